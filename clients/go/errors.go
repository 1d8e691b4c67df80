package kms

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
)

// Code names a kind of error. It is an error itself, so that errors.Is finds it:
//
//	errors.Is(err, kms.ErrKeyNotFound)
//
// A later release of the service may answer codes that are not listed here.
type Code string

// Error returns the code.
func (c Code) Error() string { return string(c) }

// Codes of the service: docs/errors.md says what each means.
const (
	ErrMalformedBody         = Code("malformed_body")
	ErrDuplicateField        = Code("duplicate_field")
	ErrInvalidField          = Code("invalid_field")
	ErrInvalidThreadID       = Code("invalid_thread_id")
	ErrMalformedCiphertext   = Code("malformed_ciphertext")
	ErrInvalidParameter      = Code("invalid_parameter")
	ErrInvalidHeader         = Code("invalid_header")
	ErrKEKNotAccepted        = Code("kek_not_accepted")
	ErrPermissionDenied      = Code("permission_denied")
	ErrCertificateExpired    = Code("certificate_expired")
	ErrKeyNotFound           = Code("key_not_found")
	ErrRotationNotFound      = Code("rotation_not_found")
	ErrRouteNotFound         = Code("route_not_found")
	ErrMethodNotAllowed      = Code("method_not_allowed")
	ErrNotAcceptable         = Code("not_acceptable")
	ErrRequestTimeout        = Code("request_timeout")
	ErrKeyDisabled           = Code("key_disabled")
	ErrKeyDecryptOnly        = Code("key_decrypt_only")
	ErrKeyPendingDestruction = Code("key_pending_destruction")
	ErrKeyDestroyed          = Code("key_destroyed")
	ErrKeyExhausted          = Code("key_exhausted")
	ErrInvalidTransition     = Code("invalid_transition")
	ErrBodyTooLarge          = Code("body_too_large")
	ErrPlaintextTooLarge     = Code("plaintext_too_large")
	ErrBatchTooLarge         = Code("batch_too_large")
	ErrUnsupportedMediaType  = Code("unsupported_media_type")
	ErrAuthenticationFailed  = Code("authentication_failed")
	ErrWrappedKeyInvalid     = Code("wrapped_key_invalid")
	ErrTooManyRequests       = Code("too_many_requests")
	ErrHeadersTooLarge       = Code("headers_too_large")
	ErrInternal              = Code("internal_error")
	ErrStoreUnavailable      = Code("store_unavailable")
	ErrStoreNotDurable       = Code("store_not_durable")
	ErrAuditUnavailable      = Code("audit_unavailable")
	ErrStaleKEK              = Code("stale_kek")
	ErrKEKUnavailable        = Code("kek_unavailable")
	ErrKEKUnreachable        = Code("kek_unreachable")
	ErrOverloaded            = Code("overloaded")
	ErrDeadlineExceeded      = Code("deadline_exceeded") // also where the context's own deadline passed
	ErrNotReady              = Code("not_ready")
)

// Codes of the client itself.
const (
	ErrEndpointInvalid   = Code("endpoint_invalid")   // the configuration can't be used
	ErrProviderClosed    = Code("provider_closed")    // used after Close
	ErrConnectionFailed  = Code("connection_failed")  // no connection, or it broke; worth another try later
	ErrTLSFailed         = Code("tls_failed")         // the two ends do not accept each other's certificates
	ErrProtocolViolation = Code("protocol_violation") // an answer that this client does not understand
	ErrCanceled          = Code("canceled")           // the caller's context was cancelled
)

// Error is any error of this package.
type Error struct {
	Code      Code
	Status    int    // of HTTP; 0 where there was no answer, and for an item of a batch
	Detail    string // the service's words, or the client's: for people, may change
	Retryable bool   // the same call may succeed later; the client's own retries are used up
	RequestID string // finds the request in the service's log

	Permission string // the one that is missing, of ErrPermissionDenied
	Identity   string // whom the service took the caller for, likewise

	err error
}

// Error says code, detail and request id.
func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "kms: %s", string(e.Code))
	if e.Detail != "" {
		fmt.Fprintf(&b, ": %s", e.Detail)
	}
	if e.RequestID != "" {
		fmt.Fprintf(&b, " (request %s)", e.RequestID)
	}
	return b.String()
}

// Is tells whether target is this error's Code.
func (e *Error) Is(target error) bool {
	code, ok := target.(Code)
	return ok && code == e.Code
}

// Unwrap returns what the error came from: context.DeadlineExceeded, an error of the network.
func (e *Error) Unwrap() error { return e.err }

// IsRetryable tells whether the same call may succeed later.
func IsRetryable(err error) bool {
	var found *Error
	return errors.As(err, &found) && found.Retryable
}

const maxDetail = 500

// oneLine makes text of the other end fit for a log: printable, on one line, bounded.
func oneLine(text string) string {
	text = strings.TrimSpace(text)
	if len(text) > maxDetail {
		text = text[:maxDetail]
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, text)
}

package kms

import (
	"context"
	"fmt"
	"log/slog"
)

// Provider is what a server needs from its key management. Client implements it; a server that runs
// without encryption has an implementation of its own whose Enabled is false.
//
// Every error is an *Error; any method may also return ErrPermissionDenied, ErrConnectionFailed,
// ErrTLSFailed, ErrDeadlineExceeded, ErrCanceled, ErrProviderClosed, and the retryable codes of the
// service once the retries are used up.
type Provider interface {
	// Enabled tells whether messages are to be encrypted.
	Enabled() bool

	// CreateDEKForThread makes a data key for a thread; it is durable when this returns. Keep keyID
	// with the thread. A further call makes a further key, however often this one was retried
	// inside. A threadID is 1 to 256 bytes of UTF-8 without control characters.
	CreateDEKForThread(ctx context.Context, threadID string) (keyID string, wrapped []byte, kekID, kekVersion string, err error)

	// EncryptWithDEK encrypts up to 1 MiB by AES-256-GCM (SP 800-38D). The ciphertext is
	// nonce(12) | ciphertext | tag(16); aad is bound to it and nil is the same as empty. keyVersion
	// is the key's number within its thread.
	EncryptWithDEK(ctx context.Context, keyID string, plaintext, aad []byte) (ciphertext []byte, keyVersion string, err error)

	// DecryptWithDEK returns what EncryptWithDEK was given, or ErrAuthenticationFailed where key, aad
	// or ciphertext are not those of the encryption.
	DecryptWithDEK(ctx context.Context, keyID string, ciphertext, aad []byte) (plaintext []byte, err error)

	// GetWrapped returns a key as it is stored, wrapped under the key-encryption key.
	GetWrapped(ctx context.Context, keyID string) (Wrapped, error)

	// Rewrap wraps a key again, under the active key-encryption key.
	Rewrap(ctx context.Context, keyID string) (Wrapped, error)

	// Health returns nil while the service serves this caller.
	Health(ctx context.Context) error

	// Close closes idle connections and takes no more calls; those under way finish.
	Close() error
}

var _ Provider = (*Client)(nil)

// DEK is a data key that has been made, and is durable.
type DEK struct {
	KeyID      string // the handle to encrypt and decrypt with
	Wrapped    []byte // the key under the key-encryption key; of no use without the service
	KEKID      string // name of that key-encryption key
	KEKVersion string // its version
	KeyVersion string // the key's number within its thread
}

// Wrapped is a data key as it is stored.
type Wrapped struct {
	KeyID      string
	Wrapped    []byte // the key under the key-encryption key
	KEKID      string // name of that key-encryption key
	KEKVersion string // its version
}

// CreateRequest asks for one data key.
type CreateRequest struct {
	ThreadID string

	// IdempotencyKey, 1 to 255 visible ASCII characters, gives the same caller the same key for the
	// same thread whenever it asks again: pass one that you have stored if a crash of your own
	// must not leave a key that nobody knows. Empty, one is made for the call and all its retries.
	IdempotencyKey string
}

// CreateResult is a data key, or why there is none.
type CreateResult struct {
	DEK DEK
	Err error
}

// EncryptRequest asks for one encryption.
type EncryptRequest struct {
	KeyID     string
	Plaintext []byte
	AAD       []byte
}

// EncryptResult is a ciphertext, or why there is none.
type EncryptResult struct {
	Ciphertext []byte
	KeyVersion string
	Err        error
}

// DecryptRequest asks for one decryption.
type DecryptRequest struct {
	KeyID      string
	Ciphertext []byte
	AAD        []byte
}

// DecryptResult is a plaintext, or why there is none.
type DecryptResult struct {
	Plaintext []byte
	Err       error
}

// Each type that holds key material or messages prints itself: for every verb of fmt, %#v and %d
// too, and for slog.

// Format writes the public part.
func (d DEK) Format(f fmt.State, _ rune) { writeHidden(f, "DEK", d.KeyID, nil) }

// LogValue is the public part.
func (d DEK) LogValue() slog.Value { return logHidden("DEK", d.KeyID, nil) }

// Format writes the public part.
func (w Wrapped) Format(f fmt.State, _ rune) { writeHidden(f, "Wrapped", w.KeyID, nil) }

// LogValue is the public part.
func (w Wrapped) LogValue() slog.Value { return logHidden("Wrapped", w.KeyID, nil) }

// Format writes the public part.
func (r CreateResult) Format(f fmt.State, _ rune) { writeHidden(f, "CreateResult", r.DEK.KeyID, r.Err) }

// LogValue is the public part.
func (r CreateResult) LogValue() slog.Value { return logHidden("CreateResult", r.DEK.KeyID, r.Err) }

// Format writes the public part.
func (r EncryptRequest) Format(f fmt.State, _ rune) { writeHidden(f, "EncryptRequest", r.KeyID, nil) }

// LogValue is the public part.
func (r EncryptRequest) LogValue() slog.Value { return logHidden("EncryptRequest", r.KeyID, nil) }

// Format writes the public part.
func (r EncryptResult) Format(f fmt.State, _ rune) { writeHidden(f, "EncryptResult", "", r.Err) }

// LogValue is the public part.
func (r EncryptResult) LogValue() slog.Value { return logHidden("EncryptResult", "", r.Err) }

// Format writes the public part.
func (r DecryptRequest) Format(f fmt.State, _ rune) { writeHidden(f, "DecryptRequest", r.KeyID, nil) }

// LogValue is the public part.
func (r DecryptRequest) LogValue() slog.Value { return logHidden("DecryptRequest", r.KeyID, nil) }

// Format writes the public part.
func (r DecryptResult) Format(f fmt.State, _ rune) { writeHidden(f, "DecryptResult", "", r.Err) }

// LogValue is the public part.
func (r DecryptResult) LogValue() slog.Value { return logHidden("DecryptResult", "", r.Err) }

func hidden(name, keyID string, err error) string {
	switch {
	case err != nil:
		return fmt.Sprintf("kms.%s{Err: %v}", name, err)
	case keyID != "":
		return fmt.Sprintf("kms.%s{KeyID: %q, ...}", name, keyID)
	}
	return fmt.Sprintf("kms.%s{...}", name)
}

func writeHidden(f fmt.State, name, keyID string, err error) {
	_, _ = fmt.Fprint(f, hidden(name, keyID, err))
}

func logHidden(name, keyID string, err error) slog.Value {
	return slog.StringValue(hidden(name, keyID, err))
}

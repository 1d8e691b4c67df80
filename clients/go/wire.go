package kms

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"unicode/utf8"
)

// The shapes of docs/api.md. []byte is standard base64 in JSON, as the service has it.

type createItem struct {
	ThreadID       string `json:"thread_id"`
	IdempotencyKey string `json:"idempotency_key,omitempty"`
}

type encryptItem struct {
	KeyID     string `json:"key_id"`
	Plaintext []byte `json:"plaintext"`
	AAD       []byte `json:"aad,omitempty"`
}

type decryptItem struct {
	KeyID      string `json:"key_id"`
	Ciphertext []byte `json:"ciphertext"`
	AAD        []byte `json:"aad,omitempty"`
}

type rewrapBody struct {
	KeyID string `json:"key_id"`
}

// answer has the members of every answer, and of every item of a batch's answer.
type answer struct {
	Error      *problem `json:"error"`
	KeyID      string   `json:"key_id"`
	Wrapped    []byte   `json:"wrapped"`
	KEKID      string   `json:"kek_id"`
	KEKVersion string   `json:"kek_version"`
	KeyVersion string   `json:"key_version"`
	Ciphertext []byte   `json:"ciphertext"`
	Plaintext  []byte   `json:"plaintext"`
	Results    []answer `json:"results"`

	err error // of an item that was not sent, or whose request failed
}

// problem is a problem document (RFC 9457), or the error of a batch's item.
type problem struct {
	Code       Code   `json:"code"`
	Detail     string `json:"detail"`
	Title      string `json:"title"`
	Retryable  *bool  `json:"retryable"`
	RequestID  string `json:"request_id"`
	Permission string `json:"permission"`
	Identity   string `json:"identity"`
}

func (p *problem) error(status int) *Error {
	detail := p.Detail
	if detail == "" {
		detail = p.Title
	}
	retryable := status == http.StatusTooManyRequests || status >= http.StatusBadGateway
	if p.Retryable != nil {
		retryable = *p.Retryable
	}
	return &Error{
		Code: Code(oneLine(string(p.Code))), Status: status, Detail: oneLine(detail), Retryable: retryable,
		RequestID: oneLine(p.RequestID), Permission: oneLine(p.Permission), Identity: oneLine(p.Identity),
	}
}

// failed returns why an item of a batch has no result.
func (a *answer) failed() error {
	if a.err != nil {
		return a.err
	}
	if a.Error != nil {
		return a.Error.error(0)
	}
	return nil
}

func (a *answer) dek() (DEK, error) {
	if err := a.failed(); err != nil {
		return DEK{}, err
	}
	if a.KeyID == "" || a.Wrapped == nil {
		return DEK{}, violation("an answer to a create has no key")
	}
	return DEK{a.KeyID, a.Wrapped, a.KEKID, a.KEKVersion, a.KeyVersion}, nil
}

func (a *answer) ciphertext() ([]byte, string, error) {
	if err := a.failed(); err != nil {
		return nil, "", err
	}
	if a.Ciphertext == nil {
		return nil, "", violation("an answer to an encryption has no ciphertext")
	}
	return a.Ciphertext, a.KeyVersion, nil
}

func (a *answer) plaintext() ([]byte, error) {
	if err := a.failed(); err != nil {
		return nil, err
	}
	if a.Plaintext == nil {
		return nil, violation("an answer to a decryption has no plaintext")
	}
	return a.Plaintext, nil
}

func (a *answer) wrapped(keyID string) (Wrapped, error) {
	if a.Wrapped == nil {
		return Wrapped{}, violation("an answer has no wrapped key")
	}
	return Wrapped{keyID, a.Wrapped, a.KEKID, a.KEKVersion}, nil
}

// parseAnswer keeps the decoder's own words back: they may quote a value.
func parseAnswer(body []byte) (*answer, *Error) {
	found := new(answer)
	if err := json.Unmarshal(body, found); err != nil {
		return nil, violation("the answer is not the JSON that was expected")
	}
	return found, nil
}

// parseProblem never repeats a body that is no problem document: what stands between may echo requests.
func parseProblem(status int, body []byte) *Error {
	var found problem
	if err := json.Unmarshal(body, &found); err == nil && found.Code != "" {
		return found.error(status)
	}
	plain := &Error{Code: Code(fmt.Sprintf("http_%d", status)), Status: status}
	plain.Detail = fmt.Sprintf("status %d without a problem document: not an answer of the service", status)
	switch status {
	case http.StatusTooManyRequests:
		plain.Code, plain.Retryable = ErrTooManyRequests, true
	case http.StatusBadGateway, http.StatusServiceUnavailable:
		plain.Code, plain.Retryable = ErrNotReady, true
	case http.StatusGatewayTimeout:
		plain.Code, plain.Retryable = ErrDeadlineExceeded, true
	}
	return plain
}

func violation(detail string) *Error { return &Error{Code: ErrProtocolViolation, Detail: detail} }

// notText refuses what encoding/json would send as another text, with U+FFFD in it: a key would belong to
// another thread.
func notText(code Code, what string) *Error {
	return &Error{Code: code, Detail: "the " + what + " is not valid UTF-8"}
}

func createBody(r CreateRequest) (createItem, error) {
	if !utf8.ValidString(r.ThreadID) {
		return createItem{}, notText(ErrInvalidThreadID, "thread id")
	}
	if r.IdempotencyKey == "" {
		r.IdempotencyKey = newID()
	} else if !visible(r.IdempotencyKey, 255) {
		return createItem{}, &Error{Code: ErrInvalidHeader, Detail: "an idempotency key is 1 to 255 visible ASCII characters"}
	}
	return createItem(r), nil
}

func encryptBody(r EncryptRequest) (encryptItem, error) {
	if !utf8.ValidString(r.KeyID) {
		return encryptItem{}, notText(ErrInvalidField, "key id")
	}
	if r.Plaintext == nil {
		r.Plaintext = []byte{} // nil would be null
	}
	return encryptItem(r), nil
}

func decryptBody(r DecryptRequest) (decryptItem, error) {
	if !utf8.ValidString(r.KeyID) {
		return decryptItem{}, notText(ErrInvalidField, "key id")
	}
	if r.Ciphertext == nil {
		r.Ciphertext = []byte{}
	}
	return decryptItem(r), nil
}

func visible(text string, most int) bool {
	for i := range len(text) {
		if text[i] < '!' || text[i] > '~' {
			return false
		}
	}
	return text != "" && len(text) <= most
}

// newID returns a name that no other call has.
func newID() string {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		// Without randomness two creates could share a name, and so a key.
		panic("kms: the system gives no random bytes: " + err.Error())
	}
	return hex.EncodeToString(b[:])
}

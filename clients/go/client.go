package kms

import (
	"context"
	"net/url"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// Client calls the service. Make one with New, share it, and Close it at the end.
type Client struct {
	config     Config
	address    address
	transports *transports
	closed     atomic.Bool
	random     func() float64
	sleep      func(context.Context, time.Duration) error
}

// New returns a client; nothing is sent before its first call. The error is ErrEndpointInvalid and says
// what to change.
func New(config Config) (*Client, error) {
	return newClient(config, time.Now)
}

func newClient(config Config, now func() time.Time) (*Client, error) {
	config = config.withDefaults()
	where, err := parseEndpoint(config.Endpoint)
	if err != nil {
		return nil, err
	}
	found, err := newTransports(config, where.socket, now)
	if err != nil {
		return nil, err
	}
	return &Client{config: config, address: where, transports: found, random: random, sleep: sleep}, nil
}

// Enabled is true: this provider encrypts.
func (c *Client) Enabled() bool { return true }

// Close closes idle connections and takes no more calls; those under way finish. It may be repeated.
func (c *Client) Close() error {
	c.closed.Store(true)
	c.transports.get().CloseIdleConnections()
	return nil
}

// CreateDEKForThread makes a data key; see Provider.
func (c *Client) CreateDEKForThread(ctx context.Context, threadID string) (keyID string, wrapped []byte, kekID, kekVersion string, err error) {
	dek, err := c.CreateDEK(ctx, CreateRequest{ThreadID: threadID})
	return dek.KeyID, dek.Wrapped, dek.KEKID, dek.KEKVersion, err
}

// CreateDEK is CreateDEKForThread with an idempotency key of the caller's, and all that is known of the
// new key.
func (c *Client) CreateDEK(ctx context.Context, request CreateRequest) (DEK, error) {
	body, err := createBody(request)
	if err != nil {
		return DEK{}, err
	}
	key := body.IdempotencyKey
	body.IdempotencyKey = "" // of a single create it travels as a header
	return c.makeDEK(ctx, call{method: "POST", target: "/create_dek_for_thread", body: body, idempotencyKey: key})
}

// RotateDEK makes a thread's next data key; those that were enabled only decrypt from then on. Of
// idempotencyKey see CreateRequest: the same one rotates once. Needs the permissions key:create and key:admin.
func (c *Client) RotateDEK(ctx context.Context, threadID, idempotencyKey string) (DEK, error) {
	body, err := createBody(CreateRequest{threadID, idempotencyKey})
	if err != nil {
		return DEK{}, err
	}
	target := "/v1/threads/" + url.PathEscape(threadID) + "/rotate-dek"
	return c.makeDEK(ctx, call{method: "POST", target: target, idempotencyKey: body.IdempotencyKey})
}

func (c *Client) makeDEK(ctx context.Context, call call) (DEK, error) {
	found, err := c.do(ctx, call)
	if err != nil {
		return DEK{}, err
	}
	return found.dek()
}

// EncryptWithDEK encrypts a message; see Provider.
func (c *Client) EncryptWithDEK(ctx context.Context, keyID string, plaintext, aad []byte) (ciphertext []byte, keyVersion string, err error) {
	body, err := encryptBody(EncryptRequest{keyID, plaintext, aad})
	if err != nil {
		return nil, "", err
	}
	found, err := c.do(ctx, call{method: "POST", target: "/encrypt", body: body})
	if err != nil {
		return nil, "", err
	}
	return found.ciphertext()
}

// DecryptWithDEK decrypts a message; see Provider.
func (c *Client) DecryptWithDEK(ctx context.Context, keyID string, ciphertext, aad []byte) (plaintext []byte, err error) {
	body, err := decryptBody(DecryptRequest{keyID, ciphertext, aad})
	if err != nil {
		return nil, err
	}
	found, err := c.do(ctx, call{method: "POST", target: "/decrypt", body: body})
	if err != nil {
		return nil, err
	}
	return found.plaintext()
}

// GetWrapped returns a key as it is stored; see Provider.
func (c *Client) GetWrapped(ctx context.Context, keyID string) (Wrapped, error) {
	target := "/get_wrapped?" + url.Values{"key_id": {keyID}}.Encode()
	return c.wrapped(ctx, keyID, call{method: "GET", target: target})
}

// Rewrap wraps a key again; see Provider. Needs the permission key:admin.
func (c *Client) Rewrap(ctx context.Context, keyID string) (Wrapped, error) {
	return c.wrapped(ctx, keyID, call{method: "POST", target: "/rewrap", body: rewrapBody{keyID}})
}

func (c *Client) wrapped(ctx context.Context, keyID string, call call) (Wrapped, error) {
	if !utf8.ValidString(keyID) {
		return Wrapped{}, notText(ErrInvalidField, "key id")
	}
	found, err := c.do(ctx, call)
	if err != nil {
		return Wrapped{}, err
	}
	return found.wrapped(keyID)
}

// Health returns nil while the service serves this caller.
func (c *Client) Health(ctx context.Context) error {
	_, err := c.do(ctx, call{method: "GET", target: "/healthz"})
	return err
}

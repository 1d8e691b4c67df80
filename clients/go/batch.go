package kms

import (
	"context"
	"errors"
)

const (
	maxBatchItems = 10_000
	// A batch's body may have 16 MiB; the rest is room for what the estimate of an item does not foresee.
	maxBatchBytes = 12 << 20
)

type item struct {
	body any
	size int // at most so many bytes of JSON
	err  error
}

type batchBody struct {
	Items []any `json:"items"`
}

// CreateDEKs makes many data keys in few requests; a key or an error for each, in order. A request that
// fails gives its error to each of its items, and after a failure of the connection or of the context
// nothing more is sent. A context without a deadline gets Config.Timeout for each request.
func (c *Client) CreateDEKs(ctx context.Context, requests []CreateRequest) []CreateResult {
	items := make([]item, len(requests))
	for i, r := range requests {
		body, err := createBody(r)
		items[i] = item{body, jsonSize(len(r.ThreadID)+len(body.IdempotencyKey), 0), err}
	}
	results := make([]CreateResult, len(requests))
	for i, found := range c.batch(ctx, "/create_dek_batch", items) {
		results[i].DEK, results[i].Err = found.dek()
	}
	return results
}

// EncryptBatch encrypts many messages, under any keys; see CreateDEKs.
func (c *Client) EncryptBatch(ctx context.Context, requests []EncryptRequest) []EncryptResult {
	items := make([]item, len(requests))
	for i, r := range requests {
		body, err := encryptBody(r)
		items[i] = item{body, jsonSize(len(r.KeyID), len(r.Plaintext)+len(r.AAD)), err}
	}
	results := make([]EncryptResult, len(requests))
	for i, found := range c.batch(ctx, "/encrypt_batch", items) {
		results[i].Ciphertext, results[i].KeyVersion, results[i].Err = found.ciphertext()
	}
	return results
}

// DecryptBatch decrypts many messages, under any keys; see CreateDEKs.
func (c *Client) DecryptBatch(ctx context.Context, requests []DecryptRequest) []DecryptResult {
	items := make([]item, len(requests))
	for i, r := range requests {
		body, err := decryptBody(r)
		items[i] = item{body, jsonSize(len(r.KeyID), len(r.Ciphertext)+len(r.AAD)), err}
	}
	results := make([]DecryptResult, len(requests))
	for i, found := range c.batch(ctx, "/decrypt_batch", items) {
		results[i].Plaintext, results[i].Err = found.plaintext()
	}
	return results
}

// jsonSize is an upper bound: a byte of text takes up to 6 as an escape, binary is base64.
func jsonSize(text, binary int) int { return 6*text + (binary+6)/3*4 + 80 }

// batch returns an answer to each item.
func (c *Client) batch(ctx context.Context, path string, items []item) []answer {
	answers := make([]answer, len(items))
	var waiting []int
	for i, item := range items {
		if answers[i].err = item.err; item.err == nil {
			waiting = append(waiting, i)
		}
	}
	most := maxBatchItems
	for len(waiting) > 0 {
		part := nextPart(items, waiting, most)
		found, err := c.sendPart(ctx, path, items, part)
		if len(part) > 1 && (errors.Is(err, ErrBatchTooLarge) || errors.Is(err, ErrBodyTooLarge)) {
			// The service has been set to take less than the usual limits.
			most = len(part) / 2
			continue
		}
		if ended(err) {
			part = waiting
		}
		for n, i := range part {
			if err != nil {
				answers[i].err = err
			} else {
				answers[i] = found[n]
			}
		}
		waiting = waiting[len(part):]
	}
	return answers
}

// nextPart returns the first of the waiting items that fit into one request. An item that is too large by
// itself goes alone: the service refuses it, and nothing else with it.
func nextPart(items []item, waiting []int, most int) []int {
	room := maxBatchBytes
	for n, i := range waiting {
		room -= items[i].size
		if n == most || (n > 0 && room < 0) {
			return waiting[:n]
		}
	}
	return waiting
}

func (c *Client) sendPart(ctx context.Context, path string, items []item, part []int) ([]answer, error) {
	body := batchBody{make([]any, len(part))}
	for n, i := range part {
		body.Items[n] = items[i].body
	}
	found, err := c.do(ctx, call{method: "POST", target: path, body: body})
	if err != nil {
		return nil, err
	}
	if len(found.Results) != len(part) {
		return nil, violation("a batch was answered with another number of results than it had items")
	}
	return found.Results, nil
}

// ended tells whether an error makes it useless to send more: an outage costs one failure's time and not
// one for each request.
func ended(err error) bool {
	for _, code := range []Code{ErrConnectionFailed, ErrTLSFailed, ErrProtocolViolation, ErrDeadlineExceeded, ErrCanceled, ErrProviderClosed} {
		if errors.Is(err, code) {
			return true
		}
	}
	return false
}

package kms

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"time"
)

// maxResponse bounds what is read of an answer. The largest request is 16 MiB, and no answer is twice its
// request's size.
const maxResponse = 32 << 20

// call is one request, before it is encoded.
type call struct {
	method         string
	target         string // path and query
	body           any    // nil for none
	idempotencyKey string
}

type contextKey int

const (
	requestIDKey contextKey = iota
	traceparentKey
)

// WithRequestID lets the calls of a context carry this X-Request-Id (1 to 128 letters, digits and ._:-),
// which stands in the service's log. Without it each call makes one of its own.
func WithRequestID(ctx context.Context, id string) context.Context {
	return context.WithValue(ctx, requestIDKey, id)
}

// WithTraceparent lets the calls of a context carry this traceparent (W3C Trace Context), which stands in
// the service's log.
func WithTraceparent(ctx context.Context, traceparent string) context.Context {
	return context.WithValue(ctx, traceparentKey, traceparent)
}

// do carries out a call over all its tries.
func (c *Client) do(ctx context.Context, call call) (*answer, error) {
	if c.closed.Load() {
		return nil, &Error{Code: ErrProviderClosed, Detail: "this client has been closed"}
	}
	// Encoded once: every try carries the same Idempotency-Key and X-Request-Id.
	header, err := headers(ctx, call)
	if err != nil {
		return nil, err
	}
	var body []byte
	if call.body != nil {
		if body, err = json.Marshal(call.body); err != nil {
			return nil, violation("the request can't be encoded")
		}
	}
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.config.Timeout)
		defer cancel()
	}
	var before *Error
	for tries := 1; ; tries++ {
		found, retryAfter, failed := c.try(ctx, call, header, body)
		if failed == nil {
			return found, nil
		}
		if before != nil && failed.Code == ErrDeadlineExceeded && failed.Status == 0 {
			failed.Detail += "; the try before: " + before.Error()
		}
		if tries > c.config.Retries || !mayRetry(failed) {
			return nil, failed
		}
		wait := retryWait(tries, retryAfter, c.random())
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= wait {
			return nil, failed
		}
		before = failed
		if err := c.sleep(ctx, wait); err != nil {
			return nil, contextError(ctx, err)
		}
	}
}

// try sends the request once.
func (c *Client) try(ctx context.Context, call call, header http.Header, body []byte) (*answer, time.Duration, *Error) {
	request, err := http.NewRequestWithContext(ctx, call.method, c.address.origin+call.target, bytes.NewReader(body))
	if err != nil {
		return nil, 0, violation("the request can't be made")
	}
	request.Header = header.Clone()
	// The transport itself: no redirects, which would carry messages to another place, and no cookies.
	response, err := c.transports.get().RoundTrip(request)
	if err != nil {
		return nil, 0, c.failed(ctx, err)
	}
	defer func() { _ = response.Body.Close() }()
	content, err := io.ReadAll(io.LimitReader(response.Body, maxResponse+1))
	if err != nil {
		return nil, 0, c.failed(ctx, err)
	}
	if len(content) > maxResponse {
		return nil, 0, violation(fmt.Sprintf("the answer is larger than %d bytes", maxResponse))
	}
	switch {
	case response.StatusCode == http.StatusOK && call.target == "/healthz":
		return nil, 0, nil // what it says beyond the status is for people
	case response.StatusCode == http.StatusOK:
		found, failed := parseAnswer(content)
		return found, 0, failed
	case response.StatusCode < http.StatusBadRequest:
		return nil, 0, violation(fmt.Sprintf("the answer has status %d", response.StatusCode))
	}
	failed := parseProblem(response.StatusCode, content)
	if failed.RequestID == "" {
		failed.RequestID = header.Get("X-Request-Id")
	}
	return nil, parseRetryAfter(response.Header), failed
}

func (c *Client) failed(ctx context.Context, err error) *Error {
	return transportError(ctx, err, c.address.socket != "" || c.config.CertFile != "")
}

func headers(ctx context.Context, call call) (http.Header, error) {
	header := http.Header{
		"Accept":     {"application/json"},
		"User-Agent": {"progressdb-kms-go"},
		// Empty, it is not sent, and lets net/http repeat a request whose kept connection the service has
		// just closed. Every request of this client may be repeated.
		"Idempotency-Key": {},
	}
	if call.body != nil {
		header.Set("Content-Type", "application/json")
	}
	if call.idempotencyKey != "" {
		header.Set("Idempotency-Key", call.idempotencyKey)
	}
	id, given := ctx.Value(requestIDKey).(string)
	if !given {
		id = newID()
	}
	if !visible(id, 128) {
		return nil, &Error{Code: ErrInvalidHeader, Detail: "a request id is 1 to 128 letters, digits and ._:-"}
	}
	header.Set("X-Request-Id", id)
	if traceparent, ok := ctx.Value(traceparentKey).(string); ok {
		if !visible(traceparent, 128) {
			return nil, &Error{Code: ErrInvalidHeader, Detail: "the traceparent is not well-formed"}
		}
		header.Set("Traceparent", traceparent)
	}
	return header, nil
}

func random() float64 { return rand.Float64() }

func sleep(ctx context.Context, wait time.Duration) error {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

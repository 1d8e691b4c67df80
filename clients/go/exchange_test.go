package kms

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// A retryable refusal is tried again, with the same names, so that a create makes one key.
func TestRetriesCarryTheSameNames(t *testing.T) {
	unavailable := refuseWith(503, "store_unavailable", true)
	s := newStandIn(t, unavailable, unavailable, answerWith(created))
	client, waits := s.client(t)
	keyID, wrapped, kekID, kekVersion, err := client.CreateDEKForThread(context.Background(), "room:1")
	check(t, err)
	if keyID != "k_1" || string(wrapped) != "wrapped" || kekID != "kek" || kekVersion != "1" {
		t.Fatal("not what was answered")
	}
	_, _, _, _, err = client.CreateDEKForThread(context.Background(), "room:1")
	check(t, err)
	got := s.got()
	if len(got) != 4 || got[0].body != `{"thread_id":"room:1"}` {
		t.Fatalf("%d requests, %s", len(got), got[0].body)
	}
	for _, name := range []string{"Idempotency-Key", "X-Request-Id"} {
		first, second := got[0].header.Get(name), got[3].header.Get(name)
		if first == "" || got[1].header.Get(name) != first || got[2].header.Get(name) != first {
			t.Errorf("%s differs between the tries of a call", name)
		}
		if second == first {
			t.Errorf("%s is the same for two calls", name)
		}
	}
	if want := []time.Duration{100 * time.Millisecond, 200 * time.Millisecond}; len(*waits) != 2 || (*waits)[0] != want[0] || (*waits)[1] != want[1] {
		t.Errorf("waited %v", *waits)
	}
}

// The caller's own idempotency key travels, and only in the header.
func TestIdempotencyKeyOfTheCaller(t *testing.T) {
	s := newStandIn(t, answerWith(created))
	client, _ := s.client(t)
	dek, err := client.CreateDEK(context.Background(), CreateRequest{"room:1", "mine"})
	check(t, err)
	if dek.KeyVersion != "2" {
		t.Error("no key version")
	}
	_, err = client.RotateDEK(context.Background(), "a/b c", "mine")
	check(t, err)
	got := s.got()
	if got[0].header.Get("Idempotency-Key") != "mine" || strings.Contains(got[0].body, "mine") {
		t.Error("not in the header alone")
	}
	if got[1].target != "/v1/threads/a%2Fb%20c/rotate-dek" || got[1].header.Get("Idempotency-Key") != "mine" {
		t.Errorf("rotate-dek asked %s", got[1].target)
	}
	if _, err = client.CreateDEK(context.Background(), CreateRequest{"room:1", "a b"}); !errors.Is(err, ErrInvalidHeader) {
		t.Error("a key with a space:", err)
	}
}

// What the service says is final is not tried again, and what keeps failing ends with the last error.
func TestWhatIsNotRetried(t *testing.T) {
	for _, refusal := range []struct {
		status    int
		code      Code
		retryable bool
		tries     int
	}{
		{503, ErrStoreUnavailable, true, 3},
		{429, ErrTooManyRequests, true, 3},
		{503, ErrNotReady, false, 1},
		{409, ErrKeyDisabled, false, 1},
		{408, ErrRequestTimeout, true, 1},
		{500, ErrInternal, true, 1},
	} {
		s := newStandIn(t, refuseWith(refusal.status, string(refusal.code), refusal.retryable))
		client, _ := s.client(t)
		_, _, err := client.EncryptWithDEK(context.Background(), "k_1", []byte("m"), nil)
		var found *Error
		if !errors.As(err, &found) || !errors.Is(err, refusal.code) || found.Status != refusal.status ||
			IsRetryable(err) != refusal.retryable || found.RequestID != "r-1" || found.Detail != "said so" {
			t.Errorf("%s: %v", refusal.code, err)
		}
		if errors.Is(err, ErrKeyDestroyed) {
			t.Errorf("%s is taken for another code", refusal.code)
		}
		if tries := len(s.got()); tries != refusal.tries {
			t.Errorf("%s: %d tries", refusal.code, tries)
		}
	}
}

// The number of tries is the caller's.
func TestRetriesAreSet(t *testing.T) {
	for retries, tries := range map[int]int{-1: 1, 0: 3, 5: 6} {
		s := newStandIn(t, refuseWith(503, "overloaded", true))
		client, _ := s.client(t, func(c *Config) { c.Retries = retries })
		if err := client.Health(context.Background()); !errors.Is(err, ErrOverloaded) || len(s.got()) != tries {
			t.Errorf("Retries %d: %d tries, %v", retries, len(s.got()), err)
		}
	}
}

// Retry-After is a least wait; one that outlasts the deadline is not begun.
func TestRetryAfter(t *testing.T) {
	s := newStandIn(t, refuseWith(503, "overloaded", true, "Retry-After", "7"), answerWith(encrypted))
	client, waits := s.client(t)
	_, version, err := client.EncryptWithDEK(context.Background(), "k_1", nil, nil)
	check(t, err)
	if version != "2" || len(*waits) != 1 || (*waits)[0] != 7100*time.Millisecond {
		t.Errorf("waited %v", *waits)
	}
	s = newStandIn(t, refuseWith(503, "overloaded", true, "Retry-After", "3600"))
	client, waits = s.client(t)
	if _, _, err = client.EncryptWithDEK(context.Background(), "k_1", nil, nil); !errors.Is(err, ErrOverloaded) {
		t.Error(err)
	}
	if len(*waits) != 0 || len(s.got()) != 1 {
		t.Errorf("waited %v, %d tries", *waits, len(s.got()))
	}
}

// Whatever a service or what stands before it says, waits stay within bounds.
func TestRetryWait(t *testing.T) {
	for tries := 1; tries < 100; tries++ {
		if least, most := retryWait(tries, 0, 0), retryWait(tries, 0, 1); least != 0 || most < retryBase || most > retryCap {
			t.Errorf("after %d tries: %v to %v", tries, least, most)
		}
	}
	date := "Sun, 06 Nov 1994 08:49:37 GMT"
	for value, want := range map[string]time.Duration{
		"": 0, "2": 2 * time.Second, "-1": 0, "+1": 0, "1.5": 0, "x": 0, "99999999999999999999": 0,
		"9999999999999999999": 1<<63 - 1, "Sun, 06 Nov 1994 08:49:40 GMT": 3 * time.Second, "Sun, 06 Nov 1994 08:49:30 GMT": 0,
	} {
		if got := parseRetryAfter(http.Header{"Retry-After": {value}, "Date": {date}}); got != want {
			t.Errorf("%q: %v", value, got)
		}
	}
	if retryWait(3, 1<<63-1, 1) != 1<<63-1 {
		t.Error("overflow")
	}
}

// A connection that breaks, before or within an answer, is tried again; no Idempotency-Key is made up for others.
func TestCutConnections(t *testing.T) {
	whole := "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"
	s := newStandIn(t, answerWith(encrypted), cut(""), cut(whole+`{"ciph`), cut("HTTP/1.1 2"), answerWith(encrypted))
	client, _ := s.client(t, func(c *Config) { c.Retries = 5 })
	for range 2 {
		ciphertext, _, err := client.EncryptWithDEK(context.Background(), "k_1", []byte("m"), []byte("a"))
		check(t, err)
		if string(ciphertext) != "sealed" {
			t.Error("not what was answered")
		}
	}
	for _, request := range s.got() {
		if request.body != `{"key_id":"k_1","plaintext":"bQ==","aad":"YQ=="}` {
			t.Error("another body:", request.body)
		}
		if _, sent := request.header["Idempotency-Key"]; sent {
			t.Error("an encryption with an Idempotency-Key")
		}
	}
	s = newStandIn(t, cut(""))
	client, _ = s.client(t)
	if err := client.Health(context.Background()); !errors.Is(err, ErrConnectionFailed) || !IsRetryable(err) {
		t.Error(err)
	}
}

// A kept connection that the service has just closed is not a failure: the request goes over another.
func TestKeptConnectionThatWasClosed(t *testing.T) {
	s := newStandIn(t, answerWith(encrypted), cut(""), answerWith(encrypted))
	client, _ := s.client(t, func(c *Config) { c.Retries = -1 })
	for range 2 {
		_, _, err := client.EncryptWithDEK(context.Background(), "k_1", []byte("m"), nil)
		check(t, err)
	}
	if len(s.got()) != 3 {
		t.Errorf("%d requests", len(s.got()))
	}
}

// What is not HTTP is not quoted: it may be a piece of a message.
func TestWhatIsNotHTTP(t *testing.T) {
	for _, text := range []string{"SECRET\r\n\r\n", "HTTP/1.1 SECRET\r\n\r\n", "HTTP/1.1 200 OK\r\nSECRET\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: SECRET\r\n\r\n"} {
		client, _ := newStandIn(t, cut(text)).client(t)
		_, err := client.DecryptWithDEK(context.Background(), "k", nil, nil)
		if !errors.Is(err, ErrConnectionFailed) {
			t.Error(err)
		}
		for ; err != nil; err = errors.Unwrap(err) {
			if strings.Contains(fmt.Sprintf("%v %+v %#v", err, err, err), "SECRET") {
				t.Errorf("quoted: %v", err)
			}
		}
	}
}

// No service at all is a failed connection.
func TestNobodyThere(t *testing.T) {
	client, err := New(Config{Endpoint: "unix:///nowhere/kms.sock", Retries: -1})
	check(t, err)
	if err = client.Health(context.Background()); !errors.Is(err, ErrConnectionFailed) {
		t.Error(err)
	}
}

// The context's deadline ends the call, and the error says what went wrong before.
func TestDeadline(t *testing.T) {
	s := newStandIn(t, refuseWith(503, "store_unavailable", true), never)
	client, _ := s.client(t)
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	err := client.Health(ctx)
	if !errors.Is(err, ErrDeadlineExceeded) || !errors.Is(err, context.DeadlineExceeded) || !IsRetryable(err) {
		t.Fatal(err)
	}
	if !strings.Contains(err.Error(), "store_unavailable") {
		t.Error(err)
	}
}

// An answer that drips ends with the deadline too, here that of the configuration.
func TestTimeoutOfASlowAnswer(t *testing.T) {
	drip := func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			_, _ = io.WriteString(w, " ")
			w.(http.Flusher).Flush()
			time.Sleep(5 * time.Millisecond)
		}
	}
	s := newStandIn(t, drip)
	client, _ := s.client(t, func(c *Config) { c.Timeout = 200 * time.Millisecond })
	if _, _, err := client.EncryptWithDEK(context.Background(), "k", nil, nil); !errors.Is(err, ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	if len(s.got()) != 1 {
		t.Error("tried again after the deadline")
	}
}

// A caller that gives up gets its own error back, while waiting for an answer and between tries.
func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	s := newStandIn(t, func(w http.ResponseWriter, r *http.Request) { cancel(); never(w, r) })
	client, _ := s.client(t)
	if err := client.Health(ctx); !errors.Is(err, context.Canceled) || !errors.Is(err, ErrCanceled) || IsRetryable(err) {
		t.Error(err)
	}
	ctx, cancel = context.WithCancel(context.Background())
	s = newStandIn(t, refuseWith(503, "overloaded", true))
	client, _ = s.client(t)
	client.sleep = func(ctx context.Context, wait time.Duration) error { cancel(); return sleep(ctx, hang) }
	if err := client.Health(ctx); !errors.Is(err, context.Canceled) || len(s.got()) != 1 {
		t.Error(err)
	}
}

// Huge answers are not read to their end.
func TestHugeAnswers(t *testing.T) {
	endless := func(w http.ResponseWriter, r *http.Request) {
		chunk := []byte(strings.Repeat("A", 1<<20))
		for r.Context().Err() == nil {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}
	s := newStandIn(t, endless)
	client, _ := s.client(t)
	if _, err := client.DecryptWithDEK(context.Background(), "k", nil, nil); !errors.Is(err, ErrProtocolViolation) {
		t.Error(err)
	}
	s = newStandIn(t, func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("A", 1<<20)) })
	client, _ = s.client(t)
	if err := client.Health(context.Background()); err == nil {
		t.Error("a header of 1 MiB is taken")
	}
}

// Answers of something else than the service are errors, and none of their text comes out.
func TestForeignAnswers(t *testing.T) {
	foreign := func(status int, body string, headers ...string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			for i := 0; i < len(headers); i += 2 {
				w.Header().Set(headers[i], headers[i+1])
			}
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body)
		}
	}
	for name, c := range map[string]struct {
		handler http.HandlerFunc
		code    Code
	}{
		"a page":          {foreign(200, "<html>SECRET"), ErrProtocolViolation},
		"no JSON object":  {foreign(200, `["SECRET"]`), ErrProtocolViolation},
		"not base64":      {foreign(200, `{"plaintext": "SECRET!"}`), ErrProtocolViolation},
		"no plaintext":    {foreign(200, `{"ciphertext": "SECRET=="}`), ErrProtocolViolation},
		"null":            {foreign(200, `{"plaintext": null}`), ErrProtocolViolation},
		"another success": {foreign(204, ""), ErrProtocolViolation},
		"a redirect":      {foreign(307, "", "Location", "/elsewhere"), ErrProtocolViolation},
		"a proxy":         {foreign(502, "SECRET"), ErrNotReady},
		"a late proxy":    {foreign(504, "SECRET"), ErrDeadlineExceeded},
		"a limit":         {foreign(429, "SECRET"), ErrTooManyRequests},
		"not found":       {foreign(404, "SECRET"), Code("http_404")},
	} {
		s := newStandIn(t, c.handler)
		client, _ := s.client(t)
		_, err := client.DecryptWithDEK(context.Background(), "k", []byte("x"), nil)
		if !errors.Is(err, c.code) || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%s: %v", name, err)
		}
		for _, request := range s.got() {
			if request.target != "/decrypt" {
				t.Errorf("%s: followed to %s", name, request.target)
			}
		}
	}
	for name, ask := range map[string]func(*Client) error{
		"create":  func(c *Client) error { _, _, _, _, err := c.CreateDEKForThread(context.Background(), "t"); return err },
		"encrypt": func(c *Client) error { _, _, err := c.EncryptWithDEK(context.Background(), "k", nil, nil); return err },
		"wrapped": func(c *Client) error { _, err := c.GetWrapped(context.Background(), "k"); return err },
	} {
		client, _ := newStandIn(t, answerWith(`{}`)).client(t)
		if err := ask(client); !errors.Is(err, ErrProtocolViolation) {
			t.Errorf("%s: an answer with nothing in it: %v", name, err)
		}
	}
}

// nil and empty are messages like others: sent as "", and an empty one comes back as one.
func TestEmptyMessages(t *testing.T) {
	s := newStandIn(t, answerWith(encrypted), answerWith(`{"plaintext": ""}`))
	client, _ := s.client(t)
	_, _, err := client.EncryptWithDEK(context.Background(), "k", nil, nil)
	check(t, err)
	plaintext, err := client.DecryptWithDEK(context.Background(), "k", nil, []byte{})
	check(t, err)
	if plaintext == nil || len(plaintext) != 0 {
		t.Error("not empty")
	}
	got := s.got()
	if got[0].body != `{"key_id":"k","plaintext":""}` || got[1].body != `{"key_id":"k","ciphertext":""}` {
		t.Error(got[0].body, got[1].body)
	}
}

// Text that JSON can't carry is refused, not changed on the way: it would make a key for another thread.
func TestInvalidText(t *testing.T) {
	s := newStandIn(t, answerWith(created))
	client, _ := s.client(t)
	ctx, bad := context.Background(), "t\xff"
	_, _, _, _, err := client.CreateDEKForThread(ctx, bad)
	if !errors.Is(err, ErrInvalidThreadID) {
		t.Error(err)
	}
	_, rotated := client.RotateDEK(ctx, bad, "")
	_, _, encrypt := client.EncryptWithDEK(ctx, bad, nil, nil)
	_, decrypt := client.DecryptWithDEK(ctx, bad, nil, nil)
	_, wrapped := client.GetWrapped(ctx, bad)
	_, rewrapped := client.Rewrap(ctx, bad)
	for _, err := range []error{rotated, encrypt, decrypt, wrapped, rewrapped} {
		if err == nil {
			t.Error("sent")
		}
	}
	for _, ctx := range []context.Context{WithRequestID(ctx, "a\r\nb"), WithRequestID(ctx, ""), WithTraceparent(ctx, "a\nb")} {
		if err := client.Health(ctx); !errors.Is(err, ErrInvalidHeader) {
			t.Error(err)
		}
	}
	if len(s.got()) != 0 {
		t.Error("something was sent")
	}
}

// Names of the caller's travel to the service's log.
func TestNamesForTheLog(t *testing.T) {
	s := newStandIn(t, answerWith("ok"))
	client, _ := s.client(t)
	trace := "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	check(t, client.Health(WithTraceparent(WithRequestID(context.Background(), "mine"), trace)))
	if got := s.got()[0].header; got.Get("X-Request-Id") != "mine" || got.Get("Traceparent") != trace {
		t.Error(got)
	}
}

// After Close no call is sent; a second Close is fine.
func TestClose(t *testing.T) {
	s := newStandIn(t, answerWith("ok"))
	client, _ := s.client(t)
	check(t, client.Health(context.Background()))
	check(t, client.Close())
	check(t, client.Close())
	if err := client.Health(context.Background()); !errors.Is(err, ErrProviderClosed) || len(s.got()) != 1 {
		t.Error(err)
	}
}

// Calls share connections, and no more than MaxConns of them.
func TestConnectionsAreShared(t *testing.T) {
	s := newStandIn(t, answerWith(encrypted))
	client, _ := s.client(t, func(c *Config) { c.MaxConns = 3 })
	done := make(chan error)
	for range 50 {
		go func() {
			_, _, err := client.EncryptWithDEK(context.Background(), "k", []byte("m"), nil)
			done <- err
		}()
	}
	for range 50 {
		check(t, <-done)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns > 3 {
		t.Errorf("%d connections", s.conns)
	}
}

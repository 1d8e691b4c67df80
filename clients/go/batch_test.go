package kms

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"testing"
)

// batches answers batches from what the stand-in has read of them.
func batches(t *testing.T, most int, each func(item map[string]any) string) *standIn {
	t.Helper()
	var s *standIn
	s = newStandIn(t, func(w http.ResponseWriter, r *http.Request) {
		got := s.got()
		var body struct {
			Items []map[string]any `json:"items"`
		}
		if err := json.Unmarshal([]byte(got[len(got)-1].body), &body); err != nil {
			w.WriteHeader(400)
			return
		}
		if len(body.Items) > most {
			refuseWith(413, "batch_too_large", false)(w, r)
			return
		}
		_, _ = io.WriteString(w, `{"results": [`)
		for i, item := range body.Items {
			if i > 0 {
				_, _ = io.WriteString(w, ",")
			}
			_, _ = io.WriteString(w, each(item))
		}
		_, _ = io.WriteString(w, `]}`)
	})
	return s
}

func sealed(item map[string]any) string {
	return fmt.Sprintf(`{"ciphertext": %q, "key_version": "1"}`, item["plaintext"])
}

func messages(n, size int) []EncryptRequest {
	found := make([]EncryptRequest, n)
	for i := range found {
		found[i] = EncryptRequest{KeyID: "k", Plaintext: fmt.Appendf(bytes.Repeat([]byte("m"), size), "%d", i)}
	}
	return found
}

// A batch of any length comes back in order, in as many requests as the limits ask for.
func TestBatchesAreSplit(t *testing.T) {
	for _, c := range []struct{ items, size, most, requests int }{
		{0, 5, 10_000, 0},
		{1, 5, 10_000, 1},
		{10_000, 5, 10_000, 1},
		{10_001, 5, 10_000, 2},
		{100, 5, 40, 5}, // 100 and 50 are refused, then 25 at a time: the service takes less than is usual
	} {
		s := batches(t, c.most, sealed)
		client, _ := s.client(t)
		sent := messages(c.items, c.size)
		results := client.EncryptBatch(context.Background(), sent)
		if len(results) != c.items {
			t.Fatalf("%d results", len(results))
		}
		for i, result := range results {
			if result.Err != nil || string(result.Ciphertext) != string(sent[i].Plaintext) || result.KeyVersion != "1" {
				t.Fatalf("%v: item %d: %v", c, i, result.Err)
			}
		}
		requests := s.got()
		if c.most == 40 {
			requests = requests[1:]
		}
		if len(requests) != c.requests {
			t.Errorf("%v: %d requests", c, len(requests))
		}
	}
}

// A request's body stays within what the service takes; an item that is too large by itself goes alone.
func TestPartsAreBounded(t *testing.T) {
	for _, c := range []struct{ size, first int }{{1, 20}, {1 << 20, 12}, {6 << 20, 2}, {12 << 20, 1}, {30 << 20, 1}} {
		items, waiting := make([]item, 20), make([]int, 20)
		for i := range items {
			items[i].size, waiting[i] = c.size, i
		}
		if part := nextPart(items, waiting, maxBatchItems); len(part) != c.first {
			t.Errorf("%d bytes each: %d items", c.size, len(part))
		}
	}
}

// An item that fails does not concern the others, nor does one that can't be sent.
func TestItemsFailAlone(t *testing.T) {
	s := batches(t, 10, func(item map[string]any) string {
		switch item["key_id"] {
		case "gone":
			return `{"error": {"code": "key_not_found", "detail": "No key has this id", "retryable": false}}`
		case "later":
			return `{"error": {"code": "store_unavailable", "retryable": true}}`
		case "nothing":
			return `{}`
		}
		return decrypted
	})
	client, _ := s.client(t)
	var requests []DecryptRequest
	for _, keyID := range []string{"k", "gone", "\xff", "later", "nothing", "k"} {
		requests = append(requests, DecryptRequest{KeyID: keyID, Ciphertext: []byte("c"), AAD: []byte("a")})
	}
	results := client.DecryptBatch(context.Background(), requests)
	for i, want := range []Code{"", ErrKeyNotFound, ErrInvalidField, ErrStoreUnavailable, ErrProtocolViolation, ""} {
		err := results[i].Err
		if want == "" && (err != nil || string(results[i].Plaintext) != "hello") || want != "" && !errors.Is(err, want) {
			t.Errorf("item %d: %v", i, err)
		}
		if IsRetryable(err) != (want == ErrStoreUnavailable) {
			t.Errorf("item %d: retryable is %t", i, IsRetryable(err))
		}
	}
}

// Each create of a batch has an idempotency key of its own, the caller's where there is one.
func TestCreatesOfABatchAreNamed(t *testing.T) {
	s := batches(t, 10, func(item map[string]any) string {
		return fmt.Sprintf(`{"key_id": "k-%s", "wrapped": ""}`, item["idempotency_key"])
	})
	client, _ := s.client(t)
	results := client.CreateDEKs(context.Background(), []CreateRequest{{"a", ""}, {"b", "mine"}, {"c", ""}, {"d\xff", ""}})
	if results[1].DEK.KeyID != "k-mine" || results[0].DEK.KeyID == results[2].DEK.KeyID || len(results[0].DEK.KeyID) != 34 {
		t.Error(results)
	}
	if !errors.Is(results[3].Err, ErrInvalidThreadID) {
		t.Error(results[3].Err)
	}
}

// A request that fails gives its error to its items; after an outage no more are sent.
func TestFailedRequests(t *testing.T) {
	s := newStandIn(t, refuseWith(503, "overloaded", true))
	client, _ := s.client(t, func(c *Config) { c.Retries = -1 })
	for i, result := range client.EncryptBatch(context.Background(), messages(10_001, 1)) {
		if !errors.Is(result.Err, ErrOverloaded) {
			t.Fatalf("item %d: %v", i, result.Err)
		}
	}
	if len(s.got()) != 2 {
		t.Errorf("%d requests", len(s.got()))
	}
	s = newStandIn(t, cut(""))
	client, _ = s.client(t, func(c *Config) { c.Retries = -1 })
	for i, result := range client.EncryptBatch(context.Background(), messages(30_000, 1)) {
		if !errors.Is(result.Err, ErrConnectionFailed) {
			t.Fatalf("item %d: %v", i, result.Err)
		}
	}
	if len(s.got()) != 1 {
		t.Errorf("%d requests", len(s.got()))
	}
	s = newStandIn(t, answerWith(`{"results": []}`))
	client, _ = s.client(t)
	if results := client.EncryptBatch(context.Background(), messages(2, 1)); !errors.Is(results[1].Err, ErrProtocolViolation) {
		t.Error(results[1].Err)
	}
}

// The estimate of an item's size is never below what is sent.
func TestJSONSize(t *testing.T) {
	for _, text := range []string{"", "k", "\x00\x01<>&", "ключ", "\u2028"} {
		for n := range 10 {
			body, err := encryptBody(EncryptRequest{text, make([]byte, n), make([]byte, 9-n)})
			check(t, err)
			encoded, err := json.Marshal(body)
			check(t, err)
			if size := jsonSize(len(text), 9); len(encoded)+1 > size {
				t.Errorf("%q, %d: %d bytes, %d expected", text, n, len(encoded), size)
			}
		}
	}
}

//go:build service

package kms

// Against a real service, which tests/clients/test_go_client.py starts. KMS_READY is a JSON file that says
// where it is and whose certificates there are.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

type ready struct {
	URL     string `json:"url"`
	Unix    string `json:"unix"`
	CA      string `json:"ca"`
	Clients map[string]struct {
		Cert string `json:"cert"`
		Key  string `json:"key"`
	} `json:"clients"`
	Stop string `json:"stop"` // a file whose appearance ends TestServiceCreatesWhileItRestarts
	Made string `json:"made"` // where that test says what it made
}

func readReady(t *testing.T) ready {
	t.Helper()
	text, err := os.ReadFile(os.Getenv("KMS_READY"))
	check(t, err)
	var found ready
	check(t, json.Unmarshal(text, &found))
	return found
}

func (r ready) config(name string) Config {
	pair := r.Clients[name]
	return Config{Endpoint: r.URL, CAFile: r.CA, CertFile: pair.Cert, KeyFile: pair.Key, Timeout: hang, ConnectTimeout: hang}
}

func open(t *testing.T, config Config) *Client {
	t.Helper()
	client, err := New(config)
	check(t, err)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// everyWay runs a test over TLS, and over a Unix socket where the service has one.
func everyWay(t *testing.T, test func(*testing.T, Provider)) {
	r := readReady(t)
	t.Run("tls", func(t *testing.T) { test(t, open(t, r.config("server"))) })
	if r.Unix != "" {
		t.Run("unix", func(t *testing.T) { test(t, open(t, Config{Endpoint: "unix://" + r.Unix, Timeout: hang})) })
	}
}

func TestServiceProvider(t *testing.T) {
	everyWay(t, func(t *testing.T, kms Provider) {
		ctx := context.Background()
		check(t, kms.Health(ctx))
		keyID, wrapped, kekID, kekVersion, err := kms.CreateDEKForThread(ctx, "go:"+newID())
		check(t, err)
		if len(wrapped) == 0 || kekID == "" || kekVersion == "" {
			t.Error("an answer with empty members")
		}
		for _, plaintext := range [][]byte{nil, {}, []byte("hello"), {0, 255}, bytes.Repeat([]byte("m"), 1<<20)} {
			for _, aad := range [][]byte{nil, []byte("room:1/message:1")} {
				ciphertext, version, err := kms.EncryptWithDEK(ctx, keyID, plaintext, aad)
				check(t, err)
				if len(ciphertext) != 12+len(plaintext)+16 || version != "1" {
					t.Errorf("%d bytes to %d, version %s", len(plaintext), len(ciphertext), version)
				}
				opened, err := kms.DecryptWithDEK(ctx, keyID, ciphertext, aad)
				check(t, err)
				if !bytes.Equal(opened, plaintext) {
					t.Error("not what was encrypted")
				}
				if _, err = kms.DecryptWithDEK(ctx, keyID, ciphertext, []byte("moved")); !errors.Is(err, ErrAuthenticationFailed) {
					t.Error("another AAD:", err)
				}
				ciphertext[len(ciphertext)-1] ^= 1
				if _, err = kms.DecryptWithDEK(ctx, keyID, ciphertext, aad); !errors.Is(err, ErrAuthenticationFailed) {
					t.Error("a changed ciphertext:", err)
				}
			}
		}
		stored, err := kms.GetWrapped(ctx, keyID)
		check(t, err)
		if !bytes.Equal(stored.Wrapped, wrapped) || stored.KEKID != kekID || stored.KEKVersion != kekVersion {
			t.Error("not what was created")
		}
	})
}

func TestServiceRefuses(t *testing.T) {
	r := readReady(t)
	kms, ctx := open(t, r.config("server")), WithRequestID(context.Background(), "go-refused")
	keyID, _, _, _, err := kms.CreateDEKForThread(ctx, "go:"+newID())
	check(t, err)
	ask := func(_ any, err error) error { return err }
	for name, c := range map[string]struct {
		err    error
		code   Code
		status int
	}{
		"an unknown key":    {ask(kms.GetWrapped(ctx, "k_AAAAAAAAAAAAAAAAAAAAAAAAAAAA")), ErrKeyNotFound, 404},
		"no thread id":      {ask(kms.CreateDEK(ctx, CreateRequest{})), ErrInvalidThreadID, 400},
		"no ciphertext":     {ask(kms.DecryptWithDEK(ctx, keyID, nil, nil)), ErrMalformedCiphertext, 400},
		"too much":          {kms.encryptError(ctx, keyID, make([]byte, 1<<20+1)), ErrPlaintextTooLarge, 413},
		"far too much":      {kms.encryptError(ctx, keyID, make([]byte, 20<<20)), ErrBodyTooLarge, 413},
		"not an operator":   {ask(kms.Rewrap(ctx, keyID)), ErrPermissionDenied, 403},
		"someone unknown":   {open(t, r.config("stranger")).encryptError(ctx, keyID, nil), ErrPermissionDenied, 403},
		"no certificate":    {open(t, Config{Endpoint: r.URL, CAFile: r.CA}).Health(ctx), "", 0},
		"another CA":        {open(t, Config{Endpoint: r.URL, Timeout: hang}).Health(ctx), ErrTLSFailed, 0},
		"not to be rotated": {ask(kms.RotateDEK(ctx, "go:x", "")), ErrPermissionDenied, 403},
	} {
		var found *Error
		if !errors.As(c.err, &found) || c.code != "" && found.Code != c.code || found.Status != c.status {
			t.Errorf("%s: %v", name, c.err)
			continue
		}
		if c.status != 0 && found.RequestID != "go-refused" {
			t.Errorf("%s: request id %q", name, found.RequestID)
		}
		if c.code == ErrPermissionDenied && (found.Permission == "" || found.Identity == "") {
			t.Errorf("%s: %q, %q", name, found.Permission, found.Identity)
		}
	}
}

func (c *Client) encryptError(ctx context.Context, keyID string, plaintext []byte) error {
	_, _, err := c.EncryptWithDEK(ctx, keyID, plaintext, nil)
	return err
}

func TestServiceNamesCreates(t *testing.T) {
	kms, ctx := open(t, readReady(t).config("operator")), context.Background()
	request := CreateRequest{"go:" + newID(), newID()}
	first, err := kms.CreateDEK(ctx, request)
	check(t, err)
	again, err := kms.CreateDEK(ctx, request)
	check(t, err)
	other, err := kms.CreateDEK(ctx, CreateRequest{ThreadID: request.ThreadID})
	check(t, err)
	if first.KeyID != again.KeyID || first.KeyID == other.KeyID {
		t.Error(first, again, other)
	}
	ciphertext, _, err := kms.EncryptWithDEK(ctx, other.KeyID, []byte("m"), nil)
	check(t, err)
	next, err := kms.RotateDEK(ctx, request.ThreadID, "once")
	check(t, err)
	repeated, err := kms.RotateDEK(ctx, request.ThreadID, "once")
	check(t, err)
	if next.KeyID != repeated.KeyID || next.KeyVersion != "3" {
		t.Error(next, repeated, next.KeyVersion)
	}
	end := time.Now().Add(hang)
	for !errors.Is(kms.encryptError(ctx, other.KeyID, nil), ErrKeyDecryptOnly) {
		if time.Now().After(end) {
			t.Fatal("the old key still encrypts")
		}
		time.Sleep(50 * time.Millisecond)
	}
	if _, err = kms.DecryptWithDEK(ctx, other.KeyID, ciphertext, nil); err != nil {
		t.Error("the old key does not decrypt:", err)
	}
	rewrapped, err := kms.Rewrap(ctx, next.KeyID)
	check(t, err)
	if len(rewrapped.Wrapped) == 0 {
		t.Error("no wrapped key")
	}
}

func TestServiceBatches(t *testing.T) {
	kms, ctx := open(t, readReady(t).config("server")), context.Background()
	thread := "go:" + newID()
	made := kms.CreateDEKs(ctx, []CreateRequest{{thread, ""}, {thread, "same"}, {thread, "same"}, {"", ""}})
	if made[0].Err != nil || made[1].Err != nil || made[1].DEK.KeyID != made[2].DEK.KeyID || !errors.Is(made[3].Err, ErrInvalidThreadID) {
		t.Fatal(made)
	}
	var requests []EncryptRequest
	for i := range 10_500 {
		requests = append(requests, EncryptRequest{made[i%2].DEK.KeyID, fmt.Appendf(nil, "message %d", i), fmt.Appendf(nil, "%d", i)})
	}
	requests[77].KeyID = "k_AAAAAAAAAAAAAAAAAAAAAAAAAAAA"
	var opens []DecryptRequest
	for i, result := range kms.EncryptBatch(ctx, requests) {
		if i == 77 {
			if !errors.Is(result.Err, ErrKeyNotFound) {
				t.Error(result.Err)
			}
		} else {
			check(t, result.Err)
		}
		opens = append(opens, DecryptRequest{requests[i].KeyID, result.Ciphertext, requests[i].AAD})
	}
	for i, result := range kms.DecryptBatch(ctx, opens) {
		if i != 77 && (result.Err != nil || !bytes.Equal(result.Plaintext, requests[i].Plaintext)) {
			t.Fatalf("message %d: %v", i, result.Err)
		}
	}
}

// The identity that the service sees changes with the files, under one client.
func TestServiceSeesRenewedCertificates(t *testing.T) {
	r := readReady(t)
	folder := t.TempDir()
	config := r.config("server")
	config.CertFile, config.KeyFile = filepath.Join(folder, "tls.crt"), filepath.Join(folder, "tls.key")
	show := func(name string) {
		for from, to := range map[string]string{r.Clients[name].Cert: config.CertFile, r.Clients[name].Key: config.KeyFile} {
			content, err := os.ReadFile(from)
			check(t, err)
			replace(t, to, content)
		}
	}
	show("stranger")
	kms, ctx := open(t, config), context.Background()
	create := func() error {
		_, _, _, _, err := kms.CreateDEKForThread(ctx, "go:"+newID())
		return err
	}
	for _, name := range []string{"server", "stranger", "server"} {
		if err := create(); name == "server" && !errors.Is(err, ErrPermissionDenied) {
			t.Fatal("a stranger creates:", err)
		}
		show(name)
		for end := time.Now().Add(hang); (create() == nil) != (name == "server"); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("the renewed certificate is not shown:", name)
			}
		}
	}
}

// While instances are restarted and killed, every create is answered, and what was answered is written down.
func TestServiceCreatesWhileItRestarts(t *testing.T) {
	r := readReady(t)
	if r.Stop == "" {
		t.Fatal("no file to stop at: this test has a run of its own")
	}
	config := r.config("server")
	config.Retries = 200
	kms := open(t, config)
	made, mu, wait := map[string]string{}, sync.Mutex{}, sync.WaitGroup{}
	for range 8 {
		wait.Add(1)
		go func() {
			defer wait.Done()
			for {
				if _, err := os.Stat(r.Stop); err == nil {
					return
				}
				thread := "go:" + newID()
				keyID, _, _, _, err := kms.CreateDEKForThread(context.Background(), thread)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				made[thread] = keyID
				mu.Unlock()
				time.Sleep(5 * time.Millisecond)
			}
		}()
	}
	wait.Wait()
	text, err := json.Marshal(made)
	check(t, err)
	replace(t, r.Made, text)
}

package kms

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// No printed form holds what was given, for any verb and any logger.
func TestNothingSecretIsPrinted(t *testing.T) {
	secret := []byte("SECRET")
	err := &Error{Code: ErrKeyNotFound}
	for _, value := range []any{
		DEK{KeyID: "k_1", Wrapped: secret},
		Wrapped{KeyID: "k_1", Wrapped: secret},
		CreateResult{DEK: DEK{KeyID: "k_1", Wrapped: secret}},
		CreateResult{DEK: DEK{Wrapped: secret}, Err: err},
		EncryptRequest{"k_1", secret, secret},
		EncryptResult{Ciphertext: secret},
		DecryptRequest{"k_1", secret, secret},
		DecryptResult{Plaintext: secret},
		DecryptResult{Plaintext: secret, Err: err},
	} {
		var out bytes.Buffer
		for _, each := range []any{value, []any{value}, struct{ V any }{value}, map[string]any{"v": value}} {
			for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%d", "%x", "%X", "%o"} {
				fmt.Fprintf(&out, verb+"\n", each)
			}
		}
		slog.New(slog.NewTextHandler(&out, nil)).Info("m", "v", value)
		slog.New(slog.NewJSONHandler(&out, nil)).Info("m", "v", value)
		text := strings.ToLower(out.String())
		for _, form := range []string{"secret", "534543524554", "83 69 67", "0x53, 0x45", "123 105 103", "u0vdukvu"} {
			if strings.Contains(text, form) {
				t.Errorf("%T prints %q", value, form)
			}
		}
		if !strings.Contains(text, "kms.") {
			t.Errorf("%T prints nothing", value)
		}
	}
}

// Words of the other end are fit for a log.
func TestOneLine(t *testing.T) {
	if got := oneLine(" a\r\nb\x1b[2J\u202ec "); strings.ContainsAny(got, "\r\n\x1b\u202e") {
		t.Errorf("%q", got)
	}
	if got := oneLine(strings.Repeat("é", 1000)); len(got) > 2*maxDetail {
		t.Errorf("%d bytes", len(got))
	}
}

// An error says its code, its words and the request that the log knows.
func TestErrorText(t *testing.T) {
	err := &Error{Code: ErrKeyNotFound, Detail: "No key has this id", RequestID: "r-1"}
	if err.Error() != "kms: key_not_found: No key has this id (request r-1)" {
		t.Error(err)
	}
	if wrapped := fmt.Errorf("thread 1: %w", err); !errors.Is(wrapped, ErrKeyNotFound) || errors.Is(wrapped, ErrKeyDisabled) {
		t.Error("errors.Is")
	}
}

// An endpoint is https or a socket, and nothing but where the service is.
func TestEndpoints(t *testing.T) {
	for text, want := range map[string]address{
		"https://kms:8443":       {origin: "https://kms:8443"},
		"https://kms:8443/":      {origin: "https://kms:8443"},
		"kms.default.svc:8443":   {origin: "https://kms.default.svc:8443"},
		"https://[::1]:8443":     {origin: "https://[::1]:8443"},
		"unix:///run/kms.sock":   {origin: "http://localhost", socket: "/run/kms.sock"},
		"unix:/run/kms.sock":     {origin: "http://localhost", socket: "/run/kms.sock"},
		"/run/kms.sock":          {origin: "http://localhost", socket: "/run/kms.sock"},
		"HTTPS://kms.default":    {origin: "https://kms.default"},
		"https://kms.default:1/": {origin: "https://kms.default:1"},
	} {
		if got, err := parseEndpoint(text); err != nil || got != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{
		"", "http://kms:8080", "https://", "https://:8443", "https://kms:8443/path", "https://kms:8443?SECRET", "https://kms#SECRET",
		"https://me:SECRET@kms:8443", "unix:run/kms.sock", "unix://run/kms.sock", "ftp://kms", "embedded:", "https://SECRET:x", "https://kms:8443/%zzSECRET",
	} {
		if got, err := parseEndpoint(text); !errors.Is(err, ErrEndpointInvalid) || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
}

// The environment that other clients read is read here too; what is not set has a usable value.
func TestConfigFromEnv(t *testing.T) {
	for name, value := range map[string]string{"ENDPOINT": "https://kms:1", "CA": "a", "CERT": "b", "KEY": "c"} {
		t.Setenv("PROGRESSDB_KMS_"+name, value)
	}
	got := ConfigFromEnv()
	if got.Endpoint != "https://kms:1" || got.CAFile != "a" || got.CertFile != "b" || got.KeyFile != "c" {
		t.Error(got)
	}
	if full := got.withDefaults(); full.Timeout != 5*time.Second || full.ConnectTimeout != time.Second || full.Retries != 2 || full.MaxConns != 32 {
		t.Error(full)
	}
	t.Setenv("PROGRESSDB_KMS_ENDPOINT", "")
	if _, err := New(ConfigFromEnv()); !errors.Is(err, ErrEndpointInvalid) {
		t.Error(err)
	}
}

package kms

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// scene is a stand-in over TLS, and a client whose files and clock a test changes.
type scene struct {
	*tlsStandIn
	ca     *authority
	config Config
	log    *bytes.Buffer
	client *Client

	mu  sync.Mutex
	now time.Time
}

func newScene(t *testing.T) *scene {
	t.Helper()
	s := &scene{ca: newAuthority(t, "ca"), log: new(bytes.Buffer), now: time.Unix(1e9, 0)}
	s.tlsStandIn = newTLSStandIn(t, s.ca, s.ca)
	folder := t.TempDir()
	s.config = Config{
		Endpoint: s.url, Timeout: hang, ConnectTimeout: hang, Retries: -1,
		CAFile: filepath.Join(folder, "ca"), CertFile: filepath.Join(folder, "cert"), KeyFile: filepath.Join(folder, "key"),
		Logger: slog.New(slog.NewTextHandler(s.log, nil)),
	}
	replace(t, s.config.CAFile, s.ca.pem())
	s.renew(t, s.ca, "chat-1")
	client, err := newClient(s.config, func() time.Time { s.mu.Lock(); defer s.mu.Unlock(); return s.now })
	check(t, err)
	s.client = client
	t.Cleanup(func() { _ = client.Close() })
	return s
}

func (s *scene) renew(t *testing.T, ca *authority, name string) {
	t.Helper()
	cert, key := ca.issue(name)
	replace(t, s.config.CertFile, cert)
	replace(t, s.config.KeyFile, key)
}

// pass lets the time between two looks at the files pass.
func (s *scene) pass() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = s.now.Add(checkEvery)
}

func (s *scene) last(t *testing.T) string {
	t.Helper()
	names := s.callers()
	return names[len(names)-1]
}

// A renewed certificate is shown by the next call after the look, over a connection that is new.
func TestCertificateIsReloaded(t *testing.T) {
	s := newScene(t)
	check(t, s.client.Health(context.Background()))
	s.renew(t, s.ca, "chat-2")
	check(t, s.client.Health(context.Background()))
	if s.last(t) != "chat-1" {
		t.Error("the files are looked at before their time")
	}
	s.pass()
	check(t, s.client.Health(context.Background()))
	if s.last(t) != "chat-2" {
		t.Error("the old certificate is still shown")
	}
}

// A link that is swapped, as Secret volumes do, is a change too.
func TestCertificateBehindALink(t *testing.T) {
	s := newScene(t)
	folder := filepath.Dir(s.config.CertFile)
	cert, key := s.ca.issue("chat-2")
	for name, content := range map[string][]byte{"cert": cert, "key": key} {
		next := filepath.Join(folder, name+"-2")
		replace(t, next, content)
		check(t, os.Symlink(next, filepath.Join(folder, "link")))
		check(t, os.Rename(filepath.Join(folder, "link"), filepath.Join(folder, name)))
	}
	s.pass()
	check(t, s.client.Health(context.Background()))
	if s.last(t) != "chat-2" {
		t.Error("the old certificate is still shown")
	}
}

// A half-written set leaves the last good one in force, is told once, and is taken once it is whole.
func TestBrokenFilesChangeNothing(t *testing.T) {
	s := newScene(t)
	cert, key := s.ca.issue("chat-2")
	replace(t, s.config.CertFile, cert)
	for range 3 {
		s.pass()
		check(t, s.client.Health(context.Background()))
	}
	if s.last(t) != "chat-1" || strings.Count(s.log.String(), "not used") != 1 {
		t.Error(s.last(t), s.log.String())
	}
	if secret := strings.Split(string(key), "\n")[1]; strings.Contains(s.log.String(), secret) {
		t.Error("a key in the log")
	}
	check(t, os.Remove(s.config.KeyFile))
	s.pass()
	check(t, s.client.Health(context.Background()))
	replace(t, s.config.KeyFile, key)
	s.pass()
	check(t, s.client.Health(context.Background()))
	if s.last(t) != "chat-2" {
		t.Error("the whole set is not taken")
	}
}

// A service that moves to another CA is trusted once the CA file holds it.
func TestCAIsReloaded(t *testing.T) {
	s := newScene(t)
	check(t, s.client.Health(context.Background()))
	other := newAuthority(t, "other")
	s.serveAs("localhost", other, s.ca)
	replace(t, s.config.CAFile, append(s.ca.pem(), other.pem()...))
	s.pass()
	check(t, s.client.Health(context.Background()))
	replace(t, s.config.CAFile, s.ca.pem())
	s.pass()
	if err := s.client.Health(context.Background()); !errors.Is(err, ErrTLSFailed) {
		t.Error("the CA that was taken out is still trusted:", err)
	}
}

// Each side's refusal is told apart from a broken connection, and never tried again.
func TestRefusals(t *testing.T) {
	other := newAuthority(t, "other")
	for name, c := range map[string]struct {
		change func(*testing.T, *scene)
		says   string
	}{
		"a service of another CA":     {func(t *testing.T, s *scene) { s.serveAs("localhost", other, s.ca) }, "not accepted"},
		"a certificate of another CA": {func(t *testing.T, s *scene) { s.renew(t, other, "chat") }, "refuses the client certificate: tls: unknown certificate authority"},
		"no certificate": {func(t *testing.T, s *scene) { s.config.CertFile, s.config.KeyFile = "", "" },
			"CertFile"},
		"another host": {func(t *testing.T, s *scene) { s.serveAs("elsewhere", s.ca, s.ca) }, "127.0.0.1"},
		"TLS 1.2": {func(t *testing.T, s *scene) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.tlsStandIn.config = s.tlsStandIn.config.Clone()
			s.tlsStandIn.config.MinVersion, s.tlsStandIn.config.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
		}, ""},
	} {
		s := newScene(t)
		s.config.Retries = 3
		c.change(t, s)
		client, err := New(s.config)
		check(t, err)
		err = client.Health(context.Background())
		// A service that closes at once may be heard of only by the closing.
		if !errors.Is(err, ErrTLSFailed) && !(name == "no certificate" && errors.Is(err, ErrConnectionFailed)) {
			t.Errorf("%s: %v", name, err)
		} else if !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
		if len(s.callers()) != 0 {
			t.Errorf("%s: served", name)
		}
	}
}

// What can't be used is said at the start, without a word of a key.
func TestFilesThatCannotBeUsed(t *testing.T) {
	for name, change := range map[string]func(*scene){
		"no CA file":      func(s *scene) { s.config.CAFile += "x" },
		"no certificate":  func(s *scene) { s.config.CertFile += "x" },
		"a key alone":     func(s *scene) { s.config.CertFile = "" },
		"not a CA":        func(s *scene) { s.config.CAFile = s.config.KeyFile },
		"the other's key": func(s *scene) { _, key := s.ca.issue("x"); replace(t, s.config.KeyFile, key) },
		"no key in cert":  func(s *scene) { s.config.KeyFile = "" },
	} {
		s := newScene(t)
		change(s)
		if _, err := New(s.config); !errors.Is(err, ErrEndpointInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	s := newScene(t)
	cert, key := s.ca.issue("both")
	replace(t, s.config.CertFile, append(cert, key...))
	s.config.KeyFile = ""
	client, err := New(s.config)
	check(t, err)
	check(t, client.Health(context.Background()))
}

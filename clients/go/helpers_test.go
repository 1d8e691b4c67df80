package kms

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// hang is a net for what never ends, never something that is measured.
const hang = 60 * time.Second

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// seen is a request as the stand-in got it.
type seen struct {
	method, target string
	header         http.Header
	body           string
}

// standIn answers over a Unix socket, each request by the next of its handlers and the last one for good.
type standIn struct {
	socket string

	mu       sync.Mutex
	handlers []http.HandlerFunc
	requests []seen
	conns    int
}

func newStandIn(t *testing.T, handlers ...http.HandlerFunc) *standIn {
	t.Helper()
	folder, err := os.MkdirTemp("", "kms") // t.TempDir is too long for a socket's path
	check(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	s := &standIn{socket: filepath.Join(folder, "s"), handlers: handlers}
	listener, err := net.Listen("unix", s.socket)
	check(t, err)
	server := httptest.NewUnstartedServer(s)
	server.Listener = listener
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			s.mu.Lock()
			s.conns++
			s.mu.Unlock()
		}
	}
	server.Start()
	t.Cleanup(server.Close)
	return s
}

func (s *standIn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	s.mu.Lock()
	s.requests = append(s.requests, seen{r.Method, r.RequestURI, r.Header, string(body)})
	handler := s.handlers[0]
	if len(s.handlers) > 1 {
		s.handlers = s.handlers[1:]
	}
	s.mu.Unlock()
	handler(w, r)
}

func (s *standIn) got() []seen {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]seen(nil), s.requests...)
}

// client returns a client of the stand-in that does not wait between tries, and the waits it would have made.
func (s *standIn) client(t *testing.T, change ...func(*Config)) (*Client, *[]time.Duration) {
	t.Helper()
	config := Config{Endpoint: "unix://" + s.socket, Timeout: hang, ConnectTimeout: hang}
	for _, f := range change {
		f(&config)
	}
	client, err := New(config)
	check(t, err)
	t.Cleanup(func() { _ = client.Close() })
	waits := new([]time.Duration)
	client.random = func() float64 { return 1 }
	client.sleep = func(ctx context.Context, wait time.Duration) error {
		*waits = append(*waits, wait)
		return ctx.Err()
	}
	return client, waits
}

func answerWith(body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, body) }
}

func refuseWith(status int, code string, retryable bool, headers ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(status)
		_, _ = fmt.Fprintf(w, `{"code": %q, "detail": "said so", "retryable": %t, "request_id": "r-1"}`, code, retryable)
	}
}

// cut sends the beginning of an answer and closes the connection.
func cut(beginning string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err == nil {
			_, _ = io.WriteString(conn, beginning)
			_ = conn.Close()
		}
	}
}

// never answers until the caller has gone.
func never(_ http.ResponseWriter, r *http.Request) {
	select {
	case <-r.Context().Done():
	case <-time.After(hang):
	}
}

const (
	created   = `{"key_id": "k_1", "wrapped": "d3JhcHBlZA==", "kek_id": "kek", "kek_version": "1", "key_version": "2"}`
	encrypted = `{"ciphertext": "c2VhbGVk", "key_version": "2"}`
	decrypted = `{"plaintext": "aGVsbG8="}`
)

// authority issues certificates, made when the test runs.
type authority struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	check(t, err)
	cert, err := x509.ParseCertificate(der)
	check(t, err)
	return &authority{t, key, cert}
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// issue returns a certificate for name and its key in PEM.
func (a *authority) issue(name string) (cert, key []byte) {
	a.t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(a.t, err)
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	check(a.t, err)
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	if name == "localhost" {
		template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, private.Public(), a.key)
	check(a.t, err)
	encoded, err := x509.MarshalPKCS8PrivateKey(private)
	check(a.t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: encoded})
}

// replace puts a file in place at once, as certificate managers do.
func replace(t *testing.T, path string, content []byte) {
	t.Helper()
	check(t, os.WriteFile(path+".new", content, 0o600))
	check(t, os.Rename(path+".new", path))
}

// tlsStandIn answers Health over mutual TLS and tells whom it spoke with.
type tlsStandIn struct {
	url string

	mu     sync.Mutex
	config *tls.Config
	names  []string
}

func newTLSStandIn(t *testing.T, server, clients *authority) *tlsStandIn {
	t.Helper()
	s := &tlsStandIn{}
	s.serveAs("localhost", server, clients)
	http := httptest.NewUnstartedServer(s)
	http.Config.ErrorLog = log.New(io.Discard, "", 0)
	http.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.config, nil
	}}
	http.StartTLS()
	t.Cleanup(http.Close)
	s.url = http.URL
	return s
}

// serveAs takes another server certificate, and client CA, for new connections.
func (s *tlsStandIn) serveAs(name string, server, clients *authority) {
	server.t.Helper()
	pair, err := tls.X509KeyPair(server.issue(name))
	check(server.t, err)
	pool := x509.NewCertPool()
	pool.AddCert(clients.cert)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.config = &tls.Config{
		Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
		MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true,
	}
}

func (s *tlsStandIn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.names = append(s.names, r.TLS.PeerCertificates[0].Subject.CommonName)
	s.mu.Unlock()
	_, _ = io.WriteString(w, `{"status": "ok"}`)
}

func (s *tlsStandIn) callers() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.names...)
}

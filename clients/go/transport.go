package kms

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"
)

const (
	// checkEvery is the time between two looks at the certificate files, which a call makes.
	checkEvery = time.Second
	// The service closes a connection that was idle for 75 s; a client that is quicker never meets that.
	idleTimeout       = 60 * time.Second
	maxResponseHeader = 64 << 10
)

// transports gives the HTTP transport of this moment: another one once the certificate files have
// changed, so that no call travels over a connection that was made with the old ones.
type transports struct {
	config Config
	socket string
	logger *slog.Logger
	now    func() time.Time

	mu      sync.Mutex
	current *http.Transport
	checked time.Time
	stamp   stamp
	refused stamp
}

// stamp identifies the content of the files, following links: a Secret volume swaps one.
type stamp [3]fs.FileInfo

func (s stamp) same(other stamp) bool {
	for i, a := range s {
		b := other[i]
		if a == nil || b == nil {
			if a != b {
				return false
			}
			continue
		}
		if !os.SameFile(a, b) || a.Size() != b.Size() || !a.ModTime().Equal(b.ModTime()) {
			return false
		}
	}
	return true
}

func newTransports(config Config, socket string, now func() time.Time) (*transports, error) {
	t := &transports{config: config, socket: socket, logger: config.Logger, now: now, checked: now()}
	// The stamp is taken before the files are read: a change in between is seen at the next look.
	t.stamp = t.look()
	var err error
	t.current, err = t.build()
	return t, err
}

// get returns the transport to use.
func (t *transports) get() *http.Transport {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.socket == "" {
		if now := t.now(); now.Sub(t.checked) >= checkEvery {
			t.checked = now
			t.reload()
		}
	}
	return t.current
}

func (t *transports) reload() {
	found := t.look()
	if found.same(t.stamp) {
		return
	}
	fresh, err := t.build()
	if err != nil {
		if !found.same(t.refused) {
			t.logger.Warn("kms: renewed certificate files are not used", "error", err)
		}
		t.refused = found
		return
	}
	// Calls under way finish over the old one, which keeps no connection that becomes idle.
	t.current.CloseIdleConnections()
	t.current, t.stamp, t.refused = fresh, found, stamp{}
}

func (t *transports) look() stamp {
	var found stamp
	for i, name := range []string{t.config.CAFile, t.config.CertFile, t.config.KeyFile} {
		if name == "" {
			continue
		}
		if info, err := os.Stat(name); err == nil {
			found[i] = info
		}
	}
	return found
}

func (t *transports) build() (*http.Transport, error) {
	dialer := &net.Dialer{Timeout: t.config.ConnectTimeout, KeepAlive: 15 * time.Second}
	transport := &http.Transport{
		// No proxy of the environment: it would see where keys are kept, and a certificate is for one hop.
		Proxy:                  nil,
		DisableCompression:     true,
		MaxConnsPerHost:        t.config.MaxConns,
		MaxIdleConnsPerHost:    t.config.MaxConns,
		IdleConnTimeout:        idleTimeout,
		TLSHandshakeTimeout:    t.config.ConnectTimeout,
		MaxResponseHeaderBytes: maxResponseHeader,
	}
	if t.socket != "" {
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", t.socket)
		}
		return transport, nil
	}
	settings, err := tlsConfig(t.config)
	if err != nil {
		return nil, err
	}
	transport.DialContext = dialer.DialContext
	transport.TLSClientConfig = settings
	return transport, nil
}

// tlsConfig reads the files. TLS 1.3 and nothing older, as the service demands.
func tlsConfig(config Config) (*tls.Config, error) {
	invalid := func(format string, words ...any) (*tls.Config, error) {
		return nil, &Error{Code: ErrEndpointInvalid, Detail: fmt.Sprintf(format, words...)}
	}
	settings := &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"}}
	if config.CAFile != "" {
		pem, err := os.ReadFile(config.CAFile)
		if err != nil {
			return invalid("the CA file can't be read: %v", err)
		}
		settings.RootCAs = x509.NewCertPool()
		if !settings.RootCAs.AppendCertsFromPEM(pem) {
			return invalid("the CA file %s holds no PEM certificate", config.CAFile)
		}
	}
	if config.CertFile == "" {
		if config.KeyFile != "" {
			return invalid("a key without a certificate: give CertFile as well")
		}
		return settings, nil
	}
	keyFile := config.KeyFile
	if keyFile == "" {
		keyFile = config.CertFile
	}
	certificate, err := tls.LoadX509KeyPair(config.CertFile, keyFile)
	if err != nil {
		var path *fs.PathError
		if errors.As(err, &path) {
			return invalid("the certificate or its key can't be read: %v", path)
		}
		// The parser's own words may quote what it read.
		return invalid("the certificate %s and its key %s are not valid PEM, encrypted, or do not belong together", config.CertFile, keyFile)
	}
	// Not Certificates: of those none is sent to a service that names another CA, and the refusal then
	// says that there was no certificate.
	settings.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return &certificate, nil
	}
	return settings, nil
}

// transportError puts an error of the network into this package's words. Its text holds addresses and
// names of certificates, and nothing that was sent or came back.
func transportError(ctx context.Context, err error, certificate bool) *Error {
	if failed := contextError(ctx, err); failed != nil {
		return failed
	}
	var (
		mine    *Error
		verify  *tls.CertificateVerificationError
		record  tls.RecordHeaderError
		network *net.OpError
	)
	switch {
	case errors.As(err, &mine):
		return mine
	case errors.As(err, &verify):
		return &Error{Code: ErrTLSFailed, Detail: oneLine("the service's certificate is not accepted: " + verify.Err.Error()), err: err}
	case errors.As(err, &record):
		return &Error{Code: ErrTLSFailed, Detail: "the other end does not speak TLS: is this the service's port?", err: err}
	case errors.As(err, &network) && (network.Op == "remote error" || network.Op == "local error"):
		detail := "the service refuses the client certificate: " + network.Err.Error()
		if !certificate {
			detail = "the service asks for a client certificate: give CertFile and KeyFile: " + network.Err.Error()
		} else if network.Op == "local error" {
			detail = network.Err.Error()
		}
		return &Error{Code: ErrTLSFailed, Detail: oneLine(detail), err: err}
	}
	failed := &Error{Code: ErrConnectionFailed, Retryable: true}
	var timeout net.Error
	switch {
	case network != nil:
		failed.Detail, failed.err = network.Error(), network
	case errors.As(err, &timeout) && timeout.Timeout():
		failed.Detail = "the connection took too long"
	default:
		// net/http quotes in its errors what it could not read, which may be part of a message.
		failed.Detail = "the connection ended before the answer, or the answer was not HTTP"
	}
	if !certificate {
		failed.Detail += "; no client certificate was given (CertFile, KeyFile)"
	}
	failed.Detail = oneLine(failed.Detail)
	return failed
}

// contextError returns the error of a context that has ended, nil while it goes on. A deadline that the
// network met a moment before the context's own timer is the context's.
func contextError(ctx context.Context, err error) *Error {
	switch cause := ctx.Err(); {
	case errors.Is(cause, context.Canceled):
		return &Error{Code: ErrCanceled, Detail: "the caller gave up", err: cause}
	case cause != nil || errors.Is(err, context.DeadlineExceeded) && expired(ctx):
		return &Error{Code: ErrDeadlineExceeded, Detail: "no answer in time", Retryable: true, err: context.DeadlineExceeded}
	}
	return nil
}

func expired(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ok && !time.Now().Before(deadline)
}

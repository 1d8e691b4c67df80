package kms

import (
	"log/slog"
	"net/url"
	"os"
	"strings"
	"time"
)

// Config says where the service is and how patiently to call it. The zero value of each field but
// Endpoint is usable.
type Config struct {
	// Endpoint is https://host:port, host:port (meaning https), unix:///path, or a socket's
	// absolute path. Over a Unix socket the caller is known by its user id.
	Endpoint string

	// PEM files. Without CAFile the system's CAs are trusted; KeyFile may stand in CertFile, and must
	// not be encrypted. When the files change, later calls use the new ones within a second or so;
	// a set that can't be used leaves the last good one in force.
	CAFile, CertFile, KeyFile string

	// Timeout bounds a call, with all its retries, whose context has no deadline; 5 s if 0.
	Timeout time.Duration

	// ConnectTimeout bounds one connection with its handshake; 1 s if 0.
	ConnectTimeout time.Duration

	// Retries are further tries after the first; 2 if 0, none if negative.
	Retries int

	// MaxConns bounds the connections; further calls wait. 32 if 0.
	MaxConns int

	// Logger is told of renewed certificate files that can't be used; slog.Default() if nil.
	Logger *slog.Logger
}

// ConfigFromEnv returns a Config of PROGRESSDB_KMS_ENDPOINT, PROGRESSDB_KMS_CA, PROGRESSDB_KMS_CERT
// and PROGRESSDB_KMS_KEY.
func ConfigFromEnv() Config {
	return Config{
		Endpoint: os.Getenv("PROGRESSDB_KMS_ENDPOINT"),
		CAFile:   os.Getenv("PROGRESSDB_KMS_CA"),
		CertFile: os.Getenv("PROGRESSDB_KMS_CERT"),
		KeyFile:  os.Getenv("PROGRESSDB_KMS_KEY"),
	}
}

const (
	defaultTimeout        = 5 * time.Second
	defaultConnectTimeout = time.Second
	defaultRetries        = 2
	defaultMaxConns       = 32
)

func (c Config) withDefaults() Config {
	if c.Timeout <= 0 {
		c.Timeout = defaultTimeout
	}
	if c.ConnectTimeout <= 0 {
		c.ConnectTimeout = defaultConnectTimeout
	}
	if c.Retries == 0 {
		c.Retries = defaultRetries
	}
	if c.MaxConns <= 0 {
		c.MaxConns = defaultMaxConns
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return c
}

// address is a parsed Endpoint.
type address struct {
	origin string // to put before a path
	socket string // path of the Unix socket, empty over TLS
}

// parseEndpoint never repeats the text in an error: it may hold a password.
func parseEndpoint(text string) (address, error) {
	invalid := func(detail string) (address, error) {
		return address{}, &Error{Code: ErrEndpointInvalid, Detail: detail}
	}
	if rest, found := strings.CutPrefix(text, "unix:"); found {
		text = strings.TrimPrefix(rest, "//")
		if !strings.HasPrefix(text, "/") {
			return invalid("a Unix socket is written unix:///absolute/path")
		}
	}
	if strings.HasPrefix(text, "/") {
		return address{origin: "http://localhost", socket: text}, nil
	}
	if text == "" {
		return invalid("no endpoint: give https://host:port or unix:///path, or set PROGRESSDB_KMS_ENDPOINT")
	}
	if !strings.Contains(text, "://") {
		text = "https://" + text
	}
	parsed, err := url.Parse(text)
	if err != nil {
		return invalid("the endpoint is not a valid URL")
	}
	if parsed.Scheme == "http" {
		return invalid("http:// would send messages in the clear: use https:// with certificates, or unix://")
	}
	if parsed.Scheme != "https" || parsed.Hostname() == "" || strings.HasSuffix(parsed.Host, ":") {
		return invalid("the endpoint must be https://host:port, unix:///path or host:port")
	}
	if parsed.User != nil || strings.Trim(parsed.Path, "/") != "" || parsed.RawQuery != "" || parsed.Fragment != "" {
		return invalid("the endpoint is scheme, host and port alone; callers are known by their certificate")
	}
	return address{origin: "https://" + parsed.Host}, nil
}

// The ceiling that encryptions are measured against: a bare net/http server with mandatory client certificates that
// does AES-256-GCM under one key in memory, over the same JSON. No policy, no key states, no limits, no audit.
package main

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
)

type plain struct {
	KeyID     string `json:"key_id"`
	Plaintext []byte `json:"plaintext"`
	Aad       []byte `json:"aad,omitempty"`
}

type sealed struct {
	KeyID      string `json:"key_id"`
	Ciphertext []byte `json:"ciphertext"`
	Aad        []byte `json:"aad,omitempty"`
}

type encrypted struct {
	Ciphertext []byte `json:"ciphertext"`
	KeyVersion string `json:"key_version"`
}

type decrypted struct {
	Plaintext []byte `json:"plaintext"`
}

func must[T any](value T, err error) T {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return value
}

func route[In any](answer func(In) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 2<<20))
		var in In
		if err == nil {
			err = json.Unmarshal(body, &in)
		}
		var out any
		if err == nil {
			out, err = answer(in)
		}
		if err != nil {
			http.Error(w, "bad request", http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write(must(json.Marshal(out)))
	}
}

func main() {
	ca, cert, key := flag.String("ca", "", "CA of clients"), flag.String("cert", "", ""), flag.String("key", "", "")
	flag.Parse()
	secret := make([]byte, 32)
	must(rand.Read(secret))
	gcm := must(cipher.NewGCM(must(aes.NewCipher(secret))))
	http.HandleFunc("/encrypt", route(func(in plain) (any, error) {
		nonce := make([]byte, gcm.NonceSize(), gcm.NonceSize()+len(in.Plaintext)+gcm.Overhead())
		must(rand.Read(nonce))
		return encrypted{gcm.Seal(nonce, nonce, in.Plaintext, in.Aad), "1"}, nil
	}))
	http.HandleFunc("/decrypt", route(func(in sealed) (any, error) {
		if len(in.Ciphertext) < gcm.NonceSize() {
			return nil, io.ErrUnexpectedEOF
		}
		nonce, body := in.Ciphertext[:gcm.NonceSize()], in.Ciphertext[gcm.NonceSize():]
		out, err := gcm.Open(nil, nonce, body, in.Aad)
		return decrypted{out}, err
	}))
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(must(os.ReadFile(*ca)))
	listener := must(net.Listen("tcp", "127.0.0.1:0"))
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	server := &http.Server{TLSConfig: &tls.Config{
		MinVersion:   tls.VersionTLS13,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    pool,
		Certificates: []tls.Certificate{must(tls.LoadX509KeyPair(*cert, *key))},
		NextProtos:   []string{"http/1.1"},
	}}
	must(0, server.ServeTLS(listener, "", ""))
}

// Package kms is the Go client of progressdb-kms, the key management service that keeps one data
// key (DEK) for each conversation thread.
//
// A server makes a [Client] with [New] and uses it as a [Provider]:
//
//	client, err := kms.New(kms.Config{
//		Endpoint: "https://kms.default.svc:8443",
//		CAFile:   "ca.crt", CertFile: "tls.crt", KeyFile: "tls.key",
//	})
//
// All methods take a context, whose deadline bounds the call with all its retries; a context
// without one gets [Config.Timeout]. A Client is safe for use by many goroutines.
//
// Errors are *[Error]; compare them with the codes of this package:
//
//	if errors.Is(err, kms.ErrKeyNotFound) { ... }
//
// Data keys never leave the service. No error and no printed form of a type of this package holds a
// wrapped key, a plaintext, a ciphertext or associated data.
package kms

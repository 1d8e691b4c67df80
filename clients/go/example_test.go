package kms_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	kms "progressdb-kms/clients/go"
)

func Example() {
	client, err := kms.New(kms.ConfigFromEnv())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	keyID, _, _, _, err := client.CreateDEKForThread(ctx, "room:1") // keep keyID with the thread
	if err != nil {
		log.Fatal(err)
	}
	// What a message must not be moved away from: its thread and its own key.
	aad := []byte("room:1/message:1")
	ciphertext, _, err := client.EncryptWithDEK(ctx, keyID, []byte("hello"), aad)
	if err != nil {
		log.Fatal(err)
	}
	plaintext, err := client.DecryptWithDEK(ctx, keyID, ciphertext, aad)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(plaintext))
}

// A page of messages costs one request.
func ExampleClient_DecryptBatch() {
	var (
		client *kms.Client
		stored []kms.DecryptRequest // of the messages of a page
	)
	for i, result := range client.DecryptBatch(context.Background(), stored) {
		switch {
		case result.Err == nil:
			fmt.Println(string(result.Plaintext))
		case errors.Is(result.Err, kms.ErrAuthenticationFailed):
			fmt.Println("message", i, "has been changed or moved")
		default:
			fmt.Println("message", i, "can't be read now:", result.Err)
		}
	}
}

// Errors are told apart by their code, and a server of your own answers by what they mean.
func ExampleError() {
	var err error = &kms.Error{Code: kms.ErrStoreUnavailable, Status: 503, Detail: "The store does not answer", Retryable: true}
	switch {
	case errors.Is(err, kms.ErrKeyNotFound):
		fmt.Println("404")
	case kms.IsRetryable(err):
		fmt.Println("503, and Retry-After")
	default:
		fmt.Println("500")
	}
	// Output: 503, and Retry-After
}

package kms

import (
	"math"
	"net/http"
	"strconv"
	"time"
)

const (
	retryBase = 100 * time.Millisecond // the first retry waits up to so long, each later one up to twice as long
	retryCap  = 2 * time.Second        // no wait is longer, unless the service asks for it by Retry-After
)

// mayRetry tells whether the same request may be sent again by the client itself. All its requests
// may be repeated: creates carry an Idempotency-Key, the others change nothing that a repetition
// would change again.
func mayRetry(err *Error) bool {
	switch err.Status {
	case 0, http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return err.Retryable
	}
	return false
}

// retryWait returns how long to wait before try number tries+1. It is drawn evenly from zero to the
// bound ("full jitter"), so that clients that failed together don't come back together; Retry-After
// (RFC 9110 10.2.3) is a least wait and is jittered upwards. random is from 0 to 1.
func retryWait(tries int, retryAfter time.Duration, random float64) time.Duration {
	bound := retryCap
	if shift := tries - 1; shift < 5 {
		bound = min(bound, retryBase<<shift)
	}
	wait := time.Duration(random * float64(bound))
	if retryAfter > math.MaxInt64-wait {
		return math.MaxInt64
	}
	return retryAfter + wait
}

// parseRetryAfter returns the wait that a Retry-After header asks for, 0 where it can't be read. A date
// is compared with the Date of the same answer, since the two ends' clocks differ.
func parseRetryAfter(header http.Header) time.Duration {
	value := header.Get("Retry-After")
	if value == "" {
		return 0
	}
	if seconds, err := strconv.ParseUint(value, 10, 64); err == nil {
		if seconds > uint64(math.MaxInt64/time.Second) {
			return math.MaxInt64
		}
		return time.Duration(seconds) * time.Second
	}
	then, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	now, err := http.ParseTime(header.Get("Date"))
	if err != nil {
		return 0
	}
	return max(0, then.Sub(now))
}

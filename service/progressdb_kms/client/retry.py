"""Whether and when to try again: decisions over values, without a clock and without waiting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Final

from progressdb_kms.client.errors import ConnectionFailed
from progressdb_kms.domain.errors import KmsError

RETRY_STATUS: Final = frozenset({429, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how patiently.

    Attributes:
        retries: Further tries after the first.
        base: The first retry waits up to so many seconds, each later one up to twice as long.
        cap: No wait is longer than this, unless the service asks for it by Retry-After.
    """

    retries: int = 2
    base: float = 0.1
    cap: float = 2.0


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed try.

    Attributes:
        error: What the caller sees if it was the last one.
        status: HTTP status, 0 where there was no answer.
        retry_after: Seconds that the service asks to wait.
    """

    error: KmsError
    status: int = 0
    retry_after: float | None = None

    @property
    def transient(self) -> bool:
        """Whether the same request may succeed later. All requests of this client may be repeated."""
        if self.status:
            return self.status in RETRY_STATUS and self.error.retryable
        return isinstance(self.error, ConnectionFailed)


def pause_before_retry(
    policy: RetryPolicy, failure: Failure, tries: int, remaining: float, random: Callable[[], float]
) -> float | None:
    """Return how long to wait before the next try, or None to give up.

    The wait is drawn evenly from zero to the bound ("full jitter"), so that clients that failed together
    don't come back together; Retry-After (RFC 9110 10.2.3) is a least wait and is jittered upwards.

    Args:
        policy: The bounds.
        failure: The try that failed.
        tries: Tries made so far.
        remaining: Seconds left of the call's deadline; a wait that would use them up is not begun.
        random: Gives numbers from 0 to 1.
    """
    if tries > policy.retries or not failure.transient:
        return None
    wait = random() * min(policy.cap, policy.base * 2 ** (tries - 1))
    if failure.retry_after is not None:
        wait += failure.retry_after
    return wait if wait < remaining else None


def parse_retry_after(value: str | None, date: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, None where there is none that can be read.

    Args:
        value: The header: seconds, or an HTTP date (RFC 9110 10.2.3).
        date: The Date header of the same answer, which a date is compared with: the two ends' clocks differ.
    """
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        # More digits than any wait that would be kept; int() of a huge number costs time.
        return float(value) if len(value) <= 9 else float("inf")  # noqa: PLR2004 - see above
    then, now = _http_date(value), _http_date(date or "")
    if then is None or now is None:
        return None
    return max(0.0, (then - now).total_seconds())


def _http_date(value: str) -> datetime | None:
    try:
        found = parsedate_to_datetime(value)
    except ValueError:
        return None
    return found if found.tzinfo is not None else None

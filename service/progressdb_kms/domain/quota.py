"""How much one identity may ask for: a token bucket and a cap on what is under way at once."""

from __future__ import annotations

from dataclasses import dataclass

from progressdb_kms.domain.errors import TooManyRequests


@dataclass(frozen=True, slots=True)
class Limit:
    """The limits of an identity, on each instance of the service.

    Attributes:
        rate: Operations a second; each item of a batch is one. 0 for no limit.
        burst: Operations that may come at once after a pause.
        concurrent: Requests under way at once. 0 for no limit.
    """

    rate: float
    burst: float
    concurrent: int


class Quota:
    """What one identity has used of its limit. Shared by its connections; not for use by several threads.

    A request is let in while the bucket is not empty and may leave it in debt, as a batch's size is known
    only when it has been read: a batch larger than the burst is possible, and paid for by the wait after it.

    Args:
        limit: The limit.
        now: Seconds of a clock that never goes back.
    """

    __slots__ = ("_at", "_limit", "_tokens", "_under_way")

    def __init__(self, limit: Limit, now: float) -> None:
        self._limit = limit
        self._tokens = limit.burst
        self._at = now
        self._under_way = 0

    def enter(self, now: float) -> None:
        """Let a request in and count it as one operation; ``leave`` must follow.

        Raises:
            TooManyRequests: Says when to come again.
        """
        limit = self._limit
        if limit.concurrent and self._under_way >= limit.concurrent:
            raise TooManyRequests(
                f"this identity may have {limit.concurrent} requests under way: wait for an answer"
            )
        if limit.rate:
            self._refill(now)
            if self._tokens <= 0:
                wait = (1 - self._tokens) / limit.rate
                raise TooManyRequests(f"this identity may make {limit.rate:g} operations a second", wait)
            self._tokens -= 1
        self._under_way += 1

    def charge(self, operations: int) -> None:
        """Count further operations of a request that is in."""
        if self._limit.rate:
            self._tokens -= operations

    def leave(self) -> None:
        """Note the end of a request."""
        self._under_way -= 1

    def unused(self, now: float) -> bool:
        """Tell whether a fresh one would be the same."""
        self._refill(now)
        return not self._under_way and self._tokens >= self._limit.burst

    def _refill(self, now: float) -> None:
        self._tokens = min(self._limit.burst, self._tokens + max(0.0, now - self._at) * self._limit.rate)
        self._at = max(self._at, now)

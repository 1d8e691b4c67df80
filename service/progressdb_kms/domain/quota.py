"""How much one identity may ask for: a token bucket and a cap on what is under way at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from progressdb_kms.domain.errors import TooManyRequests


@dataclass(frozen=True, slots=True)
class Part:
    """One worker's part of what the workers of an instance may do together.

    Attributes:
        number: Of the worker, from 0.
        workers: How many there are.
    """

    number: int
    workers: int

    def of(self, total: int) -> int:
        """Return this worker's part of a whole number; all parts together are exactly that."""
        return total // self.workers + (self.number < total % self.workers)


WHOLE: Final = Part(0, 1)
"""The part of an instance's only process."""


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
        limit: The limit of the instance.
        now: Seconds of a clock that never goes back.
        part: This process's part of it. Of requests under way it is one at least, or an identity could be
            shut out by the worker that its connection has come to.
    """

    __slots__ = ("_at", "_limit", "_tokens", "_under_way", "_whole")

    def __init__(self, limit: Limit, now: float, part: Part = WHOLE) -> None:
        self._whole = limit
        workers = part.workers
        concurrent = max(1, part.of(limit.concurrent)) if limit.concurrent else 0
        self._limit = Limit(limit.rate / workers, limit.burst / workers, concurrent)
        self._tokens = self._limit.burst
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
                f"this identity may have {self._whole.concurrent} requests under way: wait for an answer"
            )
        if limit.rate:
            self._refill(now)
            if self._tokens <= 0:
                wait = (1 - self._tokens) / limit.rate
                raise TooManyRequests(
                    f"this identity may make {self._whole.rate:g} operations a second", wait
                )
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

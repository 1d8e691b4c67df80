"""Which connection pool a call uses, while certificates are renewed under it. No I/O."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from progressdb_kms.client.errors import ProviderClosed

P = TypeVar("P")


class Lease(Generic[P]):
    """A pool in use."""

    __slots__ = ("context", "pool", "users")

    def __init__(self, pool: P, context: ssl.SSLContext | None) -> None:
        self.pool = pool
        self.context = context
        self.users = 0


class Pools(Generic[P]):
    """Hands out the pool of the present TLS context; one that is replaced ends with its last call.

    Calls under way when the certificates change finish where they began. Safe to use from many threads;
    the lock is never held over I/O.

    Args:
        make: Makes a pool for a context.
        context: Gives the present context; None for plain connections.
    """

    def __init__(
        self, make: Callable[[ssl.SSLContext | None], P], context: Callable[[], ssl.SSLContext | None]
    ) -> None:
        self._make = make
        self._context = context
        self._lock = threading.Lock()
        self._current: Lease[P] | None = None
        self._retired: list[Lease[P]] = []
        self._closed = False

    def enter(self) -> tuple[Lease[P], list[P]]:
        """Return the lease to use, and pools to close now.

        Raises:
            ProviderClosed: ``close`` was called.
        """
        with self._lock:
            if self._closed:
                raise ProviderClosed
            context = self._context()
            idle: list[P] = []
            lease = self._current
            if lease is None or lease.context is not context:
                if lease is not None:
                    idle = self._retire(lease)
                lease = self._current = Lease(self._make(context), context)
            lease.users += 1
            return lease, idle

    def leave(self, lease: Lease[P]) -> list[P]:
        """Give a lease back, and return pools to close now."""
        with self._lock:
            lease.users -= 1
            if lease.users == 0 and lease in self._retired:
                self._retired.remove(lease)
                return [lease.pool]
            return []

    def close(self) -> list[P]:
        """Take no more calls, and return pools to close now; those in use follow with their last call."""
        with self._lock:
            self._closed = True
            lease, self._current = self._current, None
            return self._retire(lease) if lease is not None else []

    def _retire(self, lease: Lease[P]) -> list[P]:
        if lease.users == 0:
            return [lease.pool]
        self._retired.append(lease)
        return []

"""Unwrapped DEKs in memory, and the rules by which they may be used.

A change of a key's state reaches every instance within one second, whatever fails, by three rules:

1. Whoever changes a key first puts a notice into the store's change stream, then changes the record, and
   refuses if the notice is older than 2 s by then (the store's part).
2. A noticed key leaves the cache and is not cached again for 5 s, nor ever by a load that began before the
   notice was read.
3. An instance whose last whole read of the notices *began* more than 1 s ago does not trust its memory and
   asks the store. The clock is CLOCK_BOOTTIME: it goes on while a machine sleeps and never jumps.

Why this is enough: take a change whose notice was put at T and whose record changed at C, T <= C <= T + 2.
An instance that answers from memory at or after C + 1 has begun a whole read after C >= T, so it has seen the
notice and dropped the key. What it loaded again meanwhile was not cached before 5 s after the notice was
read, and never by a load that took longer than ``SETTLE``: so that load began after C. At the very start the
same holds because nothing is cached from loads that began within ``SETTLE`` of the moment from which notices
are read.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    from progressdb_kms.domain.keys import KeyState

FRESH: Final = 1.0
"""Seconds for which a whole read of the notices vouches for the memory."""
QUIET: Final = 5.0
"""Seconds for which a noticed key is not cached."""
SETTLE: Final = 2.5
"""Seconds after which every change whose notice was put before the first read has been made or given up."""

FREE_USES: Final = 256
"""Encryptions that an instance may make before it has reserved any. A crash forgets at most so many, a tiny
part of the margin that ``domain.envelope.USES_LIMIT`` keeps."""
USES_BLOCK: Final = 2**16
"""Encryptions reserved at a time."""


class CachedDek(Struct, gc=False, eq=False, kw_only=True):
    """One unwrapped DEK.

    The garbage collector does not look at it, as nothing in it refers to anything else: at 100,000 of them it
    would hold the event loop for 30 ms.

    Attributes:
        key_id: Its handle.
        thread_id: Its thread, for the policy.
        cipher: AES-256-GCM under the raw key, which is held nowhere else.
        state: State when it was loaded.
        version: The DEK's number in its thread, as answers carry it.
        loaded_at: When the load began, in seconds of the cache's clock.
        uses_left: Encryptions that may be made before more must be reserved; the last ``FREE_USES`` are
            not reserved themselves.
        exhausted: The key has reached ``USES_LIMIT``.
    """

    key_id: str
    thread_id: str
    cipher: AESGCM
    state: KeyState
    version: str
    loaded_at: float
    uses_left: int = FREE_USES
    exhausted: bool = False

    def __repr__(self) -> str:
        return f"CachedDek({self.key_id!r}, state={self.state!r})"

    @property
    def unreported(self) -> int:
        """Encryptions made out of ``FREE_USES``, that the store does not know of yet."""
        return max(0, FREE_USES - self.uses_left)

    def spend(self, count: int) -> None:
        """Note encryptions about to be made: out of what is reserved first, then out of ``FREE_USES``."""
        self.uses_left -= count

    def reserved(self, count: int) -> None:
        """Note that ``count`` more uses are now in the store."""
        self.uses_left += count


class DekCache:
    """A bounded least-recently-used cache of unwrapped DEKs that knows how far it can be trusted.

    Args:
        max_keys: Bound.
        ttl: Seconds after which a key is loaded again.
        max_stale: Seconds for which keys serve while the store is away; 0 for never.
        clock: Seconds of CLOCK_BOOTTIME.
    """

    def __init__(self, *, max_keys: int, ttl: float, max_stale: float, clock: Callable[[], float]) -> None:
        self._max_keys = max_keys
        self._ttl = ttl
        self._max_stale = max_stale
        self._clock = clock
        self._keys: OrderedDict[str, CachedDek] = OrderedDict()
        self._noticed: dict[str, float] = {}
        self._owed: dict[str, int] = {}
        self._read_began = float("-inf")
        self._cacheable_from = float("inf")

    def __len__(self) -> int:
        return len(self._keys)

    def lookup(self, key_id: str) -> CachedDek | None:
        """Return a key that may be used right now, or None."""
        now = self._clock()
        if now - self._read_began > FRESH:
            return None
        key = self._keys.get(key_id)
        if key is None or now - key.loaded_at > self._ttl:
            return None
        self._keys.move_to_end(key_id)
        return key

    def lookup_stale(self, key_id: str) -> CachedDek | None:
        """Return a key that may be used while the store does not answer at all, or None."""
        if self._clock() - self._read_began > self._max_stale:
            return None
        return self._keys.get(key_id)

    def put(self, key: CachedDek) -> CachedDek:
        """Cache a key if the rules allow it, and return the object to use.

        A key that is cached already keeps its object, so that its count of uses goes on.
        """
        known = self._keys.get(key.key_id)
        if known is not None:
            if known.loaded_at <= key.loaded_at:
                known.state, known.loaded_at, known.exhausted = key.state, key.loaded_at, key.exhausted
            self._keys.move_to_end(key.key_id)
            return known
        noticed = self._noticed.get(key.key_id)
        now = self._clock()
        # Of a load slower than SETTLE nobody knows on which side of a noticed change it read.
        if key.loaded_at < max(self._cacheable_from, now - SETTLE) or (
            noticed is not None and (key.loaded_at <= noticed or now < noticed + QUIET)
        ):
            return key
        self._keys[key.key_id] = key
        while len(self._keys) > self._max_keys:
            self._settle(self._keys.popitem(last=False)[1])
        return key

    def settle(self, key: CachedDek) -> None:
        """Take over the unreported uses of a key that served one request and is not cached."""
        if self._keys.get(key.key_id) is not key:
            self._settle(key)

    def _settle(self, key: CachedDek) -> None:
        if key.unreported:
            self.owe({key.key_id: key.unreported})
            key.reserved(key.unreported)

    def take_owed(self) -> dict[str, int]:
        """Return the uses of keys that left the cache and are not in the store yet, and forget them."""
        owed, self._owed = self._owed, {}
        return owed

    def owe(self, uses: dict[str, int]) -> None:
        """Give back what ``take_owed`` gave, since the store did not take it."""
        for key_id, count in uses.items():
            self._owed[key_id] = self._owed.get(key_id, 0) + count

    def forget(self, key_ids: Iterable[str]) -> None:
        """Apply notices: drop the keys and keep them out for a while."""
        now = self._clock()
        for key_id in key_ids:
            self._noticed[key_id] = now
            key = self._keys.pop(key_id, None)
            if key is not None:
                self._settle(key)
        if len(self._noticed) > 1024:  # noqa: PLR2004 - tidy now and then, not on every read
            self._noticed = {key_id: at for key_id, at in self._noticed.items() if now < at + QUIET}

    def restart(self) -> None:
        """Drop everything: notices may have been missed, and are read from this moment on."""
        for key in self._keys.values():
            self._settle(key)
        self._keys.clear()
        self._cacheable_from = self._clock() + SETTLE
        self._read_began = float("-inf")

    def read(self, began: float) -> None:
        """Note a whole read of the notices that began at ``began`` and whose notices have been applied."""
        self._read_began = began

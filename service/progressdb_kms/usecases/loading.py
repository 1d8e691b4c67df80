"""Fetching what the hot functions lack: cold keys from the store, uses reserved there."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import structlog
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.domain.envelope import USES_LIMIT, USES_WARN, parse_blob, wrap_aad
from progressdb_kms.domain.errors import (
    KekUnavailable,
    KekUnreachable,
    KeyNotFound,
    KmsError,
    StoreUnavailable,
    WrappedKeyInvalid,
    refreshed,
)
from progressdb_kms.domain.keys import DekRecord, KeyState
from progressdb_kms.usecases.encryption import Loaded, Miss
from progressdb_kms.usecases.keycache import FRESH, USES_BLOCK, CachedDek

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from progressdb_kms.usecases.context import Kms
    from progressdb_kms.usecases.session import Session

    HotFunction = Callable[[Session, str, str, bytes, Loaded], bytes | Miss]

log = structlog.get_logger(__name__)

T = TypeVar("T")

_ROUNDS: Final = 4
"""Rounds of miss and fetch: load, reserve, and one more of each where a key was dropped in between."""


TICK: Final = 0.1
"""Seconds between two calls of ``Loader.tick``."""
STALL: Final = 0.5
"""Seconds between two ticks from which this process counts as having slept."""
AWAY_FOR: Final = 5.0
"""Seconds after the last failed call for which the store still counts as away."""


class Loader:
    """Fetches keys for the hot functions; calls for the same key at the same time share one load."""

    def __init__(self, kms: Kms) -> None:
        self._kms = kms
        self._under_way: dict[str, tuple[float, asyncio.Future[CachedDek | KmsError]]] = {}
        self._failed_at = float("-inf")
        self._ticked_at = kms.clock()
        self._woke_at = float("-inf")

    @property
    def store_away(self) -> bool:
        """Whether the store does not answer at all.

        Only then may keys that can't be vouched for serve, within ``cache.max_stale``.
        """
        return self._kms.clock() - self._failed_at <= AWAY_FOR

    def tick(self) -> None:
        """Note that this process is awake; to be called every ``TICK`` seconds."""
        now = self._kms.clock()
        if now - self._ticked_at > STALL:
            self._woke_at = now
        self._ticked_at = now

    def store_failed(self, began: float) -> None:
        """Note that a call of the store that began at ``began`` got no answer.

        It proves nothing if this process was stopped in between: the time of the call is over when it wakes,
        whatever the store has answered.
        """
        self.tick()
        if began >= self._woke_at:
            self._failed_at = self._kms.clock()

    def store_answered(self) -> None:
        """Note that the store answers."""
        self._failed_at = float("-inf")

    async def answer(
        self, hot: HotFunction, session: Session, content_type: str, accept: str, body: bytes
    ) -> bytes:
        """Call a hot function, fetching what it lacks, until it answers.

        Raises:
            KmsError: What the hot function raises, or StoreUnavailable.
        """
        return await self.complete(partial(hot, session, content_type, accept, body))

    async def complete(self, attempt: Callable[[Loaded], T | Miss]) -> T:
        """Try again with what was fetched for it, until nothing is lacking.

        Raises:
            KmsError: What ``attempt`` raises, or StoreUnavailable.
        """
        loaded: Loaded = {}
        try:
            for _ in range(_ROUNDS):
                self._drop_old(loaded)
                answer = attempt(loaded)
                if not isinstance(answer, Miss):
                    return answer
                if answer.load:
                    await self._load(answer.load, loaded)
                if answer.reserve:
                    await self._reserve(answer.reserve, loaded)
            raise StoreUnavailable
        finally:
            for key in loaded.values():
                if isinstance(key, CachedDek):
                    self._kms.cache.settle(key)

    def _stale(self, key_id: str) -> CachedDek | None:
        """Return a key that may serve because the store does not answer, or None."""
        return self._kms.cache.lookup_stale(key_id) if self.store_away else None

    def _drop_old(self, loaded: Loaded) -> None:
        """Forget what was fetched over a second ago: this request has waited for something else since."""
        kms = self._kms
        for key_id, key in list(loaded.items()):
            if (
                isinstance(key, CachedDek)
                and kms.clock() - key.loaded_at > FRESH
                and self._stale(key_id) is not key
            ):
                kms.cache.settle(key)
                del loaded[key_id]

    async def _load(self, key_ids: Iterable[str], loaded: Loaded) -> None:
        kms = self._kms
        wanted = []
        for key_id in key_ids:
            stale = self._stale(key_id)
            if stale is not None:
                kms.observer.cache("stale")
                loaded[key_id] = stale
            else:
                wanted.append(key_id)
        if not wanted:
            return
        kms.observer.cache("miss", len(wanted))
        for _ in range(2):
            late = []
            for key_id, began, key in await self._shared(wanted):
                # What the store said more than a second ago says nothing about now: ask again, once. A key
                # that serves because the store says nothing at all is judged by its staleness alone.
                old = isinstance(key, CachedDek) and kms.clock() - began > FRESH
                if old and self._stale(key_id) is not key:
                    late.append(key_id)
                else:
                    loaded[key_id] = key
            if not late:
                return
            wanted = late
        for key_id in wanted:
            loaded[key_id] = StoreUnavailable("the store answers too slowly to know the key's state")

    async def _shared(self, key_ids: list[str]) -> list[tuple[str, float, CachedDek | KmsError]]:
        now = self._kms.clock()
        mine = []
        waits = []
        for key_id in key_ids:
            load = self._under_way.get(key_id)
            if load is None or now - load[0] > FRESH / 2:
                mine.append(key_id)
            else:
                waits.append((key_id, *load))
        results = []
        if mine:
            futures = {key_id: asyncio.get_running_loop().create_future() for key_id in mine}
            for key_id, future in futures.items():
                self._under_way[key_id] = (now, future)
            fetched: dict[str, CachedDek | KmsError] = {}
            try:
                fetched = await self._fetch(mine, now)
            finally:
                for key_id, future in futures.items():
                    if self._under_way.get(key_id) == (now, future):
                        del self._under_way[key_id]
                    # A cancelled load must not leave those waiting that share it.
                    future.set_result(fetched.get(key_id) or StoreUnavailable())
            results = [(key_id, now, fetched[key_id]) for key_id in mine]
        for key_id, began, future in waits:
            results.append((key_id, began, refreshed(await asyncio.shield(future))))
        return results

    async def _fetch(self, key_ids: list[str], began: float) -> dict[str, CachedDek | KmsError]:
        kms = self._kms
        fetched: dict[str, CachedDek | KmsError] = {}
        try:
            records = await kms.store.get(key_ids)
        except StoreUnavailable as error:
            self.store_failed(began)
            for key_id in key_ids:
                stale = self._stale(key_id)
                if stale is not None:
                    kms.observer.cache("stale")
                fetched[key_id] = stale or StoreUnavailable(error.detail)
            return fetched
        live = []
        for key_id, record in zip(key_ids, records, strict=True):
            if record is None:
                fetched[key_id] = KeyNotFound()
            elif record.state is KeyState.DESTROYED:
                fetched[key_id] = _bare(record, began)
            else:
                live.append(record)
        for record, raw in zip(live, await unwrap_records(kms, live), strict=True):
            if isinstance(raw, KmsError):
                fetched[record.key_id] = raw
                continue
            key = CachedDek(
                key_id=record.key_id,
                thread_id=record.thread_id,
                cipher=AESGCM(raw),
                state=record.state,
                version=str(record.version),
                loaded_at=began,
                exhausted=record.uses >= USES_LIMIT,
            )
            fetched[record.key_id] = kms.cache.put(key)
        return fetched

    async def _reserve(self, wanted: Mapping[str, int], loaded: Loaded) -> None:
        kms = self._kms
        keys = {}
        for key_id in wanted:
            key = loaded.get(key_id) or kms.cache.lookup(key_id)
            if isinstance(key, CachedDek):
                keys[key_id] = key
        # A key that serves this request only takes what it needs, else each request would burn a block.
        blocks = {
            key_id: key.unreported
            + (max(USES_BLOCK, wanted[key_id]) if kms.cache.lookup(key_id) is key else wanted[key_id])
            for key_id, key in keys.items()
        }
        totals = await kms.store.reserve_uses(blocks)
        for key_id, total in totals.items():
            key = keys[key_id]
            key.reserved(blocks[key_id])
            if total - blocks[key_id] >= USES_LIMIT:
                key.exhausted = True
            elif total >= USES_WARN:
                kms.observer.uses_warning("dek")
                log.warning(
                    "dek_uses_high",
                    key_id=key_id,
                    uses=total,
                    limit=USES_LIMIT,
                    action="rotate the thread's key",
                )


def _bare(record: DekRecord, began: float) -> CachedDek:
    """Return a destroyed key: a thread and a state to answer with, and a cipher that nobody reaches."""
    return CachedDek(
        key_id=record.key_id,
        thread_id=record.thread_id,
        cipher=AESGCM(AESGCM.generate_key(256)),
        state=record.state,
        version=str(record.version),
        loaded_at=began,
    )


async def unwrap_records(kms: Kms, records: list[DekRecord]) -> list[bytes | KmsError]:
    """Unwrap the DEKs of records, each under exactly the version that its blob names; in order."""
    results: list[bytes | KmsError] = [WrappedKeyInvalid()] * len(records)
    by_version: dict[int, list[tuple[int, bytes, bytes]]] = {}
    for number, record in enumerate(records):
        try:
            blob = parse_blob(record.wrapped)
        except WrappedKeyInvalid as error:
            results[number] = error
            continue
        aad = wrap_aad(record.key_id, record.thread_id)
        by_version.setdefault(blob.kek_version, []).append((number, blob.body, aad))
    for version, group in by_version.items():
        raw: list[bytes | KmsError]
        try:
            raw = await kms.keks.unwrap(version, [body for _, body, _ in group], [aad for _, _, aad in group])
        except (KekUnavailable, KekUnreachable) as error:
            raw = [error] * len(group)
        for (number, _, _), key in zip(group, raw, strict=True):
            results[number] = key
    for record, result in zip(records, results, strict=True):
        if isinstance(result, WrappedKeyInvalid):
            kms.observer.wrapped_key_invalid()
            log.error(
                "wrapped_key_invalid",
                key_id=record.key_id,
                kek_version=record.kek_version,
                detail=result.detail,
            )
    return results

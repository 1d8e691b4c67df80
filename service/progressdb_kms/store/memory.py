"""The store in this process's memory: the same promises but durability, for development and tests."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, Self

from progressdb_kms.domain.errors import InternalError, KeyNotFound, KmsError, RegistryLost, StaleKek
from progressdb_kms.domain.keyring import KekInfo, KekState
from progressdb_kms.domain.keys import DekRecord, KeyState, NewDek, StateChange, locate, slot_tag
from progressdb_kms.domain.rotation import instances_missing
from progressdb_kms.ports import Changes, Heartbeat, KeyPage, Lock, RegistryView, StoreStatus
from progressdb_kms.store.cursors import decode_cursor, encode_cursor
from progressdb_kms.store.kek_states import RegistryChange, activated, retired, staged
from progressdb_kms.store.memory_audit import MemoryAudit
from progressdb_kms.store.memory_backups import MemoryBackups, MemoryDestruction, Shelves
from progressdb_kms.store.memory_escrow import MemoryEscrowBox
from progressdb_kms.store.memory_rotation import MemoryLedger, MemorySlots
from progressdb_kms.store.states import apply_change, require_rewrappable

_KEPT_NOTICES: Final = 10_000
_FORGET_AFTER: Final = 86_400.0
_STATUS: Final = StoreStatus(
    reachable=True,
    warnings=("keys are kept in memory only and end with this process: for development and tests",),
    facts={"server": "memory"},
)


class MemoryStore:
    """Implements KeyStore, KekRegistry, Heartbeats and StoreHealth for one process and one event loop.

    ``rotation_ledger``, ``rotation_slots``, ``escrow``, ``backups``, ``destruction`` and ``audit`` implement
    the ports of their names over the same records.

    Never raises StoreUnavailable or StoreNotDurable: it is always there, and says in its status that it
    promises nothing beyond the life of the process.
    """

    def __init__(self) -> None:
        self._records: dict[str, DekRecord] = {}
        self._threads: dict[str, list[str]] = {}
        self._slots: dict[str, list[str]] = {}
        self._floors: dict[str, int] = {}
        self._notices: list[str] = []
        self._trimmed = 0
        self._noticed = asyncio.Event()
        self._view: RegistryView | None = None
        self._wraps: Counter[int] = Counter()
        self._heartbeats: dict[str, Heartbeat] = {}
        self.rotation_ledger = MemoryLedger()
        self.escrow = MemoryEscrowBox()
        self.audit = MemoryAudit()
        self.rotation_slots = MemorySlots(self._records, self._slots, self._floors)
        shelves = Shelves(self._records, self._threads, self._slots, self._floors, self._wraps)
        self.backups = MemoryBackups(
            shelves, self.rotation_slots, lambda: self._view, self._register, self.rotation_ledger.require
        )
        self.destruction = MemoryDestruction(shelves, self.rotation_slots, self._notice, time.time)

    @property
    def keys(self) -> Self:
        """This store as ``KeyStore``."""
        return self

    @property
    def registry(self) -> Self:
        """This store as ``KekRegistry``."""
        return self

    @property
    def heartbeats(self) -> Self:
        """This store as ``Heartbeats``."""
        return self

    @property
    def health(self) -> Self:
        """This store as ``StoreHealth``."""
        return self

    async def close(self) -> None:
        """Forget all keys."""
        self._records.clear()
        self._threads.clear()
        self._slots.clear()

    async def create(self, deks: Sequence[NewDek]) -> list[DekRecord | KmsError]:
        """Store new DEKs; see ``KeyStore.create``."""
        return [self._create(dek) for dek in deks]

    def _create(self, dek: NewDek) -> DekRecord | KmsError:
        known = self._records.get(dek.key_id)
        if known is not None:
            if known.thread_id != dek.thread_id:
                return InternalError("this key id belongs to another thread")
            return known
        if dek.kek_version < self._floors.get(locate(dek.key_id), 0):
            return StaleKek()
        siblings = self._threads.setdefault(dek.thread_id, [])
        version = max((self._records[key_id].version for key_id in siblings), default=0) + 1
        siblings.append(dek.key_id)
        record = DekRecord(
            dek.key_id,
            dek.thread_id,
            dek.wrapped,
            dek.kek_id,
            dek.kek_version,
            version,
            KeyState.ENABLED,
            dek.created_at,
            dek.created_by,
        )
        self._records[dek.key_id] = record
        self._slots.setdefault(locate(dek.key_id), []).append(dek.key_id)
        return record

    async def get(self, key_ids: Sequence[str]) -> list[DekRecord | None]:
        """Return the records, in order; None where there is none."""
        return [self._records.get(key_id) for key_id in key_ids]

    async def change_state(
        self, key_id: str, change: StateChange, *, now: int, destroy_at: int | None = None
    ) -> DekRecord:
        """Change a key's state; see ``KeyStore.change_state``."""
        locate(key_id)
        self._notice(key_id)
        record = apply_change(self._record(key_id), change, now, destroy_at)
        self._records[key_id] = record
        return record

    def _notice(self, key_id: str) -> None:
        self._notices.append(key_id)
        if len(self._notices) > _KEPT_NOTICES:
            del self._notices[: _KEPT_NOTICES // 2]
            self._trimmed += _KEPT_NOTICES // 2
        self._noticed.set()
        self._noticed = asyncio.Event()

    async def rotate(self, dek: NewDek) -> DekRecord:
        """Store a thread's new DEK and supersede its others; see ``KeyStore.rotate``."""
        older = [] if dek.key_id in self._records else list(self._threads.get(dek.thread_id, ()))
        result = self._create(dek)
        if isinstance(result, KmsError):
            raise result
        for key_id in older:
            known = self._records[key_id]
            if known.state is KeyState.ENABLED:
                self._notice(key_id)
                self._records[key_id] = replace(known, state=KeyState.DECRYPT_ONLY, changed_at=dek.created_at)
            elif known.state in {KeyState.DISABLED, KeyState.PENDING_DESTRUCTION}:
                self._records[key_id] = replace(known, resume_state=KeyState.DECRYPT_ONLY)
        return result

    async def rewrap(self, record: DekRecord, wrapped: bytes, kek_id: str, kek_version: int) -> bool:
        """Replace the blob if it still is ``record.wrapped``; see ``KeyStore.rewrap``."""
        stored = self._record(record.key_id)
        require_rewrappable(stored)
        if kek_version < self._floors.get(locate(record.key_id), 0):
            raise StaleKek
        if stored.wrapped not in (record.wrapped, wrapped):
            return False
        self._records[record.key_id] = replace(
            stored, wrapped=wrapped, kek_id=kek_id, kek_version=kek_version
        )
        return True

    async def reserve_uses(self, uses: Mapping[str, int]) -> dict[str, int]:
        """Add to the encryption counts of keys, and return the new totals of those that exist."""
        totals = {}
        for key_id, count in uses.items():
            if (record := self._records.get(key_id)) is not None:
                self._records[key_id] = replace(record, uses=record.uses + count)
                totals[key_id] = record.uses + count
        return totals

    async def list_keys(
        self, *, thread_id: str | None, state: KeyState | None, limit: int, cursor: str | None
    ) -> KeyPage:
        """Return a page of records; see ``KeyStore.list_keys``."""
        (after,) = decode_cursor(cursor, thread_id, state, (str,)) if cursor else ("",)
        if thread_id is None:
            order = sorted(self._records)
            ids = order[bisect_right(order, after, key=str) :]
        else:
            ids = self._threads.get(thread_id, [])
            ids = ids[ids.index(str(after)) + 1 :] if after in ids else ids
        found = [record for key_id in ids if state in (None, (record := self._records[key_id]).state)]
        page = tuple(found[:limit])
        more = len(found) > limit
        return KeyPage(page, encode_cursor(thread_id, state, [page[-1].key_id]) if more else None)

    async def census(self) -> dict[int, int]:
        """Return the number of live wrapped DEKs by KEK version."""
        return dict(Counter(record.kek_version for record in self._records.values() if record.wrapped))

    async def changes(self, cursor: str | None, wait: float) -> Changes:
        """Read the notices after ``cursor``; see ``KeyStore.changes``."""
        if cursor is None:
            return Changes(self._end(), frozenset())
        seen = int(cursor)
        if seen == self._trimmed + len(self._notices) and wait > 0:
            # Between the end of the time and this task's turn a notice may come: so read after a timeout too.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._noticed.wait()
        first = max(seen - self._trimmed, 0)
        return Changes(self._end(), frozenset(self._notices[first:]), complete=seen >= self._trimmed)

    async def load(self) -> RegistryView | None:
        """Return the registry, None before ``initialise``."""
        return self._view

    async def initialise(self, kek: KekInfo, store_id: str = "") -> RegistryView:
        """Make the registry with one active version, unless there is one; return what is there after."""
        if self._view is None:
            if self.backups.importing:
                raise RegistryLost("the store is being filled by an import: let it end, or run it again")
            active = replace(kek, state=KekState.ACTIVE, activated_at=kek.created_at)
            name = store_id or secrets.token_hex(16)
            self._view = RegistryView(name, {kek.version: active}, kek.version, 1)
        return self._view

    def _register(self, view: RegistryView) -> None:
        self._view = view

    async def stage(self, kek: KekInfo) -> RegistryView:
        """Register a version as staged; see ``KekRegistry.stage``."""
        return self._change(staged(self._registered(), kek))

    async def activate(
        self, version: int, *, now: int, lock: Lock, live_since: float | None = None
    ) -> RegistryView:
        """Make a version the active one; see ``KekRegistry.activate``."""
        view = self._registered()
        change = activated(view, version, now)
        self.rotation_ledger.require(lock)
        if live_since is not None and view.active != version:
            missing = [
                beat.instance
                for beat in self._heartbeats.values()
                if beat.at >= live_since and version not in beat.kek_versions
            ]
            if missing:
                raise instances_missing(version, missing)
        return self._change(change)

    async def retire(self, version: int, *, lock: Lock) -> RegistryView:
        """Mark a decrypt-only version as retired; see ``KekRegistry.retire``."""
        change = retired(self._registered(), version)
        self.rotation_ledger.require(lock)
        return self._change(change)

    def _registered(self) -> RegistryView:
        if self._view is None:
            raise RegistryLost("the store has no registry of KEKs")
        return self._view

    def _change(self, change: RegistryChange) -> RegistryView:
        view = self._registered()
        if change.keks:
            view = RegistryView(view.store_id, {**view.keks, **change.keks}, change.active, view.revision + 1)
            self._view = view
        return view

    async def reserve_wraps(self, version: int, count: int) -> int:
        """Add to the wrap count of a KEK version and return the new total."""
        self._wraps[version] += count
        return self._wraps[version]

    async def wraps(self) -> dict[int, int]:
        """Return the wrap counts reserved so far, by version."""
        return dict(self._wraps)

    async def beat(self, heartbeat: Heartbeat) -> None:
        """Publish this instance's heartbeat; forget instances silent for a day."""
        self._heartbeats[heartbeat.instance] = heartbeat
        for known in list(self._heartbeats.values()):
            if known.at < heartbeat.at - _FORGET_AFTER:
                del self._heartbeats[known.instance]

    async def leave(self, instance: str) -> None:
        """Forget this instance."""
        self._heartbeats.pop(instance, None)

    async def live(self) -> list[Heartbeat]:
        """Return the last heartbeat of each known instance."""
        return list(self._heartbeats.values())

    async def check(self) -> StoreStatus:
        """Return the status: reachable, with a warning."""
        return _STATUS

    @property
    def status(self) -> StoreStatus:
        """The same as ``check``."""
        return _STATUS

    def set_floor(self, thread_id: str, version: int) -> None:
        """Set the least KEK version that may be written to the slot of a thread."""
        self._floors[slot_tag(thread_id)] = version

    def _record(self, key_id: str) -> DekRecord:
        try:
            return self._records[key_id]
        except KeyError:
            raise KeyNotFound from None

    def _end(self) -> str:
        return str(self._trimmed + len(self._notices))

"""Parts that the unit tests share: a clock to set, a store to trouble, recorders, a service put together."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from progressdb_kms.domain.errors import KmsError, StoreUnavailable
from progressdb_kms.domain.identity import Identity, IdentityKind
from progressdb_kms.domain.keyring import KekInfo, KekState, kek_id_of
from progressdb_kms.domain.keys import DekRecord, NewDek
from progressdb_kms.domain.policy import parse_policy
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.ports import AuditEvent, Changes
from progressdb_kms.store.memory import MemoryStore
from progressdb_kms.usecases.context import Bounds, Kms
from progressdb_kms.usecases.creation import Wanted, create_deks
from progressdb_kms.usecases.encryption import Hot
from progressdb_kms.usecases.keks import KekBook
from progressdb_kms.usecases.keycache import DekCache
from progressdb_kms.usecases.loading import Loader
from progressdb_kms.usecases.messages import JSON
from progressdb_kms.usecases.session import PolicyBook, Session

RULES = {
    "rules": [
        {
            "identities": ["dns:server"],
            "permissions": ["key:create", "key:encrypt", "key:decrypt", "key:read"],
        },
        {
            "identities": ["dns:operator"],
            "permissions": [
                "key:create",
                "key:encrypt",
                "key:decrypt",
                "key:read",
                "key:destroy",
                "key:admin",
                "rotation:run",
                "audit:read",
            ],
        },
        {
            "identities": ["dns:room"],
            "permissions": ["key:create", "key:encrypt", "key:decrypt", "key:read", "key:admin"],
            "thread_prefixes": ["room:"],
        },
    ]
}


def labelled(label: str, size: int = 32) -> bytes:
    """Return bytes made from a label: keys for tests."""
    return hashlib.sha256(label.encode()).digest()[:size]


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, at: float = 1000.0) -> None:
        self.at = at

    def __call__(self) -> float:
        """Return the time."""
        return self.at


class Watcher:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def dek_uses(self, operation: str, count: int) -> None:
        """Count."""
        self.counts[operation] += count

    def cache(self, outcome: str, count: int = 1) -> None:
        """Count."""
        self.counts[outcome] += count

    def uses_warning(self, kind: str) -> None:
        """Count."""
        self.counts[f"warning {kind}"] += 1

    def wrapped_key_invalid(self) -> None:
        """Count."""
        self.counts["invalid"] += 1


class Trail:
    """An audit log that remembers."""

    durable = False

    def __init__(self) -> None:
        self.events: list[AuditEvent] = []

    async def record(self, events: Sequence[AuditEvent]) -> None:
        """Keep the events."""
        self.events += events

    def said(self) -> list[tuple[str, str]]:
        """Return action and outcome of each event."""
        return [(event.action, event.outcome) for event in self.events]


class TroubledStore(MemoryStore):
    """The memory store, counted, and troubled as a network would.

    Attributes:
        calls: How often each method was called.
        down: Every call raises StoreUnavailable.
        gate: Where set, answers of ``get`` wait for it, with what was read before it.
        late: Called once the store has done its part of a call, by method name: time passes on the way back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.down = False
        self.gate: asyncio.Event | None = None
        self.late: dict[str, Any] = {}

    def _enter(self, name: str) -> None:
        self.calls[name] += 1
        if self.down:
            raise StoreUnavailable("down")

    def _leave(self, name: str) -> None:
        if (late := self.late.get(name)) is not None:
            late()

    async def get(self, key_ids: Sequence[str]) -> list[DekRecord | None]:
        """Read, then wait for the gate."""
        self._enter("get")
        found = await super().get(key_ids)
        if self.gate is not None:
            await self.gate.wait()
        self._leave("get")
        return found

    async def create(self, deks: Sequence[NewDek]) -> list[DekRecord | KmsError]:
        """Create, counted."""
        self._enter("create")
        made = await super().create(deks)
        self._leave("create")
        return made

    async def reserve_uses(self, uses: Mapping[str, int]) -> dict[str, int]:
        """Reserve, counted."""
        self._enter("reserve_uses")
        totals = await super().reserve_uses(uses)
        self._leave("reserve_uses")
        return totals

    async def changes(self, cursor: str | None, wait: float) -> Changes:
        """Read the notices, counted."""
        self._enter("changes")
        return await super().changes(cursor, wait)


@dataclass
class World:
    """A whole service over memory, on a clock of its own."""

    kms: Kms
    store: TroubledStore
    keks: KekBook
    cache: DekCache
    loader: Loader
    hot: Hot
    clock: Clock
    now: Clock
    watcher: Watcher
    trail: Trail
    book: PolicyBook
    kek_path: Path
    source: FileKekSource
    sessions: dict[str, Session] = field(default_factory=dict)

    def session(self, name: str = "server") -> Session:
        """Return the session of ``dns:<name>``."""
        identity = Identity(IdentityKind.DNS, name)
        return self.sessions.setdefault(name, Session(identity, self.book, self.now))

    def vouch(self) -> None:
        """Let a whole read of the notices have begun now."""
        self.cache.read(self.clock())

    async def key(self, thread_id: str = "room:1", name: str = "operator") -> str:
        """Make a key and return its id."""
        (record,) = await create_deks(self.kms, self.session(name), [Wanted(thread_id)], "r")
        assert isinstance(record, DekRecord)
        return record.key_id

    async def encrypt(
        self, key_id: str, plaintext: bytes = b"hi", *, name: str = "server", **more: Any
    ) -> Any:
        """Encrypt through the loader and return the decoded answer."""
        return await self.answer(self.hot.encrypt, {"key_id": key_id, "plaintext": plaintext, **more}, name)

    async def decrypt(self, key_id: str, ciphertext: Any, *, name: str = "server", **more: Any) -> Any:
        """Decrypt through the loader and return the decoded answer."""
        return await self.answer(self.hot.decrypt, {"key_id": key_id, "ciphertext": ciphertext, **more}, name)

    async def answer(self, hot: Any, body: Any, name: str = "server") -> Any:
        """Call a hot function through the loader, in JSON."""
        raw = msgspec.json.encode(body)
        return msgspec.json.decode(await self.loader.answer(hot, self.session(name), JSON, JSON, raw))


def write_keks(path: Path, **versions: str) -> Path:
    """Write a KEK file: ``v1="label"`` makes version 1 from that label."""
    lines = "".join(f"  {name[1:]}: {labelled(label).hex()}\n" for name, label in versions.items())
    path.unlink(missing_ok=True)
    path.touch(0o600)
    path.write_text(f"versions:\n{lines}")
    return path


async def make_world(folder: Path, *, bounds: Bounds | None = None, max_stale: float = 30.0) -> World:
    """Put a service together whose cache is settled and vouched for."""
    clock, now = Clock(), Clock(1_700_000_000.0)
    store, watcher, trail, book = TroubledStore(), Watcher(), Trail(), PolicyBook(parse_policy(RULES), "g1")
    kek_path = write_keks(folder / "kek.yaml", v1="kek 1")
    source = FileKekSource(kek_path)
    keks = KekBook(source=source, registry=store.registry, observer=watcher)
    await keks.start(now())
    cache = DekCache(max_keys=1000, ttl=300, max_stale=max_stale, clock=clock)
    draws = itertools.count()
    kms = Kms(
        store=store.keys,
        keks=keks,
        cache=cache,
        audit=trail,
        observer=watcher,
        backups=store.backups,
        ledger=store.rotation_ledger,
        policies=book,
        bounds=bounds or Bounds(),
        now=now,
        clock=clock,
        random=lambda size: hashlib.shake_128(next(draws).to_bytes(8, "big")).digest(size),
    )
    cache.restart()
    clock.at += 10
    cache.read(clock())
    return World(
        kms, store, keks, cache, Loader(kms), Hot(kms), clock, now, watcher, trail, book, kek_path, source
    )


async def create(
    world: World, thread_id: str = "room:1", key: str | None = None, name: str = "server"
) -> DekRecord:
    """Make or find a key."""
    (record,) = await create_deks(world.kms, world.session(name), [Wanted(thread_id, key)], "r")
    assert isinstance(record, DekRecord)
    return record


async def activate(world: World, version: int = 2) -> None:
    """Rotate the KEK as a rotation does: load, register, activate."""
    write_keks(world.kek_path, v1="kek 1", v2="kek 2")
    world.source.reload(world.keks.required())
    value = await world.source.check_value(version)
    view = world.store._view
    assert view is not None
    info = KekInfo(version, kek_id_of(value), "file", str(version), value, KekState.ACTIVE, 0, 0)
    old = replace(view.keks[1], state=KekState.DECRYPT_ONLY)
    world.store._view = replace(view, keks={1: old, version: info}, active=version, revision=2)

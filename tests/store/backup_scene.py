"""A store with keys that really unwrap, and what backups and rotations need around it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from progressdb_kms.domain.envelope import parse_blob, wrap_aad
from progressdb_kms.domain.keys import DekRecord, NewDek, StateChange, new_key_id
from progressdb_kms.domain.rotation import Rotation
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.ports import AuditEvent
from progressdb_kms.store.memory import MemoryStore
from progressdb_kms.store.redis import RedisStore
from progressdb_kms.usecases.backup import export_live
from progressdb_kms.usecases.keks import KekBook
from progressdb_kms.usecases.rotation import Conduct, Parts, Rotator
from progressdb_kms.usecases.vault import Vault

NOW = 1_700_000_000


class Bytes:
    """A file in memory."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.committed = False

    def write(self, data: bytes) -> None:
        """Take some bytes."""
        self.parts.append(data)

    def commit(self) -> None:
        """Make it whole."""
        self.committed = True

    def chunks(self) -> list[bytes]:
        """Give the bytes as a reader gets them."""
        data = b"".join(self.parts)
        return [data[at : at + 1000] for at in range(0, len(data), 1000)]


class Quiet:
    """Observer, progress and heartbeats that nobody needs."""

    def uses_warning(self, kind: str) -> None:
        """Say nothing."""

    def step(self, rotation: Rotation, total: int) -> None:
        """Say nothing."""

    def slot(self, counts: Mapping[str, int]) -> None:
        """Say nothing."""

    def waiting(self, missing: Sequence[str], gone: Sequence[str]) -> None:
        """Say nothing."""

    def warning(self, text: str) -> None:
        """Say nothing."""


class Audit:
    """Keeps what it is told."""

    durable = False

    def __init__(self) -> None:
        self.events: list[AuditEvent] = []

    async def record(self, events: Sequence[AuditEvent]) -> None:
        """Keep events."""
        self.events += events

    def told(self, action: str) -> list[str]:
        """Return the outcomes of an action."""
        return [event.outcome for event in self.events if event.action == action]


class Stager:
    """Adds a KEK version to the file."""

    def __init__(self, path: Path, source: FileKekSource) -> None:
        self._path = path
        self._source = source

    async def stage(self, version: int) -> None:
        """Add the version if the file lacks it."""
        if version not in self._source.versions():
            with self._path.open("a") as file:
                file.write(f"  {version}: {secrets.token_hex(32)}\n")
            self._source.reload({})

    async def escrow(self, version: int) -> int:
        """Say that a recovery key has it."""
        return int(version in self._source.versions())


@dataclass
class Scene:
    """See the module.

    Attributes:
        now: The clock of the use cases.
        deks: Raw keys by key id.
    """

    store: MemoryStore | RedisStore
    path: Path
    source: FileKekSource
    book: KekBook
    audit: Audit = field(default_factory=Audit)
    now: int = NOW
    deks: dict[str, bytes] = field(default_factory=dict)

    @property
    def vault(self) -> Vault:
        """The ports of backups."""
        store = self.store
        return Vault(
            keys=store.keys,
            backups=store.backups,
            destruction=store.destruction,
            ledger=store.rotation_ledger,
            slots=store.rotation_slots,
            registry=store.registry,
            source=self.source,
            audit=self.audit,
            owner="test",
            release="0",
            now=lambda: float(self.now),
        )

    async def create(self, *threads: str) -> list[DekRecord]:
        """Make a key for each thread."""
        names = [(new_key_id(thread, secrets.token_bytes(17)), thread) for thread in threads]
        deks = [secrets.token_bytes(32) for _ in names]
        version, kek_id, blobs = await self.book.wrap(deks, names)
        made = await self.store.keys.create(
            [
                NewDek(key_id, thread, blob, kek_id, version, self.now, "dns:chat.example")
                for (key_id, thread), blob in zip(names, blobs, strict=True)
            ]
        )
        self.deks |= {name[0]: dek for name, dek in zip(names, deks, strict=True)}
        return [record for record in made if isinstance(record, DekRecord)]

    async def record(self, key_id: str) -> DekRecord:
        """Return a record."""
        (found,) = await self.store.keys.get([key_id])
        assert found is not None
        return found

    async def opens(self, key_id: str, source: FileKekSource | None = None) -> bool:
        """Say whether a key's record unwraps to what it was made with."""
        record = await self.record(key_id)
        blob = parse_blob(record.wrapped)
        aad = wrap_aad(key_id, record.thread_id)
        (dek,) = await (source or self.source).unwrap(blob.kek_version, [blob.body], [aad])
        return dek == self.deks[key_id]

    async def damage(self, key_id: str, blob: bytes = b"") -> None:
        """Put a blob that does not unwrap in a key's place."""
        record = await self.record(key_id)
        bad = blob or record.wrapped[:-1] + bytes([record.wrapped[-1] ^ 1])
        assert await self.store.keys.rewrap(record, bad, record.kek_id, record.kek_version)

    async def schedule(self, key_id: str, destroy_at: int) -> None:
        """Let a key be destroyed at some time."""
        await self.store.keys.change_state(
            key_id, StateChange.SCHEDULE_DESTRUCTION, now=self.now, destroy_at=destroy_at
        )

    async def export(self) -> Bytes:
        """Export the store."""
        file = Bytes()
        await export_live(self.vault, file)
        assert file.committed
        return file

    async def rotate(self) -> Rotation:
        """Rotate the KEK."""
        store, quiet = self.store, Quiet()
        parts = Parts(
            ledger=store.rotation_ledger,
            slots=store.rotation_slots,
            registry=store.registry,
            heartbeats=store.heartbeats,
            stager=Stager(self.path, self.source),
            keks=self.book,
            progress=quiet,
            now=lambda: float(self.now),
            census=store.keys.census,
        )
        rotation = await Rotator(parts, Conduct(), "leader").run()
        assert rotation is not None
        return rotation

    async def elsewhere(self, store: MemoryStore | RedisStore) -> Scene:
        """Return another store with the same KEK file."""
        book = KekBook(source=self.source, registry=store.registry, observer=Quiet())  # type: ignore[arg-type] # all that it calls
        return Scene(store, self.path, self.source, book, now=self.now, deks=self.deks)


async def make_scene(store: MemoryStore | RedisStore, folder: Path) -> Scene:
    """Make the registry of an empty store, and a KEK file."""
    path = folder / "kek.yaml"
    path.write_text(f"versions:\n  1: {secrets.token_hex(32)}\n")
    path.chmod(0o600)
    source = FileKekSource(path)
    book = KekBook(source=source, registry=store.registry, observer=Quiet())  # type: ignore[arg-type] # all that it calls
    await book.start(NOW)
    return Scene(store, path, source, book)

"""A store with its KEK file, the instances that serve from it, and the commands that operators run there."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, cast

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.domain.backup import Destruction
from progressdb_kms.domain.envelope import open_sealed, parse_blob, wrap_aad
from progressdb_kms.domain.identity import Identity, IdentityKind
from progressdb_kms.domain.keys import ALL_TAGS, DekRecord
from progressdb_kms.domain.older import MasterKey
from progressdb_kms.domain.policy import parse_policy
from progressdb_kms.domain.rotation import Rotation
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.store import memory_backups
from progressdb_kms.store.memory import MemoryStore
from progressdb_kms.store.redis import RedisStore, backups, destruction, keys, rotation_slots
from progressdb_kms.usecases import crew, exclusive, retire, rollback, rotation, slotwork, snapshots
from progressdb_kms.usecases.backup import export_live
from progressdb_kms.usecases.context import Bounds, Kms
from progressdb_kms.usecases.destroyer import Destroyer
from progressdb_kms.usecases.encryption import Hot
from progressdb_kms.usecases.importing import ImportReport, import_export
from progressdb_kms.usecases.keks import KekBook
from progressdb_kms.usecases.keycache import DekCache
from progressdb_kms.usecases.loading import Loader
from progressdb_kms.usecases.moving import Moved, Mover
from progressdb_kms.usecases.restore import Restored, Restorer
from progressdb_kms.usecases.rotation import Conduct, Parts, Rotator
from progressdb_kms.usecases.session import PolicyBook, Session
from progressdb_kms.usecases.vault import Vault
from tests.store.backup_scene import Audit, Bytes, Quiet, Stager
from tests.store.life_actors import Actor, Gate, Gated, Witness
from tests.unit.helpers import RULES, Watcher

TAGS = ALL_TAGS[::512]
"""All slots that there are: a rotation goes through few calls, and each can be interrupted."""


def shrink(patch: Callable[..., None]) -> None:
    """Let there be two slots, and let nobody wait or renew a lease by the clock."""
    for module in (crew, rotation, slotwork, rollback, retire, memory_backups):
        patch(module, "ALL_TAGS", TAGS)
    for module in (backups, destruction, keys, rotation_slots):
        patch(module, "ALL_TAGS", TAGS)
    for module in (crew, rotation, rollback):
        patch(module, "IDLE", 0)
    for module in (crew, exclusive):
        patch(module, "RENEW", 1e6)


class Instance:
    """A running key service, which knows of the registry what it last read."""

    def __init__(self, store: MemoryStore | RedisStore, book: KekBook, now: Callable[[], float]) -> None:
        self.kms = Kms(
            store=store.keys,
            keks=book,
            # Never vouched for, so that every request reads the store: other tests have what it remembers.
            cache=DekCache(max_keys=100, ttl=300, max_stale=0, clock=lambda: 0.0),
            audit=Audit(),
            observer=Watcher(),
            backups=store.backups,
            ledger=store.rotation_ledger,
            policies=PolicyBook(parse_policy(RULES), "1"),
            bounds=Bounds(waiting_days=7),
            now=now,
            clock=lambda: 0.0,
        )
        self.loader = Loader(self.kms)
        self.hot = Hot(self.kms)
        self.session = Session(Identity(IdentityKind.DNS, "operator"), self.kms.policies, now)


class House:
    """See the module.

    Args:
        store: The store, empty.
        folder: Where the KEK file is.
        now: The clock of all that runs here.
    """

    def __init__(self, store: MemoryStore | RedisStore, folder: Path, now: Callable[[], float]) -> None:
        self.store = store
        self.path = folder / "kek.yaml"
        self.now = now
        self.instances: list[Instance] = []
        self.witness = Witness()
        self.path.unlink(missing_ok=True)
        self._write({1: secrets.token_hex(32)})
        self.source = FileKekSource(self.path)

    def _write(self, lines: dict[int, str]) -> None:
        self.path.touch(0o600)
        self.path.write_text("versions:\n" + "".join(f"  {v}: {key}\n" for v, key in lines.items()))

    async def settle(self, store: MemoryStore | RedisStore) -> None:
        """Start two instances on a store, which the first founds if it is empty."""
        self.store = store
        self.witness = Witness()
        self.instances = [Instance(store, self._book(store.registry), self.now) for _ in range(2)]
        for each in self.instances:
            await each.kms.keks.start(self.now())

    async def erase(self, version: int) -> None:
        """Take a KEK version out of the file, once every instance has read what it is."""
        for each in self.instances:
            await each.kms.keks.refresh()
        self._write({v: self.source.export(v).hex() for v in self.source.versions() - {version}})
        self.source.reload({})

    async def open(self, record: DekRecord, ciphertext: bytes) -> bytes | None:
        """Decrypt with no help of a service: unwrap the key under the KEK that its blob names."""
        blob = parse_blob(record.wrapped)
        assert blob.kek_version == record.kek_version
        if blob.kek_version not in self.source.versions():
            return None
        aad = wrap_aad(record.key_id, record.thread_id)
        (dek,) = await self.source.unwrap(blob.kek_version, [blob.body], [aad])
        return open_sealed(AESGCM(dek), ciphertext, None) if isinstance(dek, bytes) else None

    def book(self, gate: Gate) -> KekBook:
        """Return a command's own knowledge of the registry."""
        return self._book(Gated(self.store.registry, gate, self.witness))

    def _book(self, registry: object) -> KekBook:
        return KekBook(source=self.source, registry=cast("Any", registry), observer=cast("Any", Quiet()))

    def vault(self, gate: Gate, store: MemoryStore | RedisStore | None = None) -> Vault:
        """Return the ports of backups and destruction."""
        store = store or self.store
        ports = {
            "keys": store.keys,
            "backups": store.backups,
            "destruction": store.destruction,
            "ledger": store.rotation_ledger,
            "slots": store.rotation_slots,
            "registry": store.registry,
        }
        witness = self.witness if store is self.store else Witness()  # another store has locks of its own
        gated = {name: cast("Any", Gated(port, gate, witness)) for name, port in ports.items()}
        return Vault(**gated, source=self.source, audit=Audit(), owner="vault", release="0", now=self.now)

    def parts(self, gate: Gate, book: KekBook) -> Parts:
        """Return the ports of rotations."""
        store = self.store
        ports = {
            "ledger": store.rotation_ledger,
            "slots": store.rotation_slots,
            "registry": store.registry,
            "heartbeats": store.heartbeats,
        }
        gated = {name: cast("Any", Gated(port, gate, self.witness)) for name, port in ports.items()}
        return Parts(
            **gated,
            stager=Stager(self.path, self.source),
            keks=book,
            progress=Quiet(),
            now=self.now,
            census=store.keys.census,
        )

    def begin(
        self, kind: str, command: Callable[[Gate], Coroutine[Any, Any, Any]], subject: Any = None
    ) -> Actor:
        """Start a command, which stops before its first call of the store. Has to be called in the loop."""
        gate = Gate()
        return Actor(kind, gate, asyncio.get_running_loop().create_task(command(gate)), subject)

    async def lead(self, gate: Gate, owner: str) -> Rotation | None:
        """Rotate the KEK, or finish the rotation that is under way."""
        book = self.book(gate)
        await book.refresh()
        return await Rotator(self.parts(gate, book), Conduct(page=2), owner).run()

    async def join(self, gate: Gate) -> Rotation | None:
        """Share the work of a rotation."""
        book = self.book(gate)
        await book.refresh()
        return await Rotator(self.parts(gate, book), Conduct(page=2), secrets.token_hex(4)).work()

    async def roll_back(self, gate: Gate, owner: str) -> Rotation:
        """Turn the latest rotation back."""
        book = self.book(gate)
        await book.refresh()
        return await rollback.Rollback(self.parts(gate, book), Conduct(page=2, wait=0), owner).run()

    async def sweep(self, gate: Gate) -> int:
        """Destroy what is due; the files are not rewritten, which takes a server long."""
        vault = self.vault(gate)
        due = await vault.destruction.due(int(self.now()))
        destroyer = Destroyer(vault)
        done = 0
        for key_id in [key_id for key_ids in due.values() for key_id in key_ids]:
            done += await destroyer.destroy(Destruction(key_id, int(self.now())))
        return done

    async def export(self, gate: Gate) -> Bytes:
        """Make an export."""
        file = Bytes()
        await export_live(self.vault(gate), file)
        assert file.committed
        return file

    async def restore(self, gate: Gate, rotation_id: str, key_ids: Sequence[str]) -> Restored:
        """Restore keys from a snapshot."""
        book = self.book(gate)
        await book.start(self.now(), may_lack=True)
        return await Restorer(self.vault(gate), book).from_snapshot(rotation_id, key_ids)

    async def restore_file(self, gate: Gate, file: Bytes, key_ids: Sequence[str]) -> Restored:
        """Restore keys from an export."""
        book = self.book(gate)
        await book.start(self.now(), may_lack=True)
        return await Restorer(self.vault(gate), book).from_file(file.chunks, key_ids)

    async def purge(self, gate: Gate, rotation_id: str, *, force: bool) -> int:
        """Remove a snapshot."""
        return await snapshots.purge(self.vault(gate), rotation_id, force=force)

    async def retire(self, gate: Gate, version: int) -> Bytes:
        """Make an export, and retire a KEK version on its account."""
        file = await self.export(gate)
        await retire.retire(self.vault(gate), version, file.chunks)
        return file

    async def move_in(self, gate: Gate, master: bytes, lines: Sequence[bytes]) -> Moved:
        """Move keys of the older service in."""
        book = self.book(gate)
        await book.start(self.now(), may_lack=True)
        return await Mover(self.vault(gate), book, MasterKey(master), lambda _: None).run(lines, "lines")

    async def take_in(
        self, gate: Gate, file: Bytes, store: MemoryStore | RedisStore, *, merge: bool
    ) -> ImportReport:
        """Import an export."""
        return await import_export(self.vault(gate, store), file.chunks, merge=merge)

"""What the machine of whole lives knows, how it lets commands go on, and what has to hold after each step."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hypothesis.stateful import RuleBasedStateMachine, invariant

from progressdb_kms.domain.envelope import parse_blob
from progressdb_kms.domain.errors import (
    BackupInvalid,
    Fenced,
    KmsError,
    RotationRefused,
    RotationRunning,
    StaleKek,
)
from progressdb_kms.domain.keyring import KekState
from progressdb_kms.domain.keys import DekRecord, locate
from progressdb_kms.domain.rotation import Rotation, Step
from progressdb_kms.ports import RegistryView
from progressdb_kms.store.memory import MemoryStore
from tests.older_service import OlderService
from tests.store.backup_scene import Bytes
from tests.store.conftest import Harness
from tests.store.life_actors import Actor, Gate, KilledError
from tests.store.life_house import House
from tests.store.life_model import DESTROYED, KeyModel

DAY = 86_400
OWNERS = ("leader", "other")
MOST_ACTORS = 4
ALLOWED: dict[str, tuple[type[Exception], ...]] = {
    "lead": (RotationRunning, RotationRefused, Fenced),
    "join": (RotationRefused,),
    "roll back": (RotationRunning, RotationRefused, Fenced),
    "restore": (RotationRunning, BackupInvalid, StaleKek),
    "purge": (RotationRunning, RotationRefused, BackupInvalid),
    "retire": (RotationRunning, RotationRefused, BackupInvalid),
    "export": (),
    "sweep": (),
}
"""What a command may end with, when others come in between."""


@dataclass
class File:
    """An export.

    Attributes:
        records: All records, where nothing came in between while it was made; else None.
        damaged: Keys whose blob was damaged when it was made.
    """

    content: Bytes
    at: int
    records: dict[str, DekRecord] | None = field(repr=False)
    damaged: frozenset[str]


class LifeBase(RuleBasedStateMachine):
    """See the module.

    Attributes:
        model: Keys as they ought to be; what wraps them is the store's to say.
        said: By key id, a message and what an instance made of it.
        damaged: Keys whose blob was damaged by the machine, and not yet mended.
        dead: Every key that was ever destroyed.
        imported: Blobs that imports brought.
        rotated: Whether there ever was a rotation.
        losses: How often the store was lost.
        older: The service that keys move in from.
        mending: Whether something that mends damaged keys has run since the last look.
    """

    open_harness: Callable[[asyncio.Runner], Harness]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.harness = type(self).open_harness(self.runner)
        self.now = 1_700_000_000
        self.folder = tempfile.TemporaryDirectory()
        self.model = KeyModel()
        self.said: dict[str, tuple[bytes, bytes]] = {}
        self.damaged: set[str] = set()
        self.dead: set[str] = set()
        self.actors: list[Actor] = []
        self.files: list[File] = []
        self.blobs: dict[str, bytes] = {}
        self.floors: dict[str, int] = {}
        self.imported: set[bytes] = set()
        self.losses = 0
        self.older = OlderService()
        self.rotated = False
        self.mending = self.sweeping = self.lowering = self.sound = False
        self.house = self.run(self._founded())

    async def _founded(self) -> House:
        house = House(self.harness.store, Path(self.folder.name), lambda: float(self.now))
        await house.settle(self.harness.store)
        return house

    @property
    def store(self) -> Any:
        """The store."""
        return self.house.store

    def run(self, call: Awaitable[Any]) -> Any:
        """Let a call run to its end, while commands wait before theirs."""

        async def wait() -> Any:
            return await call

        self.sound = False
        return self.runner.run(wait())

    def tried(self, call: Awaitable[Any]) -> Any:
        """Return what a call returned, or the error that it raised."""
        try:
            return self.run(call)
        except KmsError as error:
            return error

    def pick(self, number: int) -> str | None:
        """Return a key of the model, None where there is none."""
        ids = list(self.model.records)
        return ids[number % len(ids)] if ids else None

    def begin(self, actor: Actor, *, at_once: bool) -> Actor:
        """Take in a command, and let it run to its end where nothing is to come in between."""
        while len(self.actors) >= MOST_ACTORS:
            self.end(self.actors[0])
        self.actors.append(actor)
        if at_once:
            self._note(actor)
            self.run(actor.finish())
            self.collect()
        return actor

    def advance(self, actor: Actor, calls: int) -> None:
        """Let a command make some calls of the store."""
        self._note(actor)
        self.run(actor.advance(calls))
        self.collect()

    def end(self, actor: Actor) -> None:
        """Kill a command."""
        self.run(actor.kill())
        self.collect()

    def _note(self, actor: Actor) -> None:
        self.mending |= actor.kind in {"restore", "roll back"}
        self.lowering |= actor.kind in {"roll back", "join"}
        self.sweeping |= actor.kind == "sweep"

    def collect(self) -> None:
        """Look at what commands ended with."""
        for actor in [each for each in self.actors if each.over]:
            self.actors.remove(actor)
            error = actor.task.exception()
            if error is None:
                getattr(self, f"after_{actor.kind.replace(' ', '_')}")(actor, actor.task.result())
            elif not isinstance(error, (KilledError, *ALLOWED[actor.kind])):
                raise error

    def free_lock(self) -> None:
        """Let the lock's lease run out: whoever had it is fenced from now on."""

        async def free() -> None:
            ledger = self.house.vault(self.gate()).ledger
            for owner in (*OWNERS, "vault"):
                with suppress(RotationRunning):
                    await ledger.release(await ledger.acquire(owner, 60))
                    return

        self.run(free())

    def view(self) -> RegistryView:
        """Return the registry."""
        view = self.run(self.store.registry.load())
        assert isinstance(view, RegistryView)
        return view

    def latest(self) -> Rotation | None:
        """Return the latest rotation; by its target, since time may stand still from one to the next."""
        rotations = self.run(self.store.rotation_ledger.list_rotations(1000))
        return max(rotations, key=lambda each: each.target_version, default=None)

    def turning_back(self) -> bool:
        """Say whether a rotation is being rolled back: meanwhile instances may not be able to wrap."""
        rotation = self.run(self.store.rotation_ledger.current())
        return rotation is not None and rotation.step is Step.ROLLBACK

    def live(self) -> dict[str, DekRecord]:
        """Return the stored records of all keys that are not destroyed."""
        found = self.run(self.store.keys.get(list(self.model.records)))
        return {record.key_id: record for record in found if record.state is not DESTROYED}

    def copies(self, rotation_id: str = "") -> list[tuple[str, str, bytes]]:
        """Return rotation, key id and blob of the copies in one snapshot, or in all."""

        async def read() -> list[tuple[str, str, bytes]]:
            found = []
            for name, manifests in (await self.store.backups.snapshots()).items():
                for tag, manifest in manifests.items() if rotation_id in {"", name} else ():
                    for bucket in range(manifest.buckets):
                        entries = await self.store.rotation_slots.read_bucket(tag, name, bucket)
                        found += [(name, key_id, blob) for key_id, blob in entries]
            return found

        return list(self.run(read()))

    def opens(self, key_id: str, record: DekRecord) -> bool:
        """Say whether a record decrypts what was encrypted with its key."""
        plaintext, ciphertext = self.said[key_id]
        return bool(self.run(self.house.open(record, ciphertext)) == plaintext)

    @invariant()
    def every_key_is_as_the_model_has_it(self) -> None:
        """States, what they decrypt, floors, census, and that no KEK is retired that is needed."""
        ids = list(self.model.records)
        records = dict(zip(ids, self.run(self.store.keys.get(ids)), strict=True))
        view = self.view()
        floors = dict(self.run(self.store.backups.floors()))
        if not self.lowering:
            assert all(floors[tag] >= floor for tag, floor in self.floors.items())
        for key_id, record in records.items():
            assert record is not None
            if record.state is DESTROYED and self.sweeping:
                self.model.destroy(key_id, record.changed_at)
            assert _told(record) == _told(self.model.records[key_id])
            if record.state is DESTROYED:
                assert record.wrapped == b""
                self.dead.add(key_id)
                self.damaged.discard(key_id)
                continue
            assert key_id not in self.dead
            self._check_blob(record, view, floors[locate(key_id)])
        census: dict[int, int] = {}
        for record in records.values():
            if record.wrapped:
                census[record.kek_version] = census.get(record.kek_version, 0) + 1
        assert self.run(self.store.keys.census()) == census
        if self.sweeping or isinstance(self.store, MemoryStore):  # on a server that is many calls
            self.check_copies(view)
        self.floors = floors
        self.mending = self.lowering = self.sweeping = False
        self.sound = True

    def _check_blob(self, record: DekRecord, view: RegistryView, floor: int) -> None:
        key_id = record.key_id
        if record.wrapped != self.blobs.get(key_id):
            # An import brings back what was left under an older version as it was: it wraps nothing.
            assert record.kek_version >= floor or record.wrapped in self.imported
            self.blobs[key_id] = record.wrapped
            opens = self.opens(key_id, record)
            assert opens or key_id in self.damaged
            if opens and self.mending:
                self.damaged.discard(key_id)
            assert not opens or key_id not in self.damaged
        assert view.keks[record.kek_version].state is not KekState.RETIRED
        assert record.kek_id == view.keks[record.kek_version].kek_id
        assert key_id in self.damaged or record.kek_version in self.house.source.versions()

    def check_copies(self, view: RegistryView) -> None:
        """Look at the snapshots: no destroyed key is in them, and no KEK that they need is retired."""
        for _, key_id, blob in self.copies():
            assert key_id not in self.dead
            assert view.keks[parse_blob(blob).kek_version].state is not KekState.RETIRED

    def teardown(self) -> None:
        """End what is under way; then an operator must be able to bring all in order."""
        try:
            if self.sound:
                self.set_in_order()
        finally:
            for actor in self.actors:
                self.runner.run(actor.kill())
            self.runner.run(self.store.close())
            self.runner.close()
            self.folder.cleanup()

    def set_in_order(self) -> None:
        """Finish what was begun, rotate, and retire every older version: nothing may stand in the way."""
        raise NotImplementedError

    def gate(self) -> Gate:
        """Return a gate that stands open."""
        gate = Gate()
        gate.open()
        return gate


def _told(record: DekRecord) -> DekRecord:
    """Return what callers are told of a key."""
    return replace(record, wrapped=b"", kek_id="", kek_version=0, uses=0)

"""Whole rotations by ``usecases.rotation`` over every store, also broken off at each named point."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.domain.envelope import parse_blob, wrap_aad
from progressdb_kms.domain.errors import RotationRefused, StaleKek
from progressdb_kms.domain.keyring import KekState
from progressdb_kms.domain.keys import ALL_TAGS, DekRecord, NewDek, locate, new_key_id, slot_tag
from progressdb_kms.domain.rotation import Rotation
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.ports import Quarantined
from progressdb_kms.usecases import crew as crew_module
from progressdb_kms.usecases import rotation as rotation_module
from progressdb_kms.usecases import slotwork as slotwork_module
from progressdb_kms.usecases.keks import KekBook
from progressdb_kms.usecases.rotation import Conduct, Parts, Rotator, Unled
from tests.store.conftest import Harness, RedisHarness, new_dek
from tests.store.servers import Server

POINTS = (
    "begun",
    "staged",
    "registered",
    "escrowed",
    "distributed",
    "distribute:done",
    "activate:saved",
    "activated",
    *(
        f"{step}:{at}"
        for step in ("activate", "snapshot", "rewrap", "verify")
        for at in ("opened", "slot", "done")
    ),
    "snapshot:saved",
    "rewrap:saved",
    "verify:saved",
    "complete:saved",
)


class BrokenOffError(Exception):
    """Stands for a kill."""


class Stager:
    """Adds a KEK version to the file."""

    def __init__(self, path: Path, source: FileKekSource) -> None:
        self.path = path
        self.source = source

    async def stage(self, version: int) -> None:
        """Add the version if the file lacks it."""
        if version not in self.source.versions():
            with self.path.open("a") as file:
                file.write(f"  {version}: {secrets.token_hex(32)}\n")
            self.source.reload({})

    async def escrow(self, version: int) -> int:
        """Say that a recovery key has it, if it is there."""
        return int(version in self.source.versions())


class Silent:
    """Progress and Observer that nobody listens to."""

    def step(self, rotation: Rotation, total: int) -> None:
        """Say nothing."""

    def slot(self, counts: Mapping[str, int]) -> None:
        """Say nothing."""

    def waiting(self, missing: Sequence[str], gone: Sequence[str]) -> None:
        """Say nothing."""

    def warning(self, text: str) -> None:
        """Say nothing."""

    def uses_warning(self, kind: str) -> None:
        """Say nothing."""


@dataclass
class Scene:
    """A store with keys that really unwrap."""

    harness: Harness
    path: Path
    source: FileKekSource
    book: KekBook
    deks: dict[str, bytes] = field(default_factory=dict)
    reached: list[str] = field(default_factory=list)
    tags: Sequence[str] = ALL_TAGS
    threads: Iterator[str] = field(default_factory=lambda: (f"room:{number}" for number in count(0)))

    async def create(self, keys: int) -> None:
        """Create keys, each of a thread of its own, in the slots of the scene."""
        threads = list(islice((thread for thread in self.threads if slot_tag(thread) in self.tags), keys))
        names = [(new_key_id(thread, secrets.token_bytes(17)), thread) for thread in threads]
        deks = [secrets.token_bytes(32) for _ in names]
        version, kek_id, blobs = await self.book.wrap(deks, names)
        new = [
            NewDek(key_id, thread, blob, kek_id, version, 1_700_000_000, "dns:chat.example")
            for (key_id, thread), blob in zip(names, blobs, strict=True)
        ]
        assert all(isinstance(record, DekRecord) for record in await self.harness.store.keys.create(new))
        self.deks |= {name[0]: dek for name, dek in zip(names, deks, strict=True)}

    def rotator(
        self,
        worker: str = "leader",
        stop_at: str = "",
        page: int = 250,
        sample: int = 0,
        begun: asyncio.Event | None = None,
        clock: Callable[[], float] = lambda: 1_700_000_100.0,
    ) -> Rotator:
        """Make one process's part in a rotation, which breaks off where it first reaches ``stop_at``."""

        def reached(name: str) -> None:
            self.reached.append(name)
            if begun is not None:
                begun.set()
            if name == stop_at and self.reached.count(name) == 1:
                raise BrokenOffError(name)

        store = self.harness.store
        parts = Parts(
            ledger=store.rotation_ledger,
            slots=store.rotation_slots,
            registry=store.registry,
            heartbeats=store.heartbeats,
            stager=Stager(self.path, self.source),
            keks=self.book,
            progress=Silent(),
            now=clock,
            census=store.keys.census,
            reached=reached,
        )
        return Rotator(parts, Conduct(page=page, verify_sample=sample), worker)

    async def opened(self) -> dict[str, tuple[int, bytes | None]]:
        """Return KEK version and raw DEK of each stored key; None for one that does not unwrap."""
        found: dict[str, tuple[int, bytes | None]] = {}
        for record in await self.harness.store.keys.get(list(self.deks)):
            assert record is not None
            blob = parse_blob(record.wrapped)
            aad = wrap_aad(record.key_id, record.thread_id)
            (dek,) = await self.source.unwrap(blob.kek_version, [blob.body], [aad])
            assert blob.kek_version == record.kek_version
            found[record.key_id] = (record.kek_version, dek if isinstance(dek, bytes) else None)
        return found

    async def damage(self, key_id: str, blob: bytes) -> None:
        """Put a blob that does not unwrap in a key's place."""
        (record,) = await self.harness.store.keys.get([key_id])
        assert record is not None
        assert await self.harness.store.keys.rewrap(record, blob, record.kek_id, record.kek_version)

    async def quarantined(self, rotation: Rotation) -> list[Quarantined]:
        """Return what a rotation could not deal with."""
        slots = self.harness.store.rotation_slots
        return [one for tag in self.tags for one in await slots.quarantined(tag, rotation.rotation_id)]


async def make_scene(harness: Harness, folder: Path) -> Scene:
    """Make the registry of an empty store."""
    path = folder / "kek.yaml"
    path.write_text(f"versions:\n  1: {secrets.token_hex(32)}\n")
    path.chmod(0o600)
    source = FileKekSource(path)
    book = KekBook(source=source, registry=harness.store.registry, observer=Silent())  # type: ignore[arg-type] # all that it calls
    await book.start(1_700_000_000)
    return Scene(harness, path, source, book)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait long."""
    for module in (crew_module, rotation_module):
        monkeypatch.setattr(module, "IDLE", 0.01)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Sequence[str]:
    """Let rotations have few slots, which makes them quick."""
    for module in (crew_module, rotation_module, slotwork_module):
        monkeypatch.setattr(module, "ALL_TAGS", ALL_TAGS[::64])
    return ALL_TAGS[::64]


@pytest.fixture
async def whole(harness: Harness, tmp_path: Path) -> Scene:
    """Give a store of all slots."""
    return await make_scene(harness, tmp_path)


@pytest.fixture
async def scene(harness: Harness, few: Sequence[str], tmp_path: Path) -> Scene:
    """Give a store of few slots."""
    scene = await make_scene(harness, tmp_path)
    scene.tags = few
    return scene


@pytest.fixture
async def redis_scene(
    few: Sequence[str], servers: Callable[[str], Server], opened: Callable[..., Any], tmp_path: Path
) -> tuple[Scene, Server]:
    """Give a store of few slots on Redis, for what memory can't suffer."""
    server = servers("redis")
    server.ask("FLUSHALL")
    scene = await make_scene(RedisHarness(server, await opened(server.url)), tmp_path)
    scene.tags = few
    return scene, server


async def test_two_thousand_keys_twice(scene: Scene) -> None:
    """Every DEK is the same under the new KEK, and a second rotation takes the keys made since, too."""
    await scene.create(2_000)
    for version in (2, 3):
        done = await scene.rotator().run()
        assert done is not None
        keys = len(scene.deks)
        assert (done.outcome, done.target_version) == ("clean", version)
        assert done.counts == {"snapshot": keys, "rewrapped": keys, "verified": keys}
        assert await scene.opened() == {key_id: (version, dek) for key_id, dek in scene.deks.items()}
        assert await scene.harness.store.keys.census() == {version: keys}
        view = await scene.harness.store.registry.load()
        assert view is not None
        assert view.active == version
        assert view.keks[version - 1].state is KekState.DECRYPT_ONLY
        await scene.create(10)


@pytest.mark.slow
async def test_all_slots(whole: Scene) -> None:
    """All 1,024 slots are taken, their floors raised, and their keys rewrapped."""
    await whole.create(1_500)
    done = await whole.rotator().run()
    assert done is not None
    assert done.counts == {"snapshot": 1_500, "rewrapped": 1_500, "verified": 1_500}
    old = [new_dek(f"room:{number}") for number in range(3_000)]
    assert {type(result) for result in await whole.harness.store.keys.create(old)} == {StaleKek}


async def test_small_pages(scene: Scene) -> None:
    """Slots of many pages are done whole."""
    await scene.create(600)
    done = await scene.rotator(page=3).run()
    assert done is not None
    assert done.outcome == "clean"
    assert {version for version, _ in (await scene.opened()).values()} == {2}


@pytest.mark.parametrize("point", dict.fromkeys(POINTS))
async def test_broken_off_and_resumed(scene: Scene, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken off at any point, the rotation is the same one when run again, and ends clean."""
    await scene.create(40)
    monkeypatch.setattr(crew_module, "LEASE", 0.0)
    with pytest.raises(BrokenOffError):
        await scene.rotator("killed", stop_at=point).run()
    (before,) = await scene.harness.store.rotation_ledger.list_rotations(10)
    monkeypatch.setattr(crew_module, "LEASE", 15.0)
    done = await scene.rotator("second").run(resume_only=True)
    if point == "complete:saved":
        assert done is None
        done = before
    assert done is not None
    assert (done.rotation_id, done.outcome) == (before.rotation_id, "clean")
    assert done.counts == {"snapshot": 40, "rewrapped": done.counts["rewrapped"], "verified": 40}
    assert await scene.opened() == {key_id: (2, dek) for key_id, dek in scene.deks.items()}
    assert await scene.rotator("third").run(resume_only=True) is None


@pytest.mark.parametrize("blob", [b"\x01\0\0\x01" + b"x" * 60, b"\xff" * 64, b"short"])
async def test_damaged_record(scene: Scene, blob: bytes) -> None:
    """A record that does not unwrap is named and left, the others go on, the end is incomplete."""
    await scene.create(30)
    bad = next(iter(scene.deks))
    await scene.damage(bad, blob)
    done = await scene.rotator().run()
    assert done is not None
    assert done.outcome == "incomplete"
    assert done.counts["rewrapped"] == 29
    assert await scene.quarantined(done) == [Quarantined(bad, "wrapped_key_invalid", 1)]
    (record,) = await scene.harness.store.keys.get([bad])
    assert record is not None
    assert (record.wrapped, record.kek_version) == (blob, 1)
    del scene.deks[bad]
    assert await scene.opened() == {key_id: (2, dek) for key_id, dek in scene.deks.items()}


async def test_changed_behind_its_back(scene: Scene) -> None:
    """A record that holds another DEK than its copy is found when it is verified."""
    await scene.create(5)
    key_id = next(iter(scene.deks))
    with pytest.raises(BrokenOffError):
        await scene.rotator(stop_at="verify:opened").run()
    (record,) = await scene.harness.store.keys.get([key_id])
    assert record is not None
    _, _, (blob,) = await scene.book.wrap([b"k" * 32], [(key_id, record.thread_id)])
    await scene.damage(key_id, blob)
    done = await scene.rotator().run()
    assert done is not None
    assert done.outcome == "incomplete"
    assert await scene.quarantined(done) == [Quarantined(key_id, "differs_from_backup", 2)]


async def test_created_meanwhile(scene: Scene) -> None:
    """Keys made between the steps come under the new KEK by themselves and are verified as well."""
    await scene.create(20)
    with pytest.raises(BrokenOffError):
        await scene.rotator(stop_at="rewrap:opened").run()
    await scene.create(20)
    done = await scene.rotator().run()
    assert done is not None
    assert (done.outcome, done.counts["snapshot"], done.counts["verified"]) == ("clean", 20, 40)
    assert await scene.opened() == {key_id: (2, dek) for key_id, dek in scene.deks.items()}


async def test_workers_share(scene: Scene) -> None:
    """A leader and two workers do each slot once between them."""
    await scene.create(200)
    begun = asyncio.Event()
    leader = asyncio.create_task(scene.rotator("leader", begun=begun).run())
    await begun.wait()
    workers = [scene.rotator(f"worker-{n}").work() for n in range(2)]
    done, *ended = await asyncio.gather(leader, *workers)
    assert done is not None
    assert done.counts == {"snapshot": 200, "rewrapped": 200, "verified": 200}
    assert {rotation and rotation.outcome for rotation in ended} == {"clean"}


async def test_a_worker_waits_for_a_rotation(scene: Scene) -> None:
    """A worker that comes first waits for the leader; one that comes just after the end ends as well."""
    await scene.create(50)
    worker = asyncio.create_task(scene.rotator("worker").work(wait=1e6))
    await asyncio.sleep(0)
    done = await scene.rotator("leader").run()
    ended = await worker
    assert done is not None
    assert ended is not None
    assert ended.rotation_id == done.rotation_id
    late = await scene.rotator("late").work(wait=1e6)
    assert late is not None
    assert late.rotation_id == done.rotation_id


async def test_a_worker_waits_no_longer_than_it_was_told(scene: Scene) -> None:
    """Where no rotation comes, a worker ends in the time given to it, with nothing."""
    assert await scene.rotator("worker", clock=count(1_700_000_000).__next__).work(wait=30) is None


async def test_a_worker_without_a_leader_gives_up(scene: Scene) -> None:
    """An unfinished rotation that nobody leads ends its workers, which say what to do."""
    await scene.create(50)
    with pytest.raises(BrokenOffError):
        await scene.rotator(stop_at="rewrap:opened").run()
    with pytest.raises(Unled, match="at rewrap and nobody has led it for 30 s; run rotate again"):
        await scene.rotator("worker", clock=count(1_700_000_000).__next__).work(wait=30)


async def test_sample(scene: Scene) -> None:
    """A sample verifies some of the records of each slot."""
    await scene.create(50)
    done = await scene.rotator(sample=1).run()
    assert done is not None
    assert done.outcome == "clean"
    assert 1 <= done.counts["verified"] <= 50


class TestRedis:
    """Damage that only a real server can have."""

    async def test_census_without_record(self, redis_scene: tuple[Scene, Server]) -> None:
        """A name in a census that has no record is put in quarantine, and stops nothing."""
        scene, server = redis_scene
        await scene.create(30)
        gone = next(iter(scene.deks))
        server.ask("DEL", f"kms:{{{locate(gone)}}}:dek:{gone}")
        del scene.deks[gone]
        done = await scene.rotator().run()
        assert done is not None
        assert done.outcome == "incomplete"
        assert [record.key_id for record in await scene.quarantined(done)] == [gone]
        assert await scene.opened() == {key_id: (2, dek) for key_id, dek in scene.deks.items()}

    async def test_no_headroom(self, redis_scene: tuple[Scene, Server]) -> None:
        """Without room for the snapshot nothing is begun, and the lock is free again."""
        scene, server = redis_scene
        await scene.create(5)
        used = int(server.ask("INFO", "memory").split(b"used_memory:")[1].split()[0])
        server.configure(maxmemory=str(int(used * 1.1)))
        try:
            with pytest.raises(RotationRefused, match="no room for a snapshot"):
                await scene.rotator("first").run()
        finally:
            server.configure(maxmemory="0")
        assert await scene.harness.store.rotation_ledger.current() is None
        done = await scene.rotator("second").run()
        assert done is not None
        assert done.outcome == "clean"

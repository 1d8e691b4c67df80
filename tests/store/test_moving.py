"""Moving the older service's keys in, over every store."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.domain.envelope import open_sealed, parse_blob, wrap_aad
from progressdb_kms.domain.errors import BackupInvalid, KmsError, RotationRunning, StoreUnavailable
from progressdb_kms.domain.keys import DekRecord, KeyState, StateChange, locate, slot_tag
from progressdb_kms.domain.older import MasterKey
from progressdb_kms.ports import Imported
from progressdb_kms.usecases import moving
from progressdb_kms.usecases.destruction import sweep
from progressdb_kms.usecases.importing import import_export
from progressdb_kms.usecases.moving import Mode, Moved, Mover, Refused
from progressdb_kms.usecases.restore import Restorer
from tests.older_service import FIRST_SECOND, OlderService
from tests.store.backup_scene import Scene, make_scene
from tests.store.conftest import Harness, RedisHarness

DAY = 86_400


@pytest.fixture
async def scene(harness: Harness, tmp_path: Path) -> Scene:
    """A store with a registry and a KEK file."""
    return await make_scene(harness.store, tmp_path)


class Moving:
    """The older service, its messages, and migrations of it."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.older = OlderService()
        self.said: dict[str, bytes] = {}
        self.told: list[Refused] = []

    def create(self, thread_id: str, **form: Any) -> str:
        """Make a key and a message."""
        key_id = self.older.create(thread_id, **form)
        self.said[key_id] = self.older.encrypt(key_id, key_id.encode())
        self.scene.deks[key_id] = self.older.dek(key_id)
        return key_id

    async def move(self, lines: list[bytes] | None = None, **options: Any) -> Moved:
        """Migrate."""
        master = MasterKey(options.pop("master", self.older.master))
        self.told = []
        mover = Mover(self.scene.vault, self.scene.book, master, self.told.append, **options)
        return await mover.run(self.older.lines() if lines is None else lines, "sha256 of it")

    def reasons(self) -> list[tuple[int, str]]:
        """Return lines and reasons of what was refused."""
        return [(refused.line, refused.reason) for refused in self.told]

    async def opens(self, key_id: str, scene: Scene | None = None) -> bool:
        """Say whether what the store has decrypts, with empty AAD, what the older service encrypted."""
        scene = scene or self.scene
        record = await scene.record(key_id)
        blob = parse_blob(record.wrapped)
        (dek,) = await scene.source.unwrap(
            blob.kek_version, [blob.body], [wrap_aad(key_id, record.thread_id)]
        )
        return isinstance(dek, bytes) and open_sealed(AESGCM(dek), self.said[key_id], b"") == key_id.encode()


@pytest.fixture
def moving_in(scene: Scene) -> Moving:
    """The older service beside the store."""
    return Moving(scene)


async def everything(harness: Harness, scene: Scene) -> Any:
    """Return all that a store holds, but for the audit log, which is the test's own."""
    if isinstance(harness, RedisHarness):
        return {name: harness.server.ask("DUMP", name) for name in sorted(harness.server.ask("KEYS", "*"))}
    page = await scene.store.keys.list_keys(thread_id=None, state=None, limit=1000, cursor=None)
    return page.records, await scene.store.registry.wraps()


async def test_old_ciphertexts_decrypt_by_the_same_id(moving_in: Moving, scene: Scene) -> None:
    """Keys of both stored forms come with thread and time, enabled, bound to their names, counted."""
    one, two = moving_in.create("room:1"), moving_in.create("room:2", raw=True)
    three = moving_in.create("room:1", meta=False)
    moved = await moving_in.move(moving_in.older.lines(threads=True))
    assert moved == Moved(read=3, moved=3, complete=True)
    for key_id, thread, version in ((one, "room:1", 1), (two, "room:2", 1), (three, "room:1", 2)):
        record = await scene.record(key_id)
        assert (record.thread_id, record.version, record.state) == (thread, version, KeyState.ENABLED)
        assert (record.created_at, record.created_by) == (FIRST_SECOND, "migration")
        assert await moving_in.opens(key_id)
    assert await scene.store.keys.census() == {1: 3}
    assert [(event.outcome, event.detail) for event in scene.audit.events] == [
        ("intent", "sha256 of it"),
        ("ok", "sha256 of it; read 3, moved 3, present 0, destroyed 0, refused 0"),
    ]


def marks(harness: Harness, key_ids: list[str]) -> list[int]:
    """Return how often the slot of each was written to by calls that change nothing."""
    if not isinstance(harness, RedisHarness):
        return []
    ask = harness.server.ask
    return [int(ask("HGET", f"kms:{{{locate(key_id)}}}:ctl", "touched") or 0) for key_id in key_ids]


async def test_again_changes_nothing(moving_in: Moving, scene: Scene, harness: Harness) -> None:
    """The second time finds all there, the same blobs; what is new in the file comes."""
    keys = [moving_in.create(f"room:{n}") for n in range(3)]
    await moving_in.move()
    before = await scene.store.keys.get(keys)
    touched = marks(harness, keys)
    assert await moving_in.move() == Moved(read=3, present=3, complete=True)
    # Each was written to, so that what is told as present has been waited for as what is moved.
    assert all(after > before for before, after in zip(touched, marks(harness, keys), strict=True))
    moving_in.create("room:9")
    assert await moving_in.move() == Moved(read=4, moved=1, present=3, complete=True)
    assert await scene.store.keys.get(keys) == before


async def test_a_dry_run_and_a_verification_touch_nothing(
    moving_in: Moving, scene: Scene, harness: Harness
) -> None:
    """They say what would be, or is; not a byte of the store changes, and nothing is audited."""
    moving_in.create("room:1")
    before = await everything(harness, scene)
    assert await moving_in.move(mode=Mode.DRY_RUN) == Moved(read=1, moved=1, complete=True)
    assert await moving_in.move(mode=Mode.VERIFY) == Moved(read=1, refused=1, complete=True)
    assert moving_in.reasons() == [(1, "the store does not have it")]
    assert await everything(harness, scene) == before
    assert scene.audit.events == []
    await moving_in.move()
    before = await everything(harness, scene)
    for mode in (Mode.DRY_RUN, Mode.VERIFY):
        assert await moving_in.move(mode=mode) == Moved(read=1, present=1, complete=True)
    assert await everything(harness, scene) == before


async def test_damaged_lines_stop_nothing(moving_in: Moving) -> None:
    """Each is told with its number and reason, and counted; all others are moved."""
    keys = [moving_in.create(f"room:{n}") for n in range(3)]
    torn = moving_in.older.line(keys[0])[:40] + b"\n"
    forged = moving_in.older.line(keys[0], key_id="k_5", dek=moving_in.older.line(keys[0]).decode()[40:44])
    moved = await moving_in.move(moving_in.older.lines(extra=[torn, b"\n", forged]))
    assert (moved.read, moved.moved, moved.refused, moved.unopened) == (5, 3, 2, 0)
    assert [refused.line for refused in moving_in.told] == [2, 4]
    assert {refused.key_id for refused in moving_in.told} == {""}
    assert all([await moving_in.opens(key_id) for key_id in keys])


async def test_a_damaged_wrap_is_told_by_its_id(moving_in: Moving, scene: Scene) -> None:
    """What the master key does not open is not moved."""
    bad, good = moving_in.create("a", raw=True), moving_in.create("a")
    moving_in.older.store[f"dek:{bad}"] = secrets.token_bytes(60)
    moved = await moving_in.move(moving_in.older.lines(threads=True))
    assert (moved.moved, moved.refused, moved.unopened) == (1, 1, 1)
    assert moving_in.told[0].key_id == bad
    assert "does not open under this master key" in moving_in.told[0].reason
    assert await scene.store.keys.get([bad]) == [None]
    assert await moving_in.opens(good)


async def test_a_wrong_master_key_moves_nothing(moving_in: Moving, scene: Scene, harness: Harness) -> None:
    """Every key is refused, and the store stays as it is."""
    for n in range(3):
        moving_in.create(f"room:{n}")
    moved = await moving_in.move(master=secrets.token_bytes(32))
    assert moved == Moved(read=3, refused=3, unopened=3, complete=True)
    assert await scene.store.keys.census() == {}


async def test_another_dek_under_the_same_id_is_never_overwritten(moving_in: Moving, scene: Scene) -> None:
    """It is told, and the store keeps what it has."""
    key_id = moving_in.create("a")
    await moving_in.move()
    before = await scene.record(key_id)
    second = Moving(scene)
    second.create("a", key_id=key_id)
    for mode in Mode:
        moved = await second.move(mode=mode)
        assert moved == Moved(read=1, refused=1, complete=True)
        assert "another key under this id" in second.told[0].reason
    assert await scene.record(key_id) == before
    # Twice in one file: the first one stays.
    third = Moving(scene)
    third.create("a", key_id="k_3")
    line = third.older.line("k_3")
    third.create("a", key_id="k_3")
    lines = [line, third.older.line("k_3"), line, b'{"keys": 3}']
    moved = await third.move(lines)
    assert (moved.moved, moved.present, moved.refused) == (1, 1, 1)


async def test_another_thread_under_the_same_id_is_refused(moving_in: Moving, scene: Scene) -> None:
    """A key's thread decides who may use it: it is never changed."""
    key_id = moving_in.create("a", raw=True)
    lines = [moving_in.older.line(key_id, thread_id="a"), b'{"keys": 1}']
    await moving_in.move(lines)
    lines[0] = moving_in.older.line(key_id, thread_id="b")
    for mode in Mode:
        assert (await moving_in.move(lines, mode=mode)).refused == 1
        assert moving_in.reasons() == [(1, "the store has it under another thread")]
    assert (await scene.record(key_id)).thread_id == "a"


async def test_a_key_without_a_thread(moving_in: Moving, scene: Scene) -> None:
    """It is refused, unless it is said what its thread is to be called."""
    key_id = moving_in.create("a", raw=True)
    assert (await moving_in.move()).refused == 1
    assert "nothing tells its thread" in moving_in.told[0].reason
    assert (await moving_in.move(prefix="x" * 250)).refused == 1
    assert (await moving_in.move(prefix="older:")).moved == 1
    assert (await scene.record(key_id)).thread_id == f"older:{key_id}"
    assert await moving_in.opens(key_id)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:-1],
        lambda lines: lines[1:],
        lambda lines: [*lines, *lines],
        lambda lines: [lines[-1], *lines[:-1]],
        lambda lines: [*lines[:-1], lines[-1], b'{"keys": 9}'],
    ],
)
async def test_a_file_that_is_not_whole_is_found_out(moving_in: Moving, change: Any) -> None:
    """What it holds is moved; that keys may be missing is told."""
    for n in range(2):
        moving_in.create(f"room:{n}")
    moved = await moving_in.move(change(moving_in.older.lines()))
    assert not moved.complete
    assert moved.moved + moved.present >= 1


@pytest.mark.parametrize("calls", range(1, 12, 2))
async def test_killed_in_the_middle(
    moving_in: Moving, scene: Scene, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Whichever call it dies at, running it again moves the rest, and all open."""
    monkeypatch.setattr(moving, "BATCH", 2)
    keys = [moving_in.create(f"room:{n % 3}") for n in range(9)]
    left = calls
    read, create = scene.store.backups.read, scene.store.keys.create

    def counted(call: Any) -> Any:
        async def counting(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise StoreUnavailable("died")
            return await call(*arguments)

        return counting

    with monkeypatch.context() as patched:
        patched.setattr(scene.store.backups, "read", counted(read))
        patched.setattr(scene.store.keys, "create", counted(create))
        try:
            await moving_in.move()
        except StoreUnavailable:
            assert scene.audit.events[-1].outcome == "failed"
    moved = await moving_in.move()
    assert moved.moved + moved.present == 9
    assert moved.complete
    assert all([await moving_in.opens(key_id) for key_id in keys])
    for n in range(3):
        page = await scene.store.keys.list_keys(thread_id=f"room:{n}", state=None, limit=9, cursor=None)
        assert [record.key_id for record in page.records] == keys[n::3]
        assert [record.version for record in page.records] == [1, 2, 3]


async def test_a_wrap_that_does_not_unwrap_is_not_written(
    moving_in: Moving, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each new wrap is opened before it is written: nothing is moved that could not be read."""
    moving_in.create("a")
    wrap = scene.book.wrap

    async def bad(deks: Any, names: Any) -> Any:
        return await wrap([secrets.token_bytes(32) for _ in deks], names)

    monkeypatch.setattr(scene.book, "wrap", bad)
    with pytest.raises(BackupInvalid, match="does not unwrap to the same key"):
        await moving_in.move()
    assert await scene.store.keys.census() == {}


async def test_not_beside_a_rotation(moving_in: Moving, scene: Scene) -> None:
    """Whoever has the lock of rotations is not disturbed."""
    moving_in.create("a")
    await scene.store.rotation_ledger.acquire("other", 60)
    with pytest.raises(RotationRunning):
        await moving_in.move()
    assert await scene.store.keys.census() == {}


async def test_a_rotation_takes_moved_keys_along(moving_in: Moving, scene: Scene) -> None:
    """They are snapshotted, wrapped under the new KEK and verified like all; a damaged one is restored."""
    keys = [moving_in.create(f"room:{n}") for n in range(5)]
    await moving_in.move()
    made = await scene.rotate()
    assert made.outcome == "clean"
    for key_id in keys:
        assert (await scene.record(key_id)).kek_version == 2
        assert await moving_in.opens(key_id)
    assert await scene.store.keys.census() == {2: 5}
    await scene.damage(keys[0])
    found = await Restorer(scene.vault, scene.book).from_snapshot(made.rotation_id, [keys[0]])
    assert found.restored == [keys[0]]
    assert await moving_in.opens(keys[0])
    assert await moving_in.move() == Moved(read=5, present=5, complete=True)


async def test_exports_carry_moved_keys(moving_in: Moving, scene: Scene, harness: Harness) -> None:
    """An import into an empty store brings them back, listed with their threads; a merge replaces nothing."""
    keys = [moving_in.create("room:1"), moving_in.create("room:1"), moving_in.create("room:2")]
    await scene.create("room:1")
    await moving_in.move()
    await scene.store.keys.change_state(keys[1], StateChange.DISABLE, now=scene.now)
    before = await scene.store.keys.get(keys)
    file = await scene.export()
    assert (await import_export(scene.vault, file.chunks, merge=True)).counts == {"present": 4}
    harness.lose_all()
    new = await scene.elsewhere(harness.store)
    assert (await import_export(new.vault, file.chunks)).counts == {"added": 4}
    assert await new.store.keys.get(keys) == before
    page = await new.store.keys.list_keys(thread_id="room:1", state=None, limit=9, cursor=None)
    assert [record.key_id for record in page.records][1:] == keys[:2]
    assert [record.version for record in page.records] == [1, 2, 3]
    await new.book.start(new.now)
    assert await new.store.keys.census() == {1: 4}
    assert await moving_in.opens(keys[2], new)
    (later,) = await new.create("room:1")
    assert later.version == 4


async def test_an_import_does_not_list_another_threads_key(
    moving_in: Moving, scene: Scene, harness: Harness
) -> None:
    """A record that the store has under another thread is left out, of the thread's index too."""
    key_id = moving_in.create("a")
    await moving_in.move()
    record = await scene.record(key_id)
    other = DekRecord(key_id, "b", *[getattr(record, name) for name in list(DekRecord.__slots__)[2:]])
    assert await scene.store.backups.import_records([other]) == [Imported.COLLISION]
    page = await scene.store.keys.list_keys(thread_id="b", state=None, limit=9, cursor=None)
    assert page.records == ()
    if isinstance(harness, RedisHarness):
        assert harness.server.ask("ZCARD", f"kms:{{{slot_tag('b')}}}:thread:b") == 0


async def test_a_moved_key_is_destroyed_for_good(moving_in: Moving, scene: Scene) -> None:
    """From record and snapshot; a later migration leaves it so, and counts it."""
    key_id, other = moving_in.create("a"), moving_in.create("b")
    await moving_in.move()
    made = await scene.rotate()
    await scene.schedule(key_id, scene.now - 1)
    swept = await sweep(scene.vault)
    assert swept is not None
    assert swept.destroyed == [key_id]
    assert [found for found in await scene.store.destruction.destructions([key_id]) if found] != []
    for mode in Mode:
        assert await moving_in.move(mode=mode) == Moved(read=2, present=1, destroyed=1, complete=True)
    assert (await scene.record(key_id)).wrapped == b""
    manifests = (await scene.store.backups.snapshots())[made.rotation_id]
    kept = [
        entry
        for tag, manifest in manifests.items()
        for bucket in range(manifest.buckets)
        for entry, _ in await scene.store.rotation_slots.read_bucket(tag, made.rotation_id, bucket)
    ]
    assert kept == [other]


async def test_nothing_secret_is_told(moving_in: Moving, scene: Scene) -> None:
    """Neither master key nor DEK nor wrap, in any form, is in what is told and audited."""
    moving_in.create("a")
    moving_in.create("b", raw=True)
    moving_in.older.store["dek:k_9"] = secrets.token_bytes(60)
    moving_in.older.threads["k_9"] = "c"
    lines = moving_in.older.lines(threads=True, extra=[b'{"key_id": "k_1", "dek": 5}\n'])
    scene.book._lost = "gone"
    with pytest.raises(KmsError):
        await moving_in.move(lines)
    scene.book._lost = ""
    await moving_in.move(lines)
    text = repr((moving_in.told, scene.audit.events))
    secret = [moving_in.older.master, *scene.deks.values(), *moving_in.older.store.values()]
    for each in secret:
        assert each.hex()[:16] not in text
        assert repr(each)[2:10] not in text
        assert json.dumps(each.hex()) not in text

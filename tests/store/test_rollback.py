"""Rolling a rotation back, over every store."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from progressdb_kms.domain.errors import Fenced, RotationRefused
from progressdb_kms.domain.keys import ALL_TAGS
from progressdb_kms.domain.rotation import Rotation, Step
from progressdb_kms.ports import Heartbeat
from progressdb_kms.usecases import crew, rollback, rotation, slotwork
from progressdb_kms.usecases.rollback import Rollback
from progressdb_kms.usecases.rotation import Conduct, Interrupted
from tests.store.conftest import Harness
from tests.store.test_rotation_end_to_end import BrokenOffError, Scene, make_scene


class Said:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.waited: list[list[str]] = []
        self.warnings: list[str] = []

    def step(self, rotation: Rotation, total: int) -> None:
        """Say nothing."""

    def slot(self, counts: Mapping[str, int]) -> None:
        """Say nothing."""

    def waiting(self, missing: Sequence[str], gone: Sequence[str]) -> None:
        """Keep who is waited for."""
        self.waited.append([*missing, *gone])

    def warning(self, text: str) -> None:
        """Keep it."""
        self.warnings.append(text)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait long, and let there be few slots."""
    for module in (crew, rollback, rotation):
        monkeypatch.setattr(module, "IDLE", 0.01)
    for module in (crew, rollback, rotation, slotwork):
        monkeypatch.setattr(module, "ALL_TAGS", ALL_TAGS[::128])


@pytest.fixture
async def scene(harness: Harness, tmp_path: Path) -> Scene:
    """Give a store of few slots with forty keys."""
    made = await make_scene(harness, tmp_path)
    made.tags = ALL_TAGS[::128]
    await made.create(40)
    return made


def back(scene: Scene, said: Said | None = None, **changes: object) -> Rollback:
    """Return a rollback."""
    parts = replace(scene.rotator()._parts, progress=said or Said(), **changes)  # type: ignore[arg-type] # as given
    return Rollback(parts, Conduct(page=7, wait=0), "back")


async def rotated(scene: Scene) -> Rotation:
    """Rotate once."""
    done = await scene.rotator().run()
    assert done is not None
    assert done.outcome == "clean"
    return done


async def test_copies_come_back_as_they_were(scene: Scene) -> None:
    """After it every record has the very blob that it had before the rotation, and 1 is active."""
    store = scene.harness.store
    before = await store.keys.get(sorted(scene.deks))
    done = await rotated(scene)
    made = back(scene)
    ended = await made.run()
    assert (ended.step, ended.outcome, ended.rotation_id) == ("rolled_back", "rolled_back", done.rotation_id)
    assert ended.counts["rolled_back"] == 40
    assert made.leftovers.made_since == []
    assert await store.keys.get(sorted(scene.deks)) == before
    assert scene.book.active == 1
    await scene.create(3)
    assert await store.keys.census() == {1: 43}
    with pytest.raises(RotationRefused, match="no rotation to roll back"):
        await back(scene).run()
    again = await scene.rotator().run()
    assert again is not None
    assert (again.outcome, again.target_version) == ("clean", 3)
    assert {version for version, _ in (await scene.opened()).values()} == {3}


async def test_what_was_made_since_is_named_and_kept(scene: Scene) -> None:
    """A key without a copy stays under the target version; a destroyed one stays destroyed."""
    await rotated(scene)
    old = set(scene.deks)
    await scene.create(5)
    gone = min(old)
    scene.harness.destroy(gone)
    made = back(scene)
    ended = await made.run()
    assert set(made.leftovers.made_since) == set(scene.deks) - old
    assert ended.counts["made_since"] == 5
    (record,) = await scene.harness.store.keys.get([gone])
    assert record is not None
    assert record.wrapped == b""
    del scene.deks[gone]
    opened = await scene.opened()
    assert {key_id: dek for key_id, (_, dek) in opened.items()} == scene.deks
    assert {version for key_id, (version, _) in opened.items() if key_id in old} == {1}


async def test_a_copy_that_does_not_open_replaces_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged copy is named, and the record keeps the blob that it has."""
    await rotated(scene)
    slots = scene.harness.store.rotation_slots
    bad = min(scene.deks)
    page = slots.page

    async def damaged(*args: object, **options: object) -> object:
        found = await page(*args, **options)  # type: ignore[arg-type] # as it was called
        records = [
            replace(record, backup=record.backup[:-1] + bytes([record.backup[-1] ^ 1]))
            if record.key_id == bad
            else record
            for record in found.records
        ]
        return replace(found, records=tuple(records))

    monkeypatch.setattr(slots, "page", damaged)
    made = back(scene)
    ended = await made.run()
    assert made.leftovers.bad_copy == [bad]
    assert ended.counts["bad_copy"] == 1
    opened = await scene.opened()
    assert opened[bad] == (2, scene.deks[bad])
    assert await scene.harness.store.keys.census() == {1: 39, 2: 1}


async def test_copies_under_a_still_older_version_are_wrapped_anew(scene: Scene) -> None:
    """What an incomplete rotation left under version 1 comes back under 2, which is active again."""
    victim = min(scene.deks)
    (record,) = await scene.harness.store.keys.get([victim])
    assert record is not None
    good = record.wrapped
    await scene.damage(victim, good[:-1] + bytes([good[-1] ^ 1]))
    first = await scene.rotator().run()
    assert first is not None
    assert first.outcome == "incomplete"
    # As a restore of the backup would, but under the old version, which the floor forbids.
    scene.harness.set_floor(record.thread_id, 0)
    await scene.damage(victim, good)
    scene.harness.set_floor(record.thread_id, 2)
    second = await scene.rotator().run()
    assert second is not None
    assert second.outcome == "clean"
    await back(scene).run()
    assert await scene.opened() == {key_id: (2, dek) for key_id, dek in scene.deks.items()}


@pytest.mark.parametrize("point", ["begun", "distribute:done", "activated", "snapshot:done", "rewrap:slot"])
async def test_from_any_step(scene: Scene, point: str) -> None:
    """A rotation that was broken off anywhere is rolled back; before activation nothing has to be done."""
    with pytest.raises(BrokenOffError):
        await scene.rotator("killed", stop_at=point).run()
    ended = await back(scene).run()
    assert ended.outcome == "rolled_back"
    assert await scene.opened() == {key_id: (1, dek) for key_id, dek in scene.deks.items()}
    assert await scene.harness.store.rotation_ledger.current() is None
    await rotated(scene)


async def test_a_version_that_was_rolled_back_and_lost_is_done_without(scene: Scene) -> None:
    """The next rotation goes on without it where no key is under it, and is refused where one is."""
    with pytest.raises(BrokenOffError):
        await scene.rotator("killed", stop_at="rewrap:slot").run()
    first = scene.source.export(1).hex()
    scene.path.write_text(f"versions:\n  1: {first}\n")
    scene.source.reload({})
    await scene.book.refresh()
    (latest,) = await scene.harness.store.rotation_ledger.list_rotations(1)
    assert (await back(scene).run()).counts.get("bad_copy", 0) == 0
    assert scene.book.lacking == (latest.target_version,) == (2,)
    done = await scene.rotator().run()
    assert done is not None
    assert (done.outcome, done.target_version) == ("clean", 3)
    assert await scene.opened() == {key_id: (3, dek) for key_id, dek in scene.deks.items()}
    # Version 1 goes as well, and a key is put back under it: now something needs what is lacking.
    assert (await back(scene).run()).outcome == "rolled_back"
    third = scene.source.export(3).hex()
    scene.path.write_text(f"versions:\n  3: {third}\n")
    scene.source.reload({})
    await scene.book.refresh()
    with pytest.raises(RotationRefused, match="not in order: KEK version 1"):
        await scene.rotator().run()


async def test_a_rollback_that_was_begun_is_finished_as_one(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off, it is resumed by another rollback; rotating on is refused."""
    await rotated(scene)

    def reached(name: str) -> None:
        if name == "rollback:slot":
            raise BrokenOffError(name)

    # The next one need not wait for what the slots of this one were leased for.
    monkeypatch.setattr(crew, "LEASE", 0.0)
    with pytest.raises(BrokenOffError):
        await back(scene, reached=reached).run()
    monkeypatch.setattr(crew, "LEASE", 15.0)
    with pytest.raises(RotationRefused, match="--rollback"):
        await scene.rotator().run()
    assert (await back(scene).run()).outcome == "rolled_back"
    assert await scene.harness.store.keys.census() == {1: 40}


async def test_refused_where_it_would_not_help(scene: Scene) -> None:
    """No rotation, a retired or unloaded source version, another active version: each is refused by name."""
    with pytest.raises(RotationRefused, match="no rotation"):
        await back(scene).run()
    done = await rotated(scene)
    store = scene.harness.store
    scene.path.write_text(scene.path.read_text().replace("  1: ", "  9: "))
    scene.source.reload({})
    await scene.book.refresh()
    with pytest.raises(RotationRefused, match="version 1, which would be active again, is not loaded"):
        await back(scene).run()
    await store.registry.retire(1, lock=await store.rotation_ledger.acquire("retire", 0))
    await scene.book.refresh()
    with pytest.raises(RotationRefused, match="version 1 is retired"):
        await back(scene).run()
    ledger = store.rotation_ledger
    lock = await ledger.acquire("other", 60)
    await ledger.save(replace(done, rotation_id="r_5_x", target_version=5, started_at=2_000_000_000), lock)
    await ledger.release(lock)
    with pytest.raises(RotationRefused, match="version 2 is active and not 5"):
        await back(scene).run()


async def test_instances_that_do_not_know_yet_are_named(scene: Scene) -> None:
    """Who still wraps under the target version is waited for, then named in a warning."""
    await rotated(scene)
    beats = scene.harness.store.heartbeats
    now = 1_700_000_100.0
    await beats.beat(Heartbeat("late", now, now, "1", (1, 2), 2, ""))
    await beats.beat(Heartbeat("asleep", now - 60, now, "1", (1, 2), 2, ""))
    view = await scene.harness.store.registry.load()
    assert view is not None
    # What it knew before the rotation brought version 2 says nothing of what it has wrapped under since.
    await beats.beat(Heartbeat("unheard", now, now, "1", (1, 2), 1, "", view.revision))
    await beats.beat(Heartbeat("good", now, now, "1", (1, 2), 1, "", view.revision + 1))
    await beats.beat(Heartbeat("older", now, now, "1", (1, 2), 1, ""))
    said = Said()
    await back(scene, said).run()
    (warning,) = said.warnings
    assert set(warning.rpartition(": ")[2].split(", ")) == {"late", "unheard", "asleep"}


async def test_ends_between_slots_when_asked(scene: Scene) -> None:
    """Asked to stop it gives the lock back, and another goes on at once."""
    await rotated(scene)
    with pytest.raises(Interrupted):
        await back(scene, stopping=lambda: True).run()
    assert (await back(scene).run()).step is Step.ROLLED_BACK


async def test_a_lost_lock_ends_it(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken over by another, it writes nothing more."""
    await rotated(scene)
    monkeypatch.setattr(crew, "RENEW", 0.01)
    monkeypatch.setattr(crew, "LEASE", 0.0)
    ledger = scene.harness.store.rotation_ledger
    await scene.harness.store.heartbeats.beat(Heartbeat("late", 1_700_000_100.0, 0, "1", (1, 2), 2, ""))
    parts = replace(scene.rotator()._parts, progress=Said())
    running = asyncio.create_task(Rollback(parts, Conduct(wait=1000), "first").run())
    while (await ledger.list_rotations(1))[0].step is not Step.ROLLBACK:  # noqa: ASYNC110 - the store tells nobody
        await asyncio.sleep(0.01)
    await ledger.acquire("second", 60)
    with pytest.raises(Fenced):
        await running

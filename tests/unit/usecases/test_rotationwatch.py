"""What every instance says of rotations, and who may ask."""

from __future__ import annotations

import asyncio

import pytest

from progressdb_kms.domain.errors import PermissionDenied, RotationNotFound, StoreUnavailable
from progressdb_kms.domain.rotation import Outcome, Rotation, Step
from progressdb_kms.observability.metrics import ROTATION, Metrics
from progressdb_kms.usecases.rotationwatch import RotationWatch, get_rotation, list_rotations
from tests.unit.helpers import World


async def put(world: World, *rotations: Rotation) -> None:
    """Store rotations."""
    ledger = world.store.rotation_ledger
    lock = await ledger.acquire("test", 60)
    for rotation in rotations:
        await ledger.save(rotation, lock)


DONE = Rotation("r_2_a", 1, 2, Step.COMPLETE, 10, 20, finished_at=25, outcome=str(Outcome.CLEAN))
BAD = Rotation("r_3_b", 2, 3, Step.COMPLETE, 30, 40, finished_at=45, outcome=str(Outcome.INCOMPLETE))
RUNNING = Rotation("r_4_c", 3, 4, Step.REWRAP, 50, 60)


async def test_who_may_ask(world: World) -> None:
    """rotation:run or key:read for all threads lets one in; key:read for some threads does not."""
    await put(world, DONE)
    ledger = world.store.rotation_ledger
    for name in ("server", "operator"):
        (found,) = await list_rotations(ledger, world.session(name), 10)
        assert found.rotation_id == "r_2_a"
        assert (await get_rotation(ledger, world.session(name), "r_2_a")).outcome == "clean"
    for name in ("room", "nobody"):
        with pytest.raises(PermissionDenied):
            await list_rotations(ledger, world.session(name), 10)
        with pytest.raises(PermissionDenied):
            await get_rotation(ledger, world.session(name), "r_2_a")
    with pytest.raises(RotationNotFound):
        await get_rotation(ledger, world.session("server"), "r_9_x")


async def test_facts_follow_the_latest_rotation(world: World) -> None:
    """Step, progress and quarantine are the latest rotation's; the last success is that of a clean one."""
    watch = RotationWatch(world.keks, world.store.keys, world.store.rotation_ledger)
    assert watch.facts(100) == {}
    await watch.look()
    assert watch.facts(100)["kms_rotation_running"] == 0
    assert "kms_rotation_last_success_timestamp_seconds" not in watch.facts(100)
    await put(world, DONE, BAD, RUNNING)
    await watch.look()
    facts = watch.facts(world.now() + 7)
    assert facts["kms_rotation_running"] == 1
    assert facts["kms_rotation_step"] == {"rewrap": 1}
    assert facts["kms_rotation_last_success_timestamp_seconds"] == 25
    assert facts["kms_kek_active_version"] == world.keks.active
    assert facts["kms_kek_census"] == {str(version): 0 for version in world.keks.view.keks}
    assert facts.keys() <= ROTATION.keys()


async def test_metrics_show_the_facts(world: World) -> None:
    """Each fact is a gauge; one that is not known yet is left out."""
    watch = RotationWatch(world.keks, world.store.keys, world.store.rotation_ledger)
    metrics = Metrics()
    metrics.facts(lambda: watch.facts(100))
    assert b"kms_rotation" not in metrics.render()
    await put(world, RUNNING)
    await watch.look()
    page = metrics.render().decode()
    assert 'kms_rotation_step{step="rewrap"} 1.0' in page
    assert "kms_rotation_running 1.0" in page
    assert "kms_rotation_last_success" not in page


async def test_looking_outlives_a_store_that_is_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the store is away what was seen last stays, and looking goes on."""
    monkeypatch.setattr("progressdb_kms.usecases.rotationwatch.WATCH_EVERY", 0.01)
    answers = iter([StoreUnavailable("away")])

    async def census() -> dict[int, int]:
        for error in answers:
            raise error
        return {1: 7}

    monkeypatch.setattr(world.store, "census", census)
    watch = RotationWatch(world.keks, world.store.keys, world.store.rotation_ledger)
    running = asyncio.create_task(watch.run())
    async with asyncio.timeout(30):
        while not (facts := watch.facts(1)):  # noqa: ASYNC110 - the watch tells nobody
            await asyncio.sleep(0.01)
    running.cancel()
    census_seen = facts["kms_kek_census"]
    assert isinstance(census_seen, dict)
    assert census_seen["1"] == 7

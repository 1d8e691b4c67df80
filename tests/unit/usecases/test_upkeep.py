"""What an instance does by itself: follow notices, notice an away store, report uses, beat."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from progressdb_kms.domain import errors
from progressdb_kms.domain.keys import StateChange
from progressdb_kms.ports import Changes
from progressdb_kms.usecases import upkeep
from progressdb_kms.usecases.upkeep import Upkeep
from progressdb_kms.usecases.vault import Vault
from tests.unit.helpers import World

PATIENCE = 60.0
"""Seconds after which a test that waits for something fails."""


async def until(true: Callable[[], object]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(PATIENCE):
        while not true():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.002)


def _vault(world: World) -> Vault:
    """What the world's service destroys keys with."""
    store = world.store
    return Vault(
        keys=store.keys,
        backups=store.backups,
        destruction=store.destruction,
        ledger=store.rotation_ledger,
        slots=store.rotation_slots,
        registry=store.registry,
        source=world.source,
        audit=world.trail,
        owner="me",
        release="1.2.3",
        now=world.now,
    )


@pytest.fixture
async def running(world: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Upkeep]:
    """The service's background work, in haste."""
    for name in ("NOTICE_WAIT", "REGISTRY_EVERY", "HEARTBEAT_EVERY", "STORE_EVERY", "USES_EVERY"):
        monkeypatch.setattr(upkeep, name, 0.005)
    work = Upkeep(
        kms=world.kms,
        loader=world.loader,
        health=world.store.health,
        heartbeats=world.store.heartbeats,
        release="1.2.3",
        instance="me",
        vault=_vault(world),
    )
    work.start()
    await until(lambda: world.store.calls["changes"] > 2)
    world.clock.at += 10  # settled
    await until(lambda: world.cache._read_began == world.clock.at)
    yield work
    await work.stop()


async def test_a_change_elsewhere_drops_the_key(world: World, running: Upkeep) -> None:
    """A notice that another instance put reaches this one's memory."""
    key_id = await world.key()
    assert world.cache.lookup(key_id) is not None
    await world.store.change_state(key_id, StateChange.DISABLE, now=0)
    await until(lambda: world.cache.lookup(key_id) is None)
    with pytest.raises(errors.KeyDisabled):
        await world.encrypt(key_id)


async def test_an_away_store_is_noticed_and_its_return_too(world: World, running: Upkeep) -> None:
    """While it is away cached keys serve; when it is back its notices count again, and none was missed."""
    key_id = await world.key()
    world.store.down = True
    await until(lambda: world.loader.store_away)
    world.clock.at += 5
    assert await world.encrypt(key_id)
    await world.store.change_state(key_id, StateChange.DISABLE, now=0)  # the way back is this far
    world.store.down = False
    await until(lambda: not world.loader.store_away)
    await until(lambda: world.cache.lookup_stale(key_id) is None)
    with pytest.raises(errors.KeyDisabled):
        await world.encrypt(key_id)


async def test_after_a_gap_nothing_in_memory_is_trusted(world: World, running: Upkeep) -> None:
    """A minute without a whole read: notices may have been trimmed unread, so memory starts anew."""
    key_id = await world.key()
    world.store.down = True
    await until(lambda: world.loader.store_away)
    world.clock.at += upkeep.GAP + 1
    world.store.down = False
    await until(lambda: len(world.cache) == 0)
    await until(lambda: not world.loader.store_away)
    assert await world.encrypt(key_id)
    assert len(world.cache) == 0


async def test_an_incomplete_read_starts_anew(
    world: World, running: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where notices were trimmed unread, everything is dropped and reading begins at the end."""
    await world.key()
    assert len(world.cache) == 1
    honest, once = world.store.changes, [True]

    async def trimmed(cursor: str | None, wait: float) -> Changes:
        changes = await honest(cursor, wait)
        if cursor is not None and once:
            once.clear()
            return Changes(changes.cursor, frozenset(), complete=False)
        return changes

    monkeypatch.setattr(world.store, "changes", trimmed)
    await until(lambda: len(world.cache) == 0)
    world.clock.at += 10
    await until(lambda: world.cache._read_began == world.clock.at)
    await world.key()
    assert len(world.cache) == 1


async def test_heartbeats_say_what_this_instance_is(world: World, running: Upkeep) -> None:
    """Version, KEKs, policy; and withdrawn at the end."""
    await until(lambda: world.store._heartbeats)
    (beat,) = await world.store.live()
    assert (beat.instance, beat.release, beat.policy_generation) == ("me", "1.2.3", "g1")
    assert (beat.kek_versions, beat.active) == ((1,), 1)
    assert beat.revision == world.kms.keks.view.revision > 0
    await running.stop()
    assert await world.store.live() == []


async def test_uses_are_reported_and_kept_while_the_store_is_away(world: World, running: Upkeep) -> None:
    """What the store does not take is owed, and told when it is back."""
    key_id = await world.key()
    await world.encrypt(key_id)
    world.store.down = True
    world.cache.forget([key_id])
    await until(lambda: world.store.calls["reserve_uses"] > 2)
    world.store.down = False
    await until(lambda: world.store._records[key_id].uses == 1)


async def test_an_orderly_end_reports_all_uses(world: World, running: Upkeep) -> None:
    """Nothing that was encrypted is forgotten by a stop, and nothing is counted twice."""
    key_id = await world.key()
    for _ in range(5):
        await world.encrypt(key_id)
    await running.stop()
    assert world.store._records[key_id].uses == 5
    assert len(world.cache) == 0


async def test_an_end_without_a_store_is_an_end(world: World, running: Upkeep) -> None:
    """A stop does not hang or fail on a store that is away."""
    key_id = await world.key()
    await world.encrypt(key_id)
    world.store.down = True
    await running.stop()


async def test_a_failing_task_goes_on_and_complains_once(
    world: World, running: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry's loss is logged once, not once a second, and its return is found."""
    calls = []

    async def lost() -> None:
        calls.append(1)
        if len(calls) < 20:
            raise errors.RegistryLost("the registry is lost")

    said = []

    class Log:
        def warning(self, _event: str, **fields: str) -> None:
            said.append(fields["detail"])

    monkeypatch.setattr(upkeep, "log", Log())
    monkeypatch.setattr(world.store, "load", lost)
    await until(lambda: len(calls) > 21)
    assert said.count("the registry is lost") == 1
    assert "has gone" in world.keks.problem


async def test_a_bug_does_not_end_the_upkeep(
    world: World, running: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody expects is logged, and the work goes on from a safe state."""
    key_id = await world.key()
    real = world.store.changes

    async def broken(cursor: str | None, wait: float) -> Changes:
        monkeypatch.setattr(world.store, "changes", real)
        raise RuntimeError("a bug")

    monkeypatch.setattr(upkeep, "PAUSE_AFTER_BUG", 0.005)
    monkeypatch.setattr(world.store, "changes", broken)
    await until(lambda: len(world.cache) == 0)
    await world.store.change_state(key_id, StateChange.DISABLE, now=0)
    world.clock.at += 10
    await until(lambda: world.cache._read_began == world.clock.at)
    with pytest.raises(errors.KeyDisabled):
        await world.encrypt(key_id)

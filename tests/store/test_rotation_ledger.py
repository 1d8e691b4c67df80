"""What every store promises of rotations' locks, records, shared work and KEK states."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from progressdb_kms.domain.errors import (
    Fenced,
    InstancesMissing,
    KekMismatch,
    RegistryLost,
    RotationRefused,
    RotationRunning,
)
from progressdb_kms.domain.keyring import KekState
from progressdb_kms.domain.rotation import Rotation, Step
from progressdb_kms.ports import Claim, Heartbeat, Lock
from tests.store.conftest import Harness, new_kek

SNAPSHOT = Step.SNAPSHOT
LONG = 600.0
TAGS = ("AA", "AB", "AC", "AD", "AE")


def rotation(rotation_id: str = "r_2_aa", started_at: int = 100, step: Step = Step.DISTRIBUTE) -> Rotation:
    """Make up a rotation."""
    return Rotation(rotation_id, 1, 2, step, started_at, started_at)


async def opened(harness: Harness) -> Lock:
    """Open the snapshot's work of a rotation."""
    ledger = harness.store.rotation_ledger
    lock = await ledger.acquire("leader", LONG)
    await ledger.save(rotation(), lock)
    await ledger.open_work("r_2_aa", SNAPSHOT, TAGS, lock)
    return lock


class TestLock:
    """The lock of rotations."""

    async def test_one_owner_at_a_time(self, harness: Harness) -> None:
        """A second owner is refused, told of the first; after a release it gets a higher token."""
        ledger = harness.store.rotation_ledger
        first = await ledger.acquire("host-1", LONG)
        with pytest.raises(RotationRunning, match="host-1 has been leading a rotation for 0 s"):
            await ledger.acquire("host-2", LONG)
        await ledger.release(first)
        second = await ledger.acquire("host-2", LONG)
        assert second.owner == "host-2"
        assert second.token > first.token

    async def test_many_at_once(self, harness: Harness) -> None:
        """Of twenty that ask at the same moment, one gets it."""
        ledger = harness.store.rotation_ledger
        results = await asyncio.gather(
            *[ledger.acquire(f"host-{n}", LONG) for n in range(20)], return_exceptions=True
        )
        assert sum(isinstance(result, Lock) for result in results) == 1

    async def test_taken_over_after_its_lease(self, harness: Harness) -> None:
        """A lease that ran out lets another in; whoever lost it can't renew, save, open nor release."""
        ledger = harness.store.rotation_ledger
        lost = await ledger.acquire("host-1", 0)
        held = await ledger.acquire("host-2", LONG)
        for action in (
            ledger.renew(lost, LONG),
            ledger.save(rotation(), lost),
            ledger.open_work("r_2_aa", SNAPSHOT, TAGS, lost),
        ):
            with pytest.raises(Fenced):
                await action
        assert await ledger.current() is None
        await ledger.release(lost)
        await ledger.renew(held, LONG)

    async def test_renewed_in_time(self, harness: Harness) -> None:
        """A renewed lock keeps others out; one that ran out but that nobody took can still be renewed."""
        ledger = harness.store.rotation_ledger
        lock = await ledger.acquire("host-1", 0)
        await ledger.renew(lock, LONG)
        with pytest.raises(RotationRunning):
            await ledger.acquire("host-2", LONG)

    async def test_its_pulse_shows_whether_somebody_leads(self, harness: Harness) -> None:
        """The pulse changes when the lock is taken, renewed or given back, and stands still else."""
        ledger = harness.store.rotation_ledger
        seen = [await ledger.pulse()]
        lock = await ledger.acquire("host-1", LONG)
        seen.append(await ledger.pulse())
        await ledger.renew(lock, 2 * LONG)
        seen.append(await ledger.pulse())
        assert await ledger.pulse() == seen[-1]
        await ledger.release(lock)
        seen.append(await ledger.pulse())
        assert seen[0] == seen[-1]
        assert len(set(seen)) == 3

    async def test_own_lock_is_taken_again(self, harness: Harness) -> None:
        """An owner whose answer was lost asks again, and the new token fences the old one."""
        ledger = harness.store.rotation_ledger
        first = await ledger.acquire("host-1", LONG)
        again = await ledger.acquire("host-1", LONG)
        assert again.token > first.token
        with pytest.raises(Fenced):
            await ledger.renew(first, LONG)


class TestRecords:
    """Rotations as they are persisted."""

    async def test_saved_and_finished(self, harness: Harness) -> None:
        """An unfinished rotation is the current one with every field; a finished one is not, but stays."""
        ledger = harness.store.rotation_ledger
        lock = await ledger.acquire("leader", LONG)
        assert await ledger.current() is None
        assert await ledger.get("r_2_aa") is None
        begun = replace(rotation(), verify_sample=7)
        await ledger.save(begun, lock)
        assert await ledger.current() == begun
        done = replace(begun, step=Step.COMPLETE, finished_at=120, outcome="clean")
        await ledger.save(done, lock)
        assert await ledger.current() is None
        assert await ledger.get("r_2_aa") == done

    async def test_listed_newest_first(self, harness: Harness) -> None:
        """The latest rotations come first, and no more than were asked for."""
        ledger = harness.store.rotation_ledger
        lock = await ledger.acquire("leader", LONG)
        for number in (1, 3, 2):
            await ledger.save(rotation(f"r_{number}_x", number, Step.COMPLETE), lock)
        assert [one.rotation_id for one in await ledger.list_rotations(2)] == ["r_3_x", "r_2_x"]


class TestWork:
    """The sharing of a step's slots."""

    async def test_each_slot_to_one_worker(self, harness: Harness) -> None:
        """Workers that claim at the same moment never get a slot twice, and every token is different."""
        await opened(harness)
        ledger = harness.store.rotation_ledger
        claims = await asyncio.gather(
            *[ledger.claim("r_2_aa", SNAPSHOT, f"worker-{n}", 2, LONG) for n in range(6)]
        )
        got = [claim for part in claims for claim in part]
        assert sorted(claim.tag for claim in got) == sorted(TAGS)
        assert len({claim.token for claim in got}) == len(TAGS)
        assert await ledger.outstanding("r_2_aa", SNAPSHOT) == len(TAGS)

    async def test_lease_runs_out(self, harness: Harness) -> None:
        """A slot whose lease ran out goes to another with a higher token; the late finish is refused."""
        await opened(harness)
        ledger = harness.store.rotation_ledger
        late = {claim.tag: claim for claim in await ledger.claim("r_2_aa", SNAPSHOT, "dead", 5, 0)}
        (claim, *_) = await ledger.claim("r_2_aa", SNAPSHOT, "alive", 5, LONG)
        assert claim.token > late[claim.tag].token
        with pytest.raises(Fenced, match=claim.tag):
            await ledger.finish("r_2_aa", SNAPSHOT, late[claim.tag], {"snapshot": 9})
        await ledger.finish("r_2_aa", SNAPSHOT, claim, {"snapshot": 2})
        current = await ledger.current()
        assert current is not None
        assert current.counts == {"snapshot": 2}

    async def test_extended(self, harness: Harness) -> None:
        """An extended claim stays; one that another took is left to it, and a done slot does not return."""
        await opened(harness)
        ledger = harness.store.rotation_ledger
        late = await ledger.claim("r_2_aa", SNAPSHOT, "w1", 5, 0)
        (taken,) = await ledger.claim("r_2_aa", SNAPSHOT, "w2", 1, 0)
        await ledger.finish("r_2_aa", SNAPSHOT, next(c for c in late if c.tag != taken.tag), {})
        await ledger.extend("r_2_aa", SNAPSHOT, late, LONG)
        assert [claim.tag for claim in await ledger.claim("r_2_aa", SNAPSHOT, "w3", 5, LONG)] == [taken.tag]
        assert await ledger.outstanding("r_2_aa", SNAPSHOT) == len(TAGS) - 1

    async def test_counts_are_added_once(self, harness: Harness) -> None:
        """Finishing again, as a retry does, counts nothing again; counts of slots add up."""
        await opened(harness)
        ledger = harness.store.rotation_ledger
        for claim in await ledger.claim("r_2_aa", SNAPSHOT, "worker", 5, LONG):
            for _ in range(2):
                await ledger.finish("r_2_aa", SNAPSHOT, claim, {"snapshot": 3, "quarantined": 1})
        found = await ledger.get("r_2_aa")
        assert found is not None
        assert found.counts == {"snapshot": 15, "quarantined": 5}
        assert await ledger.outstanding("r_2_aa", SNAPSHOT) == 0

    async def test_opened_once(self, harness: Harness) -> None:
        """Opening again, also when all is done, offers nothing again; another step is another matter."""
        lock = await opened(harness)
        ledger = harness.store.rotation_ledger
        for claim in await ledger.claim("r_2_aa", SNAPSHOT, "worker", 5, LONG):
            await ledger.finish("r_2_aa", SNAPSHOT, claim, {})
        await ledger.open_work("r_2_aa", SNAPSHOT, TAGS, lock)
        assert await ledger.claim("r_2_aa", SNAPSHOT, "worker", 5, LONG) == []
        await ledger.open_work("r_2_aa", Step.REWRAP, TAGS, lock)
        assert len(await ledger.claim("r_2_aa", Step.REWRAP, "worker", 9, LONG)) == len(TAGS)

    async def test_nothing_to_claim(self, harness: Harness) -> None:
        """A step that was never opened has no slots, and a claim that was never made can't be finished."""
        ledger = harness.store.rotation_ledger
        assert await ledger.claim("r_2_aa", SNAPSHOT, "worker", 5, LONG) == []
        with pytest.raises(Fenced):
            await ledger.finish("r_2_aa", SNAPSHOT, Claim("AA", 1), {})

    async def test_finished_rotation_leaves_no_work(self, harness: Harness) -> None:
        """What was shared out goes when the rotation is finished, and a straggler is told so."""
        lock = await opened(harness)
        ledger = harness.store.rotation_ledger
        claims = await ledger.claim("r_2_aa", SNAPSHOT, "worker", 1, LONG)
        await ledger.save(rotation(step=Step.COMPLETE), lock)
        assert await ledger.outstanding("r_2_aa", SNAPSHOT) == 0
        with pytest.raises(Fenced):
            await ledger.finish("r_2_aa", SNAPSHOT, claims[0], {"snapshot": 1})


class TestRegistry:
    """The states of KEK versions."""

    async def test_stage_once(self, harness: Harness) -> None:
        """A staged version is registered beside the active one; staging it again changes nothing."""
        registry = harness.store.registry
        before = await registry.initialise(new_kek(1))
        view = await registry.stage(replace(new_kek(2), state=KekState.ACTIVE))
        assert (view.active, view.keks[2].state) == (1, KekState.STAGED)
        assert view.revision > before.revision
        assert await registry.stage(replace(new_kek(2), created_at=9)) == view == await registry.load()

    async def test_stage_another_key(self, harness: Harness) -> None:
        """A version that is registered with another check value is refused and stays."""
        registry = harness.store.registry
        await registry.initialise(new_kek(1))
        view = await registry.stage(new_kek(2))
        with pytest.raises(KekMismatch, match="version 2"):
            await registry.stage(replace(new_kek(2), check_value="cd" * 32))
        assert await registry.load() == view

    async def test_activate_once(self, harness: Harness) -> None:
        """Activation makes the active version decrypt-only; doing it again changes nothing."""
        registry, ledger = harness.store.registry, harness.store.rotation_ledger
        await registry.initialise(new_kek(1))
        await registry.stage(new_kek(2))
        lock = await ledger.acquire("leader", LONG)
        view = await registry.activate(2, now=50, lock=lock)
        assert view.active == 2
        assert (view.keks[2].state, view.keks[2].activated_at) == (KekState.ACTIVE, 50)
        assert view.keks[1].state is KekState.DECRYPT_ONLY
        assert await registry.activate(2, now=60, lock=lock) == view == await registry.load()
        back = await registry.activate(1, now=70, lock=lock)
        assert (back.active, back.keks[2].state) == (1, KekState.DECRYPT_ONLY)

    async def test_activate_before_all_have_loaded_it(self, harness: Harness) -> None:
        """A live instance without the version stops it, in one step with it; a silent one does not."""
        registry, ledger = harness.store.registry, harness.store.rotation_ledger
        await registry.initialise(new_kek(1))
        await registry.stage(new_kek(2))
        lock = await ledger.acquire("leader", LONG)
        beats = harness.store.heartbeats
        await beats.beat(Heartbeat("ready", 100.5, 1.0, "r", (1, 2), 1, ""))
        await beats.beat(Heartbeat("silent", 84.5, 1.0, "r", (1,), 1, ""))
        await beats.beat(Heartbeat("late", 99.25, 1.0, "r", (1,), 1, ""))
        with pytest.raises(InstancesMissing, match="version 2 is not loaded by: late;"):
            await registry.activate(2, now=100, lock=lock, live_since=85.0)
        view = await registry.load()
        assert view is not None
        assert view.active == 1
        await beats.beat(Heartbeat("late", 100.75, 1.0, "r", (1, 2), 1, ""))
        assert (await registry.activate(2, now=101, lock=lock, live_since=86.0)).active == 2
        await beats.beat(Heartbeat("late", 102.0, 1.0, "r", (1,), 1, ""))
        assert (await registry.activate(2, now=103, lock=lock, live_since=88.0)).active == 2

    async def test_activate_under_a_lost_lock(self, harness: Harness) -> None:
        """A run whose lock was taken over can't activate, nor is it told that it has."""
        registry, ledger = harness.store.registry, harness.store.rotation_ledger
        await registry.initialise(new_kek(1))
        await registry.stage(new_kek(2))
        lost = await ledger.acquire("host-1", 0)
        held = await ledger.acquire("host-2", LONG)
        with pytest.raises(Fenced):
            await registry.activate(2, now=50, lock=lost)
        await registry.activate(2, now=51, lock=held)
        with pytest.raises(Fenced):
            await registry.activate(2, now=52, lock=lost)

    async def test_activate_what_can_not_be(self, harness: Harness) -> None:
        """An unknown or retired version is refused."""
        registry, ledger = harness.store.registry, harness.store.rotation_ledger
        await registry.initialise(new_kek(1))
        await registry.stage(new_kek(2))
        lock = await ledger.acquire("leader", LONG)
        await registry.activate(2, now=50, lock=lock)
        await registry.retire(1, lock=lock)
        for version in (1, 3):
            with pytest.raises(KekMismatch, match=f"version {version}"):
                await registry.activate(version, now=70, lock=lock)

    async def test_retire(self, harness: Harness) -> None:
        """A decrypt-only version is retired, once; the active, a staged and an unknown one are refused."""
        registry, ledger = harness.store.registry, harness.store.rotation_ledger
        await registry.initialise(new_kek(1))
        await registry.stage(new_kek(2))
        lock = await ledger.acquire("leader", LONG)
        await registry.activate(2, now=50, lock=lock)
        await registry.stage(new_kek(3))
        for version in (2, 3, 4):
            with pytest.raises(RotationRefused, match=f"version {version}"):
                await registry.retire(version, lock=lock)
        view = await registry.retire(1, lock=lock)
        assert view.keks[1].state is KekState.RETIRED
        assert await registry.retire(1, lock=lock) == view

    async def test_retire_under_a_lost_lock(self, harness: Harness) -> None:
        """What was checked under a lock that another has since is not acted upon."""
        registry, ledger = harness.store.registry, harness.store.rotation_ledger
        await registry.initialise(new_kek(1))
        await registry.stage(new_kek(2))
        lost = await ledger.acquire("host-1", 0)
        held = await ledger.acquire("host-2", LONG)
        await registry.activate(2, now=50, lock=held)
        with pytest.raises(Fenced):
            await registry.retire(1, lock=lost)
        view = await registry.load()
        assert view is not None
        assert view.keks[1].state is KekState.DECRYPT_ONLY

    async def test_changes_at_the_same_moment(self, harness: Harness) -> None:
        """Changes by compare-and-set: none of ten at once is lost."""
        registry = harness.store.registry
        await registry.initialise(new_kek(1))
        await asyncio.gather(*[registry.stage(new_kek(version)) for version in range(2, 12)])
        view = await registry.load()
        assert view is not None
        assert sorted(view.keks) == list(range(1, 12))

    async def test_without_a_registry(self, harness: Harness) -> None:
        """Nothing is staged in a store that has no registry."""
        with pytest.raises(RegistryLost):
            await harness.store.registry.stage(new_kek(2))

"""Rotation of the KEK: leading one, and working on a share of it.

The leader holds the lock and moves the rotation from step to step (``domain.rotation`` says why in this
order). The work of a step is offered slot by slot; the leader and any number of workers claim slots with a
lease and a fencing token. Whoever dies leaves nothing but a lease that runs out.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from progressdb_kms.domain.errors import InstancesMissing, RotationRefused
from progressdb_kms.domain.keyring import KekInfo, KekState, kek_id_of
from progressdb_kms.domain.keys import ALL_TAGS
from progressdb_kms.domain.rotation import SHARED, Rotation, Step, advance, instances_missing
from progressdb_kms.usecases.crew import (
    IDLE,
    Conduct,
    Crew,
    Interrupted,
    Parts,
    Progress,
    by_life,
    live_since,
)
from progressdb_kms.usecases.slotwork import SlotWork

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from progressdb_kms.ports import Claim, Lock

__all__ = ["Conduct", "Interrupted", "Parts", "Plan", "Progress", "Rotator", "Unled"]


class Unled(Exception):
    """A rotation is unfinished, and nobody has led it for as long as a worker was to wait."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rotation would do: the answer to a dry run.

    Attributes:
        source_version: The active version.
        target_version: The version to come, or that is staged already.
        census: Records by KEK version.
        live: Instances that count as live.
        headroom: Why a snapshot would not fit, or an empty string.
        under_way: An unfinished rotation that a run would resume.
    """

    source_version: int
    target_version: int
    census: Mapping[int, int]
    live: tuple[str, ...]
    headroom: str
    under_way: Rotation | None


class Rotator(Crew):
    """One process's part in rotations. Arguments as of ``Crew``."""

    def __init__(self, parts: Parts, conduct: Conduct, worker: str) -> None:
        super().__init__(parts, conduct, worker)
        self._work = SlotWork(parts.slots, parts.keks, conduct.page, conduct.max_rate)

    async def plan(self) -> Plan:
        """Say what ``run`` would do; changes nothing."""
        parts = self._parts
        view = parts.keks.view
        under_way = await parts.ledger.current()
        live, _ = by_life(await parts.heartbeats.live(), parts.now())
        return Plan(
            source_version=view.active if under_way is None else under_way.source_version,
            target_version=self._target() if under_way is None else under_way.target_version,
            census=await parts.census(),
            live=tuple(beat.instance for beat in live),
            headroom=await parts.slots.headroom(),
            under_way=under_way,
        )

    async def run(self, *, resume_only: bool = False) -> Rotation | None:
        """Lead: resume the unfinished rotation or begin one, and go on until it is finished.

        Returns:
            The finished rotation; None where there was nothing to resume.

        Raises:
            RotationRunning: Another run leads.
            RotationRefused: The store has no room for the snapshot, or the KEKs are not as they should be.
            InstancesMissing: Live instances have not loaded the new version; run again.
            Fenced: Another run took over.
            StoreUnavailable, StoreNotDurable: The store stayed away; run again.
            Interrupted: The process was asked to end; run again.
        """
        async with self._leading() as lock:
            rotation = await self._patiently(self._parts.ledger.current)
            if rotation is None:
                if resume_only:
                    return None
                rotation = await self._begin(lock)
            elif rotation.step is Step.ROLLBACK:
                raise RotationRefused(
                    f"rotation {rotation.rotation_id} is being rolled back: finish that by rotate --rollback"
                )
            while not rotation.finished_at:
                self._go_on()
                rotation = await self._do(rotation, lock)
        return rotation

    async def work(self, wait: float = 0) -> Rotation | None:
        """Join the rotation that is under way and share its work until it is finished.

        Args:
            wait: Seconds to wait for a rotation to begin, and, while one is unfinished, for somebody to lead
                it. With 0 it takes what is there, and stays until it is finished.

        Returns:
            The rotation as it ended; None where there was none.

        Raises:
            Unled: Nobody has led it for ``wait`` seconds; never with 0.
            Interrupted: The process was asked to end.
        """
        ledger = self._parts.ledger
        last = await self._patiently(ledger.current)
        if last is None and wait:
            last = await self._begun(wait)
        watch = _LeaderWatch(self._parts, wait)
        while True:
            rotation = await self._patiently(ledger.current)
            if rotation is None:
                return await ledger.get(last.rotation_id) if last else None
            last = rotation
            if wait:
                watch.look(rotation, await self._patiently(ledger.pulse))
            if rotation.step in SHARED:
                await self._patiently(self._parts.keks.refresh)
                # A worker may have started before the new version reached its KEK file.
                if rotation.target_version in self._parts.keks.usable:
                    await self._take_part(rotation)
            self._go_on()
            await asyncio.sleep(IDLE)

    async def _begun(self, wait: float) -> Rotation | None:
        """Wait for a rotation to begin; one that has ended just now is taken for the one to be joined."""
        ledger, began = self._parts.ledger, self._parts.now()
        while True:
            rotation = await self._patiently(ledger.current)
            if rotation is None:
                # A small one may begin and end before a worker of the same job has even started. Where it
                # was another one, no harm is done: whoever leads does all of the work then.
                for latest in await self._patiently(lambda: ledger.list_rotations(1)):
                    if (latest.finished_at or 0) > began - wait:
                        rotation = latest
            if rotation is not None or self._parts.now() >= began + wait:
                return rotation
            self._go_on()
            await asyncio.sleep(IDLE)

    async def _slot(self, rotation: Rotation, claim: Claim) -> Mapping[str, int]:
        return await self._work.do(rotation, claim)

    def _target(self) -> int:
        view = self._parts.keks.view
        return (
            view.active + 1
            if view.active + 1 not in view.keks
            else max(
                [kek.version for kek in view.keks.values() if kek.state is KekState.STAGED],
                default=max(view.keks) + 1,
            )
        )

    async def _begin(self, lock: Lock) -> Rotation:
        parts = self._parts
        await self._patiently(parts.keks.refresh)
        if parts.keks.problem and not await self._does_without(parts.keks.lacking):
            raise RotationRefused(f"no rotation while the KEKs are not in order: {parts.keks.problem}")
        reason = await self._patiently(parts.slots.headroom)
        if reason:
            raise RotationRefused(reason)
        now = int(parts.now())
        target = self._target()
        rotation = Rotation(
            rotation_id=f"r_{target}_{secrets.token_hex(4)}",
            source_version=parts.keks.active,
            target_version=target,
            step=Step.DISTRIBUTE,
            started_at=now,
            step_at=now,
            verify_sample=self._conduct.verify_sample,
        )
        await self._note("rotation.begin", "intent", rotation)
        await self._patiently(lambda: parts.ledger.save(rotation, lock))
        await self._note("rotation.begin", "ok", rotation)
        parts.reached("begun")
        return rotation

    async def _does_without(self, lacking: Sequence[int]) -> bool:
        """Say whether nothing but versions that no record is under is lacking.

        So is a version that was rolled back and lost: only once a rotation has raised the floors above it can
        it be retired. Should the census be wrong, the record is quarantined.
        """
        census = await self._patiently(self._parts.census)
        return bool(lacking) and not any(census.get(version) for version in lacking)

    async def _do(self, rotation: Rotation, lock: Lock) -> Rotation:
        parts = self._parts
        parts.progress.step(rotation, len(ALL_TAGS) if rotation.step in SHARED else 0)
        if rotation.step is Step.DISTRIBUTE:
            await self._distribute(rotation)
        elif rotation.step is Step.ACTIVATE:
            await self._note("kek.activate", "intent", rotation)
            await self._activate(rotation.target_version, lock)
            await self._note("kek.activate", "ok", rotation)
            await self._patiently(parts.keks.refresh)
            parts.reached("activated")
        if rotation.step in SHARED:
            await self._share(rotation, lock)
        quarantined = 0
        if rotation.step is Step.VERIFY:
            quarantined = await self._patiently(lambda: self._work.count_quarantined(rotation))
        advanced = advance(rotation, now=int(parts.now()), quarantined=quarantined)
        parts.reached(f"{rotation.step}:done")
        await self._patiently(lambda: parts.ledger.save(advanced, lock))
        await self._note("rotation.finish" if advanced.finished_at else "rotation.step", "ok", advanced)
        parts.reached(f"{advanced.step}:saved")
        return await parts.ledger.get(rotation.rotation_id) or advanced

    async def _activate(self, version: int, lock: Lock) -> None:
        parts = self._parts
        deadline: float | None = None
        while True:
            # Again, for this run may resume long after the instances were waited for.
            if parts.keks.active != version:
                await self._await_instances(version)
            try:
                await self._patiently(
                    lambda: parts.registry.activate(
                        version, now=int(parts.now()), lock=lock, live_since=live_since(parts.now())
                    )
                )
            except InstancesMissing:
                # One has come up since it was looked. Or the store names what the wait above can't read: so
                # this has a bound of its own.
                if deadline is None:
                    deadline = parts.now() + self._conduct.wait
                if parts.now() >= deadline:
                    raise
                self._go_on()
                await asyncio.sleep(IDLE)
            else:
                return

    async def _distribute(self, rotation: Rotation) -> None:
        parts = self._parts
        version = rotation.target_version
        await self._note("kek.stage", "intent", rotation)
        await self._patiently(lambda: parts.stager.stage(version))
        parts.reached("staged")
        source = parts.keks.source
        value = await self._patiently(lambda: self._check_value(version))
        kek = KekInfo(
            version=version,
            kek_id=kek_id_of(value),
            source=source.kind(version),
            source_key=source.source_key(version),
            check_value=value,
            state=KekState.STAGED,
            created_at=int(parts.now()),
        )
        await self._patiently(lambda: parts.registry.stage(kek))
        await self._note("kek.stage", "ok", rotation)
        parts.reached("registered")
        escrowed = await self._patiently(lambda: parts.stager.escrow(version))
        if not escrowed:
            parts.progress.warning(
                f"KEK version {version} is escrowed to nobody: the KEK source is the only way to the data"
            )
        parts.reached("escrowed")
        await self._patiently(parts.keks.refresh)
        if version not in parts.keks.usable:
            raise RotationRefused(parts.keks.problem or f"KEK version {version} can't be loaded here")
        await self._await_instances(version)
        parts.reached("distributed")

    async def _check_value(self, version: int) -> str:
        """Return the registered check value where this run resumes, since not every source gives it twice."""
        parts = self._parts
        view = await parts.registry.load()
        known = view.keks.get(version) if view is not None else None
        if known is not None and await parts.keks.source.matches(version, known.check_value):
            return known.check_value
        return await parts.keks.source.check_value(version)

    async def _await_instances(self, version: int) -> None:
        parts = self._parts
        deadline = parts.now() + self._conduct.wait
        while True:
            live, gone = by_life(await self._patiently(parts.heartbeats.live), parts.now())
            missing = [beat.instance for beat in live if version not in beat.kek_versions]
            if not missing:
                if gone:
                    parts.progress.waiting([], [beat.instance for beat in gone])
                return
            parts.progress.waiting(missing, [beat.instance for beat in gone])
            if parts.now() >= deadline:
                raise instances_missing(version, missing)
            self._go_on()
            await asyncio.sleep(IDLE)


class _LeaderWatch:
    """Tells a worker when nobody leads any more.

    A leader renews its lock every few seconds. What is watched is that it does, not the time that the lock
    names: so clocks need not agree.
    """

    def __init__(self, parts: Parts, wait: float) -> None:
        self._parts = parts
        self._wait = wait
        self._pulse: str | None = None
        self._changed_at = parts.now()

    def look(self, rotation: Rotation, pulse: str) -> None:
        """Take note of the lock's present pulse.

        Raises:
            Unled: It has not been renewed for long.
        """
        now = self._parts.now()
        if pulse != self._pulse:
            self._pulse, self._changed_at = pulse, now
        elif now - self._changed_at >= self._wait:
            raise Unled(
                f"rotation {rotation.rotation_id} is at {rotation.step} and nobody has led it for"
                f" {self._wait:.0f} s; run rotate again to finish it"
            )

"""Rotation of the KEK: leading one, and working on a share of it.

The leader holds the lock and moves the rotation from step to step (``domain.rotation`` says why in this order).
The work of a step is offered slot by slot; the leader and any number of workers claim slots with a lease and a
fencing token. Whoever dies leaves nothing but a lease that runs out.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import structlog

from progressdb_kms.domain.errors import (
    Fenced,
    InstancesMissing,
    KmsError,
    RotationRefused,
    StoreNotDurable,
    StoreUnavailable,
)
from progressdb_kms.domain.keyring import KekInfo, KekState, kek_id_of
from progressdb_kms.domain.keys import ALL_TAGS
from progressdb_kms.domain.rotation import SHARED, Rotation, Step, advance
from progressdb_kms.usecases.slotwork import SlotWork

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from progressdb_kms.ports import (
        Claim,
        Heartbeat,
        Heartbeats,
        KekRegistry,
        KekStager,
        Lock,
        RotationLedger,
        RotationStore,
    )
    from progressdb_kms.usecases.keks import KekBook

log = structlog.get_logger(__name__)

_T = TypeVar("_T")

LEASE: Final = 15.0
"""Seconds after which a silent leader or worker is taken for dead."""
RENEW: Final = 4.0
LIVE: Final = 15.0
"""Seconds after its last heartbeat for which an instance counts as live."""
SLOTS_AT_ONCE: Final = 16
IDLE: Final = 0.3
STORE_PATIENCE: Final = 60.0
"""Seconds for which a run goes on trying while the store is away."""


class Progress(Protocol):
    """Who is told how a run gets on."""

    def step(self, rotation: Rotation, total: int) -> None:
        """Say that a step begins, with the number of slots in it."""

    def slot(self, counts: Mapping[str, int]) -> None:
        """Say that a slot is done."""

    def waiting(self, missing: Sequence[str], gone: Sequence[str]) -> None:
        """Name the instances that have not loaded the new version, and those no longer counted as live."""

    def warning(self, text: str) -> None:
        """Pass on what the operator should know."""


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


@dataclass(frozen=True, slots=True)
class Conduct:
    """How a run goes about its work.

    Attributes:
        wait: Seconds to wait for live instances to load the new version.
        page: Records in one script call.
        max_rate: Records a second, 0 for as many as will go.
        verify_sample: Records to verify, 0 for all.
        patience: Seconds to go on while the store is away.
    """

    wait: float = 120.0
    page: int = 250
    max_rate: int = 0
    verify_sample: int = 0
    patience: float = STORE_PATIENCE


@dataclass(frozen=True, slots=True)
class Parts:
    """The ports that a rotation works with.

    Attributes:
        reached: Called at each named transition; tests end the process there.
    """

    ledger: RotationLedger
    slots: RotationStore
    registry: KekRegistry
    heartbeats: Heartbeats
    stager: KekStager
    keks: KekBook
    progress: Progress
    now: Callable[[], float]
    census: Callable[[], Awaitable[Mapping[int, int]]]
    reached: Callable[[str], None] = lambda _name: None


class Rotator:
    """One process's part in rotations.

    Args:
        parts: The ports.
        conduct: How to go about it.
        worker: Name of this process, unique.
    """

    def __init__(self, parts: Parts, conduct: Conduct, worker: str) -> None:
        self._parts = parts
        self._conduct = conduct
        self._worker = worker
        self._work = SlotWork(parts.slots, parts.keks, conduct.page, conduct.max_rate)

    async def plan(self) -> Plan:
        """Say what ``run`` would do; changes nothing."""
        parts = self._parts
        view = parts.keks.view
        under_way = await parts.ledger.current()
        live, _ = _by_life(await parts.heartbeats.live(), parts.now())
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
        """
        ledger = self._parts.ledger
        lock = await self._patiently(lambda: ledger.acquire(self._worker, LEASE))
        try:
            async with self._renewing(lock):
                rotation = await self._lead(lock, resume_only=resume_only)
        except KmsError:
            # Nothing is under way any more, so whoever runs again need not wait for the lease to run out.
            with suppress(StoreUnavailable, StoreNotDurable):
                await ledger.release(lock)
            raise
        await self._patiently(lambda: ledger.release(lock))
        return rotation

    async def _lead(self, lock: Lock, *, resume_only: bool) -> Rotation | None:
        rotation = await self._patiently(self._parts.ledger.current)
        if rotation is None:
            if resume_only:
                return None
            rotation = await self._begin(lock)
        while not rotation.finished_at:
            rotation = await self._do(rotation, lock)
        return rotation

    async def work(self) -> Rotation | None:
        """Join the rotation that is under way and share its work until it is finished.

        Returns:
            The rotation as it ended; None where there was none.
        """
        ledger = self._parts.ledger
        last = await self._patiently(ledger.current)
        while True:
            rotation = await self._patiently(ledger.current)
            if rotation is None:
                return await ledger.get(last.rotation_id) if last else None
            last = rotation
            if rotation.step in SHARED:
                await self._patiently(self._parts.keks.refresh)
                await self._take_part(rotation)
            await asyncio.sleep(IDLE)

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
        if parts.keks.problem:
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
        await self._patiently(lambda: parts.ledger.save(rotation, lock))
        parts.reached("begun")
        return rotation

    async def _do(self, rotation: Rotation, lock: Lock) -> Rotation:
        parts = self._parts
        parts.progress.step(rotation, len(ALL_TAGS) if rotation.step in SHARED else 0)
        if rotation.step is Step.DISTRIBUTE:
            await self._distribute(rotation)
        elif rotation.step is Step.ACTIVATE:
            await self._patiently(
                lambda: parts.registry.activate(rotation.target_version, now=int(parts.now()), lock=lock)
            )
            await self._patiently(parts.keks.refresh)
            parts.reached("activated")
        if rotation.step in SHARED:
            await self._patiently(
                lambda: parts.ledger.open_work(rotation.rotation_id, rotation.step, ALL_TAGS, lock)
            )
            parts.reached(f"{rotation.step}:opened")
            await self._take_part(rotation)
            while await self._patiently(
                lambda: parts.ledger.outstanding(rotation.rotation_id, rotation.step)
            ):
                await asyncio.sleep(IDLE)
                await self._take_part(rotation)
        quarantined = 0
        if rotation.step is Step.VERIFY:
            quarantined = await self._patiently(lambda: self._work.count_quarantined(rotation))
        advanced = advance(rotation, now=int(parts.now()), quarantined=quarantined)
        parts.reached(f"{rotation.step}:done")
        await self._patiently(lambda: parts.ledger.save(advanced, lock))
        parts.reached(f"{advanced.step}:saved")
        return await parts.ledger.get(rotation.rotation_id) or advanced

    async def _distribute(self, rotation: Rotation) -> None:
        parts = self._parts
        version = rotation.target_version
        await self._patiently(lambda: parts.stager.stage(version))
        parts.reached("staged")
        source = parts.keks.source
        value = await source.check_value(version)
        kek = KekInfo(
            version=version,
            kek_id=kek_id_of(value),
            source=source.name,
            source_key=source.source_key(version),
            check_value=value,
            state=KekState.STAGED,
            created_at=int(parts.now()),
        )
        await self._patiently(lambda: parts.registry.stage(kek))
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

    async def _await_instances(self, version: int) -> None:
        parts = self._parts
        deadline = parts.now() + self._conduct.wait
        while True:
            live, gone = _by_life(await self._patiently(parts.heartbeats.live), parts.now())
            missing = [beat.instance for beat in live if version not in beat.kek_versions]
            if not missing:
                if gone:
                    parts.progress.waiting([], [beat.instance for beat in gone])
                return
            parts.progress.waiting(missing, [beat.instance for beat in gone])
            if parts.now() >= deadline:
                raise InstancesMissing(
                    f"KEK version {version} is not loaded by: {', '.join(missing)}; bring it to them or stop them,"
                    " then run again"
                )
            await asyncio.sleep(IDLE)

    async def _take_part(self, rotation: Rotation) -> None:
        """Claim slots and work on them until there is none to claim."""
        ledger, step = self._parts.ledger, rotation.step
        while True:
            claims = await self._patiently(
                lambda: ledger.claim(rotation.rotation_id, step, self._worker, SLOTS_AT_ONCE, LEASE)
            )
            if not claims:
                return
            async with self._extending(rotation, claims):
                results = await asyncio.gather(
                    *(self._one(rotation, claim) for claim in claims), return_exceptions=True
                )
            for result in results:
                if isinstance(result, BaseException):
                    raise result

    async def _one(self, rotation: Rotation, claim: Claim) -> None:
        parts = self._parts
        try:
            await self._patiently(lambda: parts.slots.take([claim]))
            counts = await self._patiently(lambda: self._work.do(rotation, claim))
            parts.reached(f"{rotation.step}:slot")
            await self._patiently(
                lambda: parts.ledger.finish(rotation.rotation_id, rotation.step, claim, counts)
            )
        except Fenced:
            # Another worker has the slot, since our lease ran out; what we did of it is as good as theirs.
            log.info("slot_taken_over", tag=claim.tag, step=str(rotation.step))
            return
        parts.progress.slot(counts)

    async def _patiently(self, action: Callable[[], Awaitable[_T]]) -> _T:
        """Try again while the store is away: each action is safe to repeat."""
        deadline = self._parts.now() + self._conduct.patience
        while True:
            try:
                return await action()
            except StoreUnavailable:
                if self._parts.now() >= deadline:
                    raise
                await asyncio.sleep(IDLE)

    @asynccontextmanager
    async def _renewing(self, lock: Lock) -> AsyncIterator[None]:
        """Hold the lock; when another has taken it, end what runs inside with ``Fenced``."""
        async with _meanwhile(lambda: self._parts.ledger.renew(lock, LEASE)):
            yield

    @asynccontextmanager
    async def _extending(self, rotation: Rotation, claims: Sequence[Claim]) -> AsyncIterator[None]:
        ledger = self._parts.ledger
        async with _meanwhile(lambda: ledger.extend(rotation.rotation_id, rotation.step, claims, LEASE)):
            yield


@asynccontextmanager
async def _meanwhile(action: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Repeat ``action`` while the body runs; its error, but for the store being away, ends the body."""
    body = asyncio.current_task()
    failure: list[KmsError] = []

    async def repeat() -> None:
        while True:
            await asyncio.sleep(RENEW)
            try:
                await action()
            except StoreUnavailable:
                continue
            except KmsError as error:
                failure.append(error)
                if body is not None:
                    body.cancel()
                return

    task = asyncio.create_task(repeat())
    try:
        yield
    except asyncio.CancelledError:
        if failure:
            raise failure[0] from None
        raise
    finally:
        task.cancel()


def _by_life(beats: Sequence[Heartbeat], now: float) -> tuple[list[Heartbeat], list[Heartbeat]]:
    """Part heartbeats into those of live instances and those of silent ones."""
    live = [beat for beat in beats if now - beat.at <= LIVE]
    return live, [beat for beat in beats if now - beat.at > LIVE]

"""A process's share in the work on all slots: lock, claims, patience with the store, the end on request."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import structlog

from progressdb_kms.domain.errors import AuditUnavailable, Fenced, KekUnreachable, KmsError, StoreUnavailable
from progressdb_kms.domain.keys import ALL_TAGS
from progressdb_kms.ports import AuditEvent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from progressdb_kms.domain.rotation import Rotation
    from progressdb_kms.ports import (
        AuditLog,
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
    page: int = 128
    max_rate: int = 0
    verify_sample: int = 0
    patience: float = STORE_PATIENCE


@dataclass(frozen=True, slots=True)
class Parts:
    """The ports that a rotation works with.

    Attributes:
        reached: Called at each named transition; tests end the process there.
        stopping: Says whether the process has been asked to end: it does so between slots.
        audit: Where the steps are written down, if anywhere.
        identity: Who runs this, for the audit.
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
    stopping: Callable[[], bool] = lambda: False
    audit: AuditLog | None = None
    identity: str = ""


class Interrupted(Exception):
    """The process has been asked to end, and has done so between slots; the lock is given back."""


class Crew(ABC):
    """One process that works on slots, alone or beside others.

    Args:
        parts: The ports.
        conduct: How to go about it.
        worker: Name of this process, unique.
    """

    def __init__(self, parts: Parts, conduct: Conduct, worker: str) -> None:
        self._parts = parts
        self._conduct = conduct
        self._worker = worker

    @abstractmethod
    async def _slot(self, rotation: Rotation, claim: Claim) -> Mapping[str, int]:
        """Do the present step's part on one slot and return what was done, by name."""

    async def _take_part(self, rotation: Rotation) -> None:
        """Claim slots and work on them until there is none to claim, or the process has to end.

        Raises:
            Interrupted: The process has to end.
        """
        ledger, step = self._parts.ledger, rotation.step
        while True:
            self._go_on()
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
            counts = await self._patiently(lambda: self._slot(rotation, claim))
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
        """Try again while the store, or what keeps a KEK, is away: each action is safe to repeat."""
        deadline = self._parts.now() + self._conduct.patience
        while True:
            try:
                return await action()
            except (StoreUnavailable, AuditUnavailable, KekUnreachable):
                if self._parts.now() >= deadline:
                    raise
                self._go_on()
                await asyncio.sleep(IDLE)

    @asynccontextmanager
    async def _leading(self) -> AsyncIterator[Lock]:
        """Hold the lock; when another has taken it, end what runs inside with ``Fenced``.

        Raises:
            RotationRunning: Another run leads.
        """
        ledger = self._parts.ledger
        lock = await self._patiently(lambda: ledger.acquire(self._worker, LEASE))
        try:
            async with _meanwhile(lambda: ledger.renew(lock, LEASE)):
                yield lock
        finally:
            # Also after an error: whoever mends its cause and runs again need not wait for the lease to end.
            with suppress(KmsError):
                await ledger.release(lock)

    def _go_on(self) -> None:
        if self._parts.stopping():
            raise Interrupted("asked to stop: what is done is kept, and running again goes on")

    async def _note(self, action: str, outcome: str, rotation: Rotation) -> None:
        """Write an audit record."""
        audit = self._parts.audit
        if audit is not None:
            event = AuditEvent(
                action=action,
                outcome=outcome,
                identity=self._parts.identity,
                request_id=rotation.rotation_id,
                detail=f"KEK version {rotation.target_version}, {rotation.outcome or rotation.step}",
            )
            await self._patiently(lambda: audit.record([event]))

    async def _share(self, rotation: Rotation, lock: Lock) -> None:
        """Offer all slots for the present step, work on them, and return when all are done."""
        ledger, rotation_id, step = self._parts.ledger, rotation.rotation_id, rotation.step
        await self._patiently(lambda: ledger.open_work(rotation_id, step, ALL_TAGS, lock))
        self._parts.reached(f"{step}:opened")
        await self._take_part(rotation)
        while await self._patiently(lambda: ledger.outstanding(rotation_id, step)):
            await asyncio.sleep(IDLE)
            await self._take_part(rotation)

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


def by_life(beats: Sequence[Heartbeat], now: float) -> tuple[list[Heartbeat], list[Heartbeat]]:
    """Part heartbeats into those of live instances and those of silent ones."""
    since = live_since(now)
    return [beat for beat in beats if beat.at >= since], [beat for beat in beats if beat.at < since]


def live_since(now: float) -> float:
    """Return the time, in Unix seconds, from which a heartbeat says that its instance is live."""
    return now - LIVE

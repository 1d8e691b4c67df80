"""The audit log as a chain: each record durable where the configuration says, its head anchored in the store.

Callers hand their events to one worker. It chains what has come in meanwhile, prints it, writes it to the
file with one fsync, and to the store with one signed head: concurrent changes share all three. In this order,
since the head is what an auditor holds the others against: it never vouches for a record that a file lacks.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import structlog

from progressdb_kms.audit.files import AuditFiles
from progressdb_kms.audit.form import fields_of
from progressdb_kms.audit.pipes import PatientStream
from progressdb_kms.audit.roster import roster_with
from progressdb_kms.domain.audit import CHECKPOINT, CLOSE, NOTHING, OPEN, AuditKey, Chain, Record, VerifyKey
from progressdb_kms.domain.errors import AuditUnavailable, KmsError
from progressdb_kms.ports import AuditEvent
from progressdb_kms.ports.audit import AuditBatch, Committed

if TYPE_CHECKING:
    from typing import TextIO

    from progressdb_kms.ports.audit import AuditObserver, AuditStore

log = structlog.get_logger(__name__)

AT_ONCE: Final = 200
"""Records in one call of the store: 500 held it for up to 8 ms."""
CHECKPOINT_RECORDS: Final = 1000
CHECKPOINT_SECONDS: Final = 60.0
MOST_WAITING: Final = 20_000
"""Records kept while they can't be written; beyond, changes are refused, other events dropped and counted."""
_ROSTER_TRIES: Final = 20


@dataclass(frozen=True, slots=True)
class Sinks:
    """Where records go.

    Attributes:
        stream: Keep them in the store's stream. The head is anchored there in any case.
        directory: Make files there; None for none.
        file_bytes: Size after which the next file is begun.
        output: Print them here; None for nowhere.
    """

    stream: bool = True
    directory: Path | None = None
    file_bytes: int = 64 * 2**20
    output: TextIO | PatientStream | None = None


@dataclass(slots=True)
class _Waiting:
    """An event on its way."""

    event: AuditEvent
    at: float
    done: asyncio.Future[None] | None


class _Opening(NamedTuple):
    """A chain that is about to be begun."""

    chain: Chain
    generation: int
    record: Record
    batch: AuditBatch


class ChainedAuditLog:
    """Implements ``AuditLog``.

    An intent is durable when ``record`` returns, or it raises and the change must not be made. Anything else,
    an outcome say, is waited for as well, but that it can't be written now is no error: what has happened has
    happened. It is kept and written as soon as that is possible.

    Args:
        key: Makes MACs and signatures.
        instance: Random name of this process.
        store: Keeps the anchor, and the stream.
        sinks: Where records go.
        observer: Told what was written and what was not.
        release: The package's version.
        known: Keys that were used before this one.
        now: Gives Unix seconds.
    """

    durable = True

    def __init__(
        self,
        key: AuditKey,
        instance: str,
        store: AuditStore,
        sinks: Sinks,
        observer: AuditObserver,
        release: str,
        known: Sequence[VerifyKey] = (),
        now: Callable[[], float] = time.time,
    ) -> None:
        self._key = key
        self._known = known
        self._instance = instance
        self._store = store
        self._sinks = sinks
        self._observer = observer
        self._release = release
        self._now = now
        self._queue: deque[_Waiting] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._chain: Chain | None = None
        self._opening: _Opening | None = None
        self._files: AuditFiles | None = None
        self._pending: list[Record] = []
        self._confirmed = (0, NOTHING)
        self._shown = 0
        self._again: dict[int, AuditEvent] = {}
        self._generation = 0
        self._signed_at = (0, 0.0)
        self._after: Mapping[str, object] = {}
        self._lost = 0
        self._failing = ""

    @property
    def waiting(self) -> int:
        """Records and events that are not durable yet."""
        return len(self._queue) + len(self._pending)

    @property
    def chain(self) -> str:
        """Name of the open chain, empty before it is opened."""
        return self._chain.name if self._chain else ""

    async def open(self) -> None:
        """Open the chain now rather than with the first event.

        Raises:
            AuditUnavailable: It can't be anchored, or not be written.
        """
        await self._submit([None])

    async def record(self, events: Sequence[AuditEvent]) -> None:
        """Write events, in order, and return when they are durable.

        Raises:
            AuditUnavailable: There is an intent among them and it can't be made durable.
        """
        if not events:
            return
        intent = any(event.outcome == "intent" for event in events)
        if self.waiting >= MOST_WAITING:
            lost = sum(event.outcome != "intent" for event in events)
            self._lost += lost
            self._observer.audit_lost("store", lost)
            if intent:
                raise AuditUnavailable
            return
        try:
            await self._submit(events)
        except AuditUnavailable:
            if intent:
                raise

    async def tick(self) -> None:
        """Write what could not be written before, sign what no signature vouches for; call it each second."""
        # A chain that was given up is named by the next one, which does not wait for an event to do so.
        if self._chain is None and not self._queue and not self._after:
            return
        seq, at = self._signed_at
        unsigned = self._chain is not None and self._chain.last.seq > seq
        late = unsigned and self._now() - at >= CHECKPOINT_SECONDS
        if self._pending or self._queue or self._after or late:
            self._wake()
            if self._worker is not None:
                await asyncio.shield(self._worker)

    async def close(self) -> None:
        """Close the chain, if one is open, as far as it can be written now."""
        if self._worker is not None:
            await self._worker
        # Twice: where the store turns out to know another history, another chain says so, and is closed.
        for _ in range(2):
            if self._queue or self._after:
                await self._once()
            if self._chain is None:
                break
            self._pending.append(self._chain.control(self._control(CLOSE)))
            try:
                await self._flush(closed=True)
                break
            except KmsError as error:
                log.warning("audit_not_closed", detail=error.detail, records=len(self._pending))
                if not self._after:
                    break
        if self._files is not None:
            self._files.close()
        if self._queue:
            log.error("audit_records_lost", count=len(self._queue), detail="the chain could not be opened")

    async def _submit(self, events: Sequence[AuditEvent | None]) -> None:
        done = asyncio.get_running_loop().create_future()
        at = self._now()
        for number, event in enumerate(events):
            last = done if number == len(events) - 1 else None
            self._queue.append(_Waiting(event or _OPENING, at, last))
        self._wake()
        await done

    def _wake(self) -> None:
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())

    async def _work(self) -> None:
        try:
            while True:
                await self._once()
                # What nobody waits for is left to the next tick while it can't be written.
                if not any(waiting.done or not self._failing for waiting in self._queue):
                    return
        finally:
            self._worker = None

    async def _once(self) -> None:
        batch = [self._queue.popleft() for _ in range(len(self._queue))]
        appended = False
        try:
            if self._chain is None:
                await self._open()
            self._append(batch)
            appended = True
            await self._flush()
            self._failing = ""
        except KmsError as error:
            self._fail(batch, error, appended=appended)
        except Exception:  # a bug: nobody may wait for what will not come, and no change may be made
            log.exception("audit_broken")
            self._fail(batch, AuditUnavailable(), appended=appended)
        else:
            for waiting in batch:
                if waiting.done is not None and not waiting.done.done():
                    waiting.done.set_result(None)

    def _fail(self, batch: Sequence[_Waiting], error: KmsError, *, appended: bool) -> None:
        if error.detail != self._failing:
            log.error("audit_not_written", detail=error.detail, action="changes are refused until it is")
        self._failing = error.detail
        for waiting in batch:
            event, done = waiting.event, waiting.done
            if event.outcome == "intent":
                if appended:
                    # It may be in the log by now: say that nothing came of it.
                    refused = replace(event, outcome="failed", detail=AuditUnavailable.code)
                    self._queue.append(_Waiting(refused, self._now(), None))
            elif not appended and event is not _OPENING:
                self._queue.append(_Waiting(event, waiting.at, None))
            if done is not None and not done.done():
                done.set_exception(AuditUnavailable(error.detail))

    def _append(self, batch: Sequence[_Waiting]) -> None:
        chain = self._chain
        if chain is None:
            return
        if self._lost:
            lost, self._lost = self._lost, 0
            event = AuditEvent("audit.lost", "ok", self._instance, "", detail=f"count={lost}")
            batch = [_Waiting(event, self._now(), None), *batch]
        for waiting in batch:
            if waiting.event is not _OPENING:
                record = chain.append(fields_of(waiting.event, waiting.at, self._instance))
                self._pending.append(record)
                self._again[record.seq] = waiting.event
        seq, at = self._signed_at
        last, now = chain.last.seq, self._now()
        if last - seq >= CHECKPOINT_RECORDS or (last > seq and now - at >= CHECKPOINT_SECONDS):
            self._pending.append(chain.control(self._control(CHECKPOINT)))
            self._signed_at = (chain.last.seq, now)

    async def _open(self) -> None:
        """Begin a chain: its opening is anchored, together with the roster that lists it, before all else."""
        for _ in range(_ROSTER_TRIES):
            if self._opening is None:
                self._opening = await self._new_opening()
            # Where this raises it may have been anchored all the same: the next try repeats it, instead of
            # leaving a chain behind with each.
            committed = await self._store.commit(self._opening.batch)
            opening, self._opening = self._opening, None
            if committed is Committed.DONE:
                record = opening.record
                self._chain, self._generation, self._after = opening.chain, opening.generation, {}
                self._confirmed, self._pending, self._shown = (1, record.mac), [record], 0
                self._again = {}
                self._signed_at = (1, self._now())
                if self._sinks.directory is not None:
                    self._files = AuditFiles(self._sinks.directory, self.chain, self._sinks.file_bytes)
                log.debug("audit_chain_opened", chain=self.chain, key_id=self._key.key_id)
                return
        raise AuditUnavailable("the audit log's roster changes all the time: try again")

    async def _new_opening(self) -> _Opening:
        anchor = await self._store.anchor()
        name = secrets.token_hex(8)
        chain = Chain(self._key, name)
        opening = roster_with(self._key, self._known, anchor, name)
        fields = {
            "audit": OPEN,
            "at": round(self._now(), 6),
            "instance": self._instance,
            "outcome": "ok",
            "release": self._release,
            "roster": opening.generation,
            **opening.said,
            **self._after,
        }
        record = chain.control(fields)
        batch = AuditBatch(
            name,
            (0, NOTHING),
            [record],
            chain.head(record, self._now()),
            self._sinks.stream,
            (anchor.roster, opening.roster),
        )
        return _Opening(chain, opening.generation, record, batch)

    async def _flush(self, *, closed: bool = False) -> None:
        """Bring all sinks up to date.

        Raises:
            AuditUnavailable, StoreUnavailable, StoreNotDurable: Not now; what is not written stays pending.
        """
        began = time.perf_counter()
        chain, records = self._chain, self._pending
        if chain is None or not records:
            return
        self._print(records)
        if self._files is not None:
            try:
                await asyncio.to_thread(self._files.write, records)
            except AuditUnavailable:
                self._observer.audit_failed("file")
                raise
        missing = [record for record in records if record.seq > self._confirmed[0]]
        for first in range(0, len(missing), AT_ONCE):
            part = missing[first : first + AT_ONCE]
            final = closed and part[-1] is missing[-1]
            head = chain.head(part[-1], self._now(), closed=final)
            batch = AuditBatch(chain.name, self._confirmed, part, head, self._sinks.stream)
            try:
                committed = await self._store.commit(batch)
            except KmsError:
                self._observer.audit_failed("store")
                raise
            if committed is not Committed.DONE:
                self._give_up(chain)
            self._confirmed = (part[-1].seq, part[-1].mac)
            for record in part:
                self._again.pop(record.seq, None)
        self._pending = self._pending[len(records) :]
        self._observer.audit_committed(len(records), time.perf_counter() - began)

    def _give_up(self, chain: Chain) -> None:
        """End this chain: another begins, which says where this one was.

        Raises:
            AuditUnavailable: Always.
        """
        seq, mac = self._confirmed
        log.error(
            "audit_conflict",
            chain=chain.name,
            record=seq,
            detail="the store knows another history of this chain: restored, rolled back or tampered with",
            action="run audit verify; a new chain is begun, which names this one",
        )
        self._observer.audit_conflict()
        self._after = {"after": {"chain": chain.name, "seq": seq, "mac": mac}}
        # What the store lacks of the old chain goes into the new one as well.
        again = [
            event for _, event in sorted(self._again.items(), key=itemgetter(0)) if event.outcome != "intent"
        ]
        self._queue.extendleft(_Waiting(event, self._now(), None) for event in reversed(again))
        self._again = {}
        if self._files is not None:
            self._files.close()
        self._chain, self._files, self._pending = None, None, []
        raise AuditUnavailable("the store knows another history of the audit log; try again")

    def _print(self, records: Sequence[Record]) -> None:
        output = self._sinks.output
        lines = [record.line.decode() + "\n" for record in records if record.seq > self._shown]
        if output is None or not lines:
            return
        self._shown = records[-1].seq
        try:
            output.write("".join(lines))
            output.flush()
        except OSError:
            self._observer.audit_failed("stdout")

    def _control(self, action: str) -> dict[str, object]:
        at = round(self._now(), 6)
        return {
            "audit": action,
            "at": at,
            "instance": self._instance,
            "outcome": "ok",
            "roster": self._generation,
        }


_OPENING: Final = AuditEvent("audit.open", "ok", "", "")
"""Stands for no event of its own: the chain is opened if it is not."""

"""An audit log over the memory store, and what can go wrong with it."""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from pathlib import Path

from progressdb_kms.audit.chained import ChainedAuditLog, Sinks
from progressdb_kms.audit.reading import files_in, verify_files, verify_store
from progressdb_kms.domain.audit import AuditKey
from progressdb_kms.domain.auditreport import AuditReport
from progressdb_kms.domain.errors import AuditUnavailable, StoreUnavailable
from progressdb_kms.ports import AuditEvent
from progressdb_kms.ports.audit import AuditBatch, Committed
from progressdb_kms.store.memory_audit import MemoryAudit

KEY = AuditKey(b"\x01" * 32)


class Troubled(MemoryAudit):
    """The memory store, as a network and others would trouble it.

    Attributes:
        down: Every call raises StoreUnavailable.
        lose_answer: The next commit is made and its answer lost.
        gate: Where set, commits wait for it.
        commits: How many commits were made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.down = False
        self.lose_answer = False
        self.gate: asyncio.Event | None = None
        self.commits = 0

    async def commit(self, batch: AuditBatch) -> Committed:
        """Keep records."""
        if self.gate is not None:
            await self.gate.wait()
        if self.down:
            raise StoreUnavailable("down")
        committed = await super().commit(batch)
        self.commits += 1
        if self.lose_answer:
            self.lose_answer = False
            raise StoreUnavailable("the answer was lost")
        return committed


class Counts:
    """An observer that counts."""

    def __init__(self) -> None:
        self.told: Counter[str] = Counter()

    def audit_committed(self, records: int, seconds: float) -> None:
        """Count."""
        assert seconds >= 0
        self.told["committed"] += records

    def audit_failed(self, sink: str) -> None:
        """Count."""
        self.told[f"failed {sink}"] += 1

    def audit_lost(self, sink: str, records: int) -> None:
        """Count."""
        self.told[f"lost {sink}"] += records

    def audit_conflict(self) -> None:
        """Count."""
        self.told["conflict"] += 1

    def audit_trim_refused(self) -> None:
        """Count."""
        self.told["trim refused"] += 1


class Scene:
    """One store, and the processes on it.

    Attributes:
        now: Unix seconds.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.store = Troubled()
        self.counts = Counts()
        self.output = io.StringIO()
        self.directory = directory
        self.now = 1000.0

    def log(self, instance: str = "i1", *, stream: bool = True, key: AuditKey = KEY) -> ChainedAuditLog:
        """Return the audit log of a new process."""
        sinks = Sinks(stream=stream, directory=self.directory, file_bytes=4096, output=self.output)
        return ChainedAuditLog(key, instance, self.store, sinks, self.counts, "1.0", now=lambda: self.now)

    async def verify(self) -> AuditReport:
        """Verify the stream."""
        return await verify_store(self.store, [KEY.verify])

    async def verify_directory(self) -> AuditReport:
        """Verify the files against the anchor."""
        assert self.directory
        anchor = await self.store.anchor()
        return verify_files(files_in([self.directory]), [KEY.verify], anchor, partial=False).finish()

    def lines(self) -> list[bytes]:
        """Return the stream's lines."""
        return list(self.store.stream.values())


def event(number: int, outcome: str = "ok", action: str = "key.disable") -> AuditEvent:
    """Return an event of request ``r<number>``."""
    return AuditEvent(action, outcome, "dns:a", f"r{number}", f"k_{number}", "room:1")


async def refused(log: ChainedAuditLog, number: int) -> bool:
    """Say whether an intent is refused."""
    try:
        await log.record([event(number, "intent")])
    except AuditUnavailable:
        return True
    return False

"""Audit chains in this process's memory: the port ``AuditStore``."""

from __future__ import annotations

import json
import time

from progressdb_kms.ports.audit import Anchor, AuditBatch, Committed, Trim
from progressdb_kms.store.auditids import check_id


class MemoryAudit:
    """Implements ``AuditStore`` by the rules of the Redis one."""

    def __init__(self) -> None:
        self.heads: dict[str, bytes] = {}
        self.floors: dict[str, bytes] = {}
        self.roster = b""
        self.stream: dict[tuple[int, int], bytes] = {}
        self._last = (0, 0)

    async def commit(self, batch: AuditBatch) -> Committed:
        """Keep records and move the chain's head."""
        stored = self.heads.get(batch.chain)
        place = (0, batch.confirmed[1])
        if stored is not None:
            try:
                head = json.loads(stored)
                place = (head["seq"], head["mac"])
            except (ValueError, KeyError, TypeError):
                return Committed.CONFLICT
        if place not in {batch.confirmed, *((record.seq, record.mac) for record in batch.records)}:
            return Committed.CONFLICT
        if batch.roster is not None and stored is None:
            if self.roster != batch.roster[0]:
                return Committed.ROSTER_CHANGED
            self.roster = batch.roster[1]
        if batch.stream:
            for record in batch.records:
                if record.seq > place[0]:
                    self._add(record.line)
        self.heads[batch.chain] = batch.head
        return Committed.DONE

    def _add(self, line: bytes) -> None:
        milliseconds = max(int(time.time() * 1000), self._last[0])
        number = self._last[1] + 1 if milliseconds == self._last[0] else 0
        self._last = (milliseconds, number)
        self.stream[self._last] = line

    async def anchor(self) -> Anchor:
        """Return heads, floors and roster as they are at one moment."""
        last_id = "{}-{}".format(*self._last)
        return Anchor(self.roster, dict(self.heads), dict(self.floors), len(self.stream), last_id)

    async def page(self, after: str, limit: int) -> list[tuple[str, bytes]]:
        """Return up to ``limit`` records after an id, each with its id.

        Raises:
            InvalidParameter: ``after`` is no id.
        """
        place = check_id(after)
        found = [(f"{key[0]}-{key[1]}", line) for key, line in self.stream.items() if key > place]
        return found[:limit]

    async def tail(self, before: str | None, limit: int) -> list[tuple[str, bytes]]:
        """Return up to ``limit`` records before an id, the latest first, each with its id.

        Raises:
            InvalidParameter: ``before`` is no id.
        """
        place = None if before is None else check_id(before)
        found = [
            (f"{key[0]}-{key[1]}", line) for key, line in self.stream.items() if place is None or key < place
        ]
        return found[::-1][:limit]

    async def trim(self, trim: Trim) -> bool:
        """Trim; False where the roster is another by now."""
        if self.roster == trim.roster[1]:
            return True
        if self.roster != trim.roster[0]:
            return False
        self.floors.update(trim.floors)
        for chain in trim.dropped:
            self.heads.pop(chain, None)
            self.floors.pop(chain, None)
        if trim.first_kept:
            place = check_id(trim.first_kept)
            self.stream = {key: line for key, line in self.stream.items() if key >= place}
        self.roster = trim.roster[1]
        return True

"""Audit records on standard output, one JSON object a line, for the cluster's log system."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TextIO

    from progressdb_kms.ports import AuditEvent


class StdoutAuditLog:
    """Writes to a text stream. It can't promise that a line is kept: whoever reads the stream has to.

    Args:
        instance: Random name of this process.
        stream: Where to; standard output by default.
    """

    def __init__(self, instance: str, stream: TextIO | None = None) -> None:
        self._instance = instance
        self._stream = stream or sys.stdout

    async def record(self, events: Sequence[AuditEvent]) -> None:
        """Write events, in order, in one write."""
        if not events:
            return
        at = time.time()
        lines = []
        for event in events:
            record = {
                "audit": event.action,
                "at": round(at, 6),
                "instance": self._instance,
                "outcome": event.outcome,
                "identity": event.identity,
                "request_id": event.request_id,
            }
            if event.key_id:
                record["key_id"] = event.key_id
            if event.thread_id:
                record["thread_id"] = event.thread_id
            if event.detail:
                record["detail"] = event.detail
            lines.append(json.dumps(record, ensure_ascii=True, separators=(",", ":")))
        self._stream.write("\n".join(lines) + "\n")
        self._stream.flush()


class NoAuditLog:
    """Writes nothing: for the embedded provider, whose caller is the only user."""

    async def record(self, events: Sequence[AuditEvent]) -> None:
        """Do nothing."""

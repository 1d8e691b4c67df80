"""Audit records on standard output, one JSON object a line, for the cluster's log system."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

from progressdb_kms.audit.form import fields_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TextIO

    from progressdb_kms.audit.pipes import PatientStream
    from progressdb_kms.ports import AuditEvent


class StdoutAuditLog:
    """Writes to a text stream. It can't promise that a line is kept: whoever reads the stream has to.

    Args:
        instance: Random name of this process.
        stream: Where to; standard output by default.
    """

    durable = False

    def __init__(self, instance: str, stream: TextIO | PatientStream | None = None) -> None:
        self._instance = instance
        self._stream = stream or sys.stdout

    async def record(self, events: Sequence[AuditEvent]) -> None:
        """Write events, in order, in one write."""
        if not events:
            return
        at = time.time()
        records = [fields_of(event, at, self._instance) for event in events]
        lines = [json.dumps(record, ensure_ascii=True, separators=(",", ":")) + "\n" for record in records]
        self._stream.write("".join(lines))
        self._stream.flush()


class NoAuditLog:
    """Writes nothing: for the embedded provider, whose caller is the only user."""

    durable = False

    async def record(self, events: Sequence[AuditEvent]) -> None:
        """Do nothing."""

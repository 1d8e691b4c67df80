"""Audit lines: one JSON object each, in order, of names only."""

from __future__ import annotations

import io
import json

import pytest

from progressdb_kms.audit.stdout import NoAuditLog, StdoutAuditLog
from progressdb_kms.ports import AuditEvent


class Counted(io.StringIO):
    """A stream that counts its writes."""

    writes = 0
    flushes = 0

    def write(self, text: str) -> int:
        """Count and write."""
        self.writes += 1
        return super().write(text)

    def flush(self) -> None:
        """Count."""
        self.flushes += 1


async def test_events_are_lines_in_order() -> None:
    """Written at once, so that two requests' lines never mix, and flushed."""
    stream = Counted()
    log = StdoutAuditLog("i1", stream)
    await log.record(
        [
            AuditEvent("key.create", "ok", "dns:a", "r1", "k_1", "room:1\n{}\u2028"),
            AuditEvent("refused", "refused", "cn:é", "r2", detail="key:read /v1/keys"),
        ]
    )
    assert (stream.writes, stream.flushes) == (1, 1)
    lines = stream.getvalue().splitlines()
    assert stream.getvalue().isascii()
    first, second = map(json.loads, lines)
    assert first["audit"] == "key.create"
    assert first["thread_id"] == "room:1\n{}\u2028"
    assert {first["instance"], first["identity"], first["outcome"], first["request_id"]} == {
        "i1",
        "dns:a",
        "ok",
        "r1",
    }
    assert second["detail"] == "key:read /v1/keys"
    assert "key_id" not in second
    assert second["at"] >= first["at"] > 1_600_000_000


async def test_nothing_is_written_for_nothing() -> None:
    """No empty line for an empty batch."""
    stream = Counted()
    await StdoutAuditLog("i1", stream).record([])
    assert stream.getvalue() == ""


async def test_standard_output_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Where a cluster's log system looks."""
    await StdoutAuditLog("i1").record([AuditEvent("a", "ok", "x", "r")])
    assert json.loads(capsys.readouterr().out)["audit"] == "a"


async def test_no_audit_log_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """For the embedded provider."""
    await NoAuditLog().record([AuditEvent("a", "ok", "x", "r")])
    assert capsys.readouterr().out == ""

"""Lines about failed requests can't flood the log."""

from __future__ import annotations

from progressdb_kms.api.loglimit import LogLimit


def test_one_line_of_a_kind_a_second() -> None:
    """Others are counted, and the next line tells how many; kinds do not disturb each other."""
    now = 0.0
    lines = LogLimit(lambda: now)
    assert lines.allow("a") == 0
    assert [lines.allow("a") for _ in range(3)] == [None] * 3
    assert lines.allow("b") == 0
    now = 1.0
    assert lines.allow("a") == 3
    assert lines.allow("a") is None
    now = 3.0
    assert (lines.allow("a"), lines.allow("b")) == (1, 0)


def test_a_flood_of_kinds_is_bounded() -> None:
    """Beyond a thousand at once they share one line; quiet ones are forgotten."""
    now = 0.0
    lines = LogLimit(lambda: now)
    assert [lines.allow(kind) for kind in range(1000)] == [0] * 1000
    assert lines.allow("x") == 0
    assert [lines.allow(kind) for kind in ("y", "z")] == [None, None]
    now = 2.0
    assert lines.allow("x") == 0

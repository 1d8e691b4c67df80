"""How a run tells what it does: JSON lines, and a bar on a terminal."""

from __future__ import annotations

import io
import json
from typing import Any

from rich.console import Console

from progressdb_kms.domain.rotation import Rotation, Step
from progressdb_kms.rotation.progress import EVERY, Bar, JsonLines

ROTATION = Rotation("r_2_ab", 1, 2, Step.REWRAP, 10, 20)


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.at


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """Return what was written."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_each_happening_is_a_line() -> None:
    """Events, steps and warnings are one JSON object a line with the time and what they are."""
    stream = io.StringIO()
    report = JsonLines(stream, now=lambda: 5.0)
    report.event("start", {"worker": "w"})
    report.step(ROTATION, 1024)
    report.warning("mind this")
    report.close()
    start, step, warning = lines(stream)
    assert start == {"event": "start", "at": 5.0, "worker": "w"}
    assert (step["event"], step["step"], step["slots"], step["rotation_id"]) == (
        "step",
        "rewrap",
        1024,
        "r_2_ab",
    )
    assert warning["detail"] == "mind this"


def test_progress_is_told_every_few_seconds() -> None:
    """Slots between two lines are summed; rate and time left follow from them."""
    stream, clock = io.StringIO(), Clock()
    report = JsonLines(stream, clock=clock)
    report.step(ROTATION, 100)
    for _ in range(10):
        report.slot({"rewrapped": 30})
    assert [line["event"] for line in lines(stream)] == ["step"]
    clock.at += EVERY
    for _ in range(10):
        report.slot({"rewrapped": 30, "quarantined": 1})
    (progress,) = [line for line in lines(stream) if line["event"] == "progress"]
    assert progress["slots_done"] == 11
    assert progress["counts"] == {"rewrapped": 330, "quarantined": 1}
    assert progress["rate"] == 330 / EVERY
    assert progress["seconds_left"] == round(EVERY / 11 * 89)
    assert report.slots == 20


def test_a_worker_knows_no_total() -> None:
    """Without a step, progress has no time left."""
    stream, clock = io.StringIO(), Clock()
    report = JsonLines(stream, clock=clock)
    clock.at += EVERY
    report.slot({"verified": 2})
    (progress,) = lines(stream)
    assert progress["slots"] is None
    assert progress["seconds_left"] is None


def test_waiting_is_told_on_change_and_every_few_seconds() -> None:
    """The same names are not repeated at each look; other names are told at once."""
    stream, clock = io.StringIO(), Clock()
    report = JsonLines(stream, clock=clock)
    report.waiting(["a", "b"], [])
    report.waiting(["a", "b"], [])
    report.waiting(["b"], ["c"])
    clock.at += EVERY
    report.waiting(["b"], ["c"])
    told = [(line["missing"], line["not_live"]) for line in lines(stream)]
    assert told == [(["a", "b"], []), (["b"], ["c"]), (["b"], ["c"])]


def test_a_terminal_gets_a_bar() -> None:
    """Steps, rate, names that are waited for, warnings and the result are shown, markup as it stands."""
    stream = io.StringIO()
    bar = Bar(Console(file=stream, force_terminal=True, width=200))
    bar.event("start", {"census": {"1": 3}, "resumes": None})
    bar.slot({"verified": 1})
    bar.step(ROTATION, 2)
    bar.slot({"rewrapped": 5})
    bar.slot({"rewrapped": 5})
    bar.waiting(["[bold]host"], ["gone"])
    bar.waiting(["[bold]host"], ["gone"])
    bar.warning("mind this")
    bar.event("result", {"outcome": "clean"})
    bar.close()
    shown = stream.getvalue()
    for text in (
        'start: census={"1":3}',
        "rewrap",
        "2/2",
        "keys/s",
        "[bold]host",
        "gone",
        "mind this",
        "outcome=clean",
    ):
        assert text in shown, text
    assert shown.count("[bold]host") == 1
    assert bar.slots == 3

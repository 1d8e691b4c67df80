"""How a run of the job tells what it does: a progress bar on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from progressdb_kms.domain.rotation import Rotation

EVERY: Final = 2.0
"""Seconds between two lines of progress."""
_RECORDS: Final = ("snapshot", "rewrapped", "verified", "rolled_back")


class Reporter(Protocol):
    """Where a run reports; ``usecases.crew.Progress`` and the run's own beginning and end."""

    @property
    def slots(self) -> int:
        """Slots that this process has dealt with, over all steps."""

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Report a happening: ``start``, ``plan``, ``result``."""

    def step(self, rotation: Rotation, total: int) -> None:
        """Report that a step begins, with the number of slots in it."""

    def slot(self, counts: Mapping[str, int]) -> None:
        """Report that a slot is done."""

    def waiting(self, missing: Sequence[str], gone: Sequence[str]) -> None:
        """Name the instances that are waited for, and those no longer counted as live."""

    def warning(self, text: str) -> None:
        """Pass on what the operator should know."""

    def close(self) -> None:
        """End."""


class _Seldom:
    """Lets a message through when it differs from the last one, or when that is long ago."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: object = None
        self._at = float("-inf")

    def due(self, message: object) -> bool:
        now = self._clock()
        if message == self._last and now - self._at < EVERY:
            return False
        self._last, self._at = message, now
        return True


class JsonLines:
    """Writes one JSON object a line.

    Args:
        stream: Where to.
        now: Gives Unix seconds.
        clock: Gives seconds on a clock that only goes forward.
    """

    def __init__(
        self,
        stream: TextIO,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slots = 0
        self._stream = stream
        self._now = now
        self._clock = clock
        self._seldom = _Seldom(clock)
        self._step = ""
        self._total = self._done = 0
        self._counts: Counter[str] = Counter()
        self._began = self._told = clock()

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Write a line."""
        line = {"event": name, "at": round(self._now(), 3), **fields}
        self._stream.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._stream.flush()

    def step(self, rotation: Rotation, total: int) -> None:
        """Write that a step begins."""
        self._step, self._total, self._done = str(rotation.step), total, 0
        self._counts.clear()
        self._began = self._told = self._clock()
        self.event(
            "step",
            {
                "rotation_id": rotation.rotation_id,
                "step": self._step,
                "source_version": rotation.source_version,
                "target_version": rotation.target_version,
                "slots": total,
            },
        )

    def slot(self, counts: Mapping[str, int]) -> None:
        """Write how far this process has got, every few seconds."""
        self.slots += 1
        self._done += 1
        self._counts.update(counts)
        now = self._clock()
        if now - self._told < EVERY:
            return
        self._told = now
        records = sum(self._counts[name] for name in _RECORDS)
        self.event(
            "progress",
            {
                "step": self._step,
                "slots_done": self._done,
                "slots": self._total or None,
                "counts": dict(self._counts),
                "rate": round(records / (now - self._began)),
                "seconds_left": (
                    round((now - self._began) / self._done * (self._total - self._done))
                    if self._total
                    else None  # a worker is told of no steps
                ),
            },
        )

    def waiting(self, missing: Sequence[str], gone: Sequence[str]) -> None:
        """Write who is waited for, and who is not counted as live any more."""
        message = {"missing": list(missing), "not_live": list(gone)}
        if self._seldom.due(message):
            self.event("waiting", message)

    def warning(self, text: str) -> None:
        """Write it."""
        self.event("warning", {"detail": text})

    def close(self) -> None:
        """Do nothing: every line is out."""


class Bar:
    """Draws on a terminal.

    Args:
        console: The terminal.
    """

    def __init__(self, console: Console) -> None:
        self.slots = 0
        self._console = console
        self._seldom = _Seldom(time.monotonic)
        self._bar = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None
        self._records = 0
        self._began = time.monotonic()
        self._bar.start()

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Print what began or ended."""
        shown = "  ".join(
            f"{key}={_plain(value)}" for key, value in fields.items() if value not in (None, "")
        )
        self._console.print(f"{name}: {shown}", markup=False, highlight=False)

    def step(self, rotation: Rotation, total: int) -> None:
        """Begin a bar."""
        self._finish()
        self._records, self._began = 0, time.monotonic()
        self._task = self._bar.add_task(str(rotation.step), total=total or None, rate="")

    def slot(self, counts: Mapping[str, int]) -> None:
        """Draw on."""
        self.slots += 1
        if self._task is None:
            return
        self._records += sum(counts.get(name, 0) for name in _RECORDS)
        seconds = max(time.monotonic() - self._began, 0.001)
        self._bar.update(self._task, advance=1, rate=f"{self._records / seconds:,.0f} keys/s")

    def waiting(self, missing: Sequence[str], gone: Sequence[str]) -> None:
        """Print who is waited for, when that changes."""
        if self._seldom.due((tuple(missing), tuple(gone))):
            if missing:
                self._console.print(
                    f"waiting for instances: {', '.join(missing)}", markup=False, highlight=False
                )
            if gone:
                self._console.print(
                    f"no longer counted as live: {', '.join(gone)}", markup=False, highlight=False
                )

    def warning(self, text: str) -> None:
        """Print it."""
        self._console.print(f"warning: {text}", markup=False, highlight=False, style="yellow")

    def close(self) -> None:
        """Leave the bars as they are."""
        self._finish()
        self._bar.stop()

    def _finish(self) -> None:
        if self._task is not None:
            done = self._bar.tasks[self._task]
            total = done.total or 1
            self._bar.update(self._task, total=total, completed=done.completed if done.total else total)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))

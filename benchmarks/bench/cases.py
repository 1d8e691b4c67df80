"""What is measured: cases that are run in turns, so that noise of the machine meets all alike."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Values = Mapping[str, float]
"""One run's figures by name. The names say the units: ``per_second``, ``cpu_us``, ``p99_us``, ``mib``."""


@dataclass(frozen=True)
class Key:
    """Which figure: the part of the benchmark, what was done, by whom, and at what size."""

    part: str
    what: str
    who: str
    size: int


@dataclass(frozen=True)
class Case:
    """A measurement that can be run again and again.

    Attributes:
        key: What it measures.
        run: Runs it once.
        once: Its figure does not vary, or takes too long, so that one run has to do.
    """

    key: Key
    run: Callable[[], Values]
    once: bool = False


@dataclass(frozen=True)
class Scene:
    """What all cases share.

    Attributes:
        ready: What the development instance says of itself.
        reference_url: Of the bare Go server.
        reference_pid: Its process.
        folder: For bodies of requests.
        seconds: Length of one run.
        batch_sizes: Items in a batch.
        connections: Of single requests.
    """

    ready: dict[str, Any]
    reference_url: str
    reference_pid: int
    folder: Path
    seconds: float
    batch_sizes: tuple[int, ...] = (10, 100, 1000)
    connections: tuple[int, ...] = (1, 16, 64)


@dataclass
class Figures:
    """All runs of all cases, in the order in which they were first run."""

    runs: dict[Key, list[Values]] = field(default_factory=dict)

    def add(self, key: Key, values: Values) -> None:
        """Add a run."""
        self.runs.setdefault(key, []).append(values)

    def median(self, key: Key, name: str) -> float | None:
        """Return the median over the runs, None where it was not measured."""
        found = [values[name] for values in self.runs.get(key, []) if name in values]
        return statistics.median(found) if found else None

    def spread(self, key: Key, name: str) -> tuple[float, float]:
        """Return the lowest and the highest of the runs."""
        found = [values[name] for values in self.runs[key] if name in values]
        return min(found), max(found)

    def names(self, key: Key) -> list[str]:
        """Return the names of a case's figures."""
        return list(dict.fromkeys(name for values in self.runs[key] for name in values))

    @property
    def failed(self) -> int:
        """How many requests failed in all."""
        return int(sum(values.get("failed", 0) for runs in self.runs.values() for values in runs))

    def ratio(self, name: str, over: Key, under: Key) -> float | None:
        """Return the ratio of two medians, None where one is missing or the lower one is nothing."""
        top, bottom = self.median(over, name), self.median(under, name)
        return top / bottom if top is not None and bottom else None


def run_in_turns(cases: list[Case], runs: int, figures: Figures) -> None:
    """Run all cases, then all again, and so on; a dot on stderr says that one was run."""
    for number in range(runs):
        for case in cases:
            if number == 0 or not case.once:
                figures.add(case.key, case.run())
                print(".", end="", file=sys.stderr, flush=True)


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Say on stderr what begins, and end its line of dots."""
    print(f"{what} ", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(file=sys.stderr)

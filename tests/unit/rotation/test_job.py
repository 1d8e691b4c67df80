"""What a run of the job makes of its end: exit codes and the last line."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import progressdb_kms
from progressdb_kms.domain.errors import Fenced, KmsError, RotationRefused, RotationRunning
from progressdb_kms.domain.rotation import Rotation
from progressdb_kms.rotation import job
from progressdb_kms.settings import Settings, parse_settings
from progressdb_kms.usecases.rotation import Interrupted


class Report:
    """A reporter that remembers."""

    slots = 0

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.closed = False

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Keep it."""
        self.events.append((name, dict(fields)))

    def step(self, rotation: Rotation, total: int) -> None:
        """Say nothing."""

    def slot(self, counts: Mapping[str, int]) -> None:
        """Say nothing."""

    def waiting(self, missing: Sequence[str], gone: Sequence[str]) -> None:
        """Say nothing."""

    def warning(self, text: str) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Remember."""
        self.closed = True


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Give a configuration."""
    document = {
        "listen": {"host": None, "unix": {"path": "s", "allow_uids": [0]}},
        "policy": "p",
        "kek": {"path": "k"},
        "store": {"url": "redis://x"},
    }
    return parse_settings(document, tmp_path)


async def ended(settings: Settings, monkeypatch: pytest.MonkeyPatch, outcome: Any) -> tuple[int, Report]:
    """Run the job with this outcome of its work: a number, an error, or what to await."""
    report = Report()

    async def work(*_: object) -> int:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome if isinstance(outcome, int) else await outcome

    monkeypatch.setattr(job, "_run", work)
    try:
        return await job.run(settings, job.Options(), report), report
    finally:
        assert report.closed


@pytest.mark.parametrize(
    "outcome, code, said",
    [
        (0, 0, None),
        (3, 3, None),
        (RotationRunning("host/1 leads"), 4, "rotation_running"),
        (Fenced("taken"), 4, "fenced"),
        (Interrupted(), 75, None),
    ],
)
async def test_exit_codes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, outcome: Any, code: int, said: str | None
) -> None:
    """Each end has its exit code; whoever leads instead is told of."""
    got, report = await ended(settings, monkeypatch, outcome)
    assert got == code
    if said is not None:
        assert report.events[-1][1]["code"] == said


async def test_an_error_is_told_and_raised(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line says why, and the command line makes its one line and exit code of the error."""
    report = Report()

    async def fail(*_: object) -> int:
        raise RotationRefused("no room")

    monkeypatch.setattr(job, "_run", fail)
    with pytest.raises(KmsError, match="no room"):
        await job.run(settings, job.Options(wait=1), report)
    assert report.events == [
        ("result", {"outcome": "failed", "code": "rotation_refused", "detail": "no room"})
    ]


async def test_work_that_does_not_stop_is_cut(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """After SIGTERM and its grace, what still waits is cancelled: it is done again by the next run."""
    monkeypatch.setattr(job, "_GRACE", 0.01)

    async def wait_for_ever() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()
        return 0

    code, report = await ended(settings, monkeypatch, wait_for_ever())
    assert code == 75
    assert report.events[-1][1]["outcome"] == "stopped"


def test_nothing_in_the_package_sets_a_fault_point() -> None:
    """No file of the package names the tests' variables, and only the job's module names its hook."""
    root = Path(progressdb_kms.__file__).parent
    sources = {path: path.read_text() for path in root.rglob("*.py")}
    assert not [path for path, text in sources.items() if "FAULT_POINT" in text]
    assert [path.name for path, text in sources.items() if re.search(r"\bREACHED\b", text)] == ["job.py"]
    assert job.REACHED is job._nothing

"""For every test: Hypothesis profiles, bytecode that is kept, files in memory, and no skipped test in CI."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest
import structlog
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

# Tests start many processes of the package. Where containers set this, each one compiles the package anew,
# which takes about as much CPU time as the rest of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

LEFT_BEHIND = 86_400
"""Seconds after which a folder belongs to no run."""
MEMORY = "/dev/shm"  # noqa: S108 - folders in it are made by pytest and tempfile, for one user and with new names


def _files_in_memory() -> bool:
    """Say whether the tests' files go to memory: not where it is small, runs no programs, or in long forms.

    Stores fsync each write, and a rotation writes for each of 1024 slots in four steps: on a disk it spends
    half of its time on that. No test needs a disk that is slow: a power cut cuts files back to what was
    fsynced (``tests.fault.power``), and a full disk is one of its own.
    """
    try:
        found = os.statvfs(MEMORY)
    except OSError:
        return False
    small = found.f_bavail * found.f_frsize < 2 << 30
    usable = os.access(MEMORY, os.W_OK | os.X_OK) and not found.f_flag & os.ST_NOEXEC
    return usable and not small and "FAULT_RUNS" not in os.environ


def pytest_sessionstart(session: pytest.Session) -> None:
    """Take away what a run that was killed has left in memory; pytest sees to its own folders."""
    if not hasattr(session.config, "workerinput"):
        for folder in Path(MEMORY).glob("kms-it-*"):
            with contextlib.suppress(OSError):  # somebody else's, or gone meanwhile
                if time.time() - folder.stat().st_mtime > LEFT_BEHIND:
                    shutil.rmtree(folder)


# Where pytest makes `tmp_path`, and `tests.integration.world` its folders; somebody's own choice counts.
if _files_in_memory():
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)

# Two cores are shared by the services under test, so an example's time says nothing: no deadline.
settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=5_000,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def _no_skip_in_ci(report: Report) -> Report:
    """Fail a skipped report when CI is set: there, what a test needs has to be installed."""
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a test skipped in CI into a failure."""
    return _no_skip_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn a module skipped in CI into a failure."""
    return _no_skip_in_ci((yield))


@pytest.fixture(autouse=True)
def _logging_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take back what a command that ran in this process has set up, or the next test logs to its streams."""
    # A logger that is cached would keep the setting.
    configure = structlog.configure
    uncached = {"cache_logger_on_first_use": False}
    monkeypatch.setattr(structlog, "configure", lambda **settings: configure(**(settings | uncached)))
    root = logging.getLogger()
    level, handlers = root.level, set(root.handlers)
    yield
    if structlog.is_configured():
        structlog.reset_defaults()
        root.setLevel(level)
        for handler in set(root.handlers) - handlers:
            if type(handler) is logging.StreamHandler:
                root.removeHandler(handler)

"""What the Makefile and CI lean on: the lock check, the total of test runs, no skipped test in CI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

REPORT = '<testsuites><testsuite tests="{}" failures="{}" errors="{}" skipped="0"/></testsuites>'


def run(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with `arguments`, `env` added to the environment."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | env,
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the lock check reads, to be spoilt."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "check_locks.py", tmp_path / "scripts")
    return tmp_path


def test_locks_agree_with_pyproject(project: Path) -> None:
    """The locks as they are pass the check."""
    done = run(project / "scripts" / "check_locks.py")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "file,old,new,complaint",
    [
        (
            "pyproject.toml",
            '"msgspec>=0.20,<1"',
            '"msgspec>=0.20,<1", "left-pad"',
            "left-pad is in pyproject",
        ),
        ("pyproject.toml", '"msgspec>=0.20,<1"', '"msgspec>=99"', "is outside >=99"),
        ("requirements/client.txt", "httpcore==", "httpcore>=", "not an exact version"),
        ("requirements/client.txt", "msgspec==", "msgspec==9", "differs from dev.txt"),
        ("requirements/server.txt", "quart==", "quart @ x://y/quart.whl\nquart==", "holds an address"),
    ],
)
def test_a_wrong_lock_is_named(project: Path, file: str, old: str, new: str, complaint: str) -> None:
    """Each way in which a lock can disagree is reported, with exit status 1."""
    text = (project / file).read_text()
    assert old in text
    (project / file).write_text(text.replace(old, new, 1))
    done = run(project / "scripts" / "check_locks.py")
    assert done.returncode == 1
    assert complaint in done.stderr


def test_a_pin_without_hash_is_named(project: Path) -> None:
    """A line that pip would install unverified is reported."""
    with (project / "requirements" / "dev.txt").open("a") as lock:
        lock.write("left-pad==1.0\n")
    assert "left-pad has no hash" in run(project / "scripts" / "check_locks.py").stderr


@pytest.mark.parametrize(
    "counts,line,status",
    [
        ([(3, 0, 0), (4, 0, 0)], "7 passed, 0 failed", 0),
        ([(3, 1, 1)], "1 passed, 2 failed", 1),
        ([(0, 0, 0)], "0 passed, 0 failed", 1),
        ([(3, 0, 0), None], "3 passed, 1 failed", 1),
    ],
)
def test_total_speaks_for_all_runs(
    tmp_path: Path, counts: list[tuple[int, int, int] | None], line: str, status: int
) -> None:
    """Reports are added up; a failure, a missing report or no test at all is not a success."""
    reports = [tmp_path / f"{number}.xml" for number in range(len(counts))]
    for report, count in zip(reports, counts, strict=True):
        if count is not None:
            report.write_text(REPORT.format(*count))
    done = run(ROOT / "scripts" / "ci_total.py", *reports)
    assert (done.stdout.strip(), done.returncode) == (line, status)


def test_a_skip_fails_in_ci_only(tmp_path: Path) -> None:
    """However a test is skipped, CI counts it as failed; a developer's run goes on."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_called.py").write_text(
        "import pytest\n\ndef test_called():\n    pytest.skip('no server')\n"
        "\n@pytest.mark.skip(reason='no server')\ndef test_marked():\n    pass\n"
    )
    (tmp_path / "test_module.py").write_text("import pytest\n\npytest.importorskip('no_such_server')\n")
    command = [
        "-m",
        "pytest",
        "-q",
        "--continue-on-collection-errors",
        f"--rootdir={tmp_path}",
        str(tmp_path),
    ]
    in_ci = run(*command, CI="true", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert in_ci.stdout.splitlines()[-1].startswith("1 failed, 2 errors in ")
    assert in_ci.returncode == 1
    at_home = run(*command, CI="", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert at_home.stdout.splitlines()[-1].startswith("3 skipped in ")
    assert at_home.returncode == 0

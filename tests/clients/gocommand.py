"""The Go client's module, and the go command over it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "clients" / "go"

NEEDS_GO = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("go") is None, reason="Go is missing: its client is not tested here"),
]

OFFLINE = {
    "GOPROXY": "off",
    # All with the race detector: the standard library, which takes most of the time, is compiled but once.
    "GOFLAGS": "-mod=mod -buildvcs=false -race",
    "GOTOOLCHAIN": "local",
    "GOWORK": "off",
    "CGO_ENABLED": "1",
}
"""Environment of the go command."""


def go(*arguments: str, cwd: Path = MODULE, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the go command, with nothing to be had from a network."""
    return subprocess.run(
        ["go", *arguments],
        cwd=cwd,
        env={**os.environ, **OFFLINE, **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )


def passed(done: subprocess.CompletedProcess[str]) -> set[str]:
    """Return the tests, without subtests, that passed; fail if any did not."""
    assert done.returncode == 0, (done.stdout + done.stderr)[-8_000:]
    assert "--- SKIP" not in done.stdout
    return set(re.findall(r"^--- PASS: (\w+)", done.stdout, re.MULTILINE))


def declared_in(*names: str) -> set[str]:
    """Return the tests that these files have."""
    return {
        test
        for name in names
        for test in re.findall(r"^func (Test\w+)\(", (MODULE / name).read_text(), re.MULTILINE)
    }

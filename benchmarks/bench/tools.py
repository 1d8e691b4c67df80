"""The programs beside ours: load generators, and the reference server that Go builds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1]
TOOLS = BENCHMARKS / ".tools"
GENERATOR = "github.com/codesenberg/bombardier@v1.2.6"


def find_generator() -> Path:
    """Return the load generator, built if it is not there; ends the program where that is not possible."""
    found = shutil.which("bombardier") or shutil.which("bombardier", path=str(TOOLS))
    if found:
        return Path(found)
    if shutil.which("go") is None:
        sys.exit(
            f"the load generator is missing: install Go, or put bombardier on PATH (go install {GENERATOR})"
        )
    subprocess.run(["go", "install", GENERATOR], env={**os.environ, "GOBIN": str(TOOLS)}, check=True)
    return TOOLS / "bombardier"


def generator_version() -> str:
    """Return what the load generator says of itself, "none" where there is none.

    Built by Go it does not know its version; then its pinned name is returned.
    """
    found = shutil.which("bombardier") or shutil.which("bombardier", path=str(TOOLS))
    if found is None:
        return "none"
    said = subprocess.run([found, "--version"], check=True, capture_output=True, text=True)
    text = (said.stdout + said.stderr).strip()
    return GENERATOR if "unspecified" in text else text


def build_reference() -> Path:
    """Build the bare Go server; ends the program where there is no Go."""
    if shutil.which("go") is None:
        sys.exit("Go is missing: the reference server is built with it")
    TOOLS.mkdir(exist_ok=True)
    binary = TOOLS / "reference"
    subprocess.run(["go", "build", "-o", str(binary), "."], cwd=BENCHMARKS / "reference", check=True)
    return binary


def find_store_benchmark() -> str:
    """Return redis-benchmark, which comes with redis-server; ends the program where it is missing."""
    found = shutil.which("redis-benchmark") or shutil.which("valkey-benchmark")
    return found or sys.exit("redis-benchmark is missing: it comes with Redis (Debian: redis-tools)")


def output_of(command: list[str]) -> str:
    """Run a program and return its standard output.

    Raises:
        RuntimeError: It failed; says what it said.
    """
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with code {done.returncode}: {done.stdout}{done.stderr}"
        )
    return done.stdout

"""Runs commands in this process, and `dev` in one of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 60.0
"""Seconds until a hung process fails its test; nothing is measured by it."""

GOOD = ["--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction", "--save", ""]
"""Options of a store that loses nothing."""


@dataclass
class Dev:
    """A `dev` process and what its ready file said when it became ready."""

    process: subprocess.Popen[bytes]
    directory: Path
    log: Path
    ready: dict[str, Any]

    @property
    def output(self) -> str:
        """All that it has printed so far."""
        return self.log.read_text()

    def ready_now(self) -> dict[str, Any]:
        """Return what the ready file says now."""
        content: dict[str, Any] = json.loads((self.directory / "ready.json").read_text())
        return content

    def wait_for(self, text: str) -> None:
        """Wait until the output has `text`."""
        wait_until(lambda: text in self.output, self.log)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(LIMIT)


def wait_until(condition: Any, log: Path | None = None) -> None:
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, log.read_text() if log else "waited too long"
        time.sleep(0.02)


def start_dev(directory: Path, *arguments: str, **environment: str) -> Dev:
    """Start `dev` with free ports and wait until it is ready."""
    log = directory.with_name(f"{directory.name[:50]}.{time.monotonic_ns()}.log")
    ready = log.with_suffix(".ready")
    command = [sys.executable, "-m", "progressdb_kms.cli", "dev", "--dir", str(directory), "--port", "0"]
    command += ["--admin-port", "0", "--ready-file", str(ready), *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | environment)
    try:
        wait_until(lambda: ready.exists() or process.poll() is not None, log)
        assert process.poll() is None, log.read_text()
    except BaseException:
        process.kill()
        process.wait()
        raise
    return Dev(process, directory, log, json.loads(ready.read_text()))


def is_alive(pid: int) -> bool:
    """Say whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def listens(path: Path) -> bool:
    """Say whether somebody listens on a Unix socket, whose file is there a moment before."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


@contextmanager
def running_store(directory: Path, *words: str) -> Iterator[Path]:
    """Run a store with these options; give its socket."""
    path = directory / "store.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--dir", str(directory), *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: listens(path))
        yield path
    finally:
        process.kill()
        process.wait()

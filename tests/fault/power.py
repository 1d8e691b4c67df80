"""A store whose power can be cut: SIGKILL, then only what was fsynced is left of its files."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.store.servers import Server

SOURCE = Path(__file__).with_name("durable_length.c")
RUNS = int(os.environ.get("FAULT_RUNS", "3"))
USUAL = 1
"""Milliseconds that each fsync takes at least, as on a disk: where the files are in memory, hardly anything
would be unsynced at the moment of a power cut, and the cut would prove nothing."""


def build_shim(folder: Path, source: Path = SOURCE) -> Path:
    """Compile a shim; without a source the one that records durable lengths."""
    library = folder / f"{source.stem}.so"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", str(library), str(source), "-ldl"], check=True)
    return library


class PoweredServer:
    """A server under the shim.

    Args:
        shim: The compiled shim.
        kind: ``redis`` or ``valkey``.
        folder: Where all its files are.
        options: Its settings.
    """

    def __init__(self, shim: Path, kind: str, folder: Path, options: Mapping[str, str]) -> None:
        self._lengths = folder / "lengths"
        self._lengths.mkdir(parents=True)
        self._delay = folder / "delay"
        self.slow_down(USUAL)
        environment = {
            "LD_PRELOAD": str(shim),
            "DURABLE_LENGTH_DIR": str(self._lengths),
            "DURABLE_LENGTH_DELAY": str(self._delay),
        }
        self.server = Server(kind, folder / "data", options, environment=environment).start()

    def slow_down(self, milliseconds: int) -> None:
        """Let each fsync take so much longer from now on; ``USUAL`` is where it began."""
        fresh = self._delay.with_suffix(".new")
        fresh.write_text(str(milliseconds))
        fresh.replace(self._delay)

    def crash(self) -> None:
        """Kill the server and the process that rewrites its file: the page cache survives."""
        children = self.server.children
        self.server.kill()
        for child in children:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself meanwhile
                os.kill(child, signal.SIGKILL)

    def cut_power(self) -> int:
        """Kill the server and cut its files back to what was fsynced; return how many bytes that took."""
        self.crash()
        lost = 0
        for path in (self.server.folder / "appendonlydir").iterdir():
            size, durable = path.stat().st_size, self.durable(path)
            if durable < size:
                lost += size - durable
                os.truncate(path, durable)
        return lost

    def durable(self, path: Path) -> int:
        """Return up to which byte a file was fsynced."""
        record = self._lengths / str(path.stat().st_ino)
        return int(record.read_text()) if record.exists() else 0

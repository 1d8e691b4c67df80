"""A store whose power can be cut: SIGKILL, then only what was fsynced is left of its files."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.store.servers import Server

SOURCE = Path(__file__).with_name("durable_length.c")
RUNS = int(os.environ.get("FAULT_RUNS", "3"))


def build_shim(folder: Path) -> Path:
    """Compile the shim that records durable lengths."""
    library = folder / "durable_length.so"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", str(library), str(SOURCE), "-ldl"], check=True)
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
        environment = {"LD_PRELOAD": str(shim), "DURABLE_LENGTH_DIR": str(self._lengths)}
        self.server = Server(kind, folder / "data", options, environment=environment).start()

    def crash(self) -> None:
        """Kill the server and the process that rewrites its file: the page cache survives."""
        children = Path(f"/proc/{self.server.pid}/task/{self.server.pid}/children").read_text().split()
        self.server.kill()
        for child in children:
            os.kill(int(child), signal.SIGKILL)

    def cut_power(self) -> int:
        """Kill the server and cut its files back to what was fsynced; return how many bytes that took."""
        self.crash()
        lost = 0
        for path in (self.server.folder / "appendonlydir").iterdir():
            status = path.stat()
            record = self._lengths / str(status.st_ino)
            durable = int(record.read_text()) if record.exists() else 0
            if durable < status.st_size:
                lost += status.st_size - durable
                os.truncate(path, durable)
        return lost

"""The servers that are measured: a development instance, and the bare Go server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from progressdb_kms.client import SyncKmsProvider, open_sync_provider

from .machine import GENERATOR_CORE, SERVER_CORE, pin
from .tools import build_reference

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from progressdb_kms.client.protocol import Encoding

READY_POLL = 0.05
REFERENCE_ENVIRONMENT = {"GOMAXPROCS": "1"}


@contextmanager
def service(program: Sequence[str] = ("-m", "progressdb_kms.cli")) -> Iterator[dict[str, Any]]:
    """Run a development instance, the service on the first core, its store on the second.

    Gives what its ready file says: addresses, certificates, process ids.

    Args:
        program: The command line, as Python is told of it.
    """
    with tempfile.TemporaryDirectory() as directory:
        ready_file = Path(directory) / "ready"
        command = [sys.executable, *program, "dev", "--dir", f"{directory}/dev"]
        command += ["--port", "0", "--admin-port", "0", "--ready-file", str(ready_file)]
        with (Path(directory) / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not ready_file.exists():
                if process.poll() is not None:
                    sys.exit((Path(directory) / "log").read_text())
                time.sleep(READY_POLL)
            ready = json.loads(ready_file.read_text())
            pin(ready["pid"], SERVER_CORE)
            pin(ready["store_pid"], GENERATOR_CORE)
            yield ready
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def reference_command(ready: dict[str, Any]) -> list[str]:
    """Return the command that runs the bare Go server with the service's certificates."""
    pki = Path(ready["ca"]).parent
    files = ["-ca", ready["ca"], "-cert", str(pki / "kms.crt"), "-key", str(pki / "kms.key")]
    return [str(build_reference()), *files]


@contextmanager
def reference(ready: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Build and run the bare Go server on the service's core; gives its URL and process id."""
    process = subprocess.Popen(
        reference_command(ready),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **REFERENCE_ENVIRONMENT},
    )
    try:
        port = int((process.stdout or sys.exit("no output")).readline())
        pin(process.pid, SERVER_CORE)
        yield f"https://localhost:{port}", process.pid
    finally:
        process.kill()
        process.wait()


def client(ready: dict[str, Any], encoding: Encoding = "json", deadline: float = 60.0) -> SyncKmsProvider:
    """Return a client of a development instance, as its server."""
    pair = ready["clients"]["server"]
    return open_sync_provider(
        ready["url"],
        ca=ready["ca"],
        cert=pair["cert"],
        key=pair["key"],
        encoding=encoding,
        deadline=deadline,
        coalesce=False,
    )

"""Runs the service as its users do: `dev` in a process of its own, seen through its ready file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.contract.wire_client import Client, Connect, tcp_connect, tls_connect, tls_context, unix_connect

MAX_CONNECTIONS = 16
"""Connections that the tuned service takes."""
STALL = 1.0
"""Seconds that the tuned service gives headers and bodies."""
START_LIMIT = 120.0
"""Seconds to wait for the ready file or an exit: a net for hung tests, never something that is measured."""


@dataclass(frozen=True)
class DevService:
    """A running service: its process, its ready file's content and its log."""

    process: subprocess.Popen[bytes]
    directory: Path
    ready: dict[str, Any]
    log: Path

    @property
    def host(self) -> str:
        """The name that the service's certificate is for."""
        return urlsplit(self.ready["url"]).hostname or ""

    @property
    def port(self) -> int:
        """The TLS port."""
        return urlsplit(self.ready["url"]).port or 0

    def tls(self, client: str | None) -> Connect:
        """Return what connects as `server`, `operator` or `stranger`, or with no certificate."""
        if client is None:
            return self.tls_with(None, None)
        files = self.ready["clients"][client]
        return self.tls_with(Path(files["cert"]), Path(files["key"]))

    def tls_with(self, cert: Path | None, key: Path | None) -> Connect:
        """Return what connects with any certificate."""
        return tls_connect(self.host, self.port, tls_context(Path(self.ready["ca"]), cert, key))

    def client(self, name: str) -> Client:
        """Return a new client: `server`, `operator`, `stranger`, `unix`, or `admin` for the probe port."""
        if name == "unix":
            return Client(unix_connect(self.ready["unix"]), "localhost")
        if name == "admin":
            admin = urlsplit(self.ready["admin_url"])
            return Client(tcp_connect(admin.hostname or "", admin.port or 0), admin.netloc)
        return Client(self.tls(name), f"{self.host}:{self.port}")

    def log_text(self) -> str:
        """Everything that the service has written to stdout and stderr so far."""
        return self.log.read_text("utf-8", errors="replace")

    def kill(self) -> None:
        """End the service and its store at once, as a power cut or an OOM kill would."""
        for pid in (self.ready["store_pid"], self.ready["pid"]):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """Ask the service to end and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(START_LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


def start_dev(directory: Path, log: Path) -> DevService:
    """Start `dev` on `directory` with free ports and wait until it says that it is ready."""
    ready = log.with_suffix(".ready.json")
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "progressdb_kms.cli", "dev", "--dir", str(directory)]
    command += ["--port", "0", "--admin-port", "0", "--ready-file", str(ready)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=os.environ.copy()
        )
    deadline = time.monotonic() + START_LIMIT
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()  # not kill: the store that it started must end with it
            process.wait(START_LIMIT)
            raise RuntimeError("dev did not become ready:\n" + log.read_text(errors="replace")[-4000:])
        time.sleep(0.05)
    return DevService(process, directory, json.loads(ready.read_text()), log)

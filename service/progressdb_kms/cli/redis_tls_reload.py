"""``redis-tls-reload``: stands beside a Redis or Valkey server and has it read renewed certificates."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
import structlog
from cryptography import x509

from progressdb_kms.domain.errors import KmsError, SettingsInvalid
from progressdb_kms.files import Watch, read_private
from progressdb_kms.observability.logs import configure_logs
from progressdb_kms.store.redis.address import Address
from progressdb_kms.store.redis.certificates import (
    CertificateFiles,
    apply_certificates,
    load_acl,
    local_address,
)

log = structlog.get_logger(__name__)

_LONGEST_PAUSE: Final = 30.0


@click.command("redis-tls-reload")
@click.option("--url", required=True, help="The server's Unix socket: unix:///path.")
@click.option("--username", required=True, help="ACL user; it needs +config|set.")
@click.option(
    "--password-file",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with its password, private like a KEK file.",
)
@click.option(
    "--watch",
    "directory",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of tls.crt, tls.key and ca.crt, at the same path as in the server's container.",
)
@click.option(
    "--ca",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The CAs of the server's clients, where they are not ca.crt in that directory.",
)
@click.option(
    "--acl",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The server's ACL file, to be loaded again when it changes; the user needs +acl|load too.",
)
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=5.0,
    show_default=True,
    help="Seconds between looks.",
)
def redis_tls_reload(
    url: str,
    username: str,
    password_file: Path,
    directory: Path,
    ca: Path | None,
    acl: Path | None,
    interval: float,
) -> None:
    """Have a Redis or Valkey server read its certificates again whenever their files change.

    Runs until SIGTERM. It also does so once at its start, and tries again for as long as the server is away
    or can't use the files; the server goes on with what it has meanwhile.
    """
    configure_logs("info", "json")
    files = CertificateFiles(
        cert=directory.absolute() / "tls.crt",
        key=directory.absolute() / "tls.key",
        ca=ca.absolute() if ca is not None else directory.absolute() / "ca.crt",
    )
    # What can't be right later either is said now, and ends the container where somebody looks.
    server = _Server(local_address(url), username, password_file)
    server.password()
    work: list[_Reloading] = [_Certificates(server, files)]
    if acl is not None:
        work.append(_Users(server, acl))
    asyncio.run(_until_stopped(work, interval))


@dataclass(frozen=True, slots=True)
class _Server:
    """The server, and who we are there."""

    address: Address
    username: str
    password_file: Path

    def password(self) -> str:
        """Read the password: each time, since it may be renewed as well."""
        try:
            return read_private(self.password_file, error=SettingsInvalid).decode().strip()
        except UnicodeDecodeError:
            raise SettingsInvalid(f"{self.password_file} is not text") from None


class _Reloading(ABC):
    """Files that the server is to read again when they change.

    Attributes:
        applied, refused: The log's events.
        files: Their paths.
    """

    applied: str
    refused: str
    files: tuple[Path, ...]

    def __init__(self) -> None:
        self._due = asyncio.Event()
        self._due.set()

    @abstractmethod
    async def apply(self) -> dict[str, str]:
        """Have the server read them, and return what to log.

        Raises:
            KmsError: Not now.
        """

    async def changed(self) -> None:
        """Take note that they have changed."""
        self._due.set()

    async def run(self) -> None:
        """Apply the files at once, and after each change, until cancelled."""
        while True:
            await self._due.wait()
            pause = 1.0
            while not await self._applied():
                # A change ends the pause: what was refused may be whole now.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._due.wait(), pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _applied(self) -> bool:
        # Before the files are read: a change while they are applied makes it due again.
        self._due.clear()
        try:
            fields = await self.apply()
        except KmsError as error:
            log.warning(self.refused, detail=error.detail, trying_again=True)
            return False
        if fields:
            log.info(self.applied, **fields)
        return True


class _Certificates(_Reloading):
    applied, refused = "certificates_applied", "certificates_not_applied"

    def __init__(self, server: _Server, files: CertificateFiles) -> None:
        super().__init__()
        self._server = server
        self._certificates = files
        self.files = (files.cert, files.key, files.ca)

    async def apply(self) -> dict[str, str]:
        """Read them again."""
        server, cert = self._server, self._certificates.cert
        try:
            expires = x509.load_pem_x509_certificate(cert.read_bytes()).not_valid_after_utc
        except OSError as error:
            raise SettingsInvalid(f"can't read {cert}: {error.strerror}") from None
        except ValueError:
            raise SettingsInvalid(f"{cert} is not a certificate in PEM") from None
        await apply_certificates(server.address, server.username, server.password(), self._certificates)
        return {"certificate": str(cert), "expires": expires.isoformat()}


class _Users(_Reloading):
    applied, refused = "users_applied", "users_not_applied"

    def __init__(self, server: _Server, path: Path) -> None:
        super().__init__()
        self._server = server
        self._path = path
        self._loaded = b""
        self.files = (path,)

    async def apply(self) -> dict[str, str]:
        """Load the file again, unless it says what it said before: loading can cost others' connections."""
        server = self._server
        try:
            content = hashlib.sha256(self._path.read_bytes()).digest()
        except OSError as error:
            raise SettingsInvalid(f"can't read {self._path}: {error.strerror}") from None
        if content == self._loaded:
            return {}
        await load_acl(server.address, server.username, server.password())
        self._loaded = content
        return {"file": str(self._path)}


async def _work(work: Sequence[_Reloading], interval: float) -> None:
    # The watches are made before anything is applied, so that no change is missed.
    watches = [Watch(one.files, one.changed, interval=interval) for one in work]
    async with asyncio.TaskGroup() as group:
        for one, watch in zip(work, watches, strict=True):
            group.create_task(watch.run())
            group.create_task(one.run())


async def _until_stopped(work: Sequence[_Reloading], interval: float) -> None:
    task = asyncio.create_task(_work(work, interval))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task

"""``redis-tls-reload``: stands beside a Redis or Valkey server and has it read renewed certificates."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import Final

import click
import structlog
from cryptography import x509

from progressdb_kms.domain.errors import KmsError, SettingsInvalid
from progressdb_kms.files import Watch, read_private
from progressdb_kms.observability.logs import configure_logs
from progressdb_kms.store.redis.certificates import CertificateFiles, apply_certificates, local_address

log = structlog.get_logger(__name__)

_LONGEST_PAUSE: Final = 30.0


@click.command("redis-tls-reload")
@click.option("--url", required=True, help="The server's Unix socket: unix:///path.")
@click.option("--username", required=True, help="ACL user; it needs +config|set and nothing else.")
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
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=5.0,
    show_default=True,
    help="Seconds between looks.",
)
def redis_tls_reload(
    url: str, username: str, password_file: Path, directory: Path, ca: Path | None, interval: float
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
    local_address(url)
    _password(password_file)
    asyncio.run(_until_stopped(_Reloader(url, username, password_file, files, interval)))


def _password(path: Path) -> str:
    try:
        return read_private(path, error=SettingsInvalid).decode().strip()
    except UnicodeDecodeError:
        raise SettingsInvalid(f"{path} is not text") from None


class _Reloader:
    def __init__(
        self, url: str, username: str, password_file: Path, files: CertificateFiles, interval: float
    ) -> None:
        self._address = local_address(url)
        self._username = username
        self._password_file = password_file
        self._files = files
        self._interval = interval
        self._due = asyncio.Event()
        self._due.set()

    async def run(self) -> None:
        """Apply the files at once, and after each change."""
        watch = Watch(
            (self._files.cert, self._files.key, self._files.ca), self._changed, interval=self._interval
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(watch.run())
            group.create_task(self._apply_whenever_due())

    async def _changed(self) -> None:
        self._due.set()

    async def _apply_whenever_due(self) -> None:
        while True:
            await self._due.wait()
            pause = 1.0
            while not await self._apply():
                # A change ends the pause: what was refused may be whole now.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._due.wait(), pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _apply(self) -> bool:
        # Before the files are read: a change while they are applied makes it due again.
        self._due.clear()
        try:
            # Read each time: the password may have been renewed as well.
            password = _password(self._password_file)
            expires = await asyncio.to_thread(_expiry, self._files.cert)
            await apply_certificates(self._address, self._username, password, self._files)
        except KmsError as error:
            log.warning("certificates_not_applied", detail=error.detail, trying_again=True)
            return False
        log.info("certificates_applied", certificate=str(self._files.cert), expires=expires)
        return True


def _expiry(path: Path) -> str:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc.isoformat()
    except OSError as error:
        raise SettingsInvalid(f"can't read {path}: {error.strerror}") from None
    except ValueError:
        raise SettingsInvalid(f"{path} is not a certificate in PEM") from None


async def _until_stopped(reloader: _Reloader) -> None:
    work = asyncio.create_task(reloader.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, work.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await work

"""Files that hold secrets, and files that change while the service runs."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path

from progressdb_kms.domain.errors import OperatorError

log = logging.getLogger(__name__)

# Far above any key file; a mistaken path must not fill the memory.
MAX_PRIVATE_BYTES = 2**20


def read_private(path: Path, *, error: type[OperatorError] = OperatorError) -> bytes:
    """Return the content of a file that only this service may read.

    Its mode has to be 0600 or 0400, or 0640 or 0440 where the file's group is one of the process's: how
    Kubernetes mounts a Secret with ``fsGroup``. Symbolic links are followed: such a volume is made of them.

    Args:
        path: The file.
        error: What to raise.

    Raises:
        OperatorError: Or ``error``: the file can't be read, is not a regular file, is over 1 MiB, or is open
            to others; the message names the file, its mode and what to do.
    """
    try:
        # Non-blocking: a FIFO at this path must not stop the start. Checks are on the open file, so that what
        # was checked is what is read.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as failure:
        raise error(f"can't read {path}: {failure.strerror}") from failure
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path} is not a regular file")
        _check_mode(path, status, error)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(MAX_PRIVATE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > MAX_PRIVATE_BYTES:
        raise error(f"{path} is over {MAX_PRIVATE_BYTES} bytes, so it is not what it should be")
    return content


def _check_mode(path: Path, status: os.stat_result, error: type[OperatorError]) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if mode & ~0o640:
        raise error(f"{path} has mode {mode:04o}, wider than a secret may be: chmod 600 (or 640 for a group)")
    if mode & 0o040 and status.st_gid not in {os.getegid(), *os.getgroups()}:
        raise error(
            f"{path} has mode {mode:04o}, but its group {status.st_gid} is not one of this process's: "
            "chmod 600, or set its group (on Kubernetes, fsGroup)"
        )


Stamp = tuple[int, int, int, int] | None


class Watch:
    """Calls back when files change.

    Polls by what a path resolves to (device, inode, modification time, size) rather than by notifications: a
    Kubernetes Secret volume swaps a symbolic link above the file, which inotify on the file never sees. Made
    before the files are first read, it misses no change.

    Args:
        paths: The files; one that is missing counts as a change when it appears.
        changed: Awaited once a change has settled, that is, when a further poll finds nothing new.
        interval: Seconds between polls.
    """

    def __init__(
        self, paths: Iterable[Path], changed: Callable[[], Awaitable[object]], *, interval: float = 1.0
    ) -> None:
        self._paths = tuple(paths)
        self._changed = changed
        self._interval = interval
        self._told = self._seen = self._stamps()

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            await self.poll()

    async def poll(self) -> None:
        """Look once; ``run`` does so at each interval."""
        stamps = self._stamps()
        settled = stamps == self._seen
        self._seen = stamps
        if not settled or stamps == self._told:
            return
        self._told = stamps
        try:
            await self._changed()
        except Exception:
            # Without this, one failed reload would end the watching, and no later change would be seen.
            log.exception("reloading after a change of %s failed", ", ".join(map(str, self._paths)))

    def _stamps(self) -> tuple[Stamp, ...]:
        return tuple(map(_stamp, self._paths))


def _stamp(path: Path) -> Stamp:
    with suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
    return None

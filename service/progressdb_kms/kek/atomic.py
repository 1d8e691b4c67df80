"""Files that appear whole or not at all, and are durable once they have appeared."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_once(path: Path, data: bytes, mode: int) -> None:
    """Make a file that must never be overwritten.

    The content is linked to its name: unlike rename, link refuses an existing name, also one that a process
    running at the same time has just made.

    Raises:
        FileExistsError: The name is taken.
        OSError: It can't be written.
    """
    with _written(path, data, mode) as temporary:
        os.link(temporary, path)


def replace_file(path: Path, data: bytes, mode: int, owner: tuple[int, int] | None = None) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Args:
        path: The file.
        data: Its content.
        mode: Its mode.
        owner: User and group id that it gets; None leaves the process's own.

    Raises:
        OSError: It can't be written, or can't be given to ``owner``.
    """
    with _written(path, data, mode, owner) as temporary:
        temporary.replace(path)


@contextmanager
def _written(path: Path, data: bytes, mode: int, owner: tuple[int, int] | None = None) -> Iterator[Path]:
    """Give a temporary file that holds ``data`` durably; afterwards it is gone and the directory durable."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # No one else may read the content at any moment, whatever mode it gets in the end.
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            status = os.fstat(file.fileno())
            if owner is not None and owner != (status.st_uid, status.st_gid):
                os.fchown(file.fileno(), *owner)
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

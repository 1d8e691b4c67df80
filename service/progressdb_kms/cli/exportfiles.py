"""Export files on disk: written whole or not at all, never over another; read in pieces."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from progressdb_kms.domain.errors import BackupInvalid

_CHUNK: Final = 2**18


class ExportSink:
    """The file while it is written: a temporary one beside it.

    Args:
        file: The open temporary file.
        temporary: Its path.
        path: The name that it gets by ``commit``.
    """

    def __init__(self, file: IO[bytes], temporary: Path, path: Path) -> None:
        self._file = file
        self._temporary = temporary
        self._path = path

    def write(self, data: bytes) -> None:
        """Take some bytes."""
        self._file.write(data)

    def written(self) -> Iterable[bytes]:
        """Yield what was written so far."""
        self._file.flush()
        return chunks_of(self._temporary)

    def commit(self) -> None:
        """Make the file durable under its name.

        Raises:
            BackupInvalid: The name has been taken meanwhile.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        try:
            # Unlike rename, link refuses an existing name.
            os.link(self._temporary, self._path)
        except FileExistsError:
            raise _taken(self._path) from None
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextmanager
def new_export(path: Path) -> Iterator[ExportSink]:
    """Give the sink of a new file with mode 0600; without ``commit`` nothing remains.

    Raises:
        BackupInvalid: The file exists already.
        OSError: It can't be written.
    """
    if path.exists():
        raise _taken(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield ExportSink(file, temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def chunks_of(path: Path) -> Iterable[bytes]:
    """Yield a file's bytes.

    Raises:
        OSError: It can't be read.
    """
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _taken(path: Path) -> BackupInvalid:
    return BackupInvalid(f"{path} exists already and is never overwritten; choose another name")

"""Where ``backup create`` puts exports: a folder, or S3-compatible storage (``cli.s3``)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, Protocol

from progressdb_kms.cli.exportfiles import chunks_of
from progressdb_kms.cli.exportnames import is_leftover, surplus
from progressdb_kms.domain.errors import BackupInvalid, SettingsInvalid

_LEFTOVER_AGE: Final = 86_400
"""Seconds after which a half-written export is a killed run's, and no other run's that still goes on."""


class Destination(Protocol):
    """A place of dated exports.

    Raises OperatorError and OSError, which say what to do.
    """

    def workplace(self) -> AbstractContextManager[Path]:
        """Give the folder to make an export in, under its own name."""

    def deliver(self, file: Path, sha256: str) -> str:
        """Bring an export to its place, read it back, and return its path or URL.

        Raises:
            BackupInvalid: It reads back differently. It has been removed again.
        """

    def names(self) -> list[str]:
        """Return the names of all that may be an export there."""

    def remove(self, name: str) -> None:
        """Remove an export."""


class Folder:
    """A folder, on a volume that outlives the job.

    Args:
        path: The folder.

    Raises:
        SettingsInvalid: It is not there.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise SettingsInvalid(f"--directory {path} is not there: mount the volume, or make the folder")
        self._path = path

    @contextmanager
    def workplace(self) -> Iterator[Path]:
        """Give the folder itself, where an export appears whole or not at all."""
        for path in self._path.iterdir():
            if is_leftover(path.name) and time.time() - path.stat().st_mtime > _LEFTOVER_AGE:
                path.unlink(missing_ok=True)
        yield self._path

    def deliver(self, file: Path, sha256: str) -> str:
        """Read the export back."""
        arrived = hashlib.sha256()
        for chunk in chunks_of(file):
            arrived.update(chunk)
        if arrived.hexdigest() != sha256:
            file.unlink()
            raise BackupInvalid(
                f"what was read back from {file} is not what was written: check the disk; older exports are"
                " as they were"
            )
        return str(file)

    def names(self) -> list[str]:
        """Return the names of the regular files."""
        return [path.name for path in self._path.iterdir() if path.is_file() and not path.is_symlink()]

    def remove(self, name: str) -> None:
        """Remove an export."""
        (self._path / name).unlink(missing_ok=True)


def thin_out(destination: Destination, new: str, keep: int) -> list[str]:
    """Remove all but the latest exports and return the names of what was removed.

    Args:
        destination: Where.
        new: Name of the export that has just been verified; never removed.
        keep: Exports that remain, this one included; 0 removes none.
    """
    removed = surplus(destination.names(), new, keep) if keep else []
    for name in removed:
        destination.remove(name)
    return removed

"""Where a new KEK version comes from: the KEK file, or whoever keeps it; the port ``KekStager``.

A stager only ever adds a version, and takes one that is there already: a run that was killed after adding
it goes on with the same key.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from progressdb_kms.domain.errors import KekFileInvalid, RotationRefused
from progressdb_kms.domain.keyring import KEK_BYTES
from progressdb_kms.kek.atomic import replace_file
from progressdb_kms.kek.escrow import Escrow
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.kek.keyfile import Entry, read_entries, render_entries, same_entry

LOOK_EVERY: Final = 0.5


class FileKekStager:
    """Adds the version to the KEK file.

    Args:
        source: The KEK source over the file.
        required: Gives the check values of the versions that a reload must not lose or change.
        escrow: Seals versions.
    """

    def __init__(
        self, source: FileKekSource, required: Callable[[], Mapping[int, str]], escrow: Escrow
    ) -> None:
        self._source = source
        self._required = required
        self._escrow = escrow

    async def stage(self, version: int) -> None:
        """Make sure that the file holds ``version``, and load it.

        Raises:
            RotationRefused: The file can't be written.
            KekFileInvalid: The file can't be read, or lacks or changes a version that is needed.
        """
        # First as it is: nothing may be added to a file that is not the one that the stored keys need.
        self._source.reload(self._required())
        if version not in self._source.versions():
            add_version(self._source.path, version)
            self._source.reload(self._required())

    async def escrow(self, version: int) -> int:
        """Seal the version and those that are not sealed yet; return the number of recovery keys."""
        return await self._escrow.complete(version)


class ExternalKekStager:
    """Takes the version that someone else brings: never writes.

    Args:
        source: The KEK source over the file.
        required: As for ``FileKekStager``.
        escrow: Seals versions.
        wait: Seconds to wait for the version to appear in the file.
    """

    def __init__(
        self,
        source: FileKekSource,
        required: Callable[[], Mapping[int, str]],
        escrow: Escrow,
        wait: float,
    ) -> None:
        self._source = source
        self._required = required
        self._escrow = escrow
        self._wait = wait

    async def stage(self, version: int) -> None:
        """Load ``version`` from the file.

        Raises:
            RotationRefused: It has not appeared; the detail says what to do.
            KekFileInvalid: The file can't be read, or lacks or changes a version that is needed.
        """
        if not await appears(self._source, self._required, version, self._wait):
            raise RotationRefused(
                f"KEK version {version} is not in {self._source.path}, and rotation.distribute is external:"
                " add it where that file comes from, then run again"
            )

    async def escrow(self, version: int) -> int:
        """Seal the version and those that are not sealed yet; return the number of recovery keys."""
        return await self._escrow.complete(version)


async def appears(
    source: FileKekSource, required: Callable[[], Mapping[int, str]], version: int, wait: float
) -> bool:
    """Read the KEK file until it shows ``version``, and say whether it did within ``wait`` seconds.

    Raises:
        KekFileInvalid: The file can't be read, or lacks or changes a version that is needed.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait
    while True:
        source.reload(required())
        if version in source.versions():
            return True
        if loop.time() >= deadline:
            return False
        await asyncio.sleep(LOOK_EVERY)


def add_version(path: Path, version: int, entry: Entry = b"") -> None:
    """Add a version to a KEK file, durably; one that is there already stays.

    The new file is written beside the old one, with its mode and owner, and takes its place at once.

    Args:
        path: The file.
        version: The version.
        entry: What it holds for it; without it a fresh random key (SP 800-133, from the kernel's generator).

    Raises:
        RotationRefused: The file can't be written.
        KekFileInvalid: The file can't be read.
    """
    # A link would be replaced by a file, and whoever keeps its target would never see the new version.
    path = path.resolve()
    entries = read_entries(path)
    if version in entries:
        return
    entries[version] = entry or os.urandom(KEK_BYTES)
    try:
        status = path.stat()
        replace_file(
            path, render_entries(entries), stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid)
        )
    except OSError as error:
        raise RotationRefused(
            f"can't write {path}: {error.strerror}; where it is mounted from a Kubernetes Secret, set"
            " kek.management: kubernetes, and where someone else keeps it, rotation.distribute: external"
        ) from None
    if not same_entry(read_entries(path).get(version), entries[version]):
        raise KekFileInvalid(f"{path} does not hold KEK version {version} after it was written")

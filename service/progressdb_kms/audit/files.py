"""Audit records in files: one series of files a chain, each line fsynced before it counts.

``<when>-<chain>-<number>.jsonl``: a process never writes to another's file, so that a line torn by a crash is
the last of its file, and names in alphabetical order give each chain in its order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from progressdb_kms.domain.audit import Record
from progressdb_kms.domain.errors import AuditUnavailable


class AuditFiles:
    """The files of one chain. Its methods block, and are called from one thread at a time.

    Args:
        directory: Where they are made.
        chain: Name of the chain.
        limit: Bytes after which the next file is begun.
    """

    def __init__(self, directory: Path, chain: str, limit: int) -> None:
        self._directory = directory
        self._stem = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{chain}"
        self._limit = limit
        self._number = 0
        self._descriptor = -1
        self._size = 0
        self._torn = False
        self.written = 0

    def write(self, records: Sequence[Record]) -> None:
        """Append those records that are not written yet, and return when the disk has them.

        Raises:
            AuditUnavailable: It can't be done; nothing of these records stays, and it can be tried again.
        """
        data = b"".join(record.line + b"\n" for record in records if record.seq > self.written)
        if not data:
            return
        try:
            if self._descriptor < 0 or self._size >= self._limit:
                self._next()
            if self._torn:
                os.ftruncate(self._descriptor, self._size)
                self._torn = False
            self._torn = True
            left = memoryview(data)
            while left:
                left = left[os.write(self._descriptor, left) :]
            os.fsync(self._descriptor)
        except OSError as error:
            raise AuditUnavailable(
                f"the audit log can't be written to {self._directory}: {error.strerror}; nothing is changed"
                " until it can"
            ) from None
        self._torn = False
        self._size += len(data)
        self.written = records[-1].seq

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _next(self) -> None:
        self.close()
        path = self._directory / f"{self._stem}-{self._number + 1:06d}.jsonl"
        # Appending: the place is where the file ends, also after what was torn has been cut off.
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o640)
        self._number += 1
        self._size, self._torn = 0, False
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

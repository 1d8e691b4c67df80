"""The export file's outer form: frames, their digest, their seal. Pure.

::

    magic(8) | frame | frame | ... | seal frame | SHA-256 of all before (32)

    magic        "PDBKMSX" and the format's number, 1 or 2: what frames of records hold differs
    frame        kind(1) | length(4, big-endian) | payload
    seal frame   kind "Z", payload: a MAC over the SHA-256 of all that stands before this frame

The first digest finds every accident without any key; the seal, made under a KEK, finds every forgery. What
the frames hold is ``usecases.exportfile``'s affair: wrapped keys and metadata, never a key in the clear.
"""

from __future__ import annotations

import hashlib
from enum import Enum
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.errors import BackupInvalid

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMAT: Final = 2
"""What is written."""
READABLE: Final = (1, FORMAT)
MAGIC: Final = b"PDBKMSX"
SEAL_BYTES: Final = 32
DIGEST_BYTES: Final = 32
MAX_FRAME_BYTES: Final = 16 * 2**20
"""Far above what is ever written: a damaged length must not make a reader wait for gigabytes."""
SEAL_LABEL: Final = b"progressdb-kms/export/v1"

_HEAD_BYTES: Final = 5


class Frame(Enum):
    """Kinds of frames."""

    HEADER = b"H"
    REGISTRY = b"K"
    RECORDS = b"R"
    COUNTS = b"C"
    SEAL = b"Z"


class ExportWriter:
    """Turns frames into the bytes of a file, in order: ``begin``, ``frame`` ..., ``seal``."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def begin(self) -> bytes:
        """Return the file's first bytes."""
        return self._add(MAGIC + bytes([FORMAT]))

    def frame(self, kind: Frame, payload: bytes) -> bytes:
        """Return a frame.

        Raises:
            ValueError: The payload is over ``MAX_FRAME_BYTES``.
        """
        if len(payload) > MAX_FRAME_BYTES:
            raise ValueError(f"a frame has at most {MAX_FRAME_BYTES} bytes")
        return self._add(kind.value + len(payload).to_bytes(4, "big") + payload)

    def digest(self) -> bytes:
        """Return the SHA-256 of all so far: what is to be sealed."""
        return self._hash.digest()

    def end(self, seal: bytes) -> bytes:
        """Return the file's last bytes."""
        if len(seal) != SEAL_BYTES:
            raise ValueError(f"a seal has {SEAL_BYTES} bytes")
        frame = self.frame(Frame.SEAL, seal)
        return frame + self._add(self.digest())

    def file_digest(self) -> str:
        """Return the SHA-256 of the whole file in hex, as ``sha256sum`` shows it; after ``end``."""
        return self._hash.hexdigest()

    def _add(self, data: bytes) -> bytes:
        self._hash.update(data)
        return data


class ExportReader:
    """Turns the bytes of a file, however cut, back into frames: ``feed`` ..., ``finish``.

    What it hands out before ``finish`` has not been verified yet.

    Attributes:
        format: The file's format; 0 until its first bytes are there.
        sealed: The digest that the seal is over; after ``finish``.
        seal: The seal; likewise.
        file_digest: SHA-256 of the whole file in hex; likewise.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._hash = hashlib.sha256()
        self.format = 0
        self.sealed = b""
        self.seal = b""
        self.file_digest = ""

    def feed(self, data: bytes) -> Iterator[tuple[Frame, bytes]]:
        """Take some bytes and yield the frames that are complete with them, but not the seal.

        Raises:
            BackupInvalid: This is no export, or a damaged one.
        """
        self._buffer += data
        if not self.format:
            if len(self._buffer) <= len(MAGIC):
                return
            self._begin()
        while not self.seal and len(self._buffer) >= _HEAD_BYTES:
            kind, end = self._head()
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_HEAD_BYTES:end])
            before = self._hash.digest()
            self._take(end)
            if kind is Frame.SEAL:
                if len(payload) != SEAL_BYTES:
                    raise BackupInvalid("the export is damaged: its seal has a wrong length")
                self.sealed, self.seal = before, payload
            else:
                yield kind, payload
        if self.seal and len(self._buffer) > DIGEST_BYTES:
            raise BackupInvalid("the export is damaged: something stands behind its end")

    def finish(self) -> None:
        """Say that there are no more bytes.

        Raises:
            BackupInvalid: The file is cut short, or its digest does not match.
        """
        if not self.seal or len(self._buffer) < DIGEST_BYTES:
            raise BackupInvalid("the export is cut short: use a complete copy")
        if bytes(self._buffer) != self._hash.digest():
            raise BackupInvalid("the export is damaged: its digest does not match; use another copy")
        self._take(DIGEST_BYTES)
        self.file_digest = self._hash.hexdigest()

    def _begin(self) -> None:
        size = len(MAGIC)
        if bytes(self._buffer[:size]) != MAGIC:
            raise BackupInvalid("this is not an export of progressdb-kms")
        found = self._buffer[size]
        if found not in READABLE:
            raise BackupInvalid(
                f"the export has format {found}, this release reads up to {FORMAT}: use a newer one"
            )
        self._take(size + 1)
        self.format = found

    def _head(self) -> tuple[Frame, int]:
        try:
            kind = Frame(bytes(self._buffer[:1]))
        except ValueError:
            raise BackupInvalid("the export is damaged: it holds a frame of an unknown kind") from None
        size = int.from_bytes(self._buffer[1:_HEAD_BYTES], "big")
        if size > MAX_FRAME_BYTES:
            raise BackupInvalid("the export is damaged: it holds a frame of an impossible length")
        return kind, _HEAD_BYTES + size

    def _take(self, size: int) -> None:
        self._hash.update(self._buffer[:size])
        del self._buffer[:size]

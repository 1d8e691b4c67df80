"""What the frames of an export hold (``domain.export`` has their outer form): msgpack, with named members.

In this order: one header, records in batches, one registry, one frame of counts. The registry was read after
the
records, so that it knows every KEK version that a record can be under. Members that a newer release adds are
left out by an older one; what it must not leave out gets a new format number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from progressdb_kms.domain.backup import ExportKind
from progressdb_kms.domain.envelope import MAX_KEK_VERSION
from progressdb_kms.domain.errors import BackupInvalid, InvalidThreadId, KeyNotFound
from progressdb_kms.domain.export import ExportReader, ExportWriter, Frame
from progressdb_kms.domain.keyring import KekInfo
from progressdb_kms.domain.keys import DekRecord, KeyState, check_thread_id, may_belong

BATCH: Final = 500
"""Records in one frame."""


@dataclass(frozen=True, slots=True)
class Header:
    """What an export says of itself.

    Attributes:
        export_id: Its name in the store that it comes from.
        kind: What it holds.
        store_id: That store's name.
        created_at: Unix seconds when it was begun.
        release: The package's version that wrote it.
        seal_version: KEK version that its seal is made under.
        seal_kek_id: That KEK's name.
        rotation_id: Whose snapshot, for that kind.
    """

    export_id: str
    kind: ExportKind
    store_id: str
    created_at: int
    release: str
    seal_version: int
    seal_kek_id: str
    rotation_id: str = ""


@dataclass(frozen=True, slots=True)
class Registry:
    """The KEK registry and what belongs to it.

    Attributes:
        active: The active version.
        keks: All versions.
        wraps: Wraps counted, by version.
        escrow: KEKs sealed to recovery keys, by version, as the store holds them.
    """

    active: int
    keks: tuple[KekInfo, ...]
    wraps: dict[int, int]
    escrow: dict[str, bytes] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Counts:
    """What an export holds in all.

    Attributes:
        records: Records with a wrapped key; one that was read twice counts twice.
        tombstones: Records of destroyed keys.
        by_version: Wrapped keys by the KEK version that they need.
        damaged: Key ids of records that could not be read, and are missing.
    """

    records: int = 0
    tombstones: int = 0
    by_version: dict[int, int] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()


class _Record(msgspec.Struct, array_like=True, frozen=True):
    key_id: str
    thread_id: str
    wrapped: bytes
    kek_id: str
    kek_version: int
    version: int
    state: KeyState
    created_at: int
    created_by: str
    changed_at: int
    destroy_at: int | None
    resume_state: KeyState
    uses: int

    def __repr__(self) -> str:
        return f"_Record(key_id={self.key_id!r})"


_NAMES: Final = tuple(name for name in _Record.__struct_fields__)

Part = Header | Registry | Counts | list[DekRecord]


class ExportBuilder:
    """Makes the bytes of an export, piece by piece.

    Args:
        header: What it says of itself.
        write: Takes each piece.
    """

    def __init__(self, header: Header, write: Callable[[bytes], object]) -> None:
        self._writer = ExportWriter()
        self._write = write
        self._records: list[_Record] = []
        self._live = 0
        self._tombstones = 0
        self._by_version: dict[int, int] = {}
        write(self._writer.begin())
        self._frame(Frame.HEADER, {**msgspec.to_builtins(header), "record_fields": _NAMES})

    def add(self, record: DekRecord, blob_version: int) -> None:
        """Add a record; ``blob_version`` is the KEK version that its blob names, unused for a tombstone."""
        if record.state is KeyState.DESTROYED:
            self._tombstones += 1
        else:
            self._live += 1
            self._by_version[blob_version] = self._by_version.get(blob_version, 0) + 1
        self._records.append(_Record(*(getattr(record, name) for name in _NAMES)))
        if len(self._records) >= BATCH:
            self._flush()

    def counts(self, damaged: Sequence[str] = ()) -> Counts:
        """Return what was added."""
        return Counts(self._live, self._tombstones, dict(self._by_version), tuple(damaged))

    def close(self, registry: Registry, damaged: Sequence[str]) -> bytes:
        """Write what is left but the seal, and return the digest to be sealed."""
        self._flush()
        self._frame(Frame.REGISTRY, registry)
        self._frame(Frame.COUNTS, msgspec.to_builtins(self.counts(damaged), str_keys=False))
        return self._writer.digest()

    def seal(self, seal: bytes) -> str:
        """Write the end and return the SHA-256 of the whole file in hex."""
        self._write(self._writer.end(seal))
        return self._writer.file_digest()

    def _flush(self) -> None:
        if self._records:
            self._frame(Frame.RECORDS, self._records)
            self._records = []

    def _frame(self, kind: Frame, content: object) -> None:
        self._write(self._writer.frame(kind, msgspec.msgpack.encode(content)))


@dataclass(slots=True)
class Ending:
    """What stands at a file's end, once it has been read to it.

    Attributes:
        sealed: Digest that the seal is over.
        seal: The seal.
        sha256: Of the whole file, in hex.
    """

    sealed: bytes = b""
    seal: bytes = b""
    sha256: str = ""


def read_export(chunks: Iterable[bytes], ending: Ending) -> Iterator[Part]:
    """Yield the parts of an export as they come; unverified until the iteration has ended.

    Args:
        chunks: The file's bytes, however cut.
        ending: Filled at the end.

    Raises:
        BackupInvalid: It is damaged, of a newer format, or not in order; the message holds nothing of it.
    """
    reader = ExportReader()
    order = _Order()
    for chunk in chunks:
        for kind, payload in reader.feed(chunk):
            yield order.take(kind, payload)
    reader.finish()
    order.finish()
    ending.sealed, ending.seal, ending.sha256 = reader.sealed, reader.seal, reader.file_digest


class _Order:
    """Decodes frames and holds them to their order and to the counts."""

    def __init__(self) -> None:
        self._header = self._registry = False
        self._counts: Counts | None = None
        self._live = self._tombstones = 0

    def take(self, kind: Frame, payload: bytes) -> Part:
        if self._counts is not None:
            raise _disorder()
        if kind is Frame.HEADER and not self._header:
            self._header = True
            header: Header = _decode(payload, Header)
            return header
        if kind is Frame.REGISTRY and self._header and not self._registry:
            self._registry = True
            registry: Registry = _decode(payload, Registry)
            known = [kek.version for kek in registry.keks]
            if registry.active not in known or not all(1 <= version <= MAX_KEK_VERSION for version in known):
                raise BackupInvalid("the export is damaged: its registry is not consistent")
            return registry
        if kind is Frame.RECORDS and self._header and not self._registry:
            records = [_record(found) for found in _decode(payload, list[_Record])]
            dead = sum(record.state is KeyState.DESTROYED for record in records)
            self._tombstones += dead
            self._live += len(records) - dead
            return records
        if kind is Frame.COUNTS and self._registry:
            self._counts = _decode(payload, Counts)
            return self._counts
        raise _disorder()

    def finish(self) -> None:
        if self._counts is None:
            raise _disorder()
        if (self._counts.records, self._counts.tombstones) != (self._live, self._tombstones):
            raise BackupInvalid("the export is damaged: it holds another number of records than it says")


def _record(found: _Record) -> DekRecord:
    try:
        check_thread_id(found.thread_id)
        if not may_belong(found.key_id, found.thread_id):
            raise BackupInvalid("the export is damaged: a key does not belong to its thread")
    except (InvalidThreadId, KeyNotFound):
        raise BackupInvalid("the export is damaged: a record's ids are not valid") from None
    if (found.state is KeyState.DESTROYED) == bool(found.wrapped):
        raise BackupInvalid("the export is damaged: a record's state does not fit its content")
    return DekRecord(*(getattr(found, name) for name in _NAMES))


def _decode(payload: bytes, kind: Any) -> Any:  # noqa: ANN401 - whatever msgspec can make
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError):
        # Decoding errors name places and types only, but even these help nobody who has a damaged file.
        raise BackupInvalid("the export is damaged, or of a newer release: a frame can't be read") from None


def _disorder() -> BackupInvalid:
    return BackupInvalid("the export is damaged: its parts are not in order")

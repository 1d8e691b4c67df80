"""How the records of an export stand in a frame. Written is format 2, read are both.

::

    format 1     [row, ...]               row: the values of ``NAMES``, in order
    format 2     [[wrapped key, ...], columns]
                 columns: zlib (RFC 1950) of [[key_id, ...], [thread_id, ...], ...], a list for each of
                 ``COLUMNS``, each as long as the list of wrapped keys; at most ``BATCH`` records

Wrapped keys are as good as random and would only cost time in the compressor. Of the rest, a column holds
values that are alike, which is what it takes away.
"""

from __future__ import annotations

import zlib
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import msgspec

from progressdb_kms.domain.errors import BackupInvalid, InvalidThreadId, KeyNotFound
from progressdb_kms.domain.export import MAX_FRAME_BYTES
from progressdb_kms.domain.keys import DekRecord, KeyState, check_thread_id, may_belong

if TYPE_CHECKING:
    from collections.abc import Sequence

BATCH: Final = 500
"""Records in one frame; in format 2 no reader takes more: there, few bytes can stand for very many values."""

_LEVEL: Final = 1
"""Of zlib. Level 6 saves 1 % of the file for half as much time again."""
_MANY: Final = msgspec.Meta(max_length=BATCH)

_Texts: TypeAlias = Annotated[list[str], _MANY]
_Numbers: TypeAlias = Annotated[list[int], _MANY]
_States: TypeAlias = Annotated[list[KeyState], _MANY]


class _Row(msgspec.Struct, array_like=True, frozen=True):
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
        return f"_Row(key_id={self.key_id!r})"


class _Columns(msgspec.Struct, array_like=True, frozen=True):
    key_id: _Texts
    thread_id: _Texts
    kek_id: _Texts
    kek_version: _Numbers
    version: _Numbers
    state: _States
    created_at: _Numbers
    created_by: _Texts
    changed_at: _Numbers
    destroy_at: Annotated[list[int | None], _MANY]
    resume_state: _States
    uses: _Numbers


class _Packed(msgspec.Struct, array_like=True, frozen=True):
    wrapped: Annotated[list[bytes], _MANY]
    columns: bytes

    def __repr__(self) -> str:
        return f"_Packed({len(self.wrapped)} records)"


NAMES: Final = _Row.__struct_fields__
COLUMNS: Final = _Columns.__struct_fields__

_row_of: Final = attrgetter(*NAMES)
_values_of: Final = attrgetter(*COLUMNS)


def pack_records(records: Sequence[DekRecord]) -> bytes:
    """Return a frame's payload in format 2.

    Args:
        records: 1 to ``BATCH``.

    Raises:
        ValueError: There are none or too many, or they are too long for any reader.
    """
    if not 1 <= len(records) <= BATCH:
        raise ValueError(f"a frame has 1 to {BATCH} records")
    columns = msgspec.msgpack.encode(list(zip(*map(_values_of, records), strict=True)))
    if len(columns) > MAX_FRAME_BYTES:
        raise ValueError(f"the columns of a frame have at most {MAX_FRAME_BYTES} bytes")
    wrapped = [record.wrapped for record in records]
    return msgspec.msgpack.encode(_Packed(wrapped, zlib.compress(columns, _LEVEL)))


def read_records(payload: bytes, export_format: int) -> list[DekRecord]:
    """Return the records of a frame's payload.

    Args:
        payload: From a file of any origin.
        export_format: The file's format.

    Raises:
        BackupInvalid: It is damaged; the message holds nothing of it.
    """
    if export_format == 1:
        records = [DekRecord(*_row_of(row)) for row in decode(payload, list[_Row])]
    else:
        records = _unpack(decode(payload, _Packed))
    for record in records:
        _check(record)
    return records


def decode(payload: bytes, kind: Any) -> Any:  # noqa: ANN401 - whatever msgspec can make
    """Return what msgpack holds.

    Raises:
        BackupInvalid: It is not of this kind.
    """
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError):
        # Decoding errors name places and types only, but even these help nobody who has a damaged file.
        raise BackupInvalid("the export is damaged, or of a newer release: a frame can't be read") from None


def _unpack(packed: _Packed) -> list[DekRecord]:
    columns = decode(_inflate(packed.columns), _Columns)
    key_ids, thread_ids, *others = (getattr(columns, name) for name in COLUMNS)
    try:
        rows = list(zip(key_ids, thread_ids, packed.wrapped, *others, strict=True))
    except ValueError:
        raise BackupInvalid("the export is damaged: a record lacks a value") from None
    return [DekRecord(*row) for row in rows]


def _inflate(data: bytes) -> bytes:
    # Read before the seal has been checked, so anybody's: no more is made of it than a frame may hold.
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data, MAX_FRAME_BYTES)
    except zlib.error:
        raise BackupInvalid("the export is damaged: a frame can't be decompressed") from None
    if not inflater.eof or inflater.unused_data:
        raise BackupInvalid("the export is damaged: a frame has a wrong length")
    return plain


def _check(record: DekRecord) -> None:
    try:
        check_thread_id(record.thread_id)
        if not may_belong(record.key_id, record.thread_id):
            raise BackupInvalid("the export is damaged: a key does not belong to its thread")
    except (InvalidThreadId, KeyNotFound):
        raise BackupInvalid("the export is damaged: a record's ids are not valid") from None
    if (record.state is KeyState.DESTROYED) == bool(record.wrapped):
        raise BackupInvalid("the export is damaged: a record's state does not fit its content")

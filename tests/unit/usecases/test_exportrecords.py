"""Records in frames of an export: what is packed is read back, all else is refused, within bounds."""

from __future__ import annotations

import tracemalloc
import zlib
from dataclasses import astuple, fields, replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.domain.errors import BackupInvalid
from progressdb_kms.domain.export import MAX_FRAME_BYTES
from progressdb_kms.domain.keys import DekRecord, KeyState, new_key_id
from progressdb_kms.usecases.exportrecords import BATCH, COLUMNS, pack_records, read_records

encode, decode = msgspec.msgpack.encode, msgspec.msgpack.decode

NUMBERS = st.integers(-(2**63), 2**64 - 1)
TEXTS = st.text(max_size=70)
STATES = st.sampled_from(KeyState)
THREADS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=64)


@st.composite
def records(draw: st.DrawFn) -> DekRecord:
    """Any record that an export can hold, also one whose wrapped key is damaged."""
    thread_id, state = draw(THREADS), draw(STATES)
    return DekRecord(
        key_id=new_key_id(thread_id, draw(st.binary(min_size=17, max_size=17))),
        thread_id=thread_id,
        wrapped=b"" if state is KeyState.DESTROYED else draw(st.binary(min_size=1, max_size=300)),
        kek_id=draw(TEXTS),
        kek_version=draw(NUMBERS),
        version=draw(NUMBERS),
        state=state,
        created_at=draw(NUMBERS),
        created_by=draw(TEXTS),
        changed_at=draw(NUMBERS),
        destroy_at=draw(st.none() | NUMBERS),
        resume_state=draw(STATES),
        uses=draw(NUMBERS),
    )


def plain(number: int = 0) -> DekRecord:
    """Return an ordinary record."""
    thread_id = f"room:{number}"
    key_id = new_key_id(thread_id, number.to_bytes(17, "big"))
    return DekRecord(key_id, thread_id, bytes(64), "kek_1", 1, 1, KeyState.ENABLED, 1_700_000_000, "dns:a")


def columns_of(payload: bytes) -> list[list[Any]]:
    """Return a payload's columns."""
    _, packed = decode(payload)
    found: list[list[Any]] = decode(zlib.decompress(packed))
    return found


def forged(columns: Any, wrapped: Any) -> bytes:
    """Return a payload of format 2 with other content."""
    return encode([wrapped, zlib.compress(encode(columns))])


@pytest.mark.fuzz
@given(st.lists(records(), min_size=1, max_size=20))
def test_what_is_packed_is_read_back(found: list[DekRecord]) -> None:
    """Every field of every record, in order."""
    assert read_records(pack_records(found), 2) == found


@given(st.lists(records(), max_size=20))
def test_rows_of_format_1_are_read(found: list[DekRecord]) -> None:
    """A frame as format 1 has it, a row a record, gives the same records."""
    assert read_records(encode([astuple(record) for record in found]), 1) == found


def test_every_field_has_its_place() -> None:
    """A field that a record gets is not left out of exports by oversight."""
    assert {*COLUMNS, "wrapped"} == {field.name for field in fields(DekRecord)}


def test_a_full_frame_is_read_back() -> None:
    """The largest frame there is; a larger or an empty one is not made."""
    found = [plain(number) for number in range(BATCH + 1)]
    assert read_records(pack_records(found[:BATCH]), 2) == found[:BATCH]
    for refused in (found, []):
        with pytest.raises(ValueError, match="1 to 500 records"):
            pack_records(refused)


def test_what_no_reader_would_take_is_not_written() -> None:
    """Columns that are longer than a reader inflates end the export instead of spoiling it."""
    record = plain()
    huge = replace(record, created_by="a" * MAX_FRAME_BYTES)
    with pytest.raises(ValueError, match="at most"):
        pack_records([huge])


@pytest.mark.fuzz
@given(data=st.data(), count=st.integers(1, 3))
def test_another_payload_is_refused_or_read_whole(data: st.DataObject, count: int) -> None:
    """A payload with a piece replaced raises the one error, or gives records that are consistent."""
    payload = pack_records([plain(number) for number in range(count)])
    if data.draw(st.booleans(), "inside of the compressed part"):
        wrapped, packed = decode(payload)
        inside = _replaced(data, zlib.decompress(packed))
        payload = encode([wrapped, zlib.compress(inside)])
    else:
        payload = _replaced(data, payload)
    for export_format in (1, 2):
        try:
            found = read_records(payload, export_format)
        except BackupInvalid:
            continue
        assert export_format == 1 or read_records(pack_records(found), 2) == found or not found


def _replaced(data: st.DataObject, whole: bytes) -> bytes:
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 8)))
    return whole[:start] + data.draw(st.binary(max_size=8)) + whole[end:]


@pytest.mark.parametrize("column", range(len(COLUMNS)), ids=COLUMNS)
def test_a_column_of_another_length_is_refused(column: int) -> None:
    """No record gets a value of another one because one is missing or too many."""
    payload = pack_records([plain(1), plain(2)])
    wrapped, _ = decode(payload)
    for change in (lambda values: values[:1], lambda values: [*values, values[0]]):
        columns = columns_of(payload)
        columns[column] = change(columns[column])
        with pytest.raises(BackupInvalid):
            read_records(forged(columns, wrapped), 2)
    with pytest.raises(BackupInvalid):
        read_records(forged(columns_of(payload), wrapped[:1]), 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: packed[:-1],
        lambda packed: packed[:-4] + bytes(4),
        lambda packed: packed + b"\0",
        lambda packed: packed + packed,
        lambda _: b"",
    ],
    ids=["cut", "checksum", "longer", "twice", "empty"],
)
def test_what_is_no_single_whole_stream_is_refused(change: Any) -> None:
    """Nothing is read from a compressed part that is cut, damaged, or followed by something."""
    wrapped, packed = decode(pack_records([plain()]))
    with pytest.raises(BackupInvalid):
        read_records(encode([wrapped, change(packed)]), 2)


@pytest.mark.parametrize(
    "inside",
    [
        pytest.param(lambda: b"\xdc\xff\xff" + bytes(16 * MAX_FRAME_BYTES), id="zeros"),
        pytest.param(lambda: encode([[""] * 10_000_000] * len(COLUMNS)), id="empty texts"),
    ],
)
def test_a_small_frame_takes_little_memory(inside: Any) -> None:
    """What inflates to hundreds of megabytes is refused within a frame's bounds."""
    payload = encode([[bytes(64)], zlib.compress(inside())])
    assert len(payload) < 2**20
    tracemalloc.start()
    try:
        with pytest.raises(BackupInvalid):
            read_records(payload, 2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * MAX_FRAME_BYTES


def test_many_values_in_a_short_frame_are_refused_unread() -> None:
    """More values than a frame has records are refused before they are made."""
    many: list[list[object]] = [[""] * 1_000_000 for _ in COLUMNS]
    payload = forged(many, [b""] * BATCH)
    tracemalloc.start()
    try:
        with pytest.raises(BackupInvalid):
            read_records(payload, 2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The inflated bytes, twice while zlib's buffer grows, and no list of a million values.
    assert peak < 2.5 * len(COLUMNS) * 1_000_000

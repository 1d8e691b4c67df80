"""The export file's form: what is written is read back, and nothing else is taken for it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.client.embedded.sender import MemoryKek
from progressdb_kms.domain.backup import ExportKind, ExportNote, HeldBy, holding, may_resurrect
from progressdb_kms.domain.envelope import BLOB_BYTES, pack_blob, wrap_aad
from progressdb_kms.domain.errors import BackupInvalid
from progressdb_kms.domain.export import MAX_FRAME_BYTES, SEAL_LABEL, ExportReader, ExportWriter, Frame
from progressdb_kms.domain.keyring import KekInfo, KekState, Keyring, kek_id_of
from progressdb_kms.domain.keys import DekRecord, KeyState, new_key_id
from progressdb_kms.usecases.backup import authenticate_export, inspect_export, verify_export
from progressdb_kms.usecases.exportfile import Ending, ExportBuilder, Header, Registry, read_export
from progressdb_kms.usecases.exportrecords import BATCH

KEY = bytes(range(32))


def _record(number: int, state: KeyState = KeyState.ENABLED) -> DekRecord:
    thread_id = f"room:{number}"
    key_id = new_key_id(thread_id, number.to_bytes(17, "big"))
    (body,) = asyncio.run(MemoryKek(KEY).wrap(1, [number.to_bytes(32, "big")], [wrap_aad(key_id, thread_id)]))
    blob = b"" if state is KeyState.DESTROYED else pack_blob(1, body)
    return DekRecord(key_id, thread_id, blob, "kek_1", 1, 1, state, 1_700_000_000, "dns:a", uses=number)


def _export(records: list[DekRecord]) -> bytes:
    keyring = Keyring({1: KEY})
    value = keyring.check_value(1)
    kek = KekInfo(1, kek_id_of(value), "memory", "1", value, KekState.ACTIVE, 1, 1)
    parts: list[bytes] = []
    builder = ExportBuilder(Header("x_1", ExportKind.LIVE, "store", 1, "0", 1, kek.kek_id), parts.append)
    for record in records:
        builder.add(record, 1)
    digest = builder.close(Registry(1, (kek,), {1: 10}, {"1": b"sealed"}), [])
    builder.seal(keyring.seal(1, SEAL_LABEL, digest))
    return b"".join(parts)


RECORDS = [_record(number) for number in range(BATCH + 3)] + [_record(9_999, KeyState.DESTROYED)]
FILE = _export(RECORDS)
SMALL = _export(RECORDS[:4])


async def _verify(data: bytes) -> None:
    _, bad = await verify_export(MemoryKek(KEY), lambda: [data])
    assert not bad


@given(size=st.integers(1, 5000))
def test_what_is_written_is_read_back(size: int) -> None:
    """Whatever pieces a file comes in, its parts are the same."""
    chunks = [FILE[at : at + size] for at in range(0, len(FILE), size)]
    ending = Ending()
    parts = list(read_export(chunks, ending))
    found = [record for part in parts if isinstance(part, list) for record in part]
    assert found == RECORDS
    (registry,) = [part for part in parts if isinstance(part, Registry)]
    assert (registry.active, registry.wraps, registry.escrow) == (1, {1: 10}, {"1": b"sealed"})
    assert len(ending.sha256) == 64


async def test_whole_file_is_verified() -> None:
    """A file as it was written passes with all checks, and counts what it holds."""
    export, bad = await verify_export(MemoryKek(KEY), lambda: [FILE])
    assert (export.counts.records, export.counts.tombstones, bad) == (BATCH + 3, 1, [])


@given(at=st.integers(0, len(SMALL) - 1), bit=st.integers(0, 7))
def test_no_flipped_bit_passes(at: int, bit: int) -> None:
    """Any bit that is another makes the file invalid without a KEK already, and never crashes the parser."""
    data = bytearray(SMALL)
    data[at] ^= 1 << bit
    with pytest.raises(BackupInvalid):
        inspect_export(lambda: [bytes(data)])


@given(first=st.integers(0, len(SMALL)), second=st.integers(0, len(SMALL)), again=st.binary(max_size=40))
def test_no_cut_passes(first: int, second: int, again: bytes) -> None:
    """A file from which something is cut out, or to which something is added, is invalid."""
    start, end = sorted((first, second))
    data = SMALL[:start] + again + SMALL[end:]
    if data != SMALL:
        with pytest.raises(BackupInvalid):
            inspect_export(lambda: [data])


@given(st.binary(max_size=200), st.sampled_from([b"", b"PDBKMSX\x01", b"PDBKMSX\x02"]))
def test_noise_is_no_export(data: bytes, mark: bytes) -> None:
    """Bytes of any kind are refused with the one error."""
    with pytest.raises(BackupInvalid):
        inspect_export(lambda: [mark + data])


@given(payload=st.binary(max_size=300), kind=st.sampled_from([Frame.HEADER, Frame.REGISTRY, Frame.RECORDS]))
def test_well_framed_noise_is_refused(payload: bytes, kind: Frame) -> None:
    """Frames in good form with any content at all are refused, never a crash."""
    writer = ExportWriter()
    data = writer.begin() + writer.frame(kind, payload)
    with pytest.raises(BackupInvalid):
        inspect_export(lambda: [data + writer.end(bytes(32))])


async def test_file_resealed_without_the_kek_is_refused() -> None:
    """Whoever changes a file and mends its digest still lacks the KEK for the seal."""
    keyring = Keyring({1: bytes(32)})
    writer = ExportWriter()
    forged = writer.begin()
    reader = ExportReader()
    for kind, payload in reader.feed(SMALL):
        forged += writer.frame(kind, payload)
    forged += writer.end(keyring.seal(1, SEAL_LABEL, writer.digest()))
    export = inspect_export(lambda: [forged])
    with pytest.raises(BackupInvalid, match="seal"):
        await authenticate_export(MemoryKek(KEY), export)


async def test_other_kek_is_named() -> None:
    """With another KEK, the error says which is needed and which is loaded."""
    needed, loaded = (kek_id_of(Keyring({1: key}).check_value(1)) for key in (KEY, bytes(32)))
    with pytest.raises(BackupInvalid, match=f"must be {needed} and is {loaded}"):
        await authenticate_export(MemoryKek(bytes(32)), inspect_export(lambda: [SMALL]))


async def test_blob_of_another_key_is_found() -> None:
    """A record with another record's blob does not unwrap, and is named."""
    one, other = RECORDS[:2]
    moved = DekRecord(one.key_id, one.thread_id, other.wrapped, "kek_1", 1, 1, one.state, 1, "a")
    _, bad = await verify_export(MemoryKek(KEY), lambda: [_export([moved, other])])
    assert bad == [one.key_id]


def test_record_in_another_threads_slot_is_refused() -> None:
    """An export can't put a key into a slot where nobody would find it."""
    one, other = RECORDS[0], RECORDS[1]
    moved = DekRecord(one.key_id, other.thread_id, one.wrapped, "kek_1", 1, 1, one.state, 1, "a")
    with pytest.raises(BackupInvalid, match="does not belong to its thread"):
        inspect_export(lambda: [_export([moved])])


@pytest.mark.parametrize("state", [KeyState.DESTROYED, KeyState.ENABLED])
def test_state_that_does_not_fit_is_refused(state: KeyState) -> None:
    """A destroyed key with a blob, or a living one without, is not believed."""
    blob = bytes(BLOB_BYTES) if state is KeyState.DESTROYED else b""
    bad = DekRecord(RECORDS[0].key_id, RECORDS[0].thread_id, blob, "k", 1, 1, state, 1, "a")
    with pytest.raises(BackupInvalid):
        inspect_export(lambda: [_export([bad])])


def test_impossible_length_is_refused_at_once() -> None:
    """A damaged length does not make the reader wait for what never comes."""
    reader = ExportReader()
    head = b"PDBKMSX\x01H" + (MAX_FRAME_BYTES + 1).to_bytes(4, "big")
    with pytest.raises(BackupInvalid, match="impossible length"):
        list(reader.feed(head))


def test_newer_format_is_said() -> None:
    """A file of a newer format is refused by its number."""
    with pytest.raises(BackupInvalid, match="format 3"):
        list(ExportReader().feed(b"PDBKMSX\x03H"))


def test_exports_that_hold_a_key() -> None:
    """An export from after a key's creation holds it, an interrupted one may; an older one does not."""
    old = ExportNote("x_a", ExportKind.LIVE, 10, 20, sha256="aa")
    new = ExportNote("x_b", ExportKind.LIVE, 30, 40, sha256="bb")
    broken = ExportNote("x_c", ExportKind.LIVE, 5)
    held = holding([old, new, broken], created_at=25)
    assert held == (HeldBy("x_b", 40, "bb"), HeldBy("x_c", 5, ""))


def test_age_from_which_an_export_may_resurrect() -> None:
    """Seven days, the shortest waiting period: what was destroyed since was pending in a younger export."""
    week = 7 * 86_400
    assert not may_resurrect(1000, 1000 + week - 1)
    assert may_resurrect(1000, 1000 + week)

"""A batch in msgpack is read in one pass if its length proves that no field came twice, else one by one."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from progressdb_kms.domain.errors import BatchTooLarge, DuplicateField, KmsError
from progressdb_kms.usecases import batches
from progressdb_kms.usecases.batches import BatchReader
from progressdb_kms.usecases.messages import MSGPACK, CreateItem, DecryptItem, EncryptItem, Reader, encode

T = TypeVar("T")

MODELS: dict[str, type[Any]] = {"encrypt": EncryptItem, "decrypt": DecryptItem, "create": CreateItem}
LIMIT = 12
KEY, PLAIN = b"\xa6key_id\xa1k", b"\xa9plaintext\xc4\x01a"
GOOD = b"\x82" + KEY + PLAIN
HEAD = b"\x81\xa5items"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read bodies of some items in many pieces."""
    for name, value in {"WHOLE_BYTES": 200, "WHOLE_ITEMS": 2, "PIECE_ITEMS": 3}.items():
        monkeypatch.setattr(batches, name, value)


def shown(items: list[Any]) -> list[Any]:
    """Make items comparable."""
    return [(type(item), item.detail) if isinstance(item, KmsError) else item for item in items]


def finished(work: Generator[None, None, T]) -> tuple[T, int]:
    """Do work that yields; returns what comes of it, and how often it yielded."""
    turns = 0
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value, turns
        turns += 1


def one_by_one(model: type[Any], body: bytes) -> Any:
    """Read each item alone; a refusal is returned as its kind and text."""
    reader = Reader(model)

    def read(raw: msgspec.Raw) -> Any:
        try:
            return reader.read(MSGPACK, raw)
        except KmsError as error:
            return error

    try:
        return shown([read(raw) for raw in batches._raw_msgpack(body, LIMIT)])
    except KmsError as error:
        return type(error), error.detail


def as_one(model: type[Any], body: bytes) -> Any:
    """Read the batch as a short one is read, likewise."""
    try:
        return shown(BatchReader(model).read(MSGPACK, body, LIMIT))
    except KmsError as error:
        return type(error), error.detail


def in_pieces(model: type[Any], body: bytes) -> Any:
    """Read the batch as a long one is read, likewise."""
    reader = BatchReader(model)
    try:
        items, _ = finished(reader.begin(MSGPACK, body, LIMIT))
    except KmsError as error:
        return type(error), error.detail
    return shown([reader.item(MSGPACK, item) for item in items])


def sized(short: int, forms: list[tuple[int, int]], count: int, form: int) -> bytes:
    """Return a head: the short form where it fits and is chosen, else one with a length of its own."""
    if short >= 0 and form == 0 and count < (32 if short == 0xA0 else 16):
        return bytes([short | count])
    code, width = forms[min(max(form - 1, 0), len(forms) - 1)]
    return bytes([code]) + count.to_bytes(width, "big")


forms = st.sampled_from([0, 0, 0, 1, 2, 3])


@st.composite
def texts(draw: st.DrawFn, value: st.SearchStrategy[bytes]) -> bytes:
    """Write a string in any of its forms."""
    text = draw(value)
    return sized(0xA0, [(0xD9, 1), (0xDA, 2), (0xDB, 4)], len(text), draw(forms)) + text


@st.composite
def binaries(draw: st.DrawFn) -> bytes:
    """Write a byte string in any of its forms."""
    data = draw(st.binary(max_size=20))
    return sized(-1, [(0xC4, 1), (0xC5, 2), (0xC6, 4)], len(data), draw(forms)) + data


names = st.sampled_from(
    [b"key_id", b"plaintext", b"ciphertext", b"aad", b"thread_id", b"idempotency_key"] * 3
    + [b"x", b"items", b""]
)
values = st.one_of(
    texts(st.sampled_from([b"k", b"", b"YQ==", b"\xff", "é".encode()])),
    texts(st.sampled_from([b"k"])),
    binaries(),
    binaries(),
    st.sampled_from([b"\xc0", b"\x07", b"\xd4\x01a", b"\x90", b"\x80", b"\xc1"]),
)
NEEDED: dict[str, tuple[bytes, ...]] = {
    "encrypt": (b"key_id", b"plaintext"),
    "decrypt": (b"key_id", b"ciphertext"),
    "create": (b"thread_id",),
}
BYTES = (b"plaintext", b"ciphertext", b"aad")


@st.composite
def items(draw: st.DrawFn, kind: str) -> bytes:
    """Write an item: mostly one that can be read, in any form of its lengths, often with a field twice."""
    fields = []
    for name in NEEDED[kind] if draw(st.integers(0, 3)) else ():
        value = binaries() if name in BYTES else texts(st.sampled_from([b"k", b"room:1"]))
        fields.append(draw(texts(st.just(name))) + draw(value))
    if draw(st.booleans()):
        fields += [draw(texts(names)) + draw(values) for _ in range(draw(st.integers(0, 2)))]
    if fields and draw(st.integers(0, 3)) == 0:
        fields.append(draw(st.sampled_from(fields)))
    fields = draw(st.permutations(fields))
    return sized(0x80, [(0xDE, 2), (0xDF, 4)], len(fields), draw(forms)) + b"".join(fields)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """Write batches, some of which are none."""
    kind = draw(st.sampled_from(sorted(MODELS)))
    parts = draw(st.lists(st.one_of(items(kind), items(kind), values), max_size=LIMIT + 1))
    count = len(parts) + draw(st.sampled_from([0] * 8 + [1, -1]))
    array = sized(0x90, [(0xDC, 2), (0xDD, 4)], max(count, 0), draw(forms))
    head = draw(
        st.sampled_from(
            [HEAD] * 8 + [b"\xde\x00\x01\xa5items", b"\x82\xa5items\x90\xa5items", b"\x81\xa4item"]
        )
    )
    return kind, head + array + b"".join(parts) + draw(st.sampled_from([b""] * 8 + [b"\x00"]))


@pytest.mark.fuzz
@given(bodies())
@example(("encrypt", HEAD + b"\x9c" + GOOD * 12))
@example(("encrypt", HEAD + b"\x92" + GOOD + b"\x83" + KEY + PLAIN + KEY))
@example(("encrypt", HEAD + b"\x91\x82" + KEY + b"\xa9plaintext\xa0"))
@example(
    (
        "encrypt",
        HEAD + b"\x99" + (GOOD + b"\xde\x00\x03" + KEY + PLAIN + PLAIN + b"\xde\x00\x02" + KEY + PLAIN) * 3,
    )
)
@example(("encrypt", HEAD + b"\x94" + GOOD * 3 + b"\x82" + KEY + b"\xa9plaintext\xc4\xfa" + b"a" * 250))
@example(("create", HEAD + b"\x93" + b"\x82\xa9thread_id\xa1t\xa9thread_id\xa1t" * 3))
def test_a_batch_is_read_as_its_items_are(batch: tuple[str, bytes]) -> None:
    """The same items and errors, or the same refusal, in one pass and in pieces as one by one."""
    kind, body = batch
    wanted = one_by_one(MODELS[kind], body)
    assert as_one(MODELS[kind], body) == wanted
    assert in_pieces(MODELS[kind], body) == wanted


@pytest.mark.fuzz
@given(st.sampled_from(sorted(MODELS)).flatmap(lambda kind: st.tuples(st.just(kind), items(kind))))
def test_nothing_that_is_taken_is_shorter_than_what_is_encoded(item: tuple[str, bytes]) -> None:
    """The proof by length stands on this: an item that has the encoder's length has each field once."""
    kind, body = item
    try:
        found = msgspec.msgpack.decode(body, type=MODELS[kind])
    except (msgspec.MsgspecError, ValueError):
        return
    encoded = encode(MSGPACK, found)
    assert len(body) >= len(encoded)
    if len(body) == len(encoded):
        assert Reader(MODELS[kind]).read(MSGPACK, body) == found


@pytest.mark.parametrize("twice", [KEY, PLAIN, b"\xa3aad\xc0", b"\xa3aad\xc4\x01a", b"\xa3aad\xc4\x00"])
def test_a_field_given_twice_spoils_its_item_alone(twice: bytes) -> None:
    """Wherever the item stands, whatever the field: the proof by length must not let one through."""
    bad = b"\x84" + KEY + PLAIN + twice * 2 if twice.startswith(b"\xa3") else b"\x83" + KEY + PLAIN + twice
    for place in range(9):
        body = HEAD + b"\x99" + GOOD * place + bad + GOOD * (8 - place)
        for read in (as_one, in_pieces):
            found = read(EncryptItem, body)
            assert found[place] == (DuplicateField, DuplicateField().detail)
            assert found[:place] + found[place + 1 :] == [EncryptItem("k", b"a")] * 8


def test_good_items_are_not_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in one pass nor in pieces, from whichever encoder that takes the shortest forms."""
    monkeypatch.setattr(Reader, "read", None)
    body = msgspec.msgpack.encode({"items": [{"key_id": "k", "plaintext": b"a", "aad": None}] * LIMIT})
    assert as_one(EncryptItem, body) == in_pieces(EncryptItem, body) == [EncryptItem("k", b"a", None)] * LIMIT


def test_others_get_a_turn() -> None:
    """Between any two pieces of a long body."""
    reader = BatchReader(EncryptItem)
    for count, turns in ((2, 0), (3, 1), (12, 4)):
        body = msgspec.msgpack.encode({"items": [{"key_id": "k", "plaintext": b"a"}] * count})
        assert finished(reader.begin(MSGPACK, body, LIMIT))[1] == turns
    # One that is short in items may be long in bytes.
    body = msgspec.msgpack.encode({"items": [{"key_id": "k", "plaintext": b"a" * 200}] * 2})
    assert finished(reader.begin(MSGPACK, body, LIMIT))[1] == 1


def test_items_of_many_bytes_are_left_for_their_slice() -> None:
    """They are copied when they are read, which for 16 MiB at once nobody is to wait for."""
    reader = BatchReader(EncryptItem)
    body = msgspec.msgpack.encode(
        {"items": [{"key_id": "k", "plaintext": b"a" * size} for size in (1,) * 3 + (90,) * 3]}
    )
    found, _ = finished(reader.begin(MSGPACK, body, LIMIT))
    assert [type(item) for item in found] == [EncryptItem] * 3 + [msgspec.Raw] * 3
    assert not reader.has_read(found)
    assert reader.has_read(found[:3])
    assert reader.has_read([])


def test_too_many_are_refused_before_any_is_made() -> None:
    """By what the array says of itself, in pieces too: what is behind may not even be there."""
    for read in (as_one, in_pieces):
        assert read(EncryptItem, HEAD + b"\xdd\x00\xff\xff\xff")[0] is BatchTooLarge

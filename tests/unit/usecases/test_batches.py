"""A long batch is read and written in pieces, and nobody can tell by what comes of it."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from progressdb_kms.domain.errors import BatchTooLarge, DuplicateField, InvalidField, KmsError, MalformedBody
from progressdb_kms.usecases import cutting
from progressdb_kms.usecases.batches import BatchReader, ResultsWriter
from progressdb_kms.usecases.messages import JSON, MSGPACK, Encrypted, EncryptItem, Results, encode

T = TypeVar("T")

BATCH = BatchReader(EncryptItem)
LIMIT = 12
GOOD = '{"key_id":"k","plaintext":"YQ=="}'


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut bodies of some hundred bytes into many pieces."""
    for name, value in {"PIECE": 8, "GUESS": 64, "COMMAS": 3, "TOKEN": 3}.items():
        monkeypatch.setattr(cutting, name, value)


def finished(work: Generator[None, None, T]) -> tuple[T, int]:
    """Do work that yields; returns what comes of it, and how often it yielded."""
    turns = 0
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value, turns
        turns += 1


def in_pieces(body: bytes, limit: int = LIMIT, form: str = JSON) -> Any:
    """Read a batch in pieces; a refusal is returned as its kind and text."""
    try:
        items, _ = finished(BATCH.begin(form, body, limit))
    except KmsError as error:
        return type(error), error.detail
    return shown([BATCH.item(form, item) for item in items])


def as_one(body: bytes, limit: int = LIMIT, form: str = JSON) -> Any:
    """Read a batch as a whole, likewise."""
    try:
        return shown(BATCH.read(form, body, limit))
    except KmsError as error:
        return type(error), error.detail


def shown(items: list[Any]) -> list[Any]:
    """Make items comparable."""
    return [(type(item), item.detail) if isinstance(item, KmsError) else item for item in items]


scraps = st.sampled_from(
    [
        "},",
        '"},"',
        '\\"},',
        "\\\\",
        "{",
        "}",
        "[",
        "]",
        ",",
        '"',
        " ",
        "\n",
        "0",
        "null",
        "\\",
        "\\u007d,",
        "\\ud800",
        "\u00e9",
        '],"items":[',
        '],"x":[',
        "]}",
        "]} ",
    ]
)
texts = st.lists(scraps, max_size=6).map("".join)
values = st.recursive(
    st.one_of(st.none(), st.integers(), st.sampled_from(["", "YQ==", "k" * 30]), texts),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "},"]), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.sampled_from(["key_id", "plaintext", "aad", "x", "},"])


@st.composite
def objects(draw: st.DrawFn) -> str:
    """Write an item: mostly a good one, or one with fields twice, unknown, nested, escaped, spaced."""
    if draw(st.booleans()):
        return GOOD
    gap = draw(st.sampled_from(["", " ", "\n\t"]))
    fields = draw(st.lists(st.tuples(names, values), max_size=4))
    if draw(st.booleans()):
        fields = [("key_id", draw(texts)), ("plaintext", "YQ=="), *fields[:1]]
    ascii_only = draw(st.booleans())
    return (
        "{"
        + f",{gap}".join(
            f"{json.dumps(name)}{gap}:{json.dumps(value, ensure_ascii=ascii_only)}" for name, value in fields
        )
        + gap
        + "}"
    )


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Write batches, many of which are none."""
    items = draw(st.lists(st.one_of(objects(), values.map(json.dumps), texts), max_size=LIMIT + 2))
    comma = draw(st.sampled_from([",", ", ", " ,", ",\n"]))
    head = draw(
        st.sampled_from(
            ['{"items":['] * 6
            + [
                '{"\\u0069tems" : [',
                ' \n { "items": [',
                '{"items":[],"items":[',
                '{"x":[',
                '{"items":{',
                "[",
                "",
            ]
        )
    )
    tail = draw(
        st.sampled_from(
            ["]}"] * 6
            + [
                "] }\n",
                "]",
                "}",
                "",
                ",]}",
                "]}]",
                '],"x":1}',
                '],"items":[]}',
                '],"items":5}',
                "]}" + " " * 300,
            ]
        )
    )
    body = (head + comma.join(items) + tail).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(body)))
        cut = draw(st.integers(0, 2))
        body = (
            body[:at]
            + draw(st.sampled_from([b"", b"\xff", b'"', b"}", b",", b"\\", b"]", b"{"]))
            + body[at + cut :]
        )
    return body


@pytest.mark.fuzz
@given(bodies())
@example(f'{{"items":[{",".join([GOOD] * LIMIT)}]}}'.encode())
@example(f'{{"items":[{GOOD},{GOOD},]}}'.encode())
@example(f'{{"items":[{GOOD},{{}},,{GOOD}]}}'.encode())
@example(f'{{"items":[,{GOOD}]}}'.encode())
@example(f'{{"items":[7,{GOOD},{{"key_id":"'.encode() + b'\xff","plaintext":""}]}')
@example(f'{{"items":[{GOOD},{{"key_id":"'.encode() + b'\xff","plaintext":""},7]}')
@example(b'{"items":[{"key_id":"' + b"},{" * 40 + b'","plaintext":""},{"key_id":"\\\\","plaintext":""}]}')
@example(b'{"items":[' + b'[[],{"a":[]}],' * 9 + b"0]}")
@example(f'{{"items":[7,{GOOD},{{"key_id":"\\ud800","plaintext":""}}]}}'.encode())
@example(f'{{"items":[{GOOD},{{"key_id":"\\ud800","plaintext":""}},7]}}'.encode())
@example(b'{"items":[]}')
@example(b'{"items":[ ' + b" " * 99 + b"]}")
def test_pieces_are_read_as_the_whole_is(body: bytes) -> None:
    """The same items and errors, or the same refusal of the batch, wherever the body is cut."""
    whole, pieces = as_one(body), in_pieces(body)
    if whole != pieces:
        # More than the limit are refused without a look at the rest.
        assert pieces[0] is BatchTooLarge
        assert isinstance(whole, tuple)
        assert body.count(b",") >= LIMIT


@pytest.mark.parametrize("depth", [50, 100_000])
def test_depth(depth: int) -> None:
    """An item that is nested too deep spoils the batch, one that is nested but a little itself alone."""
    body = f'{{"items":[{GOOD},{"[" * depth}{"]" * depth},{GOOD}]}}'.encode()
    assert in_pieces(body) == as_one(body)


@pytest.mark.parametrize(
    "tail, error",
    [
        ('],"x":1}', InvalidField),
        ('],"items":[]}', DuplicateField),
        ("]}]", MalformedBody),
        ("", MalformedBody),
    ],
)
def test_what_comes_after_the_items_is_refused(tail: str, error: type[KmsError]) -> None:
    """As it is without cutting: the batch has nothing but its items."""
    body = f'{{"items":[{GOOD},{GOOD}{tail}'.encode()
    assert in_pieces(body)[0] is as_one(body)[0] is error


@pytest.mark.parametrize("form", [JSON, MSGPACK])
def test_too_many_items_are_refused_where_that_is_clear(form: str) -> None:
    """Millions of tiny items, which fit into a body, would take gigabytes and a second to make."""
    body = (msgspec.json if form == JSON else msgspec.msgpack).encode({"items": [0] * 100_000})
    # What is behind is not looked at: cut off, it would be malformed.
    assert in_pieces(body[:100], form=form)[0] is BatchTooLarge


def test_tiny_items_are_not_read_as_one_piece() -> None:
    """A piece cut by guess may be long for one long item, not for a million of them."""
    body = b'{"items":[%b{},%b0]}' % (b"0," * 20, b"0," * 30)
    assert max(taken(body)) < 20
    assert max(taken(b'{"items":[{"a":"%b"},%b0]}' % (b"a" * 40, b"0," * 30))) > 40


def taken(body: bytes) -> list[int]:
    """Return the lengths of the pieces that a body is read in."""
    lengths: list[int] = []

    def take(array: bytes) -> int:
        items = msgspec.json.decode(array)
        lengths.append(len(array))
        return len(items)

    finished(cutting.read_items(body, take))
    return lengths


def test_others_get_a_turn() -> None:
    """Between two pieces, however the body is made: of items, of one long string, of brackets, of spaces."""
    for text in (
        ",".join([GOOD] * 12),
        json.dumps("}," * 200),
        json.dumps([[[]]] * 100),
        f"{' ' * 400}0",
        f'{{"key_id":"{"}," * 200}","plaintext":""}}',
    ):
        body = f'{{"items":[{text}]}}'.encode()
        _, turns = finished(BATCH.begin(JSON, body, LIMIT))
        assert turns >= 10
        assert in_pieces(body) == as_one(body)


@pytest.mark.fuzz
@given(st.lists(st.integers(1, 300), max_size=4), st.sampled_from([JSON, MSGPACK]))
@example([256] * 300, MSGPACK)
@example([15], MSGPACK)
@example([16], MSGPACK)
@example([], JSON)
def test_an_answer_in_pieces_is_the_same(counts: list[int], form: str) -> None:
    """Byte for byte, however many results come at a time."""
    result = Encrypted(b"sealed", "1")
    writer = ResultsWriter(form)
    for count in counts:
        writer.add([result] * count)
    assert b"".join(writer.finish()) == encode(form, Results([result] * sum(counts)))

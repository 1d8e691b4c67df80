"""Bodies are read strictly, and nothing that is refused is ever repeated."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from progressdb_kms.api.models import ScheduleDestruction
from progressdb_kms.domain import errors
from progressdb_kms.domain.errors import DuplicateField, InvalidField, KmsError, MalformedBody
from progressdb_kms.usecases.batches import BatchReader
from progressdb_kms.usecases.messages import (
    JSON,
    MSGPACK,
    CreatedDek,
    CreateItem,
    CreateRequest,
    Decrypted,
    DecryptItem,
    EncryptItem,
    Reader,
    RewrappedDek,
    RewrapRequest,
    WrappedDek,
    encode,
    quotes_in,
)

ENCRYPT = Reader(EncryptItem)
READERS: dict[str, Reader[Any]] = {
    "encrypt": ENCRYPT,
    "decrypt": Reader(DecryptItem),
    "create": Reader(CreateRequest),
    "create item": Reader(CreateItem),
    "rewrap": Reader(RewrapRequest),
    "schedule": Reader(ScheduleDestruction),
}
BATCH = BatchReader(EncryptItem)
BATCHES: list[BatchReader[Any]] = [BATCH, BatchReader(DecryptItem), BatchReader(CreateItem)]
NAMES = [
    "key_id",
    "plaintext",
    "ciphertext",
    "aad",
    "thread_id",
    "idempotency_key",
    "new_kek_hex",
    "waiting_days",
]
SECRET = "5EC2E7-in-the-wrong-place"
OK = '"key_id":"k","plaintext":""'


def read(body: str | bytes, reader: Reader[Any] = ENCRYPT) -> Any:
    """Read a JSON body."""
    return reader.read(JSON, body.encode() if isinstance(body, str) else body)


@given(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.binary(),
    st.one_of(st.just(msgspec.UNSET), st.none(), st.binary()),
)
def test_both_forms_read_what_was_written(key_id: str, plaintext: bytes, aad: Any) -> None:
    """JSON and msgpack carry the same item; a null AAD differs from an absent one, but means the same."""
    item = EncryptItem(key_id, plaintext, aad)
    assert read(msgspec.json.encode(item)) == item
    assert ENCRYPT.read(MSGPACK, msgspec.msgpack.encode(item)) == item
    assert BATCH.read(JSON, msgspec.json.encode({"items": [item, item]}), 2) == [item, item]
    assert BATCH.read(MSGPACK, msgspec.msgpack.encode({"items": [item, item]}), 2) == [item, item]
    assert bool(aad) == bool(read(msgspec.json.encode(item)).aad)


@pytest.mark.parametrize(
    "text",
    ["YQ", "YQ=", "Y", "Y-_=", "YQ==YQ==", "YQ== ", " YQ==", "Y Q==", "YQ==\\n", "Y\\u0051==x", "====", "é"],
)
def test_base64_is_the_padded_standard_alphabet(text: str) -> None:
    """Unpadded, URL-safe or spaced base64 is refused (RFC 4648 section 4), and not repeated."""
    with pytest.raises(InvalidField) as raised:
        read(f'{{"key_id":"k","plaintext":"{text}"}}')
    assert text.strip() not in raised.value.detail.replace("base64", "")


def test_an_escaped_base64_character_is_still_base64() -> None:
    """JSON may write any character as an escape; the value is what counts."""
    assert read('{"key_id":"k","plaintext":"\\u0059Q=="}').plaintext == b"a"


@pytest.mark.parametrize(
    "body",
    [
        f'{{{OK},"plaintext":""}}',
        f'{{{OK},"plaintext":"YQ=="}}',
        f'{{{OK},"aad":"","aad":""}}',
        f'{{{OK},"aad":null,"aad":null}}',
        f'{{{OK},"aad":null,"aad":"YQ=="}}',
        f'{{{OK},"aad":"YQ==","aad":null}}',
        f'{{{OK},"k\\u0065y_id":"other"}}',
        f'{{{OK},"\\u0061ad":null,"aad":null}}',
    ],
)
def test_a_field_given_twice_is_refused(body: str) -> None:
    """With the same value or another, plainly or by escapes, alone or in a batch."""
    with pytest.raises(DuplicateField):
        read(body)
    good, bad, null = BATCH.read(JSON, f'{{"items":[{{{OK}}},{body},{{{OK},"aad":null}}]}}'.encode(), 3)
    assert isinstance(good, EncryptItem)
    assert isinstance(bad, DuplicateField)
    assert isinstance(null, EncryptItem)


def test_nulls_elsewhere_in_a_batch_do_not_hide_a_duplicate() -> None:
    """What one item lacks in quotes must not make up for what another has too many."""
    null, twice = f'{{{OK},"aad":null}}', f'{{{OK},"aad":null,"aad":"YQ=="}}'
    results = BATCH.read(JSON, f'{{"items":[{null},{null},{twice}]}}'.encode(), 3)
    assert [type(result) for result in results] == [EncryptItem, EncryptItem, DuplicateField]


def test_a_waiting_period_given_twice_is_refused() -> None:
    """Numbers take no quotes: a destruction must not go by the last of two."""
    with pytest.raises(DuplicateField):
        read('{"waiting_days":7,"waiting_days":30}', READERS["schedule"])
    assert read('{"waiting_days":7}', READERS["schedule"]).waiting_days == 7


@pytest.mark.parametrize("body", ['{"items":[],"items":[]}', '{"items":[],"\\u0069tems":[]}'])
def test_items_given_twice_are_refused(body: str) -> None:
    """A batch has one list."""
    with pytest.raises(DuplicateField):
        BATCH.read(JSON, body.encode(), 9)


def test_msgpack_duplicates_are_refused() -> None:
    """In maps of each length form, alone, in an item and around the items."""
    key, plain = b"\xa6key_id\xa1k", b"\xa9plaintext\xc4\x01a"
    for head in (b"\x83", b"\xde\x00\x03", b"\xdf\x00\x00\x00\x03"):
        with pytest.raises(DuplicateField):
            ENCRYPT.read(MSGPACK, head + key + plain + key)
        batch = b"\x81\xa5items\x92" + b"\x82" + key + plain + head + key + plain + plain
        good, bad = BATCH.read(MSGPACK, batch, 2)
        assert isinstance(good, EncryptItem)
        assert isinstance(bad, DuplicateField)
    for head in (b"\x82", b"\xde\x00\x02"):
        with pytest.raises(DuplicateField):
            BATCH.read(MSGPACK, head + b"\xa5items\x90" * 2, 2)
    assert ENCRYPT.read(MSGPACK, b"\xde\x00\x02" + key + plain) == EncryptItem("k", b"a")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b'{"key_id":"\xff","plaintext":""}',
        b'{"key_id":"\xed\xa0\x80","plaintext":""}',
        b'{"key_id":"\\ud800","plaintext":""}',
        b"\xef\xbb\xbf{}",
        b'{"key_id":"k","plaintext":""}{}',
        b'{"key_id":"k","plaintext":NaN}',
        b"{'key_id':'k'}",
        '{"key_id":"k","plaintext":""}'.encode("utf-16"),
    ],
)
def test_what_is_not_json_is_malformed(body: bytes) -> None:
    """Not well-formed, or not UTF-8, is malformed_body, in a batch too."""
    with pytest.raises(MalformedBody):
        read(body)
    with pytest.raises(MalformedBody):
        BATCH.read(JSON, b'{"items":[' + body + b",{}]}", 9)


@pytest.mark.parametrize("body", [b"", b"\x82", b"\x81\xa6key_id", b"\xde\x00", b"\x81\xa6key_id\xa1\xff"])
def test_what_is_not_msgpack_is_malformed(body: bytes) -> None:
    """Truncated, or not UTF-8 where text is wanted."""
    with pytest.raises(MalformedBody):
        ENCRYPT.read(MSGPACK, body)
    with pytest.raises(MalformedBody):
        BATCH.read(MSGPACK, body.replace(b"\xa6key_id", b"\xa5items\x92"), 9)


@pytest.mark.parametrize("depth", [900, 5_000, 200_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    """Thousands of brackets are one of our errors, wherever they stand."""
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        deep = opening * depth + b"1" + closing * depth
        with pytest.raises(KmsError):
            read(deep)
        with pytest.raises(KmsError):
            read(b'{"key_id":"k","plaintext":' + deep + b"}")
        for batch in (b'{"items":[' + deep + b"]}", b'{"items":' + deep + b"}"):
            with contextlib.suppress(KmsError):
                assert all(isinstance(item, KmsError) for item in BATCH.read(JSON, batch, 9))
        with contextlib.suppress(KmsError):
            read(b'{"key_id":"k","new_kek_hex":' + deep + b"}", READERS["rewrap"])


def test_a_number_of_thousands_of_digits_is_an_error_in_its_place() -> None:
    """Python refuses to convert such a number; that must not become a 500."""
    digits = b"1" * 5000
    good, bad = BATCH.read(JSON, b'{"items":[{' + OK.encode() + b"}," + digits + b"]}", 2)
    assert isinstance(good, EncryptItem)
    assert isinstance(bad, InvalidField)
    read(b'{"key_id":"k","new_kek_hex":' + digits + b"}", READERS["rewrap"])


def test_bytes_that_are_no_text_in_a_bad_item_are_malformed() -> None:
    """An item that fails for its type may hold invalid UTF-8 as well."""
    with pytest.raises(MalformedBody):
        BATCH.read(JSON, b'{"items":["\xff"]}', 2)


@pytest.mark.parametrize(
    "body",
    [
        {"key_id": "k", "plaintext": "", SECRET: ""},
        {"key_id": "k", "plaintext": "", f"` - at `$`{SECRET}": ""},
        {"key_id": "k", "plaintext": "", f"\n` - at {SECRET}`": 1},
        {"key_id": "k", "plaintext": SECRET},
        {"key_id": [SECRET], "plaintext": ""},
        {"key_id": {SECRET: 1}, "plaintext": ""},
        {"plaintext": SECRET},
        [SECRET],
        SECRET,
    ],
)
def test_what_is_refused_is_not_repeated(body: Any) -> None:
    """A secret in the wrong place must not come back, nor reach a log, in either form and in a batch."""
    for form, encoded in ((JSON, msgspec.json.encode), (MSGPACK, msgspec.msgpack.encode)):
        with pytest.raises(KmsError) as raised:
            ENCRYPT.read(form, encoded(body))
        assert SECRET not in raised.value.detail
        assert raised.value.__suppress_context__
        (item,) = BATCH.read(form, encoded({"items": [body]}), 1)
        assert isinstance(item, KmsError)
        assert SECRET not in item.detail


@pytest.mark.parametrize("form", [JSON, MSGPACK])
@pytest.mark.parametrize(
    "body", [None, [], {}, {"items": {}}, {"items": None}, {"items": [], "more": 1}, {"item": []}]
)
def test_what_is_no_batch(form: str, body: Any) -> None:
    """A batch of the wrong form is refused as a whole."""
    encoded = msgspec.json.encode(body) if form == JSON else msgspec.msgpack.encode(body)
    with pytest.raises(InvalidField):
        BATCH.read(form, encoded, 9)


@pytest.mark.parametrize(
    "item", [{"key_id": "k", "plaintext": b""}, {}, 1, {"key_id": "k", "plaintext": b"", "aad": None}]
)
def test_too_many_items_are_refused_before_any_is_looked_at(
    item: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the items are: millions of bad ones would cost minutes and gigabytes."""
    monkeypatch.setattr(Reader, "read", None)  # the way item by item would fail at once
    for form, encoded in ((JSON, msgspec.json.encode), (MSGPACK, msgspec.msgpack.encode)):
        with pytest.raises(errors.BatchTooLarge, match="at most 3 items, this one has more"):
            BATCH.read(form, encoded({"items": [item] * 4}), 3)


@pytest.mark.parametrize("form", ["text/plain", "", "application/cbor"])
def test_other_forms_are_unsupported(form: str) -> None:
    """JSON or msgpack, nothing is guessed."""
    with pytest.raises(errors.UnsupportedMediaType):
        ENCRYPT.read(form, b"{}")
    with pytest.raises(errors.UnsupportedMediaType):
        BATCH.read(form, b"{}", 9)


def test_no_message_shows_what_it_holds() -> None:
    """Neither plaintext, ciphertext nor a wrapped key in a repr."""
    shown = repr(
        [
            EncryptItem("k", b"hidden", b"hidden"),
            DecryptItem("k", b"hidden", b"hidden"),
            Decrypted(b"hidden"),
            CreatedDek("k", b"hidden", "kek", "1", "1"),
            WrappedDek(b"hidden", "kek", "1"),
            RewrappedDek("k", b"hidden", "kek", "1"),
        ]
    )
    assert "hidden'" not in shown
    assert base64.b64encode(b"hidden").decode() not in shown


def test_answers_are_base64_or_raw() -> None:
    """JSON carries padded standard base64, msgpack the bytes themselves."""
    assert encode(JSON, Decrypted(b"\xfb\xff")) == b'{"plaintext":"+/8="}'
    assert msgspec.msgpack.decode(encode(MSGPACK, Decrypted(b"\xfb\xff"))) == {"plaintext": b"\xfb\xff"}


@given(
    st.lists(
        st.one_of(
            st.builds(EncryptItem, st.text(), st.binary(), st.sampled_from([msgspec.UNSET, None, b"", b"x"])),
            st.builds(CreateItem, st.text(), st.sampled_from([msgspec.UNSET, None, "", "x"])),
        )
    )
)
def test_quotes_of_many_are_the_sum(items: list[Any]) -> None:
    """Too few would send good batches the slow way, too many would hide a field that is given twice."""
    for model in (EncryptItem, CreateItem):
        reader: Reader[Any] = Reader(model)
        mine = [item for item in items if isinstance(item, model)]
        assert reader.quotes_of(mine) == sum(map(reader.quotes, mine))


@given(st.lists(st.text('a"\\/\u00e9', max_size=6), max_size=6))
def test_quotes_are_counted_where_some_are_escaped(texts: list[str]) -> None:
    """Two for each string, whatever is in it: else each body with a backslash would be looked at twice."""
    assert quotes_in(json.dumps(texts).encode()) == 2 * len(texts)


# --- properties over the parsers -------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    st.sampled_from(["", "YQ==", "k", 'q"\\']),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
pairs = st.lists(st.tuples(st.sampled_from([*NAMES, "items", "x"]), values), max_size=5)


def spelled(name: str, *, escaped: bool) -> str:
    """Write a name in JSON, its first character as an escape if asked."""
    return f'"\\u{ord(name[0]):04x}{name[1:]}"' if escaped else json.dumps(name)


@st.composite
def objects(draw: st.DrawFn, fields: st.SearchStrategy[list[tuple[str, Any]]] = pairs) -> str:
    """Write JSON objects whose names come twice, escaped, spaced: as no encoder would."""
    gap = draw(st.sampled_from(["", " ", "\n\t"]))
    parts = [
        f"{spelled(name, escaped=draw(st.booleans()))}{gap}:{gap}{json.dumps(value)}"
        for name, value in draw(fields)
    ]
    return "{" + f",{gap}".join(parts) + gap + "}"


strings = st.sampled_from(["", "YQ==", "YWI="])
close = st.permutations(
    [("key_id", "k"), ("plaintext", "YQ=="), ("aad", None), ("aad", "YQ=="), ("plaintext", ""), ("aad", None)]
).flatmap(lambda order: st.integers(1, 6).map(lambda count: order[:count]))


def has_double(text: str) -> bool:
    """Say whether the outermost object gives a name twice: the slow reference."""
    found: list[bool] = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in pairs]
        found.append(len(set(names)) < len(names))

    json.loads(text, object_pairs_hook=look)
    return found[-1]


@pytest.mark.fuzz
@given(st.one_of(objects(), objects(close)))
@example('{"key_id":"k","plaintext":"","aad":null,"aad":null}')
def test_the_fast_check_of_duplicates_agrees_with_a_slow_one(text: str) -> None:
    """Whenever a body is taken, the slow way finds no field twice; when it is a double, it is one."""
    for reader in READERS.values():
        try:
            read(text, reader)
        except DuplicateField:
            assert has_double(text)
        except KmsError:
            pass
        else:
            assert not has_double(text)


@pytest.mark.fuzz
@given(st.lists(st.one_of(objects(), objects(close)), max_size=4))
def test_in_a_batch_too(items: list[str]) -> None:
    """Each item is judged as it would be alone, in order, whatever stands beside it."""
    body = ('{"items":[' + ",".join(items) + "]}").encode()
    alone: list[Any] = []
    for item in items:
        try:
            alone.append(read(item))
        except KmsError as error:
            alone.append(type(error))
    together = [type(item) if isinstance(item, KmsError) else item for item in BATCH.read(JSON, body, 9)]
    assert together == alone


@pytest.mark.fuzz
@given(st.binary(max_size=200), st.sampled_from([JSON, MSGPACK]))
def test_random_bytes_raise_nothing_but_our_errors(body: bytes, form: str) -> None:
    """Whatever arrives is read or refused."""
    attempt(form, body)


VALID = [
    b'{"key_id":"k_A","plaintext":"YQ==","aad":"YQ=="}',
    b'{"key_id":"k_A","ciphertext":"YQ==","aad":null}',
    b'{"thread_id":"t","idempotency_key":"a\\"b"}',
    b'{"key_id":"k","new_kek_hex":[1,{"a":"b"}]}',
    b'{"waiting_days":7}',
    b'{"items":[{"key_id":"k","plaintext":"YQ=="},{"key_id":"k","plaintext":"YQ==","aad":null},1,"x"]}',
]


@pytest.mark.fuzz
@given(
    st.sampled_from(VALID),
    st.lists(
        st.tuples(st.integers(0, 200), st.integers(0, 3), st.binary(max_size=4)), min_size=1, max_size=4
    ),
    st.booleans(),
)
def test_mutated_bodies_raise_nothing_but_our_errors(
    body: bytes, changes: list[tuple[int, int, bytes]], pack: bool
) -> None:
    """A valid body with bytes cut out and put in is read or refused."""
    if pack:
        body = msgspec.msgpack.encode(json.loads(body))
    for at, cut, put in changes:
        at %= len(body) + 1  # noqa: PLW2901 - brought into the body
        body = body[:at] + put + body[at + cut :]
    attempt(MSGPACK if pack else JSON, body)


def attempt(form: str, body: bytes) -> None:
    """Read a body every way; only the errors that are meant for bodies may come out."""
    for reader in READERS.values():
        with contextlib.suppress(MalformedBody, InvalidField, DuplicateField):
            reader.read(form, body)
    for batch in BATCHES:
        with contextlib.suppress(MalformedBody, InvalidField, DuplicateField):
            items = batch.read(form, body, 9)
            assert all(isinstance(item, KmsError | msgspec.Struct) for item in items)

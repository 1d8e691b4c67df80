"""Lines of the older service's export, and its master key."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from progressdb_kms.domain.errors import BackupInvalid, WrappedKeyInvalid
from progressdb_kms.domain.older import End, MasterKey, OlderKey, parse_line
from tests.older_service import FIRST_SECOND, OlderService, b64

older = OlderService()
KEY = older.create("room:1")
RAW = older.create("room:2", raw=True, meta=False)


def parsed(key_id: str, /, **changes: Any) -> OlderKey:
    """Return what a line of a key is read as."""
    found = parse_line(older.line(key_id, **changes))
    assert isinstance(found, OlderKey)
    return found


@pytest.mark.parametrize("raw", [False, True])
def test_both_stored_forms_are_read(raw: bool) -> None:
    """The wrapped key comes out of a JSON object and as it is; the thread from where it is told."""
    key_id = older.create("room:é", raw=raw)
    found = parsed(key_id, **({"thread_id": "room:é"} if raw else {}))
    assert (found.key_id, found.thread_id) == (key_id, "room:é")
    assert MasterKey(older.master).unwrap(found.wrapped) == older.dek(key_id)


def test_a_wrapped_key_that_begins_like_json_is_one() -> None:
    """Of 256 wrapped keys one begins with a brace: its length tells."""
    wrapped = b"{" + older.store[f"dek:{RAW}"][1:]
    assert parsed(RAW, dek=b64(wrapped)).wrapped == wrapped


def test_a_thread_that_nobody_tells_is_empty() -> None:
    """It is for the caller to say what then."""
    assert parsed(RAW).thread_id == ""
    assert parsed(RAW, thread_id=None, dekmeta=None).thread_id == ""
    assert parsed(RAW, thread_id="", dekmeta=b64(b'{"thread_id": "room:9"}')).thread_id == "room:9"


BAD_TIMES: tuple[object, ...] = ("yesterday", "", -1, 0, True, None, [], 1e9, 10**40)


@pytest.mark.parametrize(
    "told, seconds",
    [
        ("2024-04-05T19:34:38.901234567Z", 1_712_345_678),
        ("2024-04-05T21:34:38+02:00", 1_712_345_678),
        ("2024-04-05T19:34:38", 1_712_345_678),
        (1_600_000_000, 1_600_000_000),
        (1_600_000_000_123, 1_600_000_000),
        (1_600_000_000_123_456, 1_600_000_000),
        (1_600_000_000_123_456_789, 1_600_000_000),
        *((bad, FIRST_SECOND) for bad in BAD_TIMES),
    ],
)
def test_when_a_key_was_made(told: object, seconds: int) -> None:
    """Metadata tell in any unit; what can't be read costs no key, and the id tells it, too."""
    meta = json.dumps({"created_at": told}).encode()
    assert parsed(KEY, dekmeta=b64(meta)).created_at == seconds


def test_an_id_that_is_no_clock_tells_no_time() -> None:
    """A small number is not a moment in 1970."""
    assert parsed(older.create("t", meta=False, key_id="k_17")).created_at == 0


def test_the_end_tells_how_many() -> None:
    """The last line is told from a key's."""
    assert parse_line(b'{"keys": 3}\n') == End(3)


MARK = "5EC2E75EC2E7"


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"\xff", "not a JSON object"),
        (b"[" * 60_000, "not a JSON object"),
        (older.line(KEY)[:-9], "cut short"),
        (b'{"key_id": "k_1", "key_id": "k_2", "dek": ""}', "has a member twice"),
        (b'{"keys": true}', "no number of keys"),
        (b'{"keys": -1}', "no number of keys"),
        (b'{"key_id": "k_1"}', "other members"),
        (older.line(KEY, threadid=MARK), "other members"),
        *(
            (older.line(KEY, key_id=bad), "not of the form")
            for bad in ("", "k_", "k_A", 7, None, "k_" + "1" * 21)
        ),
        (older.line(KEY, key_id="k_" + "A" * 28), "not of the form"),
        *((older.line(KEY, dek=bad), "dek is not base64") for bad in (MARK + "!", 5, None, "AAA", "é")),
        (older.line(KEY, dek=b64(b"x" * 59)), "dek is not a JSON object"),
        (older.line(KEY, dek=b64(b'{"wrapped": 5}')), "wrapped in dek is not base64"),
        (older.line(KEY, dek=b64(b'{"wrapped": "AAAA"}')), "has 3 bytes instead of 60"),
        (older.line(KEY, dekmeta=b64(MARK.encode())), "dekmeta is not a JSON object"),
        (older.line(KEY, dekmeta=MARK + "!"), "dekmeta is not base64"),
        (older.line(KEY, dekmeta=b64(b'{"key_id": "k_2"}')), "another key_id"),
        (older.line(KEY, thread_id="room:2"), "two threads"),
        (older.line(RAW, thread_id=["room:2"]), "not a string"),
        (older.line(RAW, thread_id="x" * 257), "thread_id must be"),
        (older.line(RAW, thread_id="a\n"), "control characters"),
        (older.line(RAW, thread_id="\ud800"), "not valid UTF-8"),
    ],
)
def test_a_damaged_line_is_refused_and_not_repeated(line: bytes, reason: str) -> None:
    """The reason says what is wrong; nothing of the line is in it, nor in what it came from."""
    with pytest.raises(BackupInvalid, match=reason) as caught:
        parse_line(line)
    assert MARK not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@given(st.binary(max_size=300))
@example(b"NaN")
@example(b'{"keys": 1e400}')
@example(b'{"key_id": ' + b"9" * 5000 + b"}")
def test_any_bytes_are_read_or_refused(line: bytes) -> None:
    """No line ends a migration."""
    try:
        parse_line(line)
    except BackupInvalid:
        return


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32), st.integers(0, 479))
def test_only_the_master_key_opens(master: bytes, other: bytes, bit: int) -> None:
    """A wrap opens under its master key whole, and in no other way."""
    service = OlderService(master)
    wrapped = service.store[f"dek:{(key_id := service.create('t', raw=True))}"]
    assert MasterKey(master).unwrap(wrapped) == service.dek(key_id)
    flipped = (int.from_bytes(wrapped, "big") ^ 1 << bit).to_bytes(60, "big")
    for key, blob in ((master, flipped), (other, wrapped), (master, wrapped[:-1])):
        if key == other == master:
            continue
        with pytest.raises(WrappedKeyInvalid, match="under this master key"):
            MasterKey(key).unwrap(blob)


def test_nothing_secret_is_shown() -> None:
    """Neither key nor wrap is in what a log or a traceback shows."""
    found = parsed(KEY)
    assert repr(found.wrapped) not in repr(found)
    assert repr(older.master) not in repr(MasterKey(older.master))
    assert older.master.hex() not in repr(vars(MasterKey(older.master)))

"""Key ids, thread ids, idempotency keys, states."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from progressdb_kms.domain import errors
from progressdb_kms.domain.keys import (
    ALL_TAGS,
    KEY_ID_CHARS,
    MAY_DECRYPT,
    MAY_ENCRYPT,
    TRANSITIONS,
    UNIQUE_BYTES,
    DekRecord,
    KeyState,
    NewDek,
    StateChange,
    check_idempotency_key,
    check_thread_id,
    derive_key_id,
    is_older,
    locate,
    may_belong,
    new_key_id,
    refusal,
    slot_tag,
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
randoms = st.binary(min_size=UNIQUE_BYTES, max_size=UNIQUE_BYTES)
WELL_FORMED = re.compile(r"k_[A-Z2-7]{28}")
OLDER = re.compile(r"k_[0123456789]{1,20}")


@given(texts, randoms)
def test_a_new_id_is_well_formed_and_names_its_threads_slot(thread_id: str, random: bytes) -> None:
    """An id alone finds the slot that its thread hashes to."""
    key_id = new_key_id(thread_id, random)
    assert WELL_FORMED.fullmatch(key_id)
    assert len(key_id) == KEY_ID_CHARS
    assert locate(key_id) == slot_tag(thread_id)
    assert slot_tag(thread_id) in ALL_TAGS


@given(texts, randoms, randoms)
def test_other_random_bytes_make_another_id(thread_id: str, one: bytes, other: bytes) -> None:
    """130 of the random bits are all in the id: none is lost on the way to base32."""
    same_bits = int.from_bytes(one, "big") >> 6 == int.from_bytes(other, "big") >> 6
    assert (new_key_id(thread_id, one) == new_key_id(thread_id, other)) == same_bits


@pytest.mark.parametrize("size", [0, UNIQUE_BYTES - 1, UNIQUE_BYTES + 1])
def test_a_new_id_takes_exactly_17_random_bytes(size: int) -> None:
    """Too few would make ids that collide."""
    with pytest.raises(ValueError, match="17 random bytes"):
        new_key_id("t", bytes(size))


@given(st.tuples(texts, texts, texts), st.tuples(texts, texts, texts))
@example(("a", "bc", "d"), ("ab", "c", "d"))
@example(("a", "b", "cd"), ("a", "bc", "d"))
@example(("", "a", "b"), ("a", "", "b"))
def test_derived_ids_are_injective_by_parts(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    """Only the same identity, Idempotency-Key and thread have the same id: no part reaches into the next."""
    assert (derive_key_id(*one) == derive_key_id(*other)) == (one == other)


@given(texts, st.integers(0, 40), st.integers(0, 40))
def test_moving_the_borders_between_parts_changes_a_derived_id(text: str, first: int, second: int) -> None:
    """The same characters split otherwise are another request."""
    first, second = sorted((min(first, len(text)), min(second, len(text))))
    parts = (text[:first], text[first:second], text[second:])
    assume(parts != (text, "", ""))
    assert derive_key_id(*parts) != derive_key_id(text, "", "")


@given(texts, texts, texts)
def test_a_derived_id_is_well_formed_and_steady(identity: str, key: str, thread_id: str) -> None:
    """It is what it was at the first try, and lies in its thread's slot."""
    key_id = derive_key_id(identity, key, thread_id)
    assert key_id == derive_key_id(identity, key, thread_id)
    assert WELL_FORMED.fullmatch(key_id)
    assert locate(key_id) == slot_tag(thread_id)


@given(
    st.one_of(
        st.text(max_size=40),
        st.from_regex(r"\Ak_[A-Z2-7]{27,29}\Z"),
        st.from_regex(r"\Ak_[a-z0-9]{28}\Z"),
        st.from_regex(r"\Ak_\d{1,28}\Z"),
        st.integers(0, 10**20 - 1).map("k_{}".format),
    )
)
@example("k_" + "A" * 28 + "\n")
@example("k_" + "A" * 27 + "\uff21")
@example("k_" + "2" * 28)
@example("k_" + "2" * 20)
@example("k_" + "2" * 21)
@example("k_7\n")
@example("k_\u0667")
def test_locate_takes_well_formed_ids_only(key_id: str) -> None:
    """What neither service ever made is not found, whatever it looks like; no id is of both forms."""
    assert is_older(key_id) == bool(OLDER.fullmatch(key_id))
    if WELL_FORMED.fullmatch(key_id):
        assert not is_older(key_id)
        assert locate(key_id) == key_id[2:4]
    elif OLDER.fullmatch(key_id):
        assert locate(key_id) == slot_tag(key_id)
    else:
        with pytest.raises(errors.KeyNotFound):
            locate(key_id)


@given(texts, texts, randoms)
def test_which_keys_a_thread_can_have(thread_id: str, other: str, random: bytes) -> None:
    """Ids of ours tell their thread's slot, so that a wrong one is found out; older ids fit any thread."""
    key_id = new_key_id(thread_id, random)
    assert may_belong(key_id, thread_id)
    assert may_belong(key_id, other) == (slot_tag(other) == slot_tag(thread_id))
    assert may_belong("k_1712345678901234567", other)
    with pytest.raises(errors.KeyNotFound):
        may_belong("k_" + "1" * 21, thread_id)


def test_tags_are_the_1024_pairs() -> None:
    """Each of the 10-bit slots has one tag."""
    assert len(ALL_TAGS) == len(set(ALL_TAGS)) == 1024
    assert {slot_tag(str(n)) for n in range(20_000)} == set(ALL_TAGS)


@given(st.text(max_size=300))
@example("é" * 128)
@example("é" * 128 + "a")
@example("\ud800")
@example("a\x85b")
@example("a\u2028")
@example("a\u200d😀")
def test_thread_ids(thread_id: str) -> None:
    """1 to 256 bytes of UTF-8 without control characters; all else is refused, and not repeated."""
    try:
        size = len(thread_id.encode())
    except UnicodeEncodeError:
        size = 0
    good = 1 <= size <= 256 and not any(unicodedata.category(c) in {"Cc", "Cs"} for c in thread_id)
    if good:
        assert check_thread_id(thread_id) is thread_id
    else:
        with pytest.raises(errors.InvalidThreadId) as raised:
            check_thread_id(thread_id)
        if len(thread_id) > 20:
            assert thread_id not in raised.value.detail


@given(st.text(max_size=300))
@example("a" * 255)
@example("a" * 256)
@example("a b")
@example("é")
@example("a\n")
def test_idempotency_keys(value: str) -> None:
    """1 to 255 visible ASCII characters; all else is refused, and not repeated."""
    if 1 <= len(value) <= 255 and all("!" <= c <= "~" for c in value):
        assert check_idempotency_key(value) == value
    else:
        with pytest.raises(errors.InvalidHeader) as raised:
            check_idempotency_key(value)
        assert len(value) < 3 or value not in raised.value.detail


def test_every_state_that_refuses_says_why() -> None:
    """Each state that forbids a use has an error of its own, and a destroyed key is never usable."""
    assert MAY_ENCRYPT < MAY_DECRYPT
    refused = [refusal(state) for state in KeyState if state not in MAY_ENCRYPT]
    assert {error.code for error in refused} == {
        "key_decrypt_only",
        "key_disabled",
        "key_pending_destruction",
        "key_destroyed",
    }
    assert all(isinstance(error, errors.StateConflict) for error in refused)


def test_no_change_leads_from_or_to_destroyed() -> None:
    """No caller's change destroys at once or revives; a cancelled destruction ends in disabled."""
    assert set(TRANSITIONS) == set(StateChange)
    for row in TRANSITIONS.values():
        assert KeyState.DESTROYED not in row.sources
        assert row.to is not KeyState.DESTROYED
    assert TRANSITIONS[StateChange.CANCEL_DESTRUCTION].to is KeyState.DISABLED
    assert TRANSITIONS[StateChange.ENABLE].sources == {KeyState.DISABLED}


def test_records_do_not_show_the_wrapped_key() -> None:
    """Neither repr holds the blob."""
    record = DekRecord("k", "t", b"hidden blob", "kek", 1, 1, KeyState.ENABLED, 0, "me")
    new = NewDek("k", "t", b"hidden blob", "kek", 1, 0, "me")
    assert "hidden" not in repr(record) + repr(new)

"""How the recipes bind a text to its place, and what they store."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.recipes.sealing import Sealed, pack, place, seal, unpack, unseal
from progressdb_kms.client import SyncKmsProvider
from progressdb_kms.domain.errors import AuthenticationFailed, KeyNotFound
from tests.client.provider_suite import UNKNOWN_KEY, new_thread

PLACES = st.tuples(st.text(), st.text(), st.text())


@given(PLACES, PLACES)
def test_no_two_places_are_alike(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    """Associated data is the same for the same place alone."""
    assert (place(*one) == place(*other)) == (one == other)


@given(st.text(), st.text(), st.text(), st.text(min_size=1))
def test_a_boundary_can_not_move(column: str, thread: str, row: str, moved: str) -> None:
    """What is moved from one part to the next makes another place."""
    assert place(column, thread + moved, row) != place(column, thread, moved + row)
    assert place(column + moved, thread, row) != place(column, moved + thread, row)


@given(st.from_regex(r"k_[A-Z2-7]{28}", fullmatch=True), st.binary())
def test_pack_and_unpack(key_id: str, ciphertext: bytes) -> None:
    """What is stored comes back, and does not print the ciphertext."""
    sealed = Sealed(key_id, ciphertext)
    assert unpack(pack(sealed)) == sealed
    assert repr(sealed) == f"Sealed(key_id={key_id!r})"


@given(st.binary(max_size=64))
def test_other_bytes_are_refused_or_read_whole(stored: bytes) -> None:
    """Bytes of another form end in one error; what is taken is the same when it is stored again."""
    try:
        sealed = unpack(stored)
    except ValueError:
        return
    assert pack(sealed) == stored


@pytest.mark.parametrize("value", ["hello", b"hello", bytearray(b"x"), 7, ("k", b"c")])
def test_plain_values_are_refused(value: object) -> None:
    """Nothing but a sealed text is stored: no text goes in in the clear by mistake."""
    with pytest.raises(TypeError, match="no plain value"):
        pack(value)  # type: ignore[arg-type] # the mistake


def test_a_text_opens_in_its_place_alone(kms: SyncKmsProvider) -> None:
    """Another column, thread or row, or a changed text, is an error of that text and of no other."""
    thread = new_thread()
    dek = kms.create_dek_for_thread(thread)
    one, two = seal(kms, "m.body", thread, dek.key_id, [("1", "Grüße"), ("2", "")])
    assert unseal(kms, "m.body", [(thread, "1", one), (thread, "2", two)]) == ["Grüße", ""]
    changed = Sealed(one.key_id, one.ciphertext[:-1] + bytes([one.ciphertext[-1] ^ 1]))
    stranger = Sealed(UNKNOWN_KEY, one.ciphertext)
    found = unseal(
        kms,
        "m.body",
        [
            (thread, "1", two),
            ("other", "1", one),
            (thread, "1", changed),
            (thread, "1", stranger),
            (thread, "1", one),
        ],
    )
    assert [type(each) for each in found] == [AuthenticationFailed] * 3 + [KeyNotFound, str]
    assert isinstance(unseal(kms, "m.title", [(thread, "1", one)])[0], AuthenticationFailed)
    with pytest.raises(KeyNotFound):
        seal(kms, "m.body", thread, UNKNOWN_KEY, [("1", "text")])

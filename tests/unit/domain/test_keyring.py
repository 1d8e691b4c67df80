"""KEK versions in memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.domain.errors import KekFileInvalid, KekUnavailable
from progressdb_kms.domain.keyring import Keyring, check_value, kek_id_of
from tests.unit.helpers import labelled

keys = st.binary(min_size=32, max_size=32)


@given(keys, keys)
def test_check_values_tell_keys_apart(one: bytes, other: bytes) -> None:
    """Equal for equal keys only, in hex, and nothing of the key is in it."""
    assert (check_value(one) == check_value(other)) == (one == other)
    assert len(bytes.fromhex(check_value(one))) == 32
    assert one.hex() not in check_value(one)


@given(st.dictionaries(st.integers(1, 2**24 - 1), keys, min_size=1, max_size=5))
def test_a_keyring_knows_its_versions(given_keys: dict[int, bytes]) -> None:
    """Each version has its own key's check value; one key under two numbers is refused."""
    if len(set(given_keys.values())) < len(given_keys):
        with pytest.raises(KekFileInvalid, match="are the same key"):
            Keyring(given_keys)
        return
    ring = Keyring(given_keys)
    assert ring.versions == set(given_keys)
    for version, key in given_keys.items():
        assert ring.check_value(version) == check_value(key)
        assert (
            ring.cipher(version).decrypt(bytes(12), ring.cipher(version).encrypt(bytes(12), b"x", b""), b"")
            == b"x"
        )


@pytest.mark.parametrize(
    "bad, says",
    [
        ({0: bytes(32)}, "version 0"),
        ({2**24: bytes(32)}, "version 16777216"),
        ({1: bytes(31)}, "31 bytes"),
        ({1: bytes(33)}, "33 bytes"),
        ({1: labelled("a"), 2: labelled("a")}, "1 and 2 are the same key"),
    ],
)
def test_what_is_no_keyring(bad: dict[int, bytes], says: str) -> None:
    """Each mistake says which version it is about."""
    with pytest.raises(KekFileInvalid, match=says):
        Keyring(bad)


def test_a_version_that_is_not_loaded_is_unavailable() -> None:
    """Unwrap never tries another key."""
    ring = Keyring({1: labelled("a")})
    with pytest.raises(KekUnavailable, match="version 2"):
        ring.cipher(2)
    with pytest.raises(KekUnavailable, match="version 2"):
        ring.check_value(2)


def test_repr_shows_versions_only() -> None:
    """No key material, in any form."""
    key = labelled("a")
    shown = repr(Keyring({7: key}))
    assert shown == "Keyring(versions=[7])"


def test_a_kek_id_is_short_and_made_from_the_check_value() -> None:
    """It fits 64 bytes, which a compact record needs."""
    value = check_value(labelled("a"))
    assert kek_id_of(value) == f"kek_{value[:16]}"

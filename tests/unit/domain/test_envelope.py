"""The two envelopes: what opens, and everything that must not."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.domain import envelope
from progressdb_kms.domain.envelope import open_sealed, pack_blob, parse_blob, seal, unwrap, wrap, wrap_aad
from progressdb_kms.domain.errors import (
    AuthenticationFailed,
    KekUnavailable,
    MalformedCiphertext,
    WrappedKeyInvalid,
)
from progressdb_kms.domain.keyring import Keyring
from tests.unit.helpers import labelled

RING = Keyring({1: labelled("kek 1"), 2: labelled("kek 2")})
DEK = AESGCM(labelled("dek"))
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
nonces = st.binary(min_size=12, max_size=12)
deks = st.binary(min_size=32, max_size=32)
aads = st.one_of(st.none(), st.binary(max_size=50))


def opened(blob: bytes, key_id: str, thread_id: str) -> bytes:
    """Open a blob as the service does: by the version in its header."""
    parsed = parse_blob(blob)
    return unwrap(RING.cipher(parsed.kek_version), parsed.body, wrap_aad(key_id, thread_id))


def made(dek: bytes, nonce: bytes, key_id: str, thread_id: str, version: int = 1) -> bytes:
    """Make a blob."""
    return pack_blob(version, wrap(RING.cipher(version), nonce, dek, wrap_aad(key_id, thread_id)))


@given(deks, nonces, names, names, st.sampled_from([1, 2]))
def test_a_wrapped_key_opens_under_the_version_in_its_header(
    dek: bytes, nonce: bytes, key_id: str, thread_id: str, version: int
) -> None:
    """64 bytes go out, the DEK comes back, and the header alone picks the KEK."""
    blob = made(dek, nonce, key_id, thread_id, version)
    assert len(blob) == 64
    assert parse_blob(blob).kek_version == version
    assert opened(blob, key_id, thread_id) == dek


def test_every_bit_of_a_blob_counts() -> None:
    """A blob with any one bit flipped does not open: 512 of 512."""
    blob = made(labelled("d"), bytes(12), "k", "t")
    for bit in range(8 * len(blob)):
        changed = bytearray(blob)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises((WrappedKeyInvalid, KekUnavailable)):
            opened(bytes(changed), "k", "t")


@given(names, names, names, names)
def test_a_blob_moved_to_another_record_does_not_open(key: str, thread: str, key2: str, thread2: str) -> None:
    """Key id and thread id are bound, each for itself: no split of the same characters is another's."""
    blob = made(labelled("d"), bytes(12), key, thread)
    if (key, thread) == (key2, thread2):
        assert opened(blob, key2, thread2) == labelled("d")
    else:
        with pytest.raises(WrappedKeyInvalid):
            opened(blob, key2, thread2)


@given(st.integers(0, 63))
def test_a_truncated_blob_is_refused(size: int) -> None:
    """No shorter blob is taken for a key."""
    with pytest.raises(WrappedKeyInvalid):
        opened(made(labelled("d"), bytes(12), "k", "t")[:size], "k", "t")


@given(st.binary(max_size=100))
def test_random_bytes_are_no_blob(data: bytes) -> None:
    """Whatever stands in the store: one of two errors, never another exception."""
    with pytest.raises((WrappedKeyInvalid, KekUnavailable)):
        opened(data, "k", "t")


@pytest.mark.parametrize("version", [0, -1, 2**24])
def test_a_version_that_does_not_fit_the_header_is_no_version(version: int) -> None:
    """Three bytes, from 1."""
    with pytest.raises(ValueError, match="KEK version"):
        pack_blob(version, b"")


@pytest.mark.parametrize("version", [1, 255, 256, 2**24 - 1])
def test_versions_are_big_endian(version: int) -> None:
    """The header holds what was packed."""
    assert parse_blob(pack_blob(version, bytes(60))) == (1, version, bytes(60))


@pytest.mark.parametrize("dek, nonce", [(31, 12), (33, 12), (32, 11), (32, 13)])
def test_wrap_takes_right_sizes_only(dek: int, nonce: int) -> None:
    """A short nonce or key is a bug of ours and never wraps."""
    with pytest.raises(ValueError, match="32 bytes"):
        wrap(RING.cipher(1), bytes(nonce), bytes(dek), b"")


def test_a_blobs_repr_hides_its_body() -> None:
    """Neither raw nor as hex."""
    shown = repr(parse_blob(pack_blob(3, b"B" * 60)))
    assert "BBB" not in shown
    assert "kek_version=3" in shown


@given(st.binary(max_size=200), nonces, aads)
def test_a_message_opens_with_its_aad(plaintext: bytes, nonce: bytes, aad: bytes | None) -> None:
    """What was sealed comes back, 28 bytes longer on the way; absent AAD is empty AAD."""
    sealed = seal(DEK, nonce, plaintext, aad)
    assert len(sealed) == len(plaintext) + envelope.MESSAGE_OVERHEAD
    assert sealed.startswith(nonce)
    assert open_sealed(DEK, sealed, aad) == plaintext
    if not aad:
        assert open_sealed(DEK, sealed, b"") == open_sealed(DEK, sealed, None) == plaintext


@given(aads, aads)
def test_another_aad_does_not_open(one: bytes | None, other: bytes | None) -> None:
    """Wrong, missing or added AAD: one error, always."""
    sealed = seal(DEK, bytes(12), b"hello", one)
    if (one or b"") == (other or b""):
        assert open_sealed(DEK, sealed, other) == b"hello"
    else:
        with pytest.raises(AuthenticationFailed):
            open_sealed(DEK, sealed, other)


def test_every_bit_of_a_message_counts() -> None:
    """A ciphertext with any one bit flipped does not open."""
    sealed = seal(DEK, bytes(12), b"hello, world", b"aad")
    for bit in range(8 * len(sealed)):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(AuthenticationFailed):
            open_sealed(DEK, bytes(changed), b"aad")


@pytest.mark.parametrize("size", range(33))
def test_a_truncated_message_is_malformed_or_forged(size: int) -> None:
    """Below nonce and tag it is malformed, above it is forged: two errors for two mistakes."""
    sealed = seal(DEK, bytes(12), b"hello", None)
    with pytest.raises(MalformedCiphertext if size < 28 else AuthenticationFailed):
        open_sealed(DEK, sealed[:size], None)


def test_a_message_under_another_key_does_not_open() -> None:
    """A ciphertext moved to another key is forged there."""
    with pytest.raises(AuthenticationFailed):
        open_sealed(AESGCM(labelled("other")), seal(DEK, bytes(12), b"hello", None), None)


def test_the_limit_of_uses_leaves_a_margin_below_2_to_the_32() -> None:
    """SP 800-38D 8.3: at most 2^32 random nonces under a key; 2^28 are kept for what is not counted."""
    assert envelope.USES_LIMIT == 2**32 - 2**28
    assert envelope.USES_WARN == 2**31

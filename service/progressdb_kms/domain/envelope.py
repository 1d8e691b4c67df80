"""The two envelopes: a wrapped DEK, and a message encrypted under a DEK.

Both are AES-256-GCM (SP 800-38D) with a fresh random 96-bit nonce and a 128-bit tag.

Message::

    nonce(12) | ciphertext | tag(16)           AAD: the caller's, verbatim; absent means empty

Wrapped DEK, format 1 (64 bytes)::

    0x01 | KEK version(3, big-endian) | nonce(12) | ciphertext(32) | tag(16)
    AAD: each of (label, format, key_id, thread_id) with a 4-byte big-endian length before it

The KEK version is in the header but not in the AAD: a forged header only picks another key, under which
the tag fails. The DEK's own version is in neither, since the store assigns it after the wrap.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.domain.errors import AuthenticationFailed, MalformedCiphertext, WrappedKeyInvalid
from progressdb_kms.domain.keys import DEK_BYTES

NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
MESSAGE_OVERHEAD: Final = NONCE_BYTES + TAG_BYTES
NONCE: Final = slice(NONCE_BYTES)
"""The nonce of a message."""
SEALED: Final = slice(NONCE_BYTES, None)
"""Its ciphertext and tag, as AES-GCM makes them."""

WRAP_FORMAT: Final = 1
HEADER_BYTES: Final = 4
BODY_BYTES: Final = NONCE_BYTES + DEK_BYTES + TAG_BYTES
BLOB_BYTES: Final = HEADER_BYTES + BODY_BYTES
MAX_KEK_VERSION: Final = 2**24 - 1

USES_WARN: Final = 2**31
USES_LIMIT: Final = 2**32 - 2**28
"""Uses of one key after which encryption is refused: 2^32 random nonces (SP 800-38D 8.3) less a margin for
the uses that instances may spend without having counted them."""

_WRAP_LABEL: Final = b"progressdb-kms/wrap"
_length = Struct(">I").pack
_AAD_HEAD: Final = _length(len(_WRAP_LABEL)) + _WRAP_LABEL + _length(1) + bytes([WRAP_FORMAT])


class Blob(NamedTuple):
    """A parsed wrapped DEK: its header's fields, and the body that the KEK's source made."""

    format: int
    kek_version: int
    body: bytes

    def __repr__(self) -> str:
        return f"Blob(format={self.format}, kek_version={self.kek_version}, body=<hidden>)"


def wrap_aad(key_id: str, thread_id: str) -> bytes:
    """Return the AAD that binds a wrapped DEK to its record."""
    key, thread = key_id.encode(), thread_id.encode()
    return _AAD_HEAD + _length(len(key)) + key + _length(len(thread)) + thread


def pack_blob(kek_version: int, body: bytes) -> bytes:
    """Return the blob of ``body``, as a KEK source made it, under ``kek_version``.

    Raises:
        ValueError: The version does not fit into the header's three bytes.
    """
    if not 1 <= kek_version <= MAX_KEK_VERSION:
        raise ValueError(f"a KEK version is 1 to {MAX_KEK_VERSION}")
    return bytes([WRAP_FORMAT]) + kek_version.to_bytes(3, "big") + body


def parse_blob(blob: bytes) -> Blob:
    """Split a wrapped DEK into header and body.

    Raises:
        WrappedKeyInvalid: Too short for any source, of an unknown format, or with version 0.
    """
    if len(blob) < HEADER_BYTES + MESSAGE_OVERHEAD:
        raise WrappedKeyInvalid(f"the stored key has {len(blob)} bytes, too few for a wrapped key")
    if blob[0] != WRAP_FORMAT:
        raise WrappedKeyInvalid(
            f"the stored key has format {blob[0]}, this release reads format {WRAP_FORMAT}"
        )
    version = int.from_bytes(blob[1:HEADER_BYTES], "big")
    if version == 0:
        raise WrappedKeyInvalid("the stored key names KEK version 0, which never exists")
    return Blob(WRAP_FORMAT, version, blob[HEADER_BYTES:])


def wrap(kek: AESGCM, nonce: bytes, dek: bytes, aad: bytes) -> bytes:
    """Wrap ``dek`` (32 bytes) under ``kek`` and return the blob's body (60 bytes).

    Args:
        kek: The KEK's cipher.
        nonce: 12 fresh random bytes, never used before under this KEK.
        dek: The raw DEK.
        aad: From ``wrap_aad``.
    """
    if len(dek) != DEK_BYTES or len(nonce) != NONCE_BYTES:
        raise ValueError("a DEK is 32 bytes and a nonce 12")
    return nonce + kek.encrypt(nonce, dek, aad)


def unwrap(kek: AESGCM, body: bytes, aad: bytes) -> bytes:
    """Return the raw DEK in ``body``.

    Raises:
        WrappedKeyInvalid: Not of the right length, or it does not authenticate under this KEK and AAD.
    """
    if len(body) != BODY_BYTES:
        raise WrappedKeyInvalid(f"the stored key's body has {len(body)} bytes instead of {BODY_BYTES}")
    try:
        return kek.decrypt(body[:NONCE_BYTES], body[NONCE_BYTES:], aad)
    except InvalidTag:
        raise WrappedKeyInvalid from None


def seal(dek: AESGCM, nonce: bytes, plaintext: bytes, aad: bytes | None) -> bytes:
    """Encrypt a message and return ``nonce | ciphertext | tag``.

    Args:
        dek: The DEK's cipher.
        nonce: 12 fresh random bytes.
        plaintext: Any length up to the service's limit; empty is fine.
        aad: Used verbatim; None means empty.
    """
    return nonce + dek.encrypt(nonce, plaintext, aad)


def too_short() -> MalformedCiphertext:
    """Return the error of a ciphertext of less than ``MESSAGE_OVERHEAD`` bytes."""
    return MalformedCiphertext(f"a ciphertext has at least {MESSAGE_OVERHEAD} bytes: nonce and tag")


def open_sealed(dek: AESGCM, ciphertext: bytes, aad: bytes | None) -> bytes:
    """Decrypt what ``seal`` made.

    Raises:
        MalformedCiphertext: Shorter than nonce and tag.
        AuthenticationFailed: Another key, another AAD, or changed on the way.
    """
    if len(ciphertext) < MESSAGE_OVERHEAD:
        raise too_short()
    try:
        return dek.decrypt(ciphertext[:NONCE_BYTES], ciphertext[NONCE_BYTES:], aad)
    except InvalidTag:
        raise AuthenticationFailed from None

"""Messages as they are stored: an envelope that names its key, bound to its place by the AAD."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from progressdb_kms.client import KmsError, SyncKmsProvider
from progressdb_kms.domain.errors import AuthenticationFailed

PLAIN: Final = ""
"""Stands for a key id where a message is not encrypted."""
NO_KEY: Final = "?"
"""Stands for the key id of what is not an envelope: no thread has it."""
UNBOUND: Final = 0
"""AAD version of messages that came from a service that bound nothing: their AAD is empty."""
BOUND: Final = 1
"""AAD version of all that this server encrypts."""
HEAD: Final = struct.Struct(">BBB")


class Envelope(NamedTuple):
    """A stored message: the bytes 1, AAD version, length of the key id; key id; ciphertext or text."""

    key_id: str
    aad_version: int
    body: bytes

    def encode(self) -> bytes:
        """Return the stored form."""
        return HEAD.pack(1, self.aad_version, len(self.key_id)) + self.key_id.encode("ascii") + self.body

    @classmethod
    def decode(cls, stored: bytes) -> Envelope:
        """Read the stored form; anything else gives an envelope under NO_KEY."""
        try:
            form, aad_version, length = HEAD.unpack_from(stored)
            key_id = stored[HEAD.size : HEAD.size + length].decode("ascii")
        except (struct.error, UnicodeDecodeError):
            return cls(NO_KEY, BOUND, b"")
        if form != 1 or aad_version not in {UNBOUND, BOUND} or len(key_id) != length:
            return cls(NO_KEY, BOUND, b"")
        return cls(key_id, aad_version, stored[HEAD.size + length :])


def aad(version: int, thread_id: str, message_key: str) -> bytes:
    """Return what binds a ciphertext to its thread and its message.

    A length stands before each name, so that no other pair of names gives the same bytes.
    """
    if version == UNBOUND:
        return b""
    thread, message = thread_id.encode(), message_key.encode()
    return struct.pack(">BI", version, len(thread)) + thread + struct.pack(">I", len(message)) + message


def seal(kms: SyncKmsProvider | None, key_id: str, thread_id: str, message_key: str, text: bytes) -> bytes:
    """Return a message's stored form, encrypted unless the key is PLAIN; raises KmsError."""
    if key_id == PLAIN:
        return Envelope(PLAIN, UNBOUND, text).encode()
    sealed = _given(kms).encrypt_with_dek(key_id, text, aad(BOUND, thread_id, message_key))
    return Envelope(key_id, BOUND, sealed.ciphertext).encode()


def seal_many(
    kms: SyncKmsProvider | None, key_id: str, thread_id: str, messages: Sequence[tuple[str, bytes]]
) -> list[bytes]:
    """Return the stored forms of many messages (key and text) by one call; raises the first KmsError."""
    items = [(key_id, text, aad(BOUND, thread_id, key)) for key, text in messages]
    sealed = []
    for result in _given(kms).encrypt_many(items) if items else []:
        if isinstance(result, KmsError):
            raise result
        sealed.append(Envelope(key_id, BOUND, result.ciphertext).encode())
    return sealed


def open_many(
    kms: SyncKmsProvider | None, keys: set[str], thread_id: str, messages: Sequence[tuple[str, bytes]]
) -> list[bytes | KmsError]:
    """Return the texts of many stored messages by one call, or why one can't be read.

    Args:
        kms: The provider.
        keys: Those that messages may be under: one that names another is not even tried.
        thread_id: Their thread.
        messages: Key and stored form of each.

    Raises:
        KmsError: The KMS can't say now.
    """
    envelopes = [(key, Envelope.decode(stored)) for key, stored in messages]
    asked = [
        (each.key_id, each.body, aad(each.aad_version, thread_id, key))
        for key, each in envelopes
        if each.key_id in keys - {PLAIN}
    ]
    answers = iter(_given(kms).decrypt_many(asked) if asked else [])
    results: list[bytes | KmsError] = []
    for _, each in envelopes:
        if each.key_id not in keys:
            results.append(AuthenticationFailed("the message is not under a key of its thread"))
            continue
        result = each.body if each.key_id == PLAIN else next(answers)
        if isinstance(result, KmsError) and result.retryable:
            raise result
        results.append(result)
    return results


def _given(kms: SyncKmsProvider | None) -> SyncKmsProvider:
    # Callers have looked before; a slip there must not end in a plaintext.
    if kms is None:
        raise RuntimeError("encryption is off")
    return kms

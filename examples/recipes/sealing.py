"""How a text goes into a column: encrypted under its thread's key, and bound to its place.

The recipes share this. Encrypting and opening are calls over the network: make them before and after a
transaction, not in it, or its locks are held for as long. Both take many texts and cost one request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from progressdb_kms.client import KmsError, SyncKmsProvider

_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Sealed:
    """What a column holds in place of a text.

    Attributes:
        key_id: The key that it was encrypted under: a thread's key may be rotated, older texts keep theirs.
        ciphertext: As the service gave it.
    """

    key_id: str
    ciphertext: bytes = field(repr=False)


def pack(sealed: Sealed) -> bytes:
    """Return the bytes to store.

    Raises:
        TypeError: Anything but a ``Sealed``: a text given by mistake must not be stored in the clear.
    """
    if not isinstance(sealed, Sealed):
        raise TypeError("an encrypted column takes what seal() has made, and no plain value")
    key_id = sealed.key_id.encode("ascii")
    return bytes([_VERSION, len(key_id)]) + key_id + sealed.ciphertext


def unpack(stored: bytes) -> Sealed:
    """Return what ``pack`` was given.

    Raises:
        ValueError: Bytes of another form.
    """
    if len(stored) < 2 or stored[0] != _VERSION or len(stored) < 2 + stored[1]:  # noqa: PLR2004 - the head
        raise ValueError("the column does not hold a sealed text")
    end = 2 + stored[1]
    return Sealed(stored[2:end].decode("ascii"), bytes(stored[end:]))


def place(column: str, thread_id: str, row: str) -> bytes:
    """Return the associated data that binds a text to its place; no two places have the same.

    Args:
        column: ``table.column``.
        thread_id: The thread that the row belongs to.
        row: The row's primary key, known before the row is stored: a UUID, not a number of the database's.
    """
    parts = [part.encode() for part in (column, thread_id, row)]
    return b"\x01" + b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def seal(
    kms: SyncKmsProvider, column: str, thread_id: str, key_id: str, texts: Sequence[tuple[str, str]]
) -> list[Sealed]:
    """Encrypt ``(row, text)`` each under a thread's key, in one request.

    Raises:
        KmsError: The first that failed; nothing is to be stored then.
    """
    items = [(key_id, text.encode(), place(column, thread_id, row)) for row, text in texts]
    sealed = []
    for result in kms.encrypt_many(items):
        if isinstance(result, KmsError):
            raise result
        sealed.append(Sealed(key_id, result.ciphertext))
    return sealed


def unseal(
    kms: SyncKmsProvider, column: str, rows: Sequence[tuple[str, str, Sealed]]
) -> list[str | KmsError]:
    """Decrypt ``(thread_id, row, sealed)`` each, in one request; a text or its error for each, in order.

    AuthenticationFailed says that a text was changed, or stored for another place.
    """
    items = [
        (sealed.key_id, sealed.ciphertext, place(column, thread_id, row)) for thread_id, row, sealed in rows
    ]
    return [result if isinstance(result, KmsError) else result.decode() for result in kms.decrypt_many(items)]

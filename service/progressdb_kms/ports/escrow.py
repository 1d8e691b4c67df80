"""Port of the escrow: KEK versions sealed to recovery public keys, kept in the store."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class SealedKek:
    """A KEK version as one recovery key can open it.

    Attributes:
        recipient: SHA-256 of the recovery public key (SubjectPublicKeyInfo, DER), in hex.
        sealed: HPKE's encapsulated key and ciphertext (RFC 9180).
    """

    recipient: str
    sealed: bytes = field(repr=False)


class EscrowBox(Protocol):
    """Keeps sealed KEKs. Raises StoreUnavailable and StoreNotDurable as ``KeyStore`` does."""

    async def save(self, version: int, sealed: Sequence[SealedKek]) -> None:
        """Keep what a KEK version is sealed to, in place of what was kept of it."""

    async def load(self) -> Mapping[int, Sequence[SealedKek]]:
        """Return what is kept, by KEK version.

        Raises:
            BackupInvalid: An entry can't be read.
        """

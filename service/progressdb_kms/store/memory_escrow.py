"""Sealed KEKs in this process's memory: the port ``EscrowBox``."""

from __future__ import annotations

from collections.abc import Sequence

from progressdb_kms.ports.escrow import SealedKek
from progressdb_kms.store.escrow_entries import decode_entry, encode_entry


class MemoryEscrowBox:
    """Implements ``EscrowBox``; entries are encoded as in Redis."""

    def __init__(self) -> None:
        self._entries: dict[int, str] = {}

    async def save(self, version: int, sealed: Sequence[SealedKek]) -> None:
        """Keep what a KEK version is sealed to."""
        self._entries[version] = encode_entry(sealed)

    async def load(self) -> dict[int, tuple[SealedKek, ...]]:
        """Return what is kept, by KEK version."""
        return {version: decode_entry(entry) for version, entry in self._entries.items()}

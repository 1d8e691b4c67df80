"""Sealed KEKs in Redis: the port ``EscrowBox``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from progressdb_kms.ports.escrow import SealedKek
from progressdb_kms.store.escrow_entries import decode_entry, encode_entry
from progressdb_kms.store.redis.router import Call, Router
from progressdb_kms.store.redis.schema import CONTROL

ESCROW_KEY: Final = "kms:{ctl}:escrow"


class RedisEscrowBox:
    """Implements ``EscrowBox``: a hash of KEK version to entry."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def save(self, version: int, sealed: Sequence[SealedKek]) -> None:
        """Keep what a KEK version is sealed to."""
        await self._router.write_one(Call(CONTROL, ("HSET", ESCROW_KEY, version, encode_entry(sealed))))

    async def load(self) -> dict[int, tuple[SealedKek, ...]]:
        """Return what is kept, by KEK version.

        Raises:
            BackupInvalid: An entry can't be read.
        """
        reply = await self._router.read_one(Call(CONTROL, ("HGETALL", ESCROW_KEY)))
        return {
            int(version): decode_entry(entry) for version, entry in zip(reply[::2], reply[1::2], strict=True)
        }

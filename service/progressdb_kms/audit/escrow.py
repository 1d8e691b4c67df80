"""The escrow, with each reading and sealing of KEKs written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from progressdb_kms.domain.errors import KmsError
from progressdb_kms.ports import AuditEvent, AuditLog
from progressdb_kms.ports.escrow import EscrowBox, SealedKek


class AuditedEscrowBox:
    """Implements ``EscrowBox`` over another.

    Args:
        box: Where sealed KEKs are kept.
        audit: Where it is written down.
        identity: Who does it.
        reads: Write down reading too: it is the first step to raw KEKs.
    """

    def __init__(self, box: EscrowBox, audit: AuditLog, identity: str, *, reads: bool) -> None:
        self._box = box
        self._audit = audit
        self._identity = identity
        self._reads = reads

    async def save(self, version: int, sealed: Sequence[SealedKek]) -> None:
        """Keep what a KEK version is sealed to; raises AuditUnavailable besides."""
        names = ", ".join(item.recipient[:16] for item in sealed)
        detail = f"KEK version {version} to {names}"
        await self._tell("kek.escrow", "intent", detail)
        try:
            await self._box.save(version, sealed)
        except KmsError as error:
            await self._tell("kek.escrow", "failed", error.code)
            raise
        await self._tell("kek.escrow", "ok", detail)

    async def load(self) -> Mapping[int, Sequence[SealedKek]]:
        """Return what is kept; raises AuditUnavailable besides, where readings are written down."""
        if not self._reads:
            return await self._box.load()
        await self._tell("kek.escrow-read", "intent", "")
        kept = await self._box.load()
        await self._tell("kek.escrow-read", "ok", "KEK versions " + ", ".join(map(str, sorted(kept))))
        return kept

    async def _tell(self, action: str, outcome: str, detail: str) -> None:
        await self._audit.record([AuditEvent(action, outcome, self._identity, "", detail=detail)])

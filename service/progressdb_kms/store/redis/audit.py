"""Audit chains in Redis: the port ``AuditStore``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.ports.audit import Anchor, AuditBatch, Committed, Trim
from progressdb_kms.store.auditids import check_id
from progressdb_kms.store.redis import scripts
from progressdb_kms.store.redis.link import Argument
from progressdb_kms.store.redis.router import Call, Router, script_call
from progressdb_kms.store.redis.schema import (
    AUDIT_FLOORS_KEY,
    AUDIT_HEADS_KEY,
    AUDIT_KEY,
    AUDIT_ROSTER_KEY,
    CONTROL,
)

_RECORDS_A_CALL: Final = 10
"""Records that take the server as long as one plain command, roughly."""


class RedisAudit:
    """Implements ``AuditStore``: a stream of records, hashes of heads and floors, and the roster."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def commit(self, batch: AuditBatch) -> Committed:
        """Keep records and move the chain's head."""
        before, after = batch.roster or (b"", b"")
        seq, mac = batch.confirmed
        arguments: list[Argument] = [
            batch.chain,
            batch.head,
            int(batch.stream),
            int(batch.roster is not None),
            before,
            after,
            seq,
            mac,
        ]
        for record in batch.records:
            arguments += [record.seq, record.mac, record.line if batch.stream else b""]
        keys = (AUDIT_HEADS_KEY, AUDIT_KEY, AUDIT_ROSTER_KEY)
        weight = 1 + len(batch.records) // _RECORDS_A_CALL
        reply = await self._router.write_one(
            script_call(CONTROL, scripts.AUDIT_COMMIT, keys, *arguments, weight=weight)
        )
        return Committed(reply.decode())

    async def anchor(self) -> Anchor:
        """Return heads, floors and roster as they are at one moment."""
        keys = (AUDIT_HEADS_KEY, AUDIT_KEY, AUDIT_ROSTER_KEY, AUDIT_FLOORS_KEY)
        roster, heads, floors, length, last_id = await self._router.read_one(
            script_call(CONTROL, scripts.AUDIT_ANCHOR, keys)
        )
        return Anchor(roster, _pairs(heads), _pairs(floors), length, last_id.decode())

    async def page(self, after: str, limit: int) -> list[tuple[str, bytes]]:
        """Return up to ``limit`` records after an id, each with its id.

        Raises:
            InvalidParameter: ``after`` is no id.
        """
        check_id(after)
        return _entries(
            await self._router.read_one(
                Call(CONTROL, ("XRANGE", AUDIT_KEY, f"({after}", "+", "COUNT", limit))
            )
        )

    async def tail(self, before: str | None, limit: int) -> list[tuple[str, bytes]]:
        """Return up to ``limit`` records before an id, the latest first, each with its id.

        Raises:
            InvalidParameter: ``before`` is no id.
        """
        end = "+"
        if before is not None:
            if check_id(before) == (0, 0):
                return []  # which Redis takes for no interval at all
            end = f"({before}"
        return _entries(
            await self._router.read_one(Call(CONTROL, ("XREVRANGE", AUDIT_KEY, end, "-", "COUNT", limit)))
        )

    async def trim(self, trim: Trim) -> bool:
        """Trim; False where the roster is another by now."""
        before, after = trim.roster
        arguments: list[Argument] = [before, after, trim.first_kept, len(trim.floors)]
        for chain, floor in trim.floors.items():
            arguments += [chain, floor]
        keys = (AUDIT_HEADS_KEY, AUDIT_KEY, AUDIT_ROSTER_KEY, AUDIT_FLOORS_KEY)
        reply = await self._router.write_one(
            script_call(CONTROL, scripts.AUDIT_TRIM, keys, *arguments, *trim.dropped)
        )
        return bool(reply == b"ok")


def _entries(reply: Sequence[tuple[bytes, Sequence[bytes]]]) -> list[tuple[str, bytes]]:
    try:
        return [(entry_id.decode(), bytes(members[1])) for entry_id, members in reply]
    except (IndexError, TypeError):
        raise StoreUnavailable("an entry of the audit stream is not the service's") from None


def _pairs(reply: Sequence[bytes]) -> dict[str, bytes]:
    return {chain.decode(errors="replace"): text for chain, text in zip(reply[::2], reply[1::2], strict=True)}

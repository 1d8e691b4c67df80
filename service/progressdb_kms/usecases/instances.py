"""Which instances run, and what they have loaded: for those who may see what a rotation waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.policy import Permission

if TYPE_CHECKING:
    from progressdb_kms.ports import Heartbeat, Heartbeats
    from progressdb_kms.usecases.session import Session

SILENT_AFTER: Final = 15.0
"""Seconds without a heartbeat, which comes every two, after which an instance is taken for gone."""


async def list_instances(heartbeats: Heartbeats, session: Session, limit: int) -> tuple[list[Heartbeat], int]:
    """Return the last heartbeats, the latest first, and how many instances are known in all.

    Args:
        heartbeats: Where they are.
        session: Who asks.
        limit: How many to return.

    Raises:
        PermissionDenied: The caller has neither ``rotation:run`` nor ``key:read`` for all threads.
        StoreUnavailable: Not now.
    """
    grants = session.grants()
    if not grants.allows(Permission.ROTATE):
        grants.require(Permission.READ)
    known = await heartbeats.live()
    return sorted(known, key=lambda beat: (-beat.at, beat.instance))[:limit], len(known)

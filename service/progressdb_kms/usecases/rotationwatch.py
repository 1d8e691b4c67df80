"""What is known of rotations: for those who may ask, and for the metrics of every instance.

A CronJob's own endpoint is never scraped, so that each instance of the service reads from the store what
the job has written there.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

import structlog

from progressdb_kms.domain.errors import KmsError, RotationNotFound
from progressdb_kms.domain.policy import Permission
from progressdb_kms.domain.rotation import Outcome, Rotation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from progressdb_kms.ports import KeyStore, RotationLedger
    from progressdb_kms.usecases.keks import KekBook
    from progressdb_kms.usecases.session import Session

log = structlog.get_logger(__name__)

WATCH_EVERY: Final = 10.0
_LOOK_BACK: Final = 50
"""Rotations among which the last success is looked for."""


async def list_rotations(ledger: RotationLedger, session: Session, limit: int) -> list[Rotation]:
    """Return the latest rotations, newest first.

    Raises:
        PermissionDenied: The caller has neither ``rotation:run`` nor ``key:read`` for all threads.
        StoreUnavailable: Not now.
    """
    _require(session)
    return await ledger.list_rotations(limit)


async def get_rotation(ledger: RotationLedger, session: Session, rotation_id: str) -> Rotation:
    """Return a rotation.

    Raises:
        PermissionDenied: As ``list_rotations``.
        RotationNotFound: There is none of this name.
        StoreUnavailable: Not now.
    """
    _require(session)
    rotation = await ledger.get(rotation_id)
    if rotation is None:
        raise RotationNotFound
    return rotation


def _require(session: Session) -> None:
    grants = session.grants()
    if not grants.allows(Permission.ROTATE):
        grants.require(Permission.READ)


class RotationWatch:
    """Keeps what the metrics say of KEKs and rotations.

    Args:
        keks: Knows the active version.
        store: Counts keys by version.
        ledger: Knows the rotations.
        now: Gives Unix seconds.

    Attributes:
        seen_at: When it has last looked, in Unix seconds; None before the first time.
    """

    def __init__(
        self,
        keks: KekBook,
        store: KeyStore,
        ledger: RotationLedger,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._keks = keks
        self._store = store
        self._ledger = ledger
        self._now = now
        self._census: Mapping[int, int] = {}
        self._latest: Rotation | None = None
        self._success: int | None = None
        self.seen_at: float | None = None

    @property
    def census(self) -> Mapping[int, int]:
        """Live wrapped DEKs by KEK version, as of ``seen_at``."""
        return self._census

    async def run(self) -> None:
        """Look every few seconds, until cancelled."""
        while True:
            try:
                await self.look()
            except KmsError as error:
                # What was seen last stays; that the store is away is told by others.
                log.debug("rotation_watch_failed", detail=error.detail)
            await asyncio.sleep(WATCH_EVERY)

    async def look(self) -> None:
        """Read once.

        Raises:
            StoreUnavailable: Not now.
        """
        self._census = await self._store.census()
        rotations = await self._ledger.list_rotations(_LOOK_BACK)
        self._latest = rotations[0] if rotations else None
        self._success = max(
            (one.finished_at for one in rotations if one.outcome == Outcome.CLEAN and one.finished_at),
            default=None,
        )
        self.seen_at = self._now()

    def facts(self, now: float) -> dict[str, float | Mapping[str, float]]:
        """Return the metrics by name; empty before the first look.

        Args:
            now: Unix seconds.
        """
        if self.seen_at is None:
            return {}
        view = self._keks.view
        active = view.keks[view.active]
        census = {str(version): 0.0 for version in view.keks}
        census |= {str(version): float(count) for version, count in self._census.items()}
        facts: dict[str, float | Mapping[str, float]] = {
            "kms_kek_active_version": float(view.active),
            "kms_kek_active_age_seconds": now - (active.activated_at or active.created_at),
            "kms_kek_census": census,
            "kms_rotation_running": 0.0,
            "kms_rotation_quarantined": 0.0,
        }
        if (latest := self._latest) is not None:
            facts["kms_rotation_running"] = float(latest.finished_at is None)
            facts["kms_rotation_step"] = {str(latest.step): 1.0}
            facts["kms_rotation_progress"] = {name: float(count) for name, count in latest.counts.items()}
            facts["kms_rotation_quarantined"] = float(latest.counts.get("quarantined", 0))
        if self._success is not None:
            facts["kms_rotation_last_success_timestamp_seconds"] = float(self._success)
        return facts

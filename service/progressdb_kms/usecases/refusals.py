"""Refusals on their way to the audit log: counted, so that nobody without a grant can fill it.

Noting one is cheap and never fails: the hot functions do it for each item of a batch. Each second what has
been noted is written as one record per caller, permission and route.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from progressdb_kms.ports import AuditEvent

if TYPE_CHECKING:
    from progressdb_kms.domain.errors import PermissionDenied
    from progressdb_kms.ports import AuditLog

_MOST: Final = 1000
"""Different refusals kept between two writes; a caller can vary none of the parts freely."""


class RefusalLog:
    """Gathers refusals and writes them.

    Args:
        audit: Where they go.
    """

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit
        self._noted: dict[tuple[str, str, str], tuple[int, str]] = {}

    def note(self, error: PermissionDenied, route: str, request_id: str = "") -> None:
        """Note a refusal; ``request_id`` is kept of the first of its kind."""
        key = (error.identity, error.permission, route)
        known = self._noted.get(key)
        if known is not None:
            self._noted[key] = (known[0] + 1, known[1] or request_id)
        elif len(self._noted) < _MOST:
            self._noted[key] = (1, request_id)

    async def write(self) -> None:
        """Write what has been noted since the last time."""
        noted, self._noted = self._noted, {}
        events = []
        for (identity, permission, route), (count, request_id) in noted.items():
            detail = f"{permission} {route} count={count}"
            events.append(AuditEvent("refused", "refused", identity, request_id, detail=detail))
        await self._audit.record(events)

"""Refusals on their way to the audit log: counted and rate-limited, so that no stranger can fill it.

Noting one is cheap and never fails: the hot functions do it for each item of a batch. The first of a kind
(caller, permission and route) is written within a second; from then on its kind is counted and written less
and less often, at last once an hour, until it has been quiet for as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from progressdb_kms.ports import AuditEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from progressdb_kms.domain.errors import PermissionDenied
    from progressdb_kms.ports import AuditLog

_MOST: Final = 1000
"""Different refusals kept; a caller can vary none of the parts freely. Those beyond are counted together."""
_LONGEST: Final = 3600.0


@dataclass(slots=True)
class _Kind:
    """Refusals of one kind.

    Attributes:
        count: Since the last record of it.
        request_id: Of the first of these.
        quiet_until: When the next record of it may be written.
        pause: Seconds between its last record and the next.
    """

    count: int
    request_id: str
    quiet_until: float
    pause: float


class RefusalLog:
    """Gathers refusals and writes them.

    Args:
        audit: Where they go.
        clock: Gives seconds that never jump.
    """

    def __init__(self, audit: AuditLog, clock: Callable[[], float]) -> None:
        self._audit = audit
        self._clock = clock
        self._kinds: dict[tuple[str, str, str], _Kind] = {}
        self._others = 0

    def note(self, error: PermissionDenied, route: str, request_id: str = "") -> None:
        """Note a refusal; ``request_id`` is kept of the first of its kind."""
        key = (error.identity, error.permission, route)
        kind = self._kinds.get(key)
        if kind is not None:
            kind.count += 1
            kind.request_id = kind.request_id or request_id
        elif len(self._kinds) < _MOST:
            self._kinds[key] = _Kind(1, request_id, float("-inf"), 0.5)
        else:
            self._others += 1

    async def write(self, *, all_of_it: bool = False) -> None:
        """Write what has been noted since the last time, as far as it may be written already.

        Args:
            all_of_it: Write the rest too: the process ends.
        """
        now = self._clock()
        events = []
        for key, kind in list(self._kinds.items()):
            identity, permission, route = key
            if kind.count and (all_of_it or now >= kind.quiet_until):
                detail = f"{permission} {route} count={kind.count}"
                events.append(AuditEvent("refused", "refused", identity, kind.request_id, detail=detail))
                pause = min(2 * kind.pause, _LONGEST)
                self._kinds[key] = _Kind(0, "", now + pause, pause)
            elif not kind.count and now >= kind.quiet_until + kind.pause:
                del self._kinds[key]
        if self._others:
            others, self._others = self._others, 0
            events.append(AuditEvent("refused", "refused", "others", "", detail=f"count={others}"))
        await self._audit.record(events)

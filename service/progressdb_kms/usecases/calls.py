"""Encryptions and decryptions on their way to the audit log: not at all, counted per caller, or each.

Noting is cheap, never waits and never fails: what is cached goes on while the audit log can't be written.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final, Literal

from progressdb_kms.ports import AuditEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from progressdb_kms.ports import AuditLog

Mode = Literal["off", "counted", "each"]
_MOST_EACH: Final = 10_000
"""Single calls kept between two writes; those beyond are counted."""
_MOST_COUNTED: Final = 10_000
"""Different callers counted between two writes; those beyond are counted together."""


class CallLog:
    """Gathers calls and writes them.

    Args:
        audit: Where they go.
        mode: What is kept of them.
        interval: Seconds for which calls are counted.
        clock: Gives seconds that never jump.
    """

    def __init__(self, audit: AuditLog, mode: Mode, interval: float, clock: Callable[[], float]) -> None:
        self._audit = audit
        self._each = mode == "each"
        self._interval = interval
        self._clock = clock
        self._events: list[AuditEvent] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._written_at = clock()
        self.wanted = mode != "off"

    def note(self, operation: str, identity: str, keys: Sequence[tuple[str, str]]) -> None:
        """Note messages encrypted or decrypted; ask ``wanted`` before, to save the work.

        Args:
            operation: ``encrypt`` or ``decrypt``.
            identity: The caller.
            keys: Key id and thread of each message.
        """
        action = f"key.{operation}"
        if self._each:
            room = _MOST_EACH - len(self._events)
            self._events += [
                AuditEvent(action, "ok", identity, "", key_id, thread_id) for key_id, thread_id in keys[:room]
            ]
            keys = keys[max(room, 0) :]
        if keys:
            caller = (action, identity)
            if caller not in self._counts and len(self._counts) >= _MOST_COUNTED:
                caller = (action, "others")
            self._counts[caller] += len(keys)

    async def write(self, *, all_of_it: bool = False) -> None:
        """Write what has been noted, counts once an interval.

        Args:
            all_of_it: Write counts too: the process ends.
        """
        events, self._events = self._events, []
        now = self._clock()
        if self._counts and (all_of_it or now - self._written_at >= self._interval):
            counts, self._counts = self._counts, Counter()
            seconds = round(now - self._written_at)
            events += [
                AuditEvent(action, "ok", identity, "", detail=f"count={count} seconds={seconds}")
                for (action, identity), count in counts.items()
            ]
        if not self._counts:
            self._written_at = now
        await self._audit.record(events)

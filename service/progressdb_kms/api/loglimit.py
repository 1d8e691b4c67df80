"""Log lines about failed requests, of which a caller or an outage could make tens of thousands a second."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

PAUSE: Final = 1.0
"""Seconds between two lines of one kind."""
_MOST: Final = 1000
"""Kinds that are told apart; a flood of different ones shares what is beyond."""


class LogLimit:
    """Lets one line of each kind through a second, and counts the others.

    Args:
        clock: Gives seconds that never go back.
    """

    __slots__ = ("_clock", "_kinds")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kinds: dict[Hashable, tuple[float, int]] = {}

    def allow(self, kind: Hashable) -> int | None:
        """Say whether a line may be written.

        Returns:
            How many of its kind were left out since the last one; None if this one is to be left out.
        """
        now = self._clock()
        if kind not in self._kinds and len(self._kinds) >= _MOST:
            self._kinds = {kept: state for kept, state in self._kinds.items() if now - state[0] < PAUSE}
            if len(self._kinds) >= _MOST:
                kind = None
        written, left_out = self._kinds.get(kind, (float("-inf"), 0))
        if now - written < PAUSE:
            self._kinds[kind] = (written, left_out + 1)
            return None
        self._kinds[kind] = (now, 0)
        return left_out

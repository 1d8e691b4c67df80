"""Whose turn it is: shares what a pass of the event loop has left among the connections that want more of it.

A connection gets one request answered as soon as it comes. What it sent besides, in the same piece, waits
here with what others sent besides: each is served one request at a time, round and round, and after a while
the loop looks at everybody's sockets again. So however many connections ask for however much at once, whoever
asks for one thing waits for one such while, and no connection for ever.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

WHILE: Final = 0.0005
"""Seconds of a pass of the event loop: some 20 requests, and a quarter of a request's time on the way."""


class Turns:
    """The connections that wait for their turn.

    Args:
        clock: Gives seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._waiting: deque[Callable[[], None]] = deque()
        self._due = False

    def wait(self, turn: Callable[[], None]) -> None:
        """Call a function once, in a later pass of the running event loop, in the order of asking."""
        self._waiting.append(turn)
        self._call()

    def _call(self) -> None:
        if self._waiting and not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        end = self._clock() + WHILE
        try:
            while self._waiting:
                self._waiting.popleft()()
                if self._clock() >= end:
                    break
        finally:
            # One that fails costs the others nothing.
            self._due = False
            self._call()

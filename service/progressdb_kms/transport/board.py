"""What the workers of one service know of each other: numbers, and what each last said of itself.

It lies in memory that the supervisor maps before it forks, which nobody else can reach. A worker writes to
its own place alone and reads the others', without a lock and without waiting: whoever answers a probe need
not ask anybody, and a worker that hangs holds nobody up. A number is an aligned 64-bit word, written whole.

A service of one process has a board with one place.
"""

from __future__ import annotations

import mmap
import time
from enum import IntEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_SAID: Final = 2**20
"""Bytes that a worker can say of itself."""
AHEAD_WAITS: Final = 0.02
"""Seconds that a connection is left to workers with fewer: one that is idle takes it at once."""
STARTING_WAITS: Final = 0.05
FRESH: Final = 2.0
"""Seconds without a sign of life after which connections are not left to a worker any more."""
_WORD: Final = 8
_LOOKS: Final = 100
_LENGTH_BITS: Final = MOST_SAID.bit_length()


class Stage(IntEnum):
    """What a worker is doing."""

    DOWN = 0
    STARTING = 1
    SERVING = 2
    LEAVING = 3


SILENCE: Final = {Stage.DOWN: float("inf"), Stage.STARTING: 60.0, Stage.SERVING: 10.0, Stage.LEAVING: 10.0}
"""Seconds without a sign of life after which a worker counts as hung. A start waits for files and tokens."""


class _Field(IntEnum):
    """Words of a place."""

    PID = 0
    STAGE = 1
    ALIVE_AT = 2
    ACCEPTED = 3
    OPEN = 4
    SERVED = 5
    SAID = 6


class _Head(IntEnum):
    """Words before the places."""

    DRAINING = 0
    RESTARTS = 1
    CHANGES = 2


class Board:
    """The places of all workers, and one more for what those that ended have counted.

    Args:
        workers: How many.
        clock: Gives seconds; the same clock in all processes.
    """

    def __init__(self, workers: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.workers = workers
        self.clock = clock
        words = len(_Head) + (workers + 1) * len(_Field)
        self._numbers = memoryview(mmap.mmap(-1, words * _WORD)).cast("q")
        # Two halves for each place, of which one is valid: a worker may be killed while it writes the other.
        # Pages that nobody has written to take no memory.
        self._texts = mmap.mmap(-1, (workers + 1) * 2 * MOST_SAID)

    @property
    def draining(self) -> bool:
        """Whether the service ends."""
        return bool(self._numbers[_Head.DRAINING])

    @property
    def restarts(self) -> int:
        """Workers that were started again."""
        return self._numbers[_Head.RESTARTS]

    @property
    def places(self) -> list[Place]:
        """The place of each worker."""
        return [Place(self, number) for number in range(self.workers)]

    @property
    def ended(self) -> Place:
        """Where it stands what workers that ended have counted."""
        return Place(self, self.workers)

    def drain(self) -> None:
        """Note that the service ends."""
        self._numbers[_Head.DRAINING] = 1

    def restarted(self) -> None:
        """Count a worker that is started again."""
        self._numbers[_Head.RESTARTS] += 1

    def said(self) -> list[bytes]:
        """Return what stands in each place, that of ended workers last, before or after any ``move``."""
        found: list[bytes] = []
        # The supervisor moves a few bytes, once in a worker's life. One that was killed meanwhile never ends.
        for _ in range(_LOOKS):
            before = self._numbers[_Head.CHANGES]
            found = [place.said() for place in (*self.places, self.ended)]
            if before % 2 == 0 and before == self._numbers[_Head.CHANGES]:
                break
        return found

    def move(self, place: Place, sums: bytes) -> None:
        """Empty the place of a worker that ended, and put down ``sums`` as what ended workers have counted.

        For the supervisor alone. A reader sees both or neither, or a counter would go back and forth.
        """
        self._numbers[_Head.CHANGES] += 1
        try:
            self.ended.say(sums)
            place.clear()
        finally:
            self._numbers[_Head.CHANGES] += 1

    def get(self, place: int, field: int) -> int:
        """Return a number of a place."""
        return self._numbers[len(_Head) + place * len(_Field) + field]

    def set(self, place: int, field: int, value: int) -> None:
        """Write a number of a place."""
        self._numbers[len(_Head) + place * len(_Field) + field] = value

    def read(self, offset: int, length: int) -> bytes:
        """Return text."""
        return self._texts[offset : offset + length]

    def write(self, offset: int, text: bytes) -> None:
        """Write text."""
        self._texts[offset : offset + len(text)] = text


class Place:
    """One worker's part of the board.

    Args:
        board: The board.
        number: Of the worker, from 0.
    """

    __slots__ = ("board", "number")

    def __init__(self, board: Board, number: int) -> None:
        self.board = board
        self.number = number

    @property
    def stage(self) -> Stage:
        """What the worker is doing."""
        return Stage(self.board.get(self.number, _Field.STAGE))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.board.get(self.number, _Field.PID)

    @property
    def accepted(self) -> int:
        """API connections that it has accepted, those in their handshake too."""
        return self.board.get(self.number, _Field.ACCEPTED)

    @accepted.setter
    def accepted(self, count: int) -> None:
        self.board.set(self.number, _Field.ACCEPTED, count)

    @property
    def connections(self) -> int:
        """API connections that are established."""
        return self.board.get(self.number, _Field.OPEN)

    @connections.setter
    def connections(self, count: int) -> None:
        self.board.set(self.number, _Field.OPEN, count)

    @property
    def has_served(self) -> bool:
        """Whether a worker in this place has ever got so far as to serve."""
        return bool(self.board.get(self.number, _Field.SERVED))

    @property
    def silence(self) -> float:
        """Seconds since the last sign of life."""
        return self.board.clock() - self.board.get(self.number, _Field.ALIVE_AT) / 1e9

    @property
    def hung(self) -> bool:
        """Whether the worker should have given a sign of life."""
        return self.silence > SILENCE[self.stage]

    @property
    def others(self) -> list[Place]:
        """The places of the other workers."""
        return [place for place in self.board.places if place.number != self.number]

    @property
    def leaves_alone(self) -> bool:
        """Whether other workers go on when this one ends."""
        return not self.board.draining and any(place.stage is Stage.SERVING for place in self.others)

    def begin(self, pid: int) -> None:
        """Note a worker that begins."""
        self.board.set(self.number, _Field.PID, pid)
        self.alive()
        self.enter(Stage.STARTING)

    def enter(self, stage: Stage) -> None:
        """Note what the worker is doing now."""
        self.board.set(self.number, _Field.STAGE, stage)
        if stage is Stage.SERVING:
            self.board.set(self.number, _Field.SERVED, 1)

    def alive(self) -> None:
        """Give a sign of life."""
        self.board.set(self.number, _Field.ALIVE_AT, int(self.board.clock() * 1e9))

    def clear(self) -> None:
        """Note that the worker is gone, and so are its connections and what it said."""
        for field in _Field:
            if field is not _Field.SERVED:
                self.board.set(self.number, field, 0)

    def say(self, text: bytes) -> None:
        """Put down what the worker says of itself.

        Raises:
            ValueError: It is over ``MOST_SAID`` bytes; what was said before stands.
        """
        if len(text) > MOST_SAID:
            raise ValueError(f"{len(text)} bytes are more than a worker can say of itself")
        count = (self.board.get(self.number, _Field.SAID) >> _LENGTH_BITS) + 1
        self.board.write(self._half(count), text)
        self.board.set(self.number, _Field.SAID, count << _LENGTH_BITS | len(text))

    def said(self) -> bytes:
        """Return what the worker said last, nothing where it has not."""
        text = b""
        for _ in range(_LOOKS):
            word = self.board.get(self.number, _Field.SAID)
            text = self.board.read(self._half(word >> _LENGTH_BITS), word & (1 << _LENGTH_BITS) - 1)
            # Else it has said something in between, and may be writing over what was read.
            if word == self.board.get(self.number, _Field.SAID):
                break
        return text

    def full(self, limit: int) -> bool:
        """Say whether all workers together have as many connections as ``limit``."""
        return sum(place.connections for place in self.board.places) >= limit

    def hold_back(self, *, waited: bool) -> float:
        """Return for how many seconds to leave a connection that waits to the other workers.

        Whoever has more connections than another lets that one go first, so that few connections that stay
        long are spread evenly. But only for a moment: the others may be busy.

        Args:
            waited: Whether that moment is over.
        """
        others = [place for place in self.others if place.stage is Stage.SERVING and place.silence < FRESH]
        if not others:
            return 0.0
        if self.stage is Stage.STARTING:
            return STARTING_WAITS
        if not waited and self.accepted > min(place.accepted for place in others):
            return AHEAD_WAITS
        return 0.0

    def _half(self, count: int) -> int:
        return (2 * self.number + count % 2) * MOST_SAID

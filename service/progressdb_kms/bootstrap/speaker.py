"""What the admin port says where there are several workers: whoever is asked answers for all."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from progressdb_kms.observability.merging import Family, exposition, families_of, merge, sums_of
from progressdb_kms.transport.board import Stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from progressdb_kms.observability.metrics import Metrics
    from progressdb_kms.transport.board import Place

log = structlog.get_logger(__name__)

SAY_EVERY: Final = 1.0
"""Seconds: so old may be what is said of another worker. Its stage, and whether it hangs, are of now."""


class Said(msgspec.Struct, frozen=True, array_like=True):
    """What a worker says of itself. The metrics stay encoded until somebody asks for them."""

    unready: list[str]
    metrics: msgspec.Raw


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Said).decode
_decode_metrics = msgspec.msgpack.Decoder(list[Family]).decode


class Speaker:
    """Speaks for all workers of a service.

    Args:
        place: This worker's on the board.
        metrics: Its metrics.
        unready: Says why this worker is not ready.
    """

    def __init__(self, place: Place, metrics: Metrics, unready: Callable[[], list[str]]) -> None:
        self._place = place
        self._board = place.board
        self._metrics = metrics
        self._unready = unready

    async def run(self) -> None:
        """Say of this worker what there is to say, again and again, until cancelled."""
        while True:
            self.say()
            await asyncio.sleep(SAY_EVERY)

    def dead(self) -> list[str]:
        """Return which workers hang, one line each."""
        return [
            f"worker {place.number} (process {place.pid}) hangs: no sign of life for {place.silence:.0f} s"
            for place in self._board.places
            if place.hung
        ]

    def unready(self) -> list[str]:
        """Return why the service is not ready, one line each, each once.

        Workers that serve speak for it. Those that are starting again, or were told to end by themselves,
        take no connections, so they are asked only where no worker serves.
        """
        if self._board.draining:
            return ["draining"]
        said = self._board.said()
        places = self._board.places
        asked = [place for place in places if place.stage is Stage.SERVING]
        reasons = [] if asked else ["no worker serves yet"]
        for place in asked or [place for place in places if place.stage is not Stage.DOWN]:
            if place.number == self._place.number:
                reasons += self._unready()
            elif place.hung:
                reasons.append(f"worker {place.number} hangs")
            elif said[place.number]:
                reasons += _decode(said[place.number]).unready
        return list(dict.fromkeys(reasons))

    def metrics(self) -> bytes:
        """Return the exposition of all workers together."""
        self.say()
        parts: list[list[Family]] = []
        for place, text in zip((*self._board.places, None), self._board.said(), strict=True):
            # Of one that hangs or has ended only what it has counted is still true.
            alive = place is not None and place.stage is not Stage.DOWN and not place.hung
            families = _families(text)
            parts.append(families if alive else sums_of([families]))
        return exposition(merge(parts))

    def say(self) -> None:
        """Put down what is to be said of this worker now."""
        families = msgspec.Raw(_encode(families_of(self._metrics.registry)))
        try:
            self._place.say(_encode(Said(self._unready(), families)))
        except ValueError as error:
            log.error("worker_says_too_much", detail=str(error))  # noqa: TRY400 - no traceback's worth


def lay_down(place: Place) -> None:
    """Keep what a worker that has ended has counted, and empty its place."""
    board = place.board
    kept = board.ended.said()
    try:
        sums = sums_of([_families(kept), _families(place.said())])
        board.move(place, _encode(Said([], msgspec.Raw(_encode(sums)))))
    except (ValueError, KeyError) as error:
        # Whatever a worker left behind must not end the supervisor, and the others with it.
        log.error("worker_counts_lost", worker=place.number, why=type(error).__name__)  # noqa: TRY400 - likewise
        board.move(place, kept)


def _families(text: bytes) -> list[Family]:
    return _decode_metrics(_decode(text).metrics) if text else []

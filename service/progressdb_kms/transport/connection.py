"""One connection: what it proved, what it is doing, and until when it may go on doing so."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from enum import Enum, auto
from typing import Final

from progressdb_kms.domain.errors import RequestTimeout
from progressdb_kms.domain.identity import Identity
from progressdb_kms.settings import Limits
from progressdb_kms.transport.problem import raw_problem
from progressdb_kms.transport.trust import Chain

# In seconds, for a peer to take its leave when nothing of importance is under way to it.
CLOSE_GRACE = 2.0
READ_BUFFER = 2**16


class Phase(Enum):
    """What a connection is doing."""

    IDLE = auto()
    HEADERS = auto()
    BUSY = auto()
    CLOSING = auto()


# Up to Python 3.11 a look at a member of an Enum is a search that fails and a call of its metaclass: 0.1 us,
# and that six times a request.
_IDLE: Final = Phase.IDLE
_CLOSING: Final = Phase.CLOSING


class Connection:
    """The state of a connection, kept in the server's registry.

    A connection has one deadline at a time, which the server's sweep compares with the clock: no timer and
    no task per connection or request, and none that can be forgotten.

    Args:
        kind: tls, unix or admin.
        peer: The peer's address, for logs.
        identity: What the connection proved; None on the admin port.
        limits: Its time limits, in seconds.
        max_age: Seconds after which the next answer closes it.
        now: The event loop's clock.
    """

    def __init__(
        self,
        kind: str,
        peer: str,
        identity: Identity | None,
        *,
        limits: Limits,
        max_age: float,
        now: Callable[[], float],
    ) -> None:
        self.kind = kind
        self.peer = peer
        self.identity = identity
        self.phase = _IDLE
        self.why = "peer"
        self.unread = 0
        self._limits = limits
        self._now = now
        self.chain: Chain = ()
        self.opened_at = now()
        self._closes_at = self.opened_at + max_age
        self.deadline = self.opened_at + limits.idle_timeout
        self._writing = False
        self.late: Callable[[], None] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._stop_reading: Callable[[], None] | None = None

    def attach(self, transport: asyncio.WriteTransport, stop_reading: Callable[[], None]) -> None:
        """Give the connection its transport, and what ends the reading from it."""
        self._transport = transport
        self._stop_reading = stop_reading

    @property
    def last_answer(self) -> bool:
        """Whether the next answer is to say ``Connection: close``."""
        return self._now() >= self._closes_at

    def close_after_response(self) -> None:
        """Let the next answer be the last one on this connection."""
        self._closes_at = -math.inf

    def hurry(self) -> None:
        """Wait for a first request no longer than for a peer that only takes its leave."""
        self.deadline = min(self.deadline, self._now() + CLOSE_GRACE)

    def bytes_arrived(self, count: int) -> None:
        """Note input; the first byte of a request starts the time that its headers may take."""
        self.unread += count
        if self.phase is _IDLE:
            self.phase = Phase.HEADERS
            self.deadline = self._now() + self._limits.header_timeout

    def bytes_taken(self, count: int) -> None:
        """Note input that went on to the HTTP parser."""
        self.unread -= count

    def body_began(self, late: Callable[[], None]) -> None:
        """Note complete headers of a request whose body the connection itself waits for.

        Args:
            late: Answers it when body_timeout is over; to be set to None when the body is there.
        """
        self.late = late
        self.deadline = self._now() + self._limits.body_timeout

    def request_began(self) -> None:
        """Note complete headers. From here on the app keeps the time (body_timeout, request_timeout)."""
        if self.phase is not _CLOSING:
            self.phase = Phase.BUSY
            self.deadline = math.inf

    def request_done(self, *, buffered: bool) -> None:
        """Note the end of an answer; ``buffered``: the parser holds bytes of a next request."""
        if self.phase is _CLOSING:
            return
        if buffered or self.unread:
            self.phase = Phase.HEADERS
            self.deadline = self._now() + self._limits.header_timeout
        else:
            self.phase = _IDLE
            self.deadline = self._now() + self._limits.idle_timeout

    def write_began(self) -> None:
        """Note that the peer has to take what was written before anything else goes on."""
        if self.phase is not _CLOSING:
            self._writing = True
            self.deadline = self._now() + self._limits.write_timeout

    def write_done(self) -> None:
        """Note that the peer took it."""
        self._writing = False
        if self.phase is not _CLOSING:
            self.deadline = math.inf

    def finish(self, why: str, *, answered: bool = False) -> None:
        """Close. Only the first reason counts.

        Args:
            why: For ``connection_closed``.
            answered: An answer has just been written, and its end may still have to be sent: the peer gets
                write_timeout for it. Otherwise it gets a moment.
        """
        if self.phase is _CLOSING:
            return
        self.phase = _CLOSING
        self.why = why
        self.deadline = self._now() + (self._limits.write_timeout if answered else CLOSE_GRACE)
        if self._stop_reading is not None:
            self._stop_reading()

    def finish_if_idle(self, why: str) -> None:
        """Close if no byte of a request has come."""
        if self.phase is _IDLE:
            self.finish(why)

    def abort(self, why: str) -> None:
        """Cut the connection at once."""
        self.finish(why)
        self.deadline = math.inf
        if self._transport is not None:
            self._transport.abort()

    def expire(self) -> None:
        """Do what follows from a deadline that has passed."""
        if self._writing:
            self.abort("write")
        elif self.phase is _CLOSING:
            self.abort(self.why)
        elif self.late is not None:
            self.late()
        elif self.phase is Phase.HEADERS:
            # No answer is under way in this phase, so these bytes can't end up inside one.
            if self._transport is not None and not self._transport.is_closing():
                self._transport.write(
                    raw_problem(408, RequestTimeout("the request's headers did not arrive in time"))
                )
            self.finish("headers")
        else:
            self.finish("idle")


class ConnectionProtocol(asyncio.StreamReaderProtocol):
    """The event loop's end of a connection: sees each byte first, then hands it to the stream reader."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.reader = asyncio.StreamReader(limit=READ_BUFFER, loop=loop)
        super().__init__(self.reader, loop=loop)
        self._connection: Connection | None = None
        self._early = bytearray()
        self._door: Callable[[bytes], None] | None = None
        self._blocked = False

    @property
    def blocked(self) -> bool:
        """Whether the transport holds so much output that it asked for a pause."""
        return self._blocked

    def attach(self, connection: Connection, door: Callable[[bytes], None] | None = None) -> None:
        """Tell ``connection`` of input from now on, and of what came before it existed.

        Args:
            connection: The entry in the registry.
            door: Gets the input until ``hand_on`` is called.
        """
        self._connection = connection
        self._door = door
        early, self._early = bytes(self._early), bytearray()
        if early:
            self.data_received(early)

    def hand_on(self, data: bytes) -> None:
        """Give input that the door has taken to the stream reader, and what follows to it only."""
        self._door = None
        super().data_received(data)

    def data_received(self, data: bytes) -> None:
        """Take input from the event loop."""
        if self._door is not None:
            self._door(data)
        elif self._connection is None:
            # For a few turns of the event loop at most: until the certificate has been looked at.
            self._early += data
        else:
            self._connection.bytes_arrived(len(data))
            super().data_received(data)

    def pause_writing(self) -> None:
        """Note that the transport holds enough output."""
        self._blocked = True
        super().pause_writing()

    def resume_writing(self) -> None:
        """Note that the peer has taken it."""
        self._blocked = False
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the end of the connection: nothing more can be sent, whatever is still being worked on."""
        if self._connection is not None:
            self._connection.finish("peer")
        super().connection_lost(exc)

"""The fast door: answers ordinary requests for hot routes without a task, a framework or a second parser.

A connection begins at the door. Its input is looked at as it comes: a whole, wholly ordinary request
(``transport.ordinary``) for a route that the app has made ready is answered on the spot, or, where the
answer has to wait for the store, later: by a task of its own, or by one that many wait for. Anything else
goes on unchanged to Hypercorn, and so does all that ever follows on this connection: from then on its parser
alone knows where the next request begins.

What keeps it honest:

- It takes a strict subset of what the slow way takes, with the same handlers, checks, limits and errors.
- Order: while an answer is outstanding nothing that follows is looked at, only kept, up to a bound.
- Of several requests that came at once the first is answered at once; each further one waits for this
  connection's turn (``transport.turns``), so that nobody else waits for all of them.
- Of a long body a share is read, then others are, however fast it comes.
- A request in pieces is kept until it is whole, under the deadlines that the slow way has.
- A peer that does not read its answers is not read from either, and is cut at the write deadline.
- Drain, revocation, age, idle time and the count of connections see one connection, whoever answers.
"""

from __future__ import annotations

import logging
import time
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, cast

from progressdb_kms.transport.connection import READ_BUFFER, Connection, Phase
from progressdb_kms.transport.inbox import where
from progressdb_kms.transport.ordinary import HEAD_END, parse_head

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from progressdb_kms.settings import Limits
    from progressdb_kms.transport.doorapp import DoorApp, Later, Pending, RawAnswer, Ready

log = logging.getLogger(__name__)

# The same as one write of the slow way's.
PIECE: Final = 2**16
# Whoever sends so much at once has more to send, which a loop would read 32 times before it serves another.
SHARE: Final = 2**16
_CLOSING: Final = Phase.CLOSING  # see transport.connection
_CLOSE: Final = b"connection: close\r\n"
_END: Final = b"\r\n"
_LAST_END: Final = b"Connection: close\r\n\r\n"
_STATUS: Final = {status.value: b"HTTP/1.1 %d \r\n" % status for status in HTTPStatus}


class Door:
    """The fast door of one connection.

    Args:
        app: Knows the hot routes.
        session: What the connection proved, as the app made it.
        connection: Its entry in the registry.
        transport: Its output.
        limits: Sizes in bytes and times in seconds.
        hand_on: Gives input, already counted, to the slow way; after it the door is never asked again.
        start: Runs a coroutine function as a task of the connection.
        write: Writes the pieces of an answer and waits until the peer has taken them.
        blocked: Tells whether the transport asked for a pause in writing.
        soon: Calls a function once, after others had their turn.
    """

    __slots__ = (
        "_app",
        "_blocked",
        "_buffer",
        "_busy",
        "_connection",
        "_hand_on",
        "_head",
        "_last",
        "_length",
        "_limits",
        "_paused",
        "_pending",
        "_ready",
        "_session",
        "_soon",
        "_start",
        "_task",
        "_transport",
        "_turning",
        "_whole",
        "_write",
    )

    def __init__(  # noqa: PLR0913 - the parts of a connection, each named by the caller
        self,
        *,
        app: DoorApp,
        session: object,
        connection: Connection,
        transport: asyncio.Transport,
        limits: Limits,
        hand_on: Callable[[bytes], None],
        start: Callable[..., asyncio.Task[None]],
        write: Callable[[Iterable[bytes]], Awaitable[None]],
        blocked: Callable[[], bool],
        soon: Callable[[Callable[[], None]], object],
    ) -> None:
        self._app = app
        self._session = session
        self._connection = connection
        self._transport = transport
        self._limits = limits
        self._hand_on = hand_on
        self._start = start
        self._write = write
        self._blocked = blocked
        self._head = b""
        self._ready: Ready | None = None
        self._length = 0
        self._last = False
        self._buffer = bytearray()
        self._whole = 0  # bytes of the request that is being gathered, once its head is known
        self._busy = False
        self._turning = False
        self._paused = False
        self._pending: Pending | None = None
        self._task: asyncio.Task[None] | None = None
        self._soon = soon

    @property
    def turning(self) -> bool:
        """Whether whole requests may have been received that wait for this connection's turn."""
        return self._turning

    def close(self) -> None:
        """Give up the answer that is outstanding: nobody is there to take it."""
        if self._task is not None:
            self._task.cancel()
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.give_up()

    def received(self, data: bytes) -> None:
        """Take input."""
        if self._connection.phase is _CLOSING:
            # Read away only: whoever was told that the connection closes gets nothing done on it any more.
            self._hand_on(data)
            return
        if self._busy or self._buffer:
            self._gather(data)
            return
        end = data.find(HEAD_END) + 4
        if end > 3:  # noqa: PLR2004 - found
            ready = self._ready if data[:end] == self._head else self._make_ready(data[:end])
            if ready is not None and len(data) == end + self._length:
                self._answer(ready, data[end:])
                return
        self._gather(data)

    def _gather(self, data: bytes) -> None:
        """Keep what is no whole request, as far as it may still become one, or what has to wait."""
        self._connection.bytes_arrived(len(data))
        self._buffer += data
        if self._busy or self._turning:
            self._flow()
            return
        self._look()
        if len(data) >= SHARE and self._buffer:
            self._pause()
            self._wait()

    def _look(self) -> None:
        """Answer a request that has been kept whole; what comes after it waits for this connection's turn."""
        buffer, connection = self._buffer, self._connection
        if not self._whole:
            end = buffer.find(HEAD_END) + 4
            if end <= 3:  # noqa: PLR2004 - not found
                if len(buffer) > self._limits.header_bytes or not self._may_become_hot():
                    self._give_up()
                return
            head = bytes(buffer[:end])
            if head != self._head:
                self._make_ready(head)
            if self._ready is None:
                self._give_up()
                return
            self._whole = end + self._length
            if self._last and len(buffer) > self._whole:
                # More than what was to be the last: for the other parser to say what that means.
                self._whole = 0
                self._give_up()
                return
            connection.body_began(self._late)
        if len(buffer) >= self._whole and self._ready is not None:
            body = self._taken()
            self._answer(self._ready, body)
            if self._buffer and not self._busy and connection.phase is not _CLOSING:
                self._wait()

    def _taken(self) -> bytes:
        """Take the whole request out of the buffer; returns its body."""
        buffer, whole, begin = self._buffer, self._whole, len(self._head)
        self._whole = 0
        self._connection.late = None
        self._connection.bytes_taken(whole)
        if whole <= PIECE:
            body = bytes(buffer[begin:whole])
            del buffer[:whole]
            return body
        # Copying 16 MiB would take longer than anybody may hold the event loop; what is behind is short.
        self._buffer = buffer[whole:]
        del buffer[whole:]
        del buffer[:begin]
        return cast("bytes", buffer)

    def _wait(self) -> None:
        if not self._turning:
            self._turning = True
            self._soon(self._turn)

    def _turn(self) -> None:
        """Go on, now that the others had their turn. What is under way on the connection may have changed."""
        self._turning = False
        if self._buffer and not self._busy and self._connection.phase is not _CLOSING:
            self._look()
        self._flow()

    def _flow(self) -> None:
        """Hold the peer back while it has sent more than can be looked at, and no longer."""
        if (self._busy or self._turning) and len(self._buffer) > READ_BUFFER:
            self._pause()
        elif not self._transport.is_closing():
            self._resume()

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            self._transport.resume_reading()

    def _may_become_hot(self) -> bool:
        start = bytes(self._buffer[:96])
        return start.startswith(self._app.starts) or any(hot.startswith(start) for hot in self._app.starts)

    def _make_ready(self, data: bytes) -> Ready | None:
        self._head, self._ready = data, None
        if len(data) <= self._limits.header_bytes and data.startswith(self._app.starts):
            head = parse_head(data)
            if head is not None:
                ready = self._app.ready(head)
                if ready is not None and head.length <= ready.body_limit:
                    self._ready, self._length, self._last = ready, head.length, head.last
        return self._ready

    def _forget(self) -> None:
        self._buffer = bytearray()
        self._whole = 0
        self._connection.late = None
        self._resume()

    def _give_up(self) -> None:
        """Leave this connection to the slow way, with all that it has not answered."""
        data = bytes(self._buffer)
        self._forget()
        self._hand_on(data)

    def _late(self) -> None:
        """Answer a request whose body did not come in time."""
        ready = self._ready
        if ready is not None:
            self._forget()
            self._send(ready.late(self._session))

    def _answer(self, ready: Ready, body: bytes) -> None:
        answer = ready.answer(self._session, body)
        if isinstance(answer, tuple) and _is_short(answer):
            self._send(answer)
        else:
            self._busy = True
            self._connection.request_began()
            if isinstance(answer, tuple) or callable(answer):
                self._task = self._start(self._finish, answer)
            else:
                self._pending = answer
                answer.begin(self._told)

    def _told(self, make: Callable[[], RawAnswer]) -> None:
        """Make and send the answer that was pending."""
        self._pending = None
        try:
            answer = make()
            if not _is_short(answer):
                self._task = self._start(self._finish, answer)
            elif self._written(answer):
                if self._blocked():
                    self._task = self._start(self._flush)
                else:
                    self._go_on()
        except Exception as error:  # noqa: BLE001 - a bug must cost this connection only
            log.error("connection from %s failed: %s", self._connection.peer, where(error))  # noqa: TRY400 - see where
            self._connection.abort("error")

    def _send(self, answer: RawAnswer) -> None:
        """Send an answer that fits into one piece."""
        connection = self._connection
        if not self._written(answer):
            return
        if self._blocked():
            self._busy = True
            connection.request_began()
            self._task = self._start(self._flush)
        else:
            connection.request_done(buffered=bool(self._buffer))

    def _written(self, answer: RawAnswer) -> bool:
        """Write an answer that fits into one piece; returns whether the connection goes on."""
        connection, transport = self._connection, self._transport
        if connection.phase is _CLOSING or transport.is_closing():
            return False
        status, head, body, _ = answer
        close, close_line, last_line = self._ending(answer)
        transport.write(
            b"".join((_STATUS[status], head, close_line, _date(), last_line, body))  # type: ignore[arg-type]  # a short one
        )
        if close:
            connection.finish("done", answered=True)
        return not close

    def _ending(self, answer: RawAnswer) -> tuple[bool, bytes, bytes]:
        """Return whether the connection closes after an answer, and how its head says so, as Hypercorn would.

        That is among the app's fields where it is we who want it, and behind all of them where the peer does.
        """
        if answer[3] or self._connection.last_answer:
            return True, _CLOSE, _END
        return (True, b"", _LAST_END) if self._last else (False, b"", _END)

    async def _finish(self, answer: RawAnswer | Later) -> None:
        """Wait for an answer if need be, and send it, however long it is."""
        if not isinstance(answer, tuple):
            answer = await answer()
        if _is_short(answer):
            if self._written(answer):
                if self._blocked():
                    await self._write((b"",))
                self._go_on()
            return
        connection = self._connection
        if connection.phase is _CLOSING:
            return
        close, close_line, last_line = self._ending(answer)
        await self._write(_pieces_of(answer, close_line, last_line))
        if close:
            connection.finish("done", answered=True)
        else:
            self._go_on()

    async def _flush(self) -> None:
        """Wait until the peer has taken what was written."""
        await self._write((b"",))
        self._go_on()

    def _go_on(self) -> None:
        """Look at what came while an answer was outstanding."""
        self._busy = False
        self._connection.request_done(buffered=bool(self._buffer))
        if self._buffer and self._connection.phase is not _CLOSING:
            self._wait()
        self._flow()


def _is_short(answer: RawAnswer) -> bool:
    body = answer[2]
    return isinstance(body, bytes) and len(body) <= PIECE


def _pieces_of(answer: RawAnswer, close_line: bytes, last_line: bytes) -> Iterator[bytes]:
    status, head, body, _ = answer
    head = b"%b%b%b%b%b" % (_STATUS[status], head, close_line, _date(), last_line)
    if isinstance(body, bytes):
        yield head + body
        return
    body.reverse()
    yield head + body.pop()
    while body:
        # Each is let go of once it is sent: freeing many MiB in one go takes milliseconds.
        yield body.pop()


class _Clock:
    """The Date field, made once a second."""

    second = 0
    line = b""


def _date() -> bytes:
    now = int(time.time())
    if now != _Clock.second:
        _Clock.second = now
        _Clock.line = b"date: %b\r\n" % formatdate(now, usegmt=True).encode()
    return _Clock.line

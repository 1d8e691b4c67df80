"""The reading, writing and closing of one connection: Hypercorn's TCPServer with our ends."""

from __future__ import annotations

import asyncio
import logging
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from hypercorn.asyncio.tcp_server import MAX_RECV, TCPServer
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.typing import ConnectionState

from progressdb_kms.transport.connection import CLOSE_GRACE, Connection, ConnectionProtocol, Phase
from progressdb_kms.transport.door import PIECE, Door
from progressdb_kms.transport.http1 import Http1
from progressdb_kms.transport.inbox import ConnectionTasks, where

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hypercorn.asyncio.worker_context import WorkerContext
    from hypercorn.config import Config
    from hypercorn.typing import AppWrapper

    from progressdb_kms.settings import Limits
    from progressdb_kms.transport.doorapp import DoorApp
    from progressdb_kms.transport.turns import Turns

log = logging.getLogger(__name__)

# In seconds: a peer that is silent for so long has sent what it had to say.
LINGER_PAUSE = 0.5


class Exchange(TCPServer):
    """All requests of one connection.

    Args:
        app: The wrapped ASGI app.
        config: From ``http_config``.
        context: Hypercorn's; shared by all connections.
        state: What the app finds in ``scope["state"]``; copied for each request.
        reader: The connection's input.
        writer: The connection's output.
        connection: Its entry in the registry.
        protocol: The event loop's end of it.
        door: Knows the hot routes; None where all requests go through the app.
        limits: Sizes and times of the door.
        turns: Shared by all connections.
    """

    def __init__(  # noqa: PLR0913 - Hypercorn's six, and ours by name
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        state: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        connection: Connection,
        *,
        protocol: ConnectionProtocol,
        door: DoorApp | None,
        limits: Limits,
        turns: Turns,
    ) -> None:
        super().__init__(app, asyncio.get_running_loop(), config, context, state, reader, writer)
        self.connection = connection
        self.http: Http1
        self._reading: asyncio.Task[None] | None = None
        self._protocol = protocol
        self._limits = limits
        self._door_app = door
        self._turns = turns
        self._door: Door | None = None

    async def run(self) -> None:
        """Serve until either side closes; returns when the socket is closed and no task is left."""
        self.connection.attach(self.writer.transport, self._stop_reading)
        self.writer.transport.set_write_buffer_limits(high=PIECE)
        client, server = _address(self.writer, "peername"), _address(self.writer, "sockname")
        secure = self.writer.get_extra_info("ssl_object") is not None
        try:
            tasks = ConnectionTasks(self.loop)
            async with tasks:
                self.http = Http1(
                    self.app,
                    self.config,
                    self.context,
                    tasks,
                    ConnectionState(self.state),
                    secure,
                    client,
                    server,
                    self.protocol_send,
                    connection=self.connection,
                )
                if self._door_app is not None:
                    self._door = self._open_door(self._door_app, tasks)
                self._protocol.attach(self.connection, self._door.received if self._door else None)
                self._reading = self.loop.create_task(self._read_data())
                await self._reading_ended(self._reading)
        except ExceptionGroup as group:
            # A bug must cost this connection only.
            errors = ", ".join(map(where, group.exceptions))
            log.error("connection from %s failed: %s", self.connection.peer, errors)  # noqa: TRY400 - see where
            self.connection.abort("error")
        finally:
            if self._door is not None:
                # Also where this task was cancelled: a pending answer is no task of the connection's.
                self._door.close()
            await self._close()

    def _open_door(self, app: DoorApp, tasks: ConnectionTasks) -> Door:
        return Door(
            app=app,
            session=self.state["kms.session"],
            connection=self.connection,
            transport=cast("asyncio.Transport", self.writer.transport),
            hand_on=self._protocol.hand_on,
            start=tasks.start,
            write=self._write,
            blocked=lambda: self._protocol.blocked,
            soon=self._turns.wait,
            limits=self._limits,
        )

    async def protocol_send(self, event: Event) -> None:
        """Carry out what the protocol asks for: bytes to send, the connection's end, a change of phase."""
        if isinstance(event, RawData):
            await self._write((event.data,))
        elif isinstance(event, Closed):
            self.connection.finish("done", answered=True)
        elif isinstance(event, Updated):
            if event.idle:
                self.connection.request_done(buffered=self.http.buffered)
            else:
                self.connection.request_began()

    async def _write(self, parts: Iterable[bytes]) -> None:
        async with self.send_lock:
            self.connection.write_began()
            try:
                # In pieces, as the loops' TLS layers take anything at once and only then ask to wait.
                # Of nothing there is the waiting only.
                written = 0
                for whole in parts:
                    part = memoryview(whole)
                    while not written or part:
                        if self.writer.is_closing():
                            return  # uvloop raises for it, asyncio warns; the app hears of it by its inbox
                        # What would be left of it, if that is but a little, goes with it.
                        size = PIECE if len(part) > PIECE + PIECE // 2 else len(part)
                        self.writer.write(part[:size])
                        part = part[size:]
                        await self.writer.drain()
                        written += PIECE
                        if written > PIECE:
                            # To a peer that reads as fast as this writes there was nothing to wait for.
                            await asyncio.sleep(0)
            except (ConnectionError, ssl.SSLError):
                await self.http.handle(Closed())
            finally:
                self.connection.write_done()

    async def _read_data(self) -> None:
        while self.connection.phase is not Phase.CLOSING:
            try:
                data = await self.reader.read(MAX_RECV)
            except OSError:  # reset by the peer; ssl.SSLError is one too
                break
            if not data:
                break
            self.connection.bytes_taken(len(data))
            await self.http.handle(RawData(data))

    async def _reading_ended(self, reading: asyncio.Task[None]) -> None:
        """Wait for the reading to end, by itself or stopped, and tell the app that the peer is gone."""
        try:
            await asyncio.wait([reading])
        finally:
            reading.cancel()
        if not reading.cancelled():
            reading.result()
        if self._door is not None:
            # A peer that has sent its requests and then its end may still read the answers.
            # Its turn comes with a pass of the loop.
            while self._door.turning and self.connection.phase is not Phase.CLOSING:  # noqa: ASYNC110 - see above
                await asyncio.sleep(0)
            self._door.close()
        await self.http.handle(Closed())

    def _stop_reading(self) -> None:
        if self._reading is not None and self._reading is not asyncio.current_task():
            self._reading.cancel()

    async def _close(self) -> None:
        try:
            if self.http.request_unfinished or self.connection.unread:
                await self._discard()
            self.connection.finish("peer")
            self.writer.close()
            with suppress(OSError):
                await self.writer.wait_closed()
        finally:
            self.writer.transport.abort()

    async def _discard(self) -> None:
        """Read on for a moment, so that the answer is not lost with a reset (RFC 9112 9.6)."""
        with suppress(OSError):  # TimeoutError is one
            async with asyncio.timeout(CLOSE_GRACE):
                while await asyncio.wait_for(self.reader.read(MAX_RECV), LINGER_PAUSE):
                    pass


def _address(writer: asyncio.StreamWriter, which: str) -> tuple[str, int] | None:
    name = writer.get_extra_info(which)
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else None

"""The serve loop: accepts, proves, limits, drains. One event loop (asyncio or uvloop) in each process.

The loop accepts by itself instead of by ``asyncio.start_server``, because that swallows refused handshakes,
caps nothing, and holds one TLS context for ever.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.asyncio.worker_context import WorkerContext

from progressdb_kms.domain.errors import SettingsInvalid
from progressdb_kms.transport.alert import handshaking
from progressdb_kms.transport.board import Board, Place
from progressdb_kms.transport.connection import CLOSE_GRACE, Connection, ConnectionProtocol, Phase
from progressdb_kms.transport.exchange import Exchange
from progressdb_kms.transport.http1 import http_config
from progressdb_kms.transport.identity import IdentityRefused, identity_of, peer_identity
from progressdb_kms.transport.inbox import where
from progressdb_kms.transport.listeners import Acceptor, Sockets, bind_all, peer_of
from progressdb_kms.transport.refusal import handshake_reason, trusted_chain
from progressdb_kms.transport.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from progressdb_kms.domain.identity import Identity
    from progressdb_kms.settings import Admin, Drain, Limits, Listen, UnixListen
    from progressdb_kms.transport.doorapp import DoorApp
    from progressdb_kms.transport.events import TransportEvents
    from progressdb_kms.transport.tls import TlsHolder
    from progressdb_kms.transport.trust import Chain

log = logging.getLogger(__name__)

# Probes and scrapes need a few. The oldest gives way, so that nobody can shut the kubelet out.
ADMIN_CONNECTIONS = 64
# How exactly deadlines are kept, in seconds.
SWEEP = 0.5
# At the end of a drain, for cancelled tasks to finish.
LAST_MOMENT = 1.0


class Server:
    """Serves the API over TLS and a Unix socket, and the admin app over plain HTTP.

    Args:
        app: ASGI app of the API. It finds ``kms.session``, ``kms.identity`` and ``kms.connection`` in
            ``scope["state"]``.
        admin_app: ASGI app of probes and metrics; its state is empty.
        listen: Where the API is served.
        admin: Where the admin app is served.
        limits: Bounds on connections and times.
        drain: How to end.
        tls: The TLS context; None where ``listen`` has no TCP address.
        session_for: Makes what the app gets as ``kms.session``, once per connection.
        events: Told what happens.
        door: The app's hot routes, for the fast door; None: it is closed.
        sockets: Bound by the supervisor, for all its workers; None: the server binds its own.
        place: This worker's on the board; None: it is the only one.
    """

    def __init__(  # noqa: PLR0913 - the parts of a server, each named by the caller
        self,
        *,
        app: Any,  # noqa: ANN401 - any ASGI 3 callable; frameworks type theirs differently
        admin_app: Any,  # noqa: ANN401 - likewise
        listen: Listen,
        admin: Admin,
        limits: Limits,
        drain: Drain,
        tls: TlsHolder | None,
        session_for: Callable[[Identity], object],
        events: TransportEvents,
        door: DoorApp | None = None,
        sockets: Sockets | None = None,
        place: Place | None = None,
    ) -> None:
        self._app = ASGIWrapper(app)
        self._admin_app = ASGIWrapper(admin_app)
        self._listen = listen
        self._admin = admin
        self._limits = limits
        self._drain = drain
        self._tls = tls
        self._session_for = session_for
        self._events = events
        self._door = door
        self._config = http_config(limits.header_bytes)
        self._context = WorkerContext(None)
        self._turns = Turns()
        self._tasks: dict[asyncio.Task[None], str] = {}
        self._handshakes: dict[socket.socket, asyncio.Task[None]] = {}
        self._api_open: dict[Connection, None] = {}
        self._admin_open: dict[Connection, None] = {}
        self._acceptors: list[Acceptor] = []
        self._admin_acceptor: Acceptor | None = None
        self._sockets = sockets
        self._shared = sockets is not None
        self._place = place or Board(1).places[0]
        self._sweeping: asyncio.Task[None] | None = None
        self._stopped = False
        self.draining = False
        self.tcp_address: tuple[str, int] | None = None
        self.admin_address: tuple[str, int] = ("", 0)

    @property
    def connections(self) -> int:
        """API connections that are open now."""
        return len(self._api_open)

    @property
    def registry(self) -> tuple[Connection, ...]:
        """Open API connections, oldest first, with identity and ``opened_at`` (the event loop's clock)."""
        return tuple(self._api_open)

    @property
    def unix_path(self) -> Path | None:
        """Where the Unix socket is, if there is one."""
        return self._sockets.unix.path if self._sockets and self._sockets.unix else None

    async def start(self) -> None:
        """Bind everything and serve.

        Raises:
            SettingsInvalid: An address or the Unix socket can't be had; nothing stays bound.
        """
        try:
            self._bind()
        except BaseException:
            self._stop_accepting()
            self._stop_admin()
            raise
        self._sweeping = asyncio.get_running_loop().create_task(self._sweep())

    def _bind(self) -> None:
        if self._listen.host is not None and self._tls is None:
            raise SettingsInvalid("listen: TCP is served with TLS only, and there is none")
        if self._sockets is None:
            self._sockets = bind_all(self._listen, self._admin)
        sockets, hold_back = self._sockets, self._place.hold_back
        if sockets.tcp is not None and self._tls is not None:
            self._tls.replaced = partial(self._judge, self._tls)
            self.tcp_address = sockets.tcp.getsockname()[:2]
            self._acceptors.append(Acceptor(sockets.tcp, partial(self._accepted_tls, self._tls), hold_back))
        if sockets.unix is not None and self._listen.unix is not None:
            accepted = partial(self._accepted_unix, self._listen.unix)
            self._acceptors.append(Acceptor(sockets.unix.socket, accepted, hold_back))
        self.admin_address = sockets.admin.getsockname()[:2]
        self._admin_acceptor = Acceptor(sockets.admin, self._accepted_admin)

    async def drain(self) -> None:
        """End as SIGTERM asks for: unready now, accepting for ``drain.delay``, done ``drain.timeout`` later.

        Until the delay is over each answer closes its connection, so that clients go elsewhere. Then idle
        connections close, requests under way finish, and what is left at the timeout is cut.
        """
        self.draining = True
        if self._place.leaves_alone:
            # Probes are the others' business: one that came here at the very end would be cut.
            self._stop_admin()
        for connection in self.registry:
            connection.close_after_response()
        await asyncio.sleep(self._drain.delay)
        self._stopped = True
        for acceptor in self._acceptors:
            acceptor.finish()
        self._stop_accepting()
        api = {task for task, kind in self._tasks.items() if kind != "admin"}
        for connection in self.registry:
            connection.finish_if_idle("drain")
        if api:
            await asyncio.wait(api, timeout=self._drain.timeout)
        await self.abort()

    async def abort(self) -> None:
        """Stop at once: cut all connections and wait for their tasks to end."""
        drained, self.draining, self._stopped = self._stopped, True, True
        self._stop_accepting(keep_file=self._shared and not drained)
        self._stop_admin()
        # A task cancelled before its first step would never close its socket.
        await asyncio.sleep(0)
        for connection in (*self._api_open, *self._admin_open):
            connection.abort("abort")
        tasks = [*self._tasks]
        if self._sweeping is not None:
            tasks.append(self._sweeping)
        for task in tasks:
            task.cancel()
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=LAST_MOMENT)
            if left:
                log.warning("%d connections did not end when they were cancelled", len(left))

    def _stop_accepting(self, *, keep_file: bool = False) -> None:
        for acceptor in self._acceptors:
            acceptor.close()
        if self._sockets is not None and self._sockets.unix is not None:
            self._sockets.unix.close(keep_file=keep_file)

    def _stop_admin(self) -> None:
        if self._admin_acceptor is not None:
            self._admin_acceptor.close()

    def _accepted_tls(self, tls: TlsHolder, sock: socket.socket) -> None:
        if self._full():
            sock.close()
            return
        self._spawn("tls", self._serve_tls(sock, tls))

    def _accepted_unix(self, listen: UnixListen, sock: socket.socket) -> None:
        if self._full():
            sock.close()
            return
        try:
            identity = peer_identity(sock, listen)
        except IdentityRefused as error:
            self._events.connection_refused(error.reason)
            log.warning("Unix socket: %s", error)
            sock.close()
            return
        self._spawn("unix", self._serve_plain(sock, "unix", identity))

    def _accepted_admin(self, sock: socket.socket) -> None:
        self._spawn("admin", self._serve_plain(sock, "admin", None))

    def _full(self) -> bool:
        if not self._place.full(self._limits.max_connections):
            return False
        self._events.connection_refused("limit")
        return True

    def _spawn(self, kind: str, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = kind
        self._place.accepted += kind != "admin"
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._place.accepted -= self._tasks.pop(task) != "admin"
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a connection's task failed: %s", where(error))

    async def _serve_tls(self, sock: socket.socket, tls: TlsHolder) -> None:
        peer = peer_of(sock)
        while len(self._handshakes) >= self._limits.max_handshakes:
            self._events.connection_refused("handshakes")
            self._handshakes.pop(next(iter(self._handshakes))).cancel()
        self._handshakes[sock] = cast("asyncio.Task[None]", asyncio.current_task())
        try:
            transport, protocol = await self._handshake(sock, tls)
        except OSError as error:  # ssl.SSLError and TimeoutError are ones too
            self._events.handshake_refused(handshake_reason(error), peer)
            return
        finally:
            self._handshakes.pop(sock, None)
        connection = transport.get_extra_info("ssl_object")
        try:
            identity = identity_of(connection.getpeercert(binary_form=True))
            chain = trusted_chain(connection, tls.trust)
        except IdentityRefused as error:
            self._events.handshake_refused(error.reason, peer)
            log.info("certificate of %s: %s", peer, error)
            transport.abort()
            return
        await self._serve("tls", peer, identity, transport, protocol, chain)

    async def _handshake(
        self, sock: socket.socket, tls: TlsHolder
    ) -> tuple[asyncio.Transport, ConnectionProtocol]:
        loop = asyncio.get_running_loop()
        protocol = ConnectionProtocol(loop)
        handshaking.set(sock)
        # uvloop's second result is its TLS layer, not our protocol.
        transport, _layer = await loop.connect_accepted_socket(
            lambda: protocol,
            sock,
            ssl=tls.context,
            ssl_handshake_timeout=self._limits.handshake_timeout,
            # Includes the sending of what is left. The sweep keeps the time, by what is being closed.
            ssl_shutdown_timeout=self._limits.write_timeout + CLOSE_GRACE,
        )
        return transport, protocol

    async def _serve_plain(self, sock: socket.socket, kind: str, identity: Identity | None) -> None:
        loop = asyncio.get_running_loop()
        peer = str(identity) if identity else peer_of(sock)
        protocol = ConnectionProtocol(loop)
        try:
            transport, _layer = await loop.connect_accepted_socket(lambda: protocol, sock)
        except OSError:
            sock.close()
            return
        await self._serve(kind, peer, identity, transport, protocol)

    async def _serve(
        self,
        kind: str,
        peer: str,
        identity: Identity | None,
        transport: asyncio.Transport,
        protocol: ConnectionProtocol,
        chain: Chain = (),
    ) -> None:
        connection = self._connection(kind, peer, identity)
        connection.chain = chain
        held = self._admin_open if identity is None else self._api_open
        if identity is None:
            self._make_room()
        elif self._full():
            # Counted again: several may have been accepted before the first of them was open.
            transport.abort()
            return
        held[connection] = None
        self._place.connections = self.connections
        self._events.connection_opened(kind)
        try:
            await self._exchange(connection, transport, protocol)
        except Exception:
            connection.finish("error")
            raise
        finally:
            transport.abort()
            del held[connection]
            self._place.connections = self.connections
            self._events.connection_closed(kind, connection.why)

    def _connection(self, kind: str, peer: str, identity: Identity | None) -> Connection:
        spread = random.uniform(0.8, 1.2)  # noqa: S311 - keeps connections from closing together; not a secret
        connection = Connection(
            kind,
            peer,
            identity,
            limits=self._limits,
            max_age=self._limits.max_connection_age * spread,
            now=asyncio.get_running_loop().time,
        )
        if self.draining:
            connection.close_after_response()
        if self._stopped:
            connection.hurry()
        return connection

    async def _exchange(
        self, connection: Connection, transport: asyncio.Transport, protocol: ConnectionProtocol
    ) -> None:
        app, state = self._admin_app, dict[str, Any]()
        if connection.identity is not None:
            app = self._app
            state["kms.session"] = self._session_for(connection.identity)
            state["kms.identity"] = connection.identity
            state["kms.connection"] = connection
        reader = protocol.reader
        writer = asyncio.StreamWriter(transport, protocol, reader, asyncio.get_running_loop())
        await Exchange(
            app,
            self._config,
            self._context,
            state,
            reader,
            writer,
            connection,
            protocol=protocol,
            door=self._door if connection.identity is not None else None,
            limits=self._limits,
            turns=self._turns,
        ).run()

    def _judge(self, tls: TlsHolder) -> None:
        # At once, whatever is under way: whoever is not trusted any more gets no further plaintext.
        now = time.time()
        for connection in self.registry:
            if connection.chain and (reason := tls.trust.why_not(connection.chain, now)):
                log.warning("connection of %s (%s) closed: %s", connection.peer, connection.identity, reason)
                connection.abort(reason)

    def _make_room(self) -> None:
        if len(self._admin_open) >= ADMIN_CONNECTIONS:
            ending = Phase.CLOSING
            oldest = next((held for held in self._admin_open if held.phase is not ending), None)
            if oldest is not None:
                oldest.abort("evicted")

    async def _sweep(self) -> None:
        limits = self._limits
        shortest = min(limits.header_timeout, limits.idle_timeout, limits.write_timeout)
        interval = min(SWEEP, shortest / 4)
        clock = asyncio.get_running_loop().time
        while True:
            self._place.alive()
            await asyncio.sleep(interval)
            now, today = clock(), time.time()
            for connection in (*self._api_open, *self._admin_open):
                if connection.deadline <= now:
                    connection.expire()
                elif connection.chain and connection.chain[0].not_after <= today:
                    connection.abort("expired")

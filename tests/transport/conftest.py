"""A real server over real sockets for each test, on both event loops."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

from progressdb_kms.settings import Admin, Drain, Limits, Listen, Tls, UnixListen
from progressdb_kms.transport.doorapp import DoorApp
from progressdb_kms.transport.server import Server
from progressdb_kms.transport.tls import TlsHolder
from tests.transport.app import App
from tests.transport.pki import Ca, Issued, client_context, shared_ca

# A bound against hanging, not an expectation: tests wait for what happens.
PATIENCE = 60


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run each asynchronous test on both event loops that the service can run on."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until something holds that nobody reports."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - there is no event for it, which is why this exists
            await asyncio.sleep(0.005)


class Recorder:
    """Keeps the events, and lets a test wait for one."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self._changed = asyncio.Event()

    def _note(self, *event: Any) -> None:
        self.seen.append(event)
        self._changed.set()

    def handshake_refused(self, reason: str, peer: str) -> None:
        """Keep it."""
        self._note("handshake", reason, peer)

    def connection_opened(self, kind: str) -> None:
        """Keep it."""
        self._note("opened", kind)

    def connection_closed(self, kind: str, why: str) -> None:
        """Keep it."""
        self._note("closed", kind, why)

    def connection_refused(self, why: str) -> None:
        """Keep it."""
        self._note("refused", why)

    def reloaded(self, what: str, ok: bool, detail: str) -> None:
        """Keep it."""
        self._note("reloaded", what, ok, detail)

    async def until(self, *event: Any) -> tuple[Any, ...]:
        """Wait for an event that begins with these values, and return it."""
        async with asyncio.timeout(PATIENCE):
            while True:
                for seen in self.seen:
                    if seen[: len(event)] == event:
                        return seen
                self._changed.clear()
                await self._changed.wait()


@dataclass
class Answer:
    """A response; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The parsed body."""
        return json.loads(self.body)

    @property
    def closes(self) -> bool:
        """Whether it is the last one on its connection."""
        return self.headers.get("connection") == "close"


class Peer:
    """A client that sends exactly the bytes that a test wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)

    def ask(self, target: str, *, method: str = "GET", headers: str = "", body: bytes = b"") -> None:
        """Send a request; with a body, its Content-Length too."""
        length = f"content-length: {len(body)}\r\n" if body else ""
        self.send(f"{method} {target} HTTP/1.1\r\nhost: kms\r\n{length}{headers}\r\n".encode() + body)

    async def answer(self) -> Answer:
        """Read one response."""
        async with asyncio.timeout(PATIENCE):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {}
            for line in head[1:-2]:
                name, _, value = line.partition(": ")
                headers[name.lower()] = value
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(int(head[0].split()[1]), headers, body)

    async def get(self, target: str, **kwargs: Any) -> Answer:
        """Send a request and read its response."""
        self.ask(target, **kwargs)
        return await self.answer()

    async def end(self) -> bytes:
        """Wait for the server to close; returns what came before that."""
        rest = b""
        async with asyncio.timeout(PATIENCE):
            with suppress(ConnectionError, ssl.SSLError):
                while data := await self.reader.read(2**16):
                    rest += data
        return rest

    async def close(self) -> None:
        """Close the client's side."""
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()


@dataclass
class Running:
    """A started server and what belongs to it."""

    server: Server
    app: App
    events: Recorder
    tls: TlsHolder
    files: Tls
    folder: Path
    ca: Ca
    peers: list[Peer] = field(default_factory=list)

    async def connect(self, client: Issued | None, *, ca: Ca | None = None, context: Any = None) -> Peer:
        """Connect over TLS with a client certificate (or none)."""
        assert self.server.tcp_address is not None
        context = context or client_context(ca or self.ca, client, self.folder)
        return self._keep(
            await asyncio.open_connection(*self.server.tcp_address, ssl=context, server_hostname="localhost")
        )

    async def tls_peer(self) -> Peer:
        """Connect over TLS with a good certificate."""
        return await self.connect(self.ca.client())

    async def plain_peer(self) -> Peer:
        """Connect to the TLS port without TLS."""
        assert self.server.tcp_address is not None
        return self._keep(await asyncio.open_connection(*self.server.tcp_address))

    async def unix_peer(self) -> Peer:
        """Connect to the Unix socket."""
        assert self.server.unix_path is not None
        return self._keep(await asyncio.open_unix_connection(self.server.unix_path))

    async def admin_peer(self) -> Peer:
        """Connect to the admin port."""
        return self._keep(await asyncio.open_connection(*self.server.admin_address))

    def _keep(self, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> Peer:
        self.peers.append(Peer(*streams))
        return self.peers[-1]


Serve = Callable[..., Awaitable[Running]]


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Return what starts a server on free ports; afterwards no task and no connection may be left."""
    started: list[Running] = []

    async def start(
        *,
        app: Any = None,
        limits: Limits | None = None,
        drain: Drain | None = None,
        unix: UnixListen | None = None,
        session_for: Callable[[Any], object] = "session of {}".format,
        crl: bytes | None = None,
        require_current_crl: bool = False,
        door: DoorApp | None = None,
    ) -> Running:
        ca, events, own_app = shared_ca(), Recorder(), App()
        cert, key = ca.server().write(tmp_path, "server")
        client_ca = tmp_path / "ca.pem"
        client_ca.write_bytes(ca.pem)
        client_crl = tmp_path / "crl.pem" if crl is not None else None
        if client_crl is not None:
            client_crl.write_bytes(crl or b"")
        files = Tls(
            cert=cert,
            key=key,
            client_ca=client_ca,
            client_crl=client_crl,
            require_current_crl=require_current_crl,
        )
        tls = TlsHolder(files, events)
        server = Server(
            app=app or own_app,
            admin_app=own_app,
            listen=Listen(
                host="127.0.0.1",
                port=0,
                unix=unix or UnixListen(path=tmp_path / "kms.sock", allow_uids=(os.getuid(),)),
            ),
            admin=Admin(host="127.0.0.1", port=0),
            limits=limits or Limits(),
            drain=drain or Drain(delay=0, timeout=5),
            tls=tls,
            session_for=session_for,
            events=events,
            door=door,
        )
        await server.start()
        started.append(Running(server, own_app, events, tls, files, tmp_path, ca))
        return started[-1]

    yield start
    for running in started:
        await running.server.abort()
        for peer in running.peers:
            await peer.close()
        assert running.server.connections == 0
        kinds = [event[0] for event in running.events.seen]
        assert kinds.count("opened") == kinds.count("closed")
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from progressdb_kms.settings import Drain, Limits
from progressdb_kms.transport import connection, server
from tests.transport.conftest import eventually
from tests.transport.pki import client_context

if TYPE_CHECKING:
    from progressdb_kms.transport.doorapp import RawAnswer
    from tests.transport.conftest import Serve


async def test_request_under_way_finishes(serve: Serve) -> None:
    """What was asked before the end is answered, and says that it is the last answer."""
    running = await serve()
    peer, idle = await running.tls_peer(), await running.tls_peer()
    await idle.get("/who")
    peer.ask("/wait")
    await running.app.waiting.wait()
    draining = asyncio.create_task(running.server.drain())
    await running.events.until("closed", "tls", "drain")
    assert await idle.end() == b""
    running.app.gate.set()
    answer = await peer.answer()
    assert (answer.body, answer.closes) == (b"waited", True)
    await draining
    assert running.server.connections == 0


async def test_delay_goes_on_serving(serve: Serve) -> None:
    """During the delay connects and requests are served, each answer being its connection's last."""
    # Certificates are made and handshakes done within it, also where the machine is busy.
    running = await serve(drain=Drain(delay=4, timeout=5))
    old = await running.tls_peer()
    assert not (await old.get("/who")).closes
    assert not running.server.draining
    draining = asyncio.create_task(running.server.drain())
    await asyncio.sleep(0)
    assert running.server.draining
    assert (await old.get("/who")).closes
    new = await running.tls_peer()
    assert (await new.get("/who")).closes
    unix = await running.unix_peer()
    assert (await unix.get("/who")).closes
    assert (await (await running.admin_peer()).get("/who")).status == 200
    await draining


async def test_nothing_listens_after_a_drain(serve: Serve) -> None:
    """Afterwards connects are refused on every door, and the Unix socket's file is gone."""
    running = await serve()
    path = running.server.unix_path
    assert path is not None
    assert path.exists()
    await running.server.drain()
    assert not path.exists()
    for connect in (running.tls_peer, running.admin_peer):
        with pytest.raises(ConnectionRefusedError):
            await connect()
    with pytest.raises(FileNotFoundError):
        await running.unix_peer()


async def test_admin_port_serves_until_the_end(serve: Serve) -> None:
    """Probes and scrapes are answered while requests finish."""
    running = await serve()
    peer = await running.unix_peer()
    peer.ask("/wait")
    await running.app.waiting.wait()
    draining = asyncio.create_task(running.server.drain())
    path = running.server.unix_path
    assert path is not None
    await eventually(lambda: not path.exists())
    assert (await (await running.admin_peer()).get("/who")).status == 200
    running.app.gate.set()
    await peer.answer()
    await draining


@pytest.mark.parametrize("path", ["/wait", "/hang"])
async def test_ends_although_a_request_hangs(serve: Serve, path: str) -> None:
    """A request that does not end is cut at the timeout; no task is left (the fixture looks)."""
    running = await serve(drain=Drain(delay=0, timeout=0.2))
    peer = await running.tls_peer()
    peer.ask(path)
    await running.app.waiting.wait()
    await running.server.drain()
    assert running.server.connections == 0
    assert await peer.end() == b""
    await running.events.until("closed", "tls", "abort")


async def test_ends_although_a_client_hangs(serve: Serve) -> None:
    """Neither half a request, nor an unread answer, nor half a handshake keeps the service from ending."""
    running = await serve(drain=Drain(delay=0, timeout=0.3), limits=Limits(handshake_timeout=60))
    half, deaf = await running.unix_peer(), await running.unix_peer()
    half.send(b"GET /wh")
    deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]  # an asyncio.Transport
    deaf.ask("/large?30000000")
    await running.plain_peer()
    await eventually(lambda: running.app.scopes)
    await running.server.drain()
    assert running.server.connections == 0
    deaf.writer.transport.abort()


async def test_a_handshake_under_way_is_served(serve: Serve) -> None:
    """A client whose handshake began before accepting ended gets an answer, the last of its connection."""
    running = await serve(drain=Drain(delay=0, timeout=5))
    busy = await running.unix_peer()
    busy.ask("/wait")
    await running.app.waiting.wait()
    late = await running.plain_peer()
    await eventually(lambda: running.server._handshakes)
    draining = asyncio.create_task(running.server.drain())
    path = running.server.unix_path
    assert path is not None
    await eventually(lambda: not path.exists())
    context = client_context(running.ca, running.ca.client(), running.folder)
    await late.writer.start_tls(context, server_hostname="localhost")
    answer = await late.get("/who")
    assert (answer.status, answer.closes) == (200, True)
    running.app.gate.set()
    await draining


async def test_a_late_connection_without_a_request(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes through its handshake after accepting ended, and asks nothing, is not waited for."""
    monkeypatch.setattr(connection, "CLOSE_GRACE", 0.1)
    running = await serve(drain=Drain(delay=0, timeout=60))
    late = await running.plain_peer()
    await eventually(lambda: running.server._handshakes)
    draining = asyncio.create_task(running.server.drain())
    await asyncio.sleep(0.05)
    context = client_context(running.ca, running.ca.client(), running.folder)
    await late.writer.start_tls(context, server_hostname="localhost")
    await running.events.until("closed", "tls", "idle")
    await draining


async def test_abort_right_after_an_accept(serve: Serve) -> None:
    """A connection whose task has not even begun is closed too."""
    running = await serve()
    with socket.create_connection(running.server.admin_address) as sock:
        acceptor = running.server._admin_acceptor
        assert acceptor is not None
        acceptor._accept()
        assert running.server._tasks
        await running.server.abort()
        sock.settimeout(10)
        with suppress(ConnectionResetError):
            assert await asyncio.to_thread(sock.recv, 1) == b""


async def test_a_task_that_can_not_be_cancelled(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even an app that ignores its cancellation keeps the service; it is logged."""
    monkeypatch.setattr(server, "LAST_MOMENT", 0.1)
    running = await serve(drain=Drain(delay=0, timeout=0.1))
    peer = await running.unix_peer()
    peer.ask("/stubborn")
    await running.app.waiting.wait()
    await running.server.drain()
    assert "1 connections did not end" in caplog.text
    running.app.gate.set()


async def test_abort_cuts_at_once(serve: Serve) -> None:
    """Abort waits for nobody."""
    running = await serve(drain=Drain(delay=60, timeout=60))
    peer = await running.tls_peer()
    peer.ask("/wait")
    await running.app.waiting.wait()
    draining = asyncio.create_task(running.server.drain())
    await asyncio.sleep(0)
    await running.server.abort()
    draining.cancel()
    assert await peer.end() == b""
    await asyncio.wait([draining])


async def test_who_has_connected_by_then_is_served(serve: Serve) -> None:
    """What waits to be accepted at the end of the drain is answered, not reset."""
    running = await serve()
    path = running.server.unix_path
    waiting = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    for sock in waiting:
        # Without giving the event loop a turn: nobody has accepted any of them.
        sock.connect(str(path))
        sock.sendall(b"GET /who HTTP/1.1\r\nhost: kms\r\n\r\n")
        sock.settimeout(20)
    await running.server.drain()
    for sock in waiting:
        with sock:
            assert sock.recv(2**16).startswith(b"HTTP/1.1 200")


class Unanswered:
    """A hot route whose answer is pending for ever."""

    starts = (b"POST /pending HTTP/1.1",)
    body_limit = 100

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.given_up = False

    def ready(self, head: object) -> Unanswered:
        """Be ready."""
        assert head
        return self

    def answer(self, session: object, body: bytes) -> Unanswered:
        """Have no answer yet."""
        assert session
        assert body
        return self

    def late(self, session: object) -> RawAnswer:
        """Never be asked."""
        raise AssertionError(session)

    def begin(self, tell: object) -> None:
        """Tell nothing."""
        assert tell
        self.begun.set()

    def give_up(self) -> None:
        """Be told that nobody waits."""
        self.given_up = True


@pytest.mark.parametrize("how", ["drained", "cut", "gone"])
async def test_an_answer_that_is_pending_is_given_up(serve: Serve, how: str) -> None:
    """By a server that ends, at once or when its drain has lasted long enough, and when its peer is gone."""
    door = Unanswered()
    running = await serve(door=door, drain=Drain(delay=0, timeout=0.2))
    peer = await running.tls_peer()
    peer.ask("/pending", method="POST", body=b"x")
    await door.begun.wait()
    if how == "gone":
        await peer.close()
    else:
        await (running.server.drain() if how == "drained" else running.server.abort())
    await eventually(lambda: door.given_up)

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import pytest

from progressdb_kms.settings import Limits
from progressdb_kms.transport import listeners
from progressdb_kms.transport import server as server_module
from progressdb_kms.transport.connection import Phase
from progressdb_kms.transport.door import PIECE
from tests.transport.conftest import eventually
from tests.transport.pki import client_context

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from tests.transport.conftest import Peer, Running, Serve

HALVES = {
    "half a request line": b"GET /wh",
    "no blank line": b"GET /who HTTP/1.1\r\nhost: kms\r\n",
}


async def connect(running: Running, kind: str) -> Peer:
    """Connect by kind."""
    return await {"tls": running.tls_peer, "unix": running.unix_peer}[kind]()


@pytest.mark.parametrize("kind", ["tls", "unix"])
async def test_idle_connection_closed(serve: Serve, kind: str) -> None:
    """A connection without a request is closed after idle_timeout, without a word."""
    running = await serve(limits=Limits(idle_timeout=0.2))
    peer = await connect(running, kind)
    assert await peer.end() == b""
    await running.events.until("closed", kind, "idle")


async def test_idle_after_an_answer_closed(serve: Serve) -> None:
    """The idle time counts again from each answer."""
    running = await serve(limits=Limits(idle_timeout=1))
    peer = await running.tls_peer()
    assert (await peer.get("/who")).status == 200
    assert await peer.end() == b""
    await running.events.until("closed", "tls", "idle")


@pytest.mark.parametrize("kind", ["tls", "unix"])
@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
async def test_half_sent_headers(serve: Serve, kind: str, half: bytes) -> None:
    """Headers that do not end are answered with 408 and closed."""
    running = await serve(limits=Limits(header_timeout=0.2))
    peer = await connect(running, kind)
    peer.send(half)
    answer = await peer.answer()
    assert (answer.status, answer.json["code"], answer.closes) == (408, "request_timeout", True)
    await peer.end()
    await running.events.until("closed", kind, "headers")
    assert running.app.scopes == []


async def test_slow_headers(serve: Serve) -> None:
    """A byte now and then does not extend the time that headers have."""
    running = await serve(limits=Limits(header_timeout=0.3, idle_timeout=60))
    peer = await running.unix_peer()

    async def drip() -> None:
        peer.send(b"GET /who HTTP/1.1\r\n")
        while True:
            peer.send(b"a: b\r\n")
            await asyncio.sleep(0.05)

    dripping = asyncio.create_task(drip())
    try:
        assert (await peer.answer()).status == 408
    finally:
        dripping.cancel()
        with suppress(asyncio.CancelledError):
            await dripping


async def test_half_a_pipelined_request(serve: Serve) -> None:
    """The time for headers also counts where their beginning came along with an earlier request."""
    running = await serve(limits=Limits(header_timeout=0.2, idle_timeout=60))
    peer = await running.unix_peer()
    peer.send(b"GET /echo?1 HTTP/1.1\r\nhost: kms\r\n\r\nGET /ec")
    assert (await peer.answer()).body == b"1"
    assert (await peer.answer()).status == 408


async def test_a_slow_app_is_not_idle(serve: Serve) -> None:
    """While the app works neither idle_timeout nor header_timeout counts."""
    running = await serve(limits=Limits(header_timeout=0.5, idle_timeout=0.5))
    peer = await running.unix_peer()
    peer.ask("/wait")
    await running.app.waiting.wait()
    await asyncio.sleep(1.2)
    running.app.gate.set()
    assert (await peer.answer()).body == b"waited"


@pytest.mark.parametrize("kind", ["tls", "unix"])
async def test_write_stall_closed(serve: Serve, kind: str) -> None:
    """A peer that does not take its answer is cut after write_timeout."""
    running = await serve(limits=Limits(write_timeout=0.3))
    peer = await connect(running, kind)
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # an asyncio.Transport
    peer.ask("/large?30000000")
    await running.events.until("closed", kind, "write")
    peer.writer.transport.abort()


async def test_a_peer_that_never_reads_many_small_answers(serve: Serve) -> None:
    """Pipelining small requests without reading fills no memory: the peer is cut likewise."""
    running = await serve(limits=Limits(write_timeout=0.3))
    peer = await running.unix_peer()
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # an asyncio.Transport
    peer.send(b"GET /large?10000 HTTP/1.1\r\nhost: kms\r\n\r\n" * 500)
    await running.events.until("closed", "unix", "write")
    peer.writer.transport.abort()


async def test_a_large_answer_arrives_whole(serve: Serve) -> None:
    """A peer that reads gets all of an answer that is larger than any buffer."""
    running = await serve()
    peer = await running.tls_peer()
    assert len((await peer.get("/large?16000000")).body) == 16_000_000
    assert len((await peer.get("/large?70000")).body) == 70_000


async def test_others_get_their_turn_while_a_large_answer_is_written(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a peer that reads as fast as it is written to, a piece goes out in a pass of the event loop."""
    running = await serve()
    peer = await running.unix_peer()
    loop = asyncio.get_running_loop()
    now = 0
    written: list[int] = []
    write = asyncio.StreamWriter.write

    def look() -> None:
        nonlocal now
        now += 1
        loop.call_soon(look)

    def noting(writer: asyncio.StreamWriter, data: bytes) -> None:
        if len(data) == PIECE:
            written.append(now)
        write(writer, data)

    async def nothing_to_wait_for(_writer: asyncio.StreamWriter) -> None:
        pass

    look()
    monkeypatch.setattr(asyncio.StreamWriter, "write", noting)
    monkeypatch.setattr(asyncio.StreamWriter, "drain", nothing_to_wait_for)
    assert len((await peer.get(f"/large?{20 * PIECE}")).body) == 20 * PIECE
    assert len(written) == 20
    assert len(set(written)) >= 19  # the first two go out at once


def read_late(sock: socket.socket, context: ssl.SSLContext, told: Callable[[], bool]) -> bytes:
    """Ask for a last answer, and read it only after ``told``."""
    with context.wrap_socket(sock, server_hostname="localhost") as connection:
        connection.sendall(b"GET /large?60000 HTTP/1.1\r\nhost: kms\r\nconnection: close\r\n\r\n")
        assert told()
        answer = b""
        while data := connection.recv(2**16):
            answer += data
        return answer


async def test_the_end_of_a_last_answer_waits_for_a_slow_peer(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the peer of a closing connection has not taken yet is not thrown away with other farewells."""
    monkeypatch.setattr("progressdb_kms.transport.connection.CLOSE_GRACE", 0.1)
    running = await serve(limits=Limits(header_timeout=0.2))
    server = running.server
    # Little fits into the kernel on its way, so that the rest waits in the server.
    server._acceptors[0]._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(20)
    context = client_context(running.ca, running.ca.client(), running.folder)
    assert server.tcp_address is not None
    await asyncio.to_thread(sock.connect, server.tcp_address)
    told = threading.Event()
    reading = asyncio.create_task(asyncio.to_thread(read_late, sock, context, partial(told.wait, 20)))
    await eventually(lambda: server.registry and server.registry[0].phase is Phase.CLOSING)
    await asyncio.sleep(0.5)  # several times as long as other closing connections get here
    told.set()
    assert (await reading).endswith(b"\r\n\r\n" + bytes(60_000))


@pytest.mark.parametrize("kind", ["tls", "unix"])
async def test_connection_cap(serve: Serve, kind: str) -> None:
    """Over max_connections new ones are closed and counted; when one ends, there is room again."""
    running = await serve(limits=Limits(max_connections=2))
    peers = [await connect(running, kind) for _ in range(2)]
    for peer in peers:
        await peer.get("/who")
    assert running.server.connections == 2
    with suppress(OSError):
        assert await (await connect(running, kind)).end() == b""
    await running.events.until("refused", "limit")
    assert (await (await running.admin_peer()).get("/who")).status == 200

    await peers[0].close()
    await running.events.until("closed", kind)
    again = await connect(running, kind)
    assert (await again.get("/who")).status == 200


async def test_connection_cap_under_simultaneous_connects(serve: Serve) -> None:
    """Connections that are proved at the same moment do not slip past the cap."""
    running = await serve(limits=Limits(max_connections=3))
    found = await asyncio.gather(*(running.tls_peer() for _ in range(12)), return_exceptions=True)
    for peer in found:
        if not isinstance(peer, BaseException):
            peer.ask("/who")
    await asyncio.gather(*(peer.reader.read(1) for peer in running.peers), return_exceptions=True)
    assert running.events.seen.count(("opened", "tls")) == 3
    assert running.server.connections == 3
    assert running.events.seen.count(("refused", "limit")) >= 9


async def test_a_flood_of_connects_leaves_others_their_turn() -> None:
    """No more than four connections are accepted in a pass of the event loop; all are, in the end."""
    accepted: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setblocking(False)
        peers = [socket.create_connection(sock.getsockname()) for _ in range(10)]
        acceptor = listeners.Acceptor(sock, accepted.append)
        most = 0
        async with asyncio.timeout(20):
            while len(accepted) < len(peers):
                before = len(accepted)
                await asyncio.sleep(0)
                most = max(most, len(accepted) - before)
        acceptor.close()
    for each in (*accepted, *peers):
        each.close()
    assert most <= 4


async def test_connection_age(serve: Serve) -> None:
    """Past its age the next answer is the connection's last one."""
    running = await serve(limits=Limits(max_connection_age=0.05))
    peer = await running.tls_peer()
    await asyncio.sleep(0.1)
    answer = await peer.get("/who")
    assert (answer.status, answer.closes) == (200, True)
    assert await peer.end() == b""
    await running.events.until("closed", "tls", "done")


async def test_connection_age_is_spread(serve: Serve) -> None:
    """Connections of one moment do not end at one moment, but within 20 % of the setting."""
    running = await serve(limits=Limits(max_connection_age=100))
    for _ in range(8):
        await (await running.unix_peer()).get("/who")
    ages = [connection._closes_at - connection.opened_at for connection in running.server.registry]
    assert len(set(ages)) == 8
    assert all(80 <= age <= 120 for age in ages)


async def test_admin_port_gives_way(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held admin connections do not shut out a probe: the oldest goes."""
    monkeypatch.setattr(server_module, "ADMIN_CONNECTIONS", 3)
    running = await serve()
    held = [await running.admin_peer() for _ in range(3)]
    for peer in held:
        await peer.get("/who")
    assert (await (await running.admin_peer()).get("/who")).status == 200
    assert await held[0].end() == b""
    await running.events.until("closed", "admin", "evicted")
    assert (await held[1].get("/who")).status == 200


async def test_out_of_descriptors(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without descriptors the server pauses instead of spinning, and goes on when there are some."""
    running = await serve()
    monkeypatch.setattr(listeners, "ACCEPT_PAUSE", 0.05)
    calls = 0
    accept = socket.socket.accept
    loop = asyncio.get_running_loop()
    until = loop.time() + 0.2

    def failing(sock: socket.socket) -> object:
        nonlocal calls
        calls += 1
        if loop.time() < until:
            raise OSError(24, "Too many open files")
        return accept(sock)

    monkeypatch.setattr(socket.socket, "accept", failing)
    peer = await running.unix_peer()
    assert (await peer.get("/who")).status == 200
    assert calls < 20  # without pauses, thousands

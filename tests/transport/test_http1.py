from __future__ import annotations

import asyncio
import json
import logging
import socket
from typing import TYPE_CHECKING, Any

import pytest
from quart import Quart, request

from progressdb_kms.transport import exchange
from progressdb_kms.transport.http1 import Http1
from progressdb_kms.transport.inbox import INBOX_PIECES, Inbox
from tests.transport.conftest import Answer, eventually

if TYPE_CHECKING:
    from tests.transport.conftest import Peer, Running, Serve


def assert_problem(answer: Answer, status: int, code: str) -> None:
    """Check a problem document and that it is the connection's last answer."""
    assert answer.status == status
    assert answer.closes
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json["code"] == code
    assert answer.json["status"] == status
    assert answer.json["type"] == f"urn:progressdb-kms:error:{code}"
    assert answer.json["request_id"] == answer.headers["x-request-id"]
    assert {"title", "detail", "retryable"} <= answer.json.keys()


@pytest.fixture
async def running(serve: Serve) -> Running:
    """Return a server with the default limits."""
    return await serve()


@pytest.fixture
async def peer(running: Running) -> Peer:
    """Return a client on the Unix socket: HTTP is the same there, without the cost of TLS."""
    return await running.unix_peer()


async def test_state_in_scope(running: Running) -> None:
    """Each API request finds identity, session and connection; the admin port has none of them."""
    tls = await running.tls_peer()
    expected = {"identity": "dns:chat.default.svc", "session": "session of dns:chat.default.svc"}
    assert (await tls.get("/who")).json == expected
    assert (await tls.get("/who")).json == expected
    connection = running.app.scopes[0]["state"]["kms.connection"]
    assert running.server.registry == (connection,)
    assert str(connection.identity) == "dns:chat.default.svc"
    assert len(running.app.scopes[0]["state"]["kms.identity"].spki_sha256) == 64
    # Each request has a mapping of its own: what one leaves in it, the next does not find.
    assert running.app.scopes[0]["state"] is not running.app.scopes[1]["state"]
    admin = await running.admin_peer()
    assert (await admin.get("/who")).json == {"identity": "None", "session": None}
    assert running.app.scopes[-1]["state"] == {}


async def test_scheme_addresses_and_headers(running: Running) -> None:
    """The scope names scheme and peer; the answer names a date and no server software."""
    tls, unix = await running.tls_peer(), await running.unix_peer()
    answer = await tls.get("/who")
    assert "server" not in answer.headers
    assert "date" in answer.headers
    assert running.app.scopes[0]["scheme"] == "https"
    assert running.app.scopes[0]["client"] == tls.writer.get_extra_info("sockname")
    await unix.get("/who")
    assert (running.app.scopes[1]["scheme"], running.app.scopes[1]["client"]) == ("http", None)


async def test_quart_over_tls(serve: Serve) -> None:
    """Quart finds the state, gets bodies whole, and its answers arrive whole."""
    quart = Quart("test")

    @quart.post("/count")
    async def count() -> dict[str, object]:
        body = await request.get_data()
        return {"bytes": len(body), "who": str(request.scope["state"]["kms.identity"])}

    running = await serve(app=quart)
    peer = await running.tls_peer()
    for size in (1, 70_000, 1_000_000):
        answer = await peer.get("/count", method="POST", body=bytes(size))
        assert answer.json == {"bytes": size, "who": "dns:chat.default.svc"}
    assert not answer.closes


async def test_pipelined_answers_keep_their_order(running: Running, peer: Peer) -> None:
    """Requests sent at once are answered in order, though the first one takes longest."""
    peer.ask("/wait")
    for number in range(5):
        peer.ask(f"/echo?{number}", method="POST", body=b"-body")
    await running.app.waiting.wait()
    running.app.gate.set()
    assert (await peer.answer()).body == b"waited"
    assert [(await peer.answer()).body for _ in range(5)] == [b"%d-body" % n for n in range(5)]


async def test_http2_preface_refused(peer: Peer) -> None:
    """HTTP/2 by prior knowledge is refused."""
    peer.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
    assert_problem(await peer.answer(), 400, "invalid_header")
    assert await peer.end() == b""


async def test_h2c_upgrade_ignored(peer: Peer) -> None:
    """An offer to switch to h2c is answered in HTTP/1.1."""
    headers = "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
    answer = await peer.get("/echo?still-1.1", headers=headers)
    assert (answer.status, answer.body) == (200, b"still-1.1")
    assert (await peer.get("/echo?again")).body == b"again"


async def test_websocket_ignored(running: Running, peer: Peer) -> None:
    """A WebSocket handshake reaches the app as a plain request."""
    headers = (
        "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    )
    answer = await peer.get("/echo?plain", headers=headers)
    assert (answer.status, answer.body) == (200, b"plain")
    assert running.app.scopes[0]["type"] == "http"


async def test_connect_refused(running: Running, peer: Peer) -> None:
    """CONNECT is refused before any app sees it."""
    peer.send(b"CONNECT kms:443 HTTP/1.1\r\nhost: kms\r\n\r\n")
    assert_problem(await peer.answer(), 405, "method_not_allowed")
    assert await peer.end() == b""
    assert running.app.scopes == []


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
        b"GET /who\r\n\r\n",
        b"GET /who HTTP/1.1\r\n\r\n",
        b"GET /who HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET /who HTTP/1.1\r\nhost: a\r\nbad header\r\n\r\n",
        b"POST /who HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        b"POST /who HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST /who HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n",
        b"POST /who HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_malformed_requests(running: Running, peer: Peer, data: bytes) -> None:
    """What is not HTTP/1.1 gets a problem document, and closes."""
    peer.send(data)
    assert_problem(await peer.answer(), 400, "invalid_header")
    assert running.app.scopes == []


@pytest.mark.parametrize("path", ["/wait", "/slowly"])
async def test_broken_chunk_after_the_request_began(
    running: Running, peer: Peer, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A body that breaks off into nonsense is refused, and an answer that still comes is nobody's error."""
    caplog.set_level(logging.WARNING)
    peer.ask(path, method="POST", headers="transfer-encoding: chunked\r\n")
    peer.send(b"5\r\nhello\r\n")
    await eventually(lambda: running.app.scopes)
    peer.send(b"zz\r\n")
    assert_problem(await peer.answer(), 400, "invalid_header")
    running.app.gate.set()
    await running.events.until("closed", "unix")
    assert caplog.text == ""


@pytest.mark.parametrize("endless", [True, False])
async def test_header_flood(running: Running, peer: Peer, endless: bool) -> None:
    """Headers over the limit are refused, whether they come in one piece or never end."""
    flood = b"x-a: " + b"a" * 20_000 + b"\r\n"
    peer.send(b"GET /who HTTP/1.1\r\nhost: kms\r\n" + flood + (b"" if endless else b"\r\n"))
    assert_problem(await peer.answer(), 431, "headers_too_large")
    assert running.app.scopes == []


async def test_headers_within_the_limit(peer: Peer) -> None:
    """Headers just under the limit are taken."""
    assert (await peer.get("/echo?fits", headers=f"x-a: {'a' * 16_000}\r\n")).body == b"fits"


async def test_expect_continue(peer: Peer) -> None:
    """A client that waits for 100 Continue gets it, then its answer."""
    peer.send(b"POST /echo HTTP/1.1\r\nhost: kms\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n")
    assert (await peer.answer()).status == 100
    peer.send(b"ok")
    assert (await peer.answer()).body == b"ok"


async def test_http_1_0_and_connection_close(running: Running, peer: Peer) -> None:
    """A peer that wants its connection closed gets that, and an HTTP/1.0 one too."""
    answer = await peer.get("/who", headers="connection: close\r\n")
    assert answer.closes
    assert await peer.end() == b""
    old = await running.unix_peer()
    old.send(b"GET /echo?old HTTP/1.0\r\n\r\n")
    assert (await old.answer()).body == b"old"
    assert await old.end() == b""
    assert (await running.events.until("closed")) == ("closed", "unix", "done")


async def test_the_app_can_end_a_connection(peer: Peer) -> None:
    """After close_after_response the answer says so, and the connection closes."""
    answer = await peer.get("/last")
    assert (answer.body, answer.closes) == (b"last", True)
    assert await peer.end() == b""


def send_all_then_read(path: str, request: bytes) -> bytes:
    """Do as most clients do: send all of a request before looking for the answer."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(path)
        sock.sendall(request)
        return sock.recv(2**16)


async def test_early_answer_to_a_large_body(running: Running) -> None:
    """A refused body is taken and thrown away, so that a client that sends it all can read the answer."""
    request = b"POST /early HTTP/1.1\r\nhost: kms\r\ncontent-length: 3000000\r\n\r\n" + bytes(3_000_000)
    answer = await asyncio.to_thread(send_all_then_read, str(running.server.unix_path), request)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer
    await running.events.until("closed", "unix", "done")


async def test_early_answer_to_a_peer_that_sends_on(
    running: Running, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That patience ends, too: who goes on sending after the answer is cut."""
    monkeypatch.setattr(exchange, "CLOSE_GRACE", 0.3)
    peer.send(b"POST /early HTTP/1.1\r\nhost: kms\r\ncontent-length: 900000000\r\n\r\n" + bytes(500_000))
    assert (await peer.answer()).status == 413

    async def send_on() -> None:
        while True:
            peer.send(b"more")
            await asyncio.sleep(0.05)

    sending = asyncio.create_task(send_on())
    try:
        await running.events.until("closed", "unix", "done")
    finally:
        sending.cancel()
        await asyncio.wait([sending])


async def test_inbox_lets_a_disconnect_through() -> None:
    """Neither what waits to be put in, nor what waits to be taken out, holds up a disconnect."""
    inbox = Inbox()
    piece: Any = {"type": "http.request", "body": b"", "more_body": True}
    gone: Any = {"type": "http.disconnect"}
    for _ in range(INBOX_PIECES):
        await inbox.put(piece)
    waiting = asyncio.create_task(inbox.put(piece))
    await asyncio.sleep(0)
    assert not waiting.done()
    await inbox.put(gone)
    await asyncio.wait_for(waiting, 10)
    assert [await inbox.get() for _ in range(3)] == [gone] * 3


async def test_early_answer_to_a_body_that_never_ends(running: Running, peer: Peer) -> None:
    """A peer that stalls after the answer is cut after a moment."""
    peer.send(b"POST /early HTTP/1.1\r\nhost: kms\r\ncontent-length: 900000\r\n\r\n" + bytes(500_000))
    assert (await peer.answer()).status == 413
    await peer.end()
    await running.events.until("closed", "unix", "done")


async def test_a_small_unread_body_does_not_cost_the_connection(peer: Peer) -> None:
    """An app may leave a body unread that has arrived whole; the next request is still its own."""
    answer = await peer.get("/early", method="POST", body=b"GET /who HTTP/1.1\r\nhost: kms\r\n\r\n")
    assert (answer.status, answer.closes) == (413, False)
    assert (await peer.get("/echo?next")).body == b"next"


async def test_backpressure(running: Running) -> None:
    """While the app does not read, little is taken from the peer; then the body arrives whole."""
    size = 10_000_000
    peer = await running.unix_peer()
    peer.ask("/slowly", method="POST", body=bytes(size))
    await running.app.waiting.wait()
    transport, levels = peer.writer.transport, [-1, -2]

    def still() -> bool:
        levels.append(transport.get_write_buffer_size())
        return len(set(levels[-20:])) == 1

    await eventually(still)
    assert levels[-1] > size / 2
    running.app.gate.set()
    assert (await peer.answer()).body == b"read"
    assert running.app.received == size


async def test_disconnect_reaches_the_app(running: Running, peer: Peer) -> None:
    """An app that waits is told when its peer goes."""
    peer.ask("/wait")
    await running.app.waiting.wait()
    await peer.close()
    await asyncio.wait_for(running.app.gone.wait(), 10)
    assert await running.events.until("closed") == ("closed", "unix", "peer")


async def test_a_reset_reaches_the_app(running: Running) -> None:
    """An app whose peer is gone is told even while a further request waits, unread, behind its own."""
    peer = await running.tls_peer()
    peer.ask("/wait")
    await running.app.waiting.wait()
    peer.ask("/who")
    await eventually(lambda: running.server.registry[0].unread == 0)
    peer.writer.transport.abort()
    await running.events.until("closed", "tls", "peer")
    assert running.app.gone.is_set()


async def test_disconnect_while_the_app_does_not_read(running: Running, peer: Peer) -> None:
    """A peer that goes in the middle of a body that nobody reads leaves nothing behind."""
    peer.send(b"POST /slowly HTTP/1.1\r\nhost: kms\r\ncontent-length: 900000\r\n\r\n" + bytes(800_000))
    await running.app.waiting.wait()
    peer.writer.transport.abort()
    running.app.gate.set()
    await running.events.until("closed", "unix")


@pytest.mark.parametrize("path", ["/crash", "/silent"])
async def test_an_app_that_fails(peer: Peer, path: str, caplog: pytest.LogCaptureFixture) -> None:
    """An app that raises or does not answer is a 500 problem; what it said is not shown."""
    assert_problem(await peer.get(path), 500, "internal_error")
    assert "do not show this" not in caplog.text
    assert ("RuntimeError at " in caplog.text) == (path == "/crash")


async def test_an_app_that_sends_less_than_it_promised(running: Running, peer: Peer) -> None:
    """An answer that breaks off closes its connection, so that it can't be taken for a whole one."""
    peer.ask("/cut")
    assert b"200" in (await peer.end()) or running.events.seen
    await running.events.until("closed", "unix")
    assert (await (await running.unix_peer()).get("/who")).status == 200


async def test_a_bug_costs_one_connection(
    running: Running, peer: Peer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error in the handling of HTTP ends its connection, is logged without its text, and ends no other."""

    async def broken(*_: object) -> None:
        raise RuntimeError("do not show this")

    with monkeypatch.context() as patched:
        patched.setattr(Http1, "_create_stream", broken)
        peer.ask("/who")
        assert await peer.end() == b""
        await running.events.until("closed", "unix", "error")
    assert "RuntimeError at" in caplog.text
    assert "do not show this" not in caplog.text
    assert (await (await running.unix_peer()).get("/who")).status == 200


async def test_a_failing_session_costs_one_connection(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Where no session can be made the connection closes, and the reason is logged without its text."""

    def broken(_: object) -> object:
        raise RuntimeError("do not show this")

    running = await serve(session_for=broken)
    peer = await running.unix_peer()
    assert await peer.end() == b""
    await running.events.until("closed", "unix", "error")
    assert "RuntimeError at" in caplog.text
    assert "do not show this" not in caplog.text


async def test_refusals_are_logged_with_their_request_id(
    peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """The request id of a refusal finds it in the log."""
    caplog.set_level(logging.INFO)
    peer.send(b"nonsense\r\n\r\n")
    assert json.loads((await peer.answer()).body)["request_id"] in caplog.text

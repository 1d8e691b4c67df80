"""Malformed, stalled and hostile HTTP over mutual TLS: refused or served, in order, and never a way in."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator

import pytest

from tests.contract.dev_service import MAX_CONNECTIONS, STALL, DevService
from tests.contract.wire_client import (
    Answer,
    Client,
    RawConnection,
    assert_problem,
    b64,
    tcp_connect,
    unix_connect,
)

HOST = b"Host: localhost\r\n"
HEALTHZ = b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"


def post(path: str, body: bytes, *headers: str) -> bytes:
    """Return a well-formed POST of JSON."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.fixture(scope="module", autouse=True)
def _no_traceback(service: DevService) -> Iterator[None]:
    """Whatever this module sends, the service must not stumble over it."""
    yield
    assert "Traceback" not in service.log_text()


@pytest.fixture(params=["mtls", "unix"])
def line(request: pytest.FixtureRequest, service: DevService) -> Iterator[RawConnection]:
    """Give a raw connection, once over mutual TLS and once over the Unix socket."""
    connect = service.tls("server") if request.param == "mtls" else unix_connect(service.ready["unix"])
    with RawConnection(connect) as connection:
        yield connection


def still_serves(service: DevService) -> bool:
    """Whether a new client gets an answer."""
    client = service.client("server")
    try:
        return client.get("/healthz").status == 200
    finally:
        client.close()


def assert_refused(answer: Answer | None, *statuses: int) -> None:
    """Assert a hang-up, or one of these statuses; protocol errors may be answered without a problem body."""
    assert answer is None or answer.status in statuses, answer


# stalls


def test_half_sent_headers_are_given_up(tuned: DevService) -> None:
    """A client that stops within its headers is hung up on, with 408 or without an answer."""
    with RawConnection(tuned.tls("server")) as connection:
        connection.send(b"POST /encrypt HTTP/1.1\r\nHost: local")
        answer = connection.response()
        assert_refused(answer, 408)
        assert answer is None or answer.headers["connection"] == "close"


def test_dribbled_headers_are_given_up(tuned: DevService) -> None:
    """A byte now and then does not buy more time for the headers."""
    with RawConnection(tuned.tls("server")) as connection:
        connection.send(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        connection.socket.settimeout(STALL / 10)
        for _ in range(100):
            connection.send(b"x")
            with contextlib.suppress(TimeoutError):
                assert_refused(connection.response(), 408)
                return
        raise AssertionError("the service is still listening")


def test_a_silent_connection_is_given_up(tuned: DevService) -> None:
    """A client that connects and never asks is hung up on."""
    with RawConnection(tuned.tls("server")) as connection:
        assert_refused(connection.response(), 408)


def test_a_half_sent_body_is_408(tuned: DevService) -> None:
    """A body that stops arriving is 408 request_timeout, and the connection ends."""
    with RawConnection(tuned.tls("server")) as connection:
        connection.send(post("/encrypt", b"x" * 1000)[:-500])
        answer = connection.must_answer("POST")
        assert_problem(answer, 408, "request_timeout")
        assert answer.headers["connection"] == "close"


def test_a_half_sent_chunked_body_is_408(tuned: DevService) -> None:
    """The same for a chunked body, here on a route off the hot path."""
    with RawConnection(tuned.tls("server")) as connection:
        head = b"POST /create_dek_batch HTTP/1.1\r\nContent-Type: application/json\r\n" + HOST
        connection.send(head + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"ite\r\n')
        assert_problem(connection.must_answer("POST"), 408, "request_timeout")


def test_a_dribbled_body_is_408(tuned: DevService) -> None:
    """A byte now and then does not buy more time for the body."""
    with RawConnection(tuned.tls("server")) as connection:
        connection.send(post("/encrypt", b"x" * 100_000)[:-99_000])
        connection.socket.settimeout(STALL / 10)
        for _ in range(100):
            connection.send(b"x")
            with contextlib.suppress(TimeoutError):
                assert_problem(connection.must_answer("POST"), 408, "request_timeout")
                return
        raise AssertionError("the service is still listening")


@pytest.mark.parametrize("cut", [10, 40, 120, -1], ids=["line", "headers", "more-headers", "body"])
def test_a_client_that_goes_away_harms_nobody(service: DevService, cut: int) -> None:
    """A connection closed within a request leaves the service serving."""
    with RawConnection(service.tls("server")) as connection:
        connection.send(post("/encrypt", b"{}" * 100, "X-Padding: 0123456789")[:cut])
    assert still_serves(service)


def test_slow_clients_at_the_limit_leave_others_served(tuned: DevService) -> None:
    """Slow clients fill every place: a connected client is answered all along, a new one before long."""
    known = tuned.client("server")
    slow: list[RawConnection] = []
    try:
        assert known.get("/healthz").status == 200
        for number in range(MAX_CONNECTIONS * 3):
            # Some stop before TLS begins, the others within their headers.
            connect = tuned.tls("server") if number % 4 else tcp_connect(tuned.host, tuned.port)
            with contextlib.suppress(OSError):  # over the limit a connection may be refused in any way
                slow.append(RawConnection(connect))
                slow[-1].send(b"POST /encrypt HTTP/1.1\r\n" if number % 4 else b"\x16\x03")
            assert known.get("/healthz").status == 200
        assert len(slow) >= MAX_CONNECTIONS - 1
        limit = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                if still_serves(tuned):
                    break
            assert time.monotonic() < limit, "slow clients keep a new one out"
            # Asked all along, for an idle connection would be closed, too.
            assert known.get("/healthz").status == 200
            time.sleep(0.1)
    finally:
        known.close()
        for connection in slow:
            connection.socket.close()


# headers


def test_one_huge_header_is_431(line: RawConnection) -> None:
    """A header of 256 KiB is 431 headers_too_large."""
    line.send(b"GET /healthz HTTP/1.1\r\n" + HOST + b"X-Big: " + b"x" * (256 << 10) + b"\r\n\r\n")
    assert_problem(line.must_answer(), 431, "headers_too_large")


def test_a_flood_of_headers_is_431(line: RawConnection) -> None:
    """So are ten thousand small ones, though each comes alone."""
    line.send(b"GET /healthz HTTP/1.1\r\n" + HOST)
    for number in range(0, 10_000, 500):
        line.send(b"".join(b"X-%d: some value\r\n" % n for n in range(number, number + 500)))
    line.send(b"\r\n")
    assert_problem(line.must_answer(), 431, "headers_too_large")


def test_a_huge_request_line_is_refused(line: RawConnection) -> None:
    """A target of 256 KiB is refused like a huge header."""
    line.send(b"GET /" + b"x" * (256 << 10) + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    assert_refused(line.response(), 400, 414, 431)


# framing


def create(thread_id: str) -> bytes:
    """Return a create's body."""
    return json.dumps({"thread_id": thread_id}).encode()


def test_content_length_and_chunked_together_smuggle_nothing(line: RawConnection, thread_id: str) -> None:
    """Refused, or read as chunked and hung up on after (RFC 9112, 6.1): what follows is never a request."""
    body = create(thread_id)
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    head = b"POST /create_dek_for_thread HTTP/1.1\r\nContent-Type: application/json\r\n" + HOST
    head += b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % (len(chunked) + len(HEALTHZ))
    line.socket.settimeout(5)
    line.send(head + chunked + HEALTHZ)
    assert_refused(line.response("POST"), 400, 200)
    assert line.rest() == b""


GET = b"GET /healthz HTTP/1.1\r\n"
POST = b"POST /encrypt HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
BROKEN = {
    "no-host": GET + b"\r\n",
    "two-hosts": GET + b"Host: a\r\nHost: b\r\n\r\n",
    "nul": GET + b"Host: a\r\nX-Nul: a\x00b\r\n\r\n",
    "no-colon": GET + b"Host: a\r\nno colon\r\n\r\n",
    "space-before-colon": GET + b"Host: a\r\nX-Space : v\r\n\r\n",
    "http-0.9": b"GET /healthz\r\n\r\n",
    "two-spaces": b"GET  /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
    "http-2-preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    "binary": b"\x00\x01\x02\x03\r\n\r\n",
    "elf": b"\r\n\r\n\r\n\x7fELF\r\n\r\n",
    "two-lengths": POST + b"Content-Length: 3\r\nContent-Length: 30\r\n\r\n{} ",
    "length-list": POST + b"Content-Length: 3, 30\r\n\r\n{} ",
    "length-plus": POST + b"Content-Length: +3\r\n\r\n{} ",
    "length-minus": POST + b"Content-Length: -1\r\n\r\n{} ",
    "length-hex": POST + b"Content-Length: 0x3\r\n\r\n{} ",
    "length-spaced": POST + b"Content-Length: 3 3\r\n\r\n{} ",
    "length-empty": POST + b"Content-Length: \r\n\r\n{} ",
    "gzip-chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked-identity": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "bad-chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
}


@pytest.fixture(scope="module", params=["mtls", "unix"])
def broken(request: pytest.FixtureRequest, service: DevService) -> dict[str, tuple[Answer | None, bytes]]:
    """Send every broken request, a good one after each, and give answer and rest of each connection.

    All at once: the service lingers after a refusal, so that its answer is not lost to a reset.
    """
    connect = service.tls("server") if request.param == "mtls" else unix_connect(service.ready["unix"])
    with contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context(RawConnection(connect)) for name in BROKEN}
        for name, connection in opened.items():
            connection.send(BROKEN[name] + HEALTHZ)
        answers = {name: connection.response("POST") for name, connection in opened.items()}
        return {name: (answers[name], connection.rest()) for name, connection in opened.items()}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_http_is_refused(broken: dict[str, tuple[Answer | None, bytes]], name: str) -> None:
    """What is not HTTP/1.1 or has ambiguous framing is 400 or 501, and nothing after it is served."""
    answer, rest = broken[name]
    assert_refused(answer, 400, 501)
    assert rest == b""


def test_a_chunked_body_works(line: RawConnection, thread_id: str) -> None:
    """A body in chunks of one byte, with a chunk extension and a trailer, is the body."""
    chunks = (
        b"".join(b"1;ext=1\r\n%c\r\n" % byte for byte in create(thread_id)) + b"0\r\nX-Trailer: t\r\n\r\n"
    )
    head = b"POST /create_dek_for_thread HTTP/1.1\r\nContent-Type: application/json\r\n" + HOST
    line.send(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
    assert "key_id" in line.must_answer("POST").ok()


def test_a_request_in_single_bytes_works(line: RawConnection, thread_id: str) -> None:
    """However a request is cut into packets, it is the same request."""
    for byte in post("/create_dek_for_thread", create(thread_id)):
        line.send(bytes([byte]))
    assert "key_id" in line.must_answer("POST").ok()


def test_expect_continue_works(line: RawConnection, thread_id: str) -> None:
    """A client that waits for 100 gets it, and then its answer."""
    body = create(thread_id)
    line.send(post("/create_dek_for_thread", body, "Expect: 100-continue")[: -len(body)])
    assert line.must_answer("POST").status == 100
    line.send(body)
    assert "key_id" in line.must_answer("POST").ok()


# order and versions


def test_pipelined_requests_are_answered_in_order(line: RawConnection, key_id: str, thread_id: str) -> None:
    """Slow and quick, hot and cold, right and wrong, sent at once: answered one by one in the order sent."""
    encrypt = json.dumps({"key_id": key_id, "plaintext": b64(b"m")}).encode()
    requests = [
        (post("/create_dek_for_thread", create(thread_id), "X-Request-Id: n0"), 200),
        (b"GET /healthz HTTP/1.1\r\n" + HOST + b"X-Request-Id: n1\r\n\r\n", 200),
        (post("/encrypt", encrypt, "X-Request-Id: n2"), 200),
        (post("/encrypt", b"{", "X-Request-Id: n3"), 400),
        (post("/create_dek_batch", b'{"items": []}', "X-Request-Id: n4"), 200),
        (post("/encrypt", encrypt, "X-Request-Id: n5"), 200),
        (b"GET /nothing HTTP/1.1\r\n" + HOST + b"X-Request-Id: n6\r\n\r\n", 404),
        (post("/encrypt", encrypt, "X-Request-Id: n7"), 200),
    ]
    line.send(b"".join(request for request, _ in requests))
    for number, (_, status) in enumerate(requests):
        answer = line.must_answer()
        assert answer.headers["x-request-id"] == f"n{number}"
        assert answer.status == status, answer


def test_a_pair_of_hot_requests_is_answered_in_order(line: RawConnection, key_id: str) -> None:
    """Two encrypts in one packet make two answers, each to its own."""
    pair = [json.dumps({"key_id": key_id, "plaintext": b64(bytes(size))}).encode() for size in (1, 100)]
    line.send(b"".join(post("/encrypt", body) for body in pair))
    lengths = [len(line.must_answer("POST").ok()["ciphertext"]) for _ in pair]
    assert lengths == [len(b64(bytes(29))), len(b64(bytes(128)))]


def test_a_refused_body_does_not_become_the_next_request(line: RawConnection) -> None:
    """What a route doesn't read of a body is not taken for a request."""
    line.send(post("/nothing", HEALTHZ) + b"GET /healthz HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n")
    assert line.must_answer("POST").status == 404
    assert line.rest().count(b"HTTP/1.1 ") <= 1


def test_http_1_0_is_answered_and_closed(line: RawConnection) -> None:
    """An HTTP/1.0 request gets a whole answer, and the connection ends."""
    line.send(b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert line.must_answer().status == 200
    assert line.rest() == b""


def test_connection_close_is_honoured(line: RawConnection, key_id: str) -> None:
    """The answer comes whole and is the last."""
    body = json.dumps({"key_id": key_id, "plaintext": ""}).encode()
    line.send(post("/encrypt", body, "Connection: close"))
    assert "ciphertext" in line.must_answer("POST").ok()
    assert line.rest() == b""


# protocols that are not served


@pytest.mark.parametrize(
    "headers",
    [
        [
            b"Connection: Upgrade, HTTP2-Settings",
            b"Upgrade: h2c",
            b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
        ],
        [
            b"Connection: Upgrade",
            b"Upgrade: websocket",
            b"Sec-WebSocket-Version: 13",
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        ],
        [b"Connection: Upgrade", b"Upgrade: TLS/1.3"],
    ],
    ids=["h2c", "websocket", "tls"],
)
@pytest.mark.parametrize("path", [b"/healthz", b"/encrypt", b"/v1/keys"])
def test_an_upgrade_is_not_done(line: RawConnection, headers: list[bytes], path: bytes) -> None:
    """No request changes the protocol: never 101, but an HTTP/1.1 answer to the request or a refusal."""
    line.send(b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"\r\n".join(headers) + b"\r\n\r\n")
    assert_refused(line.response(), 200, 400, 404, 405, 426, 501)


def test_absolute_form_is_the_path(line: RawConnection) -> None:
    """A target in absolute form is served as its path (RFC 9112, 3.2.2) or refused, and never fetched."""
    line.send(b"GET https://localhost/healthz HTTP/1.1\r\n" + HOST + b"\r\n")
    assert_refused(line.response(), 200, 400, 404)


def test_absolute_form_of_another_host_is_not_fetched(line: RawConnection, service: DevService) -> None:
    """The service is no proxy: asked for its own probe port by URL, it does not go there."""
    line.send(f"GET {service.ready['admin_url']}/metrics HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert_refused(line.response(), 400, 403, 404, 421)


def test_connect_is_refused(line: RawConnection, service: DevService) -> None:
    """The service is no tunnel."""
    target = service.ready["admin_url"].removeprefix("http://").encode()
    line.send(b"CONNECT " + target + b" HTTP/1.1\r\nHost: " + target + b"\r\n\r\n")
    assert_refused(line.response("GET"), 400, 404, 405, 501)


@pytest.mark.parametrize("method", ["TRACE", "OPTIONS", "HEAD", "PROPFIND", "post", "ENCRYPT"])
def test_other_methods_are_405_or_400(line: RawConnection, method: str) -> None:
    """A method that the route doesn't name is refused; TRACE repeats nothing."""
    line.send(f"{method} /encrypt HTTP/1.1\r\nHost: localhost\r\nX-Marker: repeat-me\r\n\r\n".encode())
    answer = line.response(method)
    assert_refused(answer, 400, 405, 501)
    assert answer is None or b"repeat-me" not in answer.body


def test_after_all_this_the_service_serves(service: DevService, open_client: Callable[[str], Client]) -> None:
    """It is still the same process, and it answers."""
    assert service.process.poll() is None
    assert open_client("server").get("/healthz").status == 200

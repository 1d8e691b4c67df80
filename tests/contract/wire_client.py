"""A small client of the wire contract over the standard library: mutual TLS, Unix socket, raw bytes.

It knows HTTP and the shapes of the contract and nothing of the service's own code, so that a test
which passes here holds for a client that somebody else wrote.
"""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import msgspec

JSON = "application/json"
MSGPACK = "application/msgpack"
PROBLEM = "application/problem+json"
TIMEOUT = 60.0
"""Seconds after which a silent peer fails a test. A net for hung tests, never something that is measured."""
PATIENCE = 60.0
"""Seconds for which `batch` asks again."""

Connect = Callable[[], socket.socket]


def b64(data: bytes) -> str:
    """Return `data` in standard, padded base64."""
    return base64.b64encode(data).decode("ascii")


def unb64(text: object) -> bytes:
    """Return the bytes of standard base64, refusing all that is not its canonical form."""
    assert isinstance(text, str)
    data = base64.b64decode(text, validate=True)
    assert b64(data) == text, "not the canonical base64 of these bytes"
    return data


@dataclass(frozen=True)
class Answer:
    """One HTTP response, header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the body parsed as JSON; the Content-Type must say that it is."""
        assert self.media_type in {JSON, PROBLEM}, self.media_type
        return json.loads(self.body.decode("utf-8"))

    def msgpack(self) -> Any:
        """Return the body parsed as msgpack; the Content-Type must say that it is."""
        assert self.media_type == MSGPACK, self.media_type
        return msgspec.msgpack.decode(self.body)

    @property
    def media_type(self) -> str:
        """The Content-Type without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip()

    def ok(self) -> Any:
        """Return the JSON body of a success, whose status the contract fixes as 200."""
        assert self.status == 200, (self.status, self.body[:500])
        return self.json()


def assert_problem(answer: Answer, status: int, code: str) -> dict[str, Any]:
    """Assert that `answer` is the RFC 9457 problem with this status and code, and return it."""
    assert (answer.status, answer.media_type) == (status, PROBLEM), (answer.status, answer.body[:500])
    problem: dict[str, Any] = json.loads(answer.body)
    assert problem["code"] == code, problem
    members = {"type", "title", "status", "code", "detail", "retryable", "request_id"}
    members |= {"permission", "identity"} if code == "permission_denied" else set()
    assert set(problem) == members, problem
    assert problem["type"] == f"urn:progressdb-kms:error:{code}", problem
    assert problem["status"] == status, problem
    assert problem["title"], problem
    assert isinstance(problem["detail"], str), problem
    assert isinstance(problem["retryable"], bool), problem
    assert problem["request_id"] == answer.headers["x-request-id"], (problem, answer.headers)
    return problem


def assert_item_error(item: dict[str, Any], code: str) -> None:
    """Assert that this place of a batch's results holds the error `code` and nothing else."""
    assert set(item) == {"error"}, item
    assert set(item["error"]) == {"code", "detail", "retryable"}, item
    assert item["error"]["code"] == code, item
    assert isinstance(item["error"]["detail"], str), item
    assert isinstance(item["error"]["retryable"], bool), item


class _Pinned(http.client.HTTPConnection):
    """An HTTPConnection over a socket that somebody else makes."""

    def __init__(self, connect: Connect, host: str) -> None:
        super().__init__(host, timeout=TIMEOUT)
        self._make_socket = connect

    def connect(self) -> None:
        self.sock = self._make_socket()


class Client:
    """One keep-alive connection. Not for use by several threads at once."""

    def __init__(self, connect: Connect, host: str) -> None:
        self.connect = connect
        self.host = host
        self._connection = _Pinned(connect, host)

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        self._connection.close()

    def connect_no_more(self) -> None:
        """Hold to the connection that is open, as a client of a service that is about to be killed has to.

        A handshake with a service that has just died leaks its socket in Python's ssl module, and a leak is
        an error here.
        """

        def gone() -> socket.socket:
            raise ConnectionRefusedError

        self._connection._make_socket = gone

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send one request and read its answer, over a new connection if the server has closed this one."""
        reused = self._connection.sock is not None
        try:
            return self._once(method, path, body, headers)
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError):
            self.close()
            if not reused:
                raise
            return self._once(method, path, body, headers)

    def _once(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str] | None) -> Answer:
        self._connection.request(method, path, body=body, headers=dict(headers or {}))
        response = self._connection.getresponse()
        content = response.read()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, content)

    def get(self, path: str, params: Mapping[str, str] | None = None, **headers: str) -> Answer:
        """GET `path`; keyword arguments are headers, `X_Request_Id` meaning X-Request-Id."""
        query = f"?{urlencode(params)}" if params else ""
        return self.request("GET", path + query, headers=_names(headers))

    def post(self, path: str, value: object = None, **headers: str) -> Answer:
        """POST `value` as JSON (nothing at all where it is None)."""
        body = None if value is None else json.dumps(value).encode()
        named = ({} if value is None else {"Content-Type": JSON}) | _names(headers)
        return self.request("POST", path, body, named)

    def post_raw(self, path: str, body: bytes, content_type: str = JSON, **headers: str) -> Answer:
        """POST these very bytes."""
        return self.request("POST", path, body, {"Content-Type": content_type} | _names(headers))

    def post_msgpack(self, path: str, value: object, **headers: str) -> Answer:
        """POST `value` as msgpack and ask for msgpack."""
        named = {"Content-Type": MSGPACK, "Accept": MSGPACK} | _names(headers)
        return self.request("POST", path, msgspec.msgpack.encode(value), named)

    def batch(self, path: str, items: Sequence[Mapping[str, object]]) -> list[dict[str, Any]]:
        """Return the result of each item, as a client would get it that asks again for what may be retried.

        For tests whose subject is something else: a busy store's 503, for an item or for all, is no failure
        of theirs.
        Creates need an idempotency key each.
        """
        results: dict[int, dict[str, Any]] = {}
        left = list(range(len(items)))
        end = time.monotonic() + PATIENCE
        while left:
            answer = self.post(path, {"items": [items[number] for number in left]})
            if answer.status == 503:
                assert time.monotonic() < end, answer.body
                time.sleep(0.2)
                continue
            results |= dict(zip(left, answer.ok()["results"], strict=True))
            left = [number for number in left if results[number].get("error", {}).get("retryable")]
            assert not left or time.monotonic() < end, results[left[0]]
            time.sleep(0.2 if left else 0)
        return [results[number] for number in range(len(items))]

    # The verbs of the contract, for tests whose subject is something else.

    def create(self, thread_id: str, **headers: str) -> dict[str, str]:
        """Make a key for the thread; asked again where a busy disk kept the store from answering in time."""
        end = time.monotonic() + PATIENCE
        while True:
            answer = self.post("/create_dek_for_thread", {"thread_id": thread_id}, **headers)
            if answer.status != 503 or answer.json()["code"] != "store_unavailable" or time.monotonic() > end:
                made: dict[str, str] = answer.ok()
                return made
            time.sleep(0.2)

    def encrypt(self, key_id: str, plaintext: bytes, aad: bytes | None = None) -> bytes:
        """Return the ciphertext of `plaintext`."""
        body = {"key_id": key_id, "plaintext": b64(plaintext)} | ({} if aad is None else {"aad": b64(aad)})
        return unb64(self.post("/encrypt", body).ok()["ciphertext"])

    def try_decrypt(self, key_id: str, ciphertext: bytes, aad: bytes | None = None) -> Answer:
        """Ask for a decryption and return the answer whatever it is."""
        body = {"key_id": key_id, "ciphertext": b64(ciphertext)} | ({} if aad is None else {"aad": b64(aad)})
        return self.post("/decrypt", body)

    def decrypt(self, key_id: str, ciphertext: bytes, aad: bytes | None = None) -> bytes:
        """Return the plaintext of `ciphertext`."""
        return unb64(self.try_decrypt(key_id, ciphertext, aad).ok()["plaintext"])


def _names(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def tls_context(ca: Path, cert: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """Return a context that trusts `ca`, presents `cert` if there is one, and offers HTTP/1.1 alone."""
    context = ssl.create_default_context(cafile=str(ca))
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # Python's default from 3.13 on
    context.set_alpn_protocols(["http/1.1"])
    if cert is not None:
        context.load_cert_chain(cert, key)
    return context


def tls_connect(host: str, port: int, context: ssl.SSLContext) -> Connect:
    """Return what opens a TLS connection to the service."""
    open_tcp = tcp_connect(host, port)

    def connect() -> socket.socket:
        plain = open_tcp()
        try:
            return context.wrap_socket(plain, server_hostname=host)
        except BaseException:  # whatever it was, the socket must not outlive it
            plain.close()
            raise

    return connect


def tcp_connect(host: str, port: int) -> Connect:
    """Return what opens a plain TCP connection."""

    def connect() -> socket.socket:
        plain = socket.create_connection((host, port), timeout=TIMEOUT)
        # Or a request in two writes would wait for a delayed acknowledgement in between.
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return plain

    return connect


def unix_connect(path: str) -> Connect:
    """Return what opens a connection to the Unix socket at `path`."""

    def connect() -> socket.socket:
        plain = socket.socket(socket.AF_UNIX)
        try:
            plain.settimeout(TIMEOUT)
            plain.connect(path)
        except BaseException:  # whatever it was, the socket must not outlive it
            plain.close()
            raise
        return plain

    return connect


class RawConnection:
    """A connection on which a test sends any bytes it likes and reads whole responses, or the end."""

    def __init__(self, connect: Connect) -> None:
        self.socket = connect()
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send `data`, or as much of it as a server that has already answered and hung up will take."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return

    def response(self, method: str = "GET") -> Answer | None:
        """Read one response; None where the connection ends before the first byte of one."""
        head = self._until(b"\r\n\r\n")
        if head is None:
            return None
        status_line, *lines = head.decode("latin-1").split("\r\n")
        version, status, *_ = status_line.split(" ")
        assert version in {"HTTP/1.1", "HTTP/1.0"}, status_line
        headers = {}
        for line in lines:
            name, colon, value = line.partition(":")
            assert colon, line
            headers[name.lower()] = value.strip()
        return Answer(int(status), headers, self._body(method, int(status), headers))

    def must_answer(self, method: str = "GET") -> Answer:
        """Read one response, failing if the connection ends instead."""
        answer = self.response(method)
        assert answer is not None, "connection closed without an answer"
        return answer

    def rest(self) -> bytes:
        """Read until the connection ends."""
        while self._more():
            pass
        rest, self._buffer = self._buffer, b""
        return rest

    def _body(self, method: str, status: int, headers: dict[str, str]) -> bytes:
        if method == "HEAD" or status in {204, 304} or status < 200:
            return b""
        if "chunked" in headers.get("transfer-encoding", ""):
            body = b""
            while True:
                line = self._until(b"\r\n")
                assert line is not None
                size = int(line, 16)
                chunk = self._exactly(size + 2)
                assert chunk[size:] == b"\r\n"
                if size == 0:
                    return body
                body += chunk[:size]
        if "content-length" in headers:
            return self._exactly(int(headers["content-length"]))
        return self.rest()

    def _until(self, mark: bytes) -> bytes | None:
        while mark not in self._buffer:
            if not self._more():
                assert not self._buffer, f"cut off in the middle of a response: {self._buffer[:200]!r}"
                return None
        found, _, self._buffer = self._buffer.partition(mark)
        return found

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            assert self._more(), "cut off in the middle of a body"
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def _more(self) -> bool:
        # A reset and a TLS connection that ends without close_notify are ends, too: which of them a
        # test sees depends on whether the server had unread bytes when it hung up.
        try:
            data = self.socket.recv(65536)
        except (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return False
        self._buffer += data
        return bool(data)

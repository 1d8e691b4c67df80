"""A service for the client to speak to: the wire contract, with switches to fail.

Written from the contract, apart from the real service, so that each can be wrong alone.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import socket
import socketserver
import ssl
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.client.pki import Pair

FIELDS = ("kek_id", "kek_version", "key_version")
BATCHES = {"/create_dek_batch", "/encrypt_batch", "/decrypt_batch"}


class ProblemError(Exception):
    """What the service refuses with."""

    def __init__(self, status: int, code: str, **extra: Any) -> None:
        super().__init__(code)
        self.status, self.code, self.extra = status, code, extra


@dataclass(frozen=True)
class Seen:
    """A request as it came; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    query: dict[str, str]
    connection: int
    serial: int | None


@dataclass
class Key:
    """A made key."""

    key_id: str
    thread_id: str
    version: int
    cipher: AESGCM
    state: str = "enabled"
    waiting_days: int | None = None


Fault = Callable[["Handler"], bool]
"""Runs in place of a request's answer; True lets the answer follow all the same."""


@dataclass
class StandIn:
    """The running stand-in: its address, what it saw, and what it shall do next."""

    url: str = ""
    old: bool = False
    """Answer as the older service: no optional fields, no batches, errors in plain text."""
    max_items: int = 10_000
    page: int = 2
    tls: ssl.SSLContext | None = None
    seen: list[Seen] = field(default_factory=list)
    faults: deque[Fault] = field(default_factory=deque)
    always: Fault | None = None
    keys: dict[str, Key] = field(default_factory=dict)
    by_idempotency: dict[str, Key] = field(default_factory=dict)
    stopping: threading.Event = field(default_factory=threading.Event)
    sockets: list[socket.socket] = field(default_factory=list)
    counter: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def connections(self) -> set[int]:
        """Numbers of the connections that carried requests."""
        return {request.connection for request in self.seen}

    def close_connections(self) -> None:
        """Close what is open, as a service does that ends or tires of idle connections."""
        with self.lock:
            sockets, self.sockets = self.sockets, []
        for sock in sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the client was quicker

    # what the routes do

    def create(self, thread_id: str, idempotency_key: str | None) -> dict[str, Any]:
        """Make a key, or find the one of this idempotency key."""
        if not thread_id:
            raise ProblemError(400, "invalid_thread_id")
        if idempotency_key is not None and idempotency_key in self.by_idempotency:
            return self.describe(self.by_idempotency[idempotency_key])
        with self.lock:
            version = 1 + sum(key.thread_id == thread_id for key in self.keys.values())
            key = Key(f"k_{len(self.keys):028d}", thread_id, version, AESGCM(os.urandom(32)))
            self.keys[key.key_id] = key
        if idempotency_key is not None:
            self.by_idempotency[idempotency_key] = key
        return self.describe(key)

    def describe(self, key: Key) -> dict[str, Any]:
        """Return a create's answer."""
        return {
            "key_id": key.key_id,
            "wrapped": b"wrapped-" + key.key_id.encode(),
            "kek_id": "kek_1",
            "kek_version": "1",
            "key_version": str(key.version),
        }

    def find(self, key_id: str) -> Key:
        """Return a key that exists."""
        try:
            return self.keys[key_id]
        except KeyError:
            raise ProblemError(404, "key_not_found") from None

    def encrypt(self, key_id: str, plaintext: bytes, aad: bytes | None = None) -> dict[str, Any]:
        """Encrypt for real."""
        key = self.usable(key_id)
        nonce = os.urandom(12)
        return {
            "ciphertext": nonce + key.cipher.encrypt(nonce, plaintext, aad),
            "key_version": str(key.version),
        }

    def decrypt(self, key_id: str, ciphertext: bytes, aad: bytes | None = None) -> dict[str, Any]:
        """Decrypt for real."""
        key = self.usable(key_id)
        if len(ciphertext) < 28:
            raise ProblemError(400, "malformed_ciphertext")
        try:
            return {"plaintext": key.cipher.decrypt(ciphertext[:12], ciphertext[12:], aad)}
        except InvalidTag:
            raise ProblemError(422, "authentication_failed") from None

    def usable(self, key_id: str) -> Key:
        """Return a key whose state lets it be used."""
        key = self.find(key_id)
        if key.state != "enabled":
            raise ProblemError(409, f"key_{key.state}")
        return key

    def info(self, key: Key) -> dict[str, Any]:
        """Return a key's metadata."""
        made = {"created_at": "2026-01-01T00:00:00Z", "created_by": "dns:chat", "uses": 3}
        made |= {"changed_at": "2026-01-02T00:00:00Z", "kek_id": "kek_1", "kek_version": 1}
        made |= {"key_id": key.key_id, "thread_id": key.thread_id, "version": key.version, "state": key.state}
        if key.waiting_days is not None:
            made["destroy_at"] = f"2026-01-{key.waiting_days:02d}T00:00:00Z"
        return made

    def listing(self, query: dict[str, str]) -> dict[str, Any]:
        """Return one page."""
        found = [
            self.info(key)
            for key in self.keys.values()
            if query.get("thread_id") in {None, key.thread_id} and query.get("state") in {None, key.state}
        ]
        size = min(self.page, int(query.get("limit", self.page)))
        start = int(query.get("cursor", "0"))
        after = start + size
        return {"keys": found[start:after], "cursor": str(after) if after < len(found) else None}

    def change(self, key_id: str, verb: str, body: dict[str, Any]) -> dict[str, Any]:
        """Change a key's state."""
        key = self.find(key_id)
        if verb == "enable" and key.state == "pending_destruction":
            raise ProblemError(409, "invalid_transition")
        key.waiting_days = body.get("waiting_days", 30) if verb == "schedule-destruction" else None
        states = {"enable": "enabled", "schedule-destruction": "pending_destruction"}
        key.state = states.get(verb, "disabled")
        return self.info(key)

    def route(self, seen: Seen, body: dict[str, Any]) -> Any:  # noqa: C901, PLR0911 - one line for each route
        """Find what the request asks for, and do it."""
        token = seen.headers.get("idempotency-key")
        match seen.method, *seen.path.strip("/").split("/"):
            case "POST", "create_dek_for_thread":
                return self.create(body["thread_id"], token)
            case "POST", "encrypt":
                return self.encrypt(**body)
            case "POST", "decrypt":
                return self.decrypt(**body)
            case "GET", "get_wrapped":
                return self.describe(self.find(seen.query["key_id"]))
            case "GET", "healthz":
                return {"status": "ok"}
            case "POST", "rewrap":
                return self.describe(self.find(body["key_id"])) | {"kek_version": "2"}
            case "POST", ("create_dek_batch" | "encrypt_batch" | "decrypt_batch") as name if not self.old:
                return self.batch(name.removesuffix("_batch"), body["items"])
            case "GET", "v1", "keys":
                return self.listing(seen.query)
            case "GET", "v1", "keys", key_id:
                return self.info(self.find(unquote(key_id)))
            case "POST", "v1", "keys", key_id, verb:
                return self.change(unquote(key_id), verb, body)
            case "GET", "v1", "keks":
                kek = {"version": 1, "kek_id": "kek_1", "state": "active", "source": "file", "deks": 2}
                return {"active": 1, "keks": [kek | {"wraps": 2, "loaded": True, "new_member": 1}]}
            case "GET", "openapi.json":
                return {"openapi": "3.1.0"}
        raise ProblemError(404, "route_not_found")

    def batch(self, name: str, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Do the same for each item."""
        if len(items) > self.max_items:
            raise ProblemError(413, "batch_too_large")
        results = []
        for item in items:
            try:
                if name == "create_dek":
                    results.append(self.create(item["thread_id"], item.get("idempotency_key")))
                else:
                    results.append(getattr(self, name)(**item))
            except ProblemError as error:
                again = error.status in {429, 503}
                results.append({"error": {"code": error.code, "detail": "no", "retryable": again}})
        return {"results": results}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = False
    wbufsize = -1
    standin: StandIn
    serial: int | None = None

    def setup(self) -> None:
        """Number the connection."""
        self.number = next(self.standin.counter)
        with self.standin.lock:
            self.standin.sockets.append(self.request)
        super().setup()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Stay silent."""

    def handle(self) -> None:
        """Serve the connection's requests."""
        try:
            super().handle()
        except OSError:
            return  # the client, or a fault, has closed the connection

    def finish(self) -> None:
        """End the connection."""
        try:
            super().finish()
        except OSError:
            return  # likewise

    def do_GET(self) -> None:
        """Answer."""
        self._answer()

    def do_POST(self) -> None:
        """Answer."""
        self._answer()

    def _answer(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = dict(parse_qsl(parts.query))
        self.seen = Seen(self.command, parts.path, headers, raw, query, self.number, self.serial)
        self.standin.seen.append(self.seen)
        fault = self.standin.faults.popleft() if self.standin.faults else self.standin.always
        if fault is None or fault(self):
            self.carry_out()

    def carry_out(self) -> None:
        """Do what the request asks, and answer."""
        try:
            answer = self.standin.route(self.seen, self._decode(self.seen.body))
        except ProblemError as error:
            self.problem(error)
            return
        if self.standin.old:
            self.send(200, json.dumps(_base64_values(answer, drop=FIELDS)).encode(), {})
        elif self.seen.headers["accept"].startswith("application/msgpack"):
            self.send(200, msgspec.msgpack.encode(answer), {"Content-Type": "application/msgpack"})
        else:
            body = json.dumps(_base64_values(answer)).encode()
            self.send(200, body, {"Content-Type": "application/json"})

    def problem(self, error: ProblemError, headers: dict[str, str] | None = None) -> None:
        """Answer with a problem document, or as the older service does."""
        if self.standin.old:
            text = {"route_not_found": "404 page not found"}.get(error.code, error.code.replace("_", " "))
            if error.code == "authentication_failed":
                text = "cipher: message authentication failed"
            self.send(error.status, f"{text}\n".encode(), {"Content-Type": "text/plain; charset=utf-8"})
            return
        request_id = self.seen.headers.get("x-request-id", "")
        body = {"type": f"urn:progressdb-kms:error:{error.code}", "title": "T", "status": error.status}
        body |= {"code": error.code, "detail": f"detail of {error.code}", "request_id": request_id}
        body |= {"retryable": error.status in {429, 503}} | error.extra
        content_type = {"Content-Type": "application/problem+json"}
        self.send(error.status, json.dumps(body).encode(), content_type | (headers or {}))

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """Write an answer."""
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _decode(self, raw: bytes) -> dict[str, Any]:
        if not raw:
            return {}
        if self.headers["Content-Type"] == "application/msgpack":
            return msgspec.msgpack.decode(raw)
        return _raw_values(json.loads(raw))


BINARY = {"plaintext", "ciphertext", "aad", "wrapped"}


def _raw_values(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _raw_values(member, key) for key, member in value.items()}
    if isinstance(value, list):
        return [_raw_values(member) for member in value]
    return base64.b64decode(value, validate=True) if name in BINARY else value


def _base64_values(value: Any, drop: tuple[str, ...] = ()) -> Any:
    if isinstance(value, dict):
        return {key: _base64_values(member, drop) for key, member in value.items() if key not in drop}
    if isinstance(value, list):
        return [_base64_values(member, drop) for member in value]
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


class _Threads(socketserver.ThreadingMixIn):
    daemon_threads = True
    block_on_close = False
    standin: StandIn

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Do the handshake here, in the connection's own thread."""
        attributes: dict[str, Any] = {"standin": self.standin, "serial": None}
        if self.standin.tls is not None:
            request = self.standin.tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
            try:
                request.do_handshake()
            except OSError:
                _linger(request)
                return
            certificate = request.getpeercert()
            if certificate:
                attributes["serial"] = int(certificate["serialNumber"], 16)
        try:
            type("BoundHandler", (Handler,), attributes)(request, client_address, self)
        finally:
            if isinstance(request, ssl.SSLSocket):
                request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent: tests look at what the client makes of it."""


def _linger(sock: ssl.SSLSocket) -> None:
    """Let the client read why it was refused: a reset would overtake that."""
    with sock:
        try:
            sock.settimeout(5)
            socket.socket.shutdown(sock, socket.SHUT_WR)
            while socket.socket.recv(sock, 4096):
                pass
        except OSError:
            return  # the client went away first


class _Tcp(_Threads, socketserver.TCPServer):
    allow_reuse_address = True
    request_queue_size = 64


class _Unix(_Threads, socketserver.UnixStreamServer):
    request_queue_size = 64


class Running:
    """Runs a stand-in in threads until it is closed."""

    def __init__(self, standin: StandIn, address: Path | None = None, scheme: str = "https") -> None:
        self.standin = standin
        self._server: _Tcp | _Unix
        if address is not None:
            self._server = _Unix(str(address), Handler)
            standin.url = f"unix://{address}"
        else:
            self._server = _Tcp(("127.0.0.1", 0), Handler)
            standin.url = f"{scheme}://localhost:{self._server.server_address[1]}"
        self._server.standin = standin
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def __enter__(self) -> StandIn:
        return self.standin

    def __exit__(self, *_: object) -> None:
        self.standin.stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self.standin.close_connections()


def server_context(pair: Pair, client_ca: Path) -> ssl.SSLContext:
    """Return a context that asks for a client certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(pair.cert, pair.key)
    context.load_verify_locations(client_ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0
    return context

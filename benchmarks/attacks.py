"""The attacks that ``abuse.py`` measures, each at a rate that is bounded and counted."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import collections
    from collections.abc import Awaitable, Callable

    Outcomes = collections.Counter[str]
    Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]
    One = Callable[["Target", Outcomes], Awaitable[None]]

UNDER_WAY = 400
"""Attempts that the attacker has under way at most."""
PATIENCE = 4.0
"""Seconds that the attacker waits for what happens to an attempt."""
HELLO = bytes.fromhex("16030100f8010000f40303") + bytes(32)
"""The beginning of a ClientHello whose record says that 248 bytes follow."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@dataclass(frozen=True)
class Target:
    """Where the service is, and who may call it."""

    host: str
    port: int
    ca: str
    certificates: dict[str, tuple[str, str]]
    key_id: str
    contexts: dict[str, ssl.SSLContext] = field(default_factory=dict, compare=False)

    async def tcp(self) -> Line:
        """Open a TCP connection."""
        return await asyncio.open_connection(self.host, self.port)

    async def tls(self, who: str, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> Line:
        """Open a TLS connection as ``server``, ``stranger``, or with no certificate as ``nobody``."""
        context = self.contexts.get(who + newest.name)
        if context is None:
            context = ssl.create_default_context(cafile=self.ca)
            context.maximum_version = newest
            if who in self.certificates:
                context.load_cert_chain(*self.certificates[who])
            self.contexts[who + newest.name] = context
        return await asyncio.open_connection(self.host, self.port, ssl=context, server_hostname=self.host)

    def post(self, path: str, body: bytes, *lines: str, length: bool = True) -> bytes:
        """Return a POST of JSON."""
        head = [f"POST {path} HTTP/1.1", f"Host: {self.host}:{self.port}", "Content-Type: application/json"]
        if length:
            head.append(f"Content-Length: {len(body)}")
        return "\r\n".join([*head, *lines]).encode() + b"\r\n\r\n" + body


@dataclass(frozen=True)
class Attack:
    """An attack: attempts begun at a fixed rate; limits of the policy that hold for its identity."""

    name: str
    title: str
    rate: float
    one: One
    limits: dict[str, int] | None = None
    identity: str = ""

    async def run(self, target: Target, seconds: float, outcomes: Outcomes) -> None:
        """Begin attempts for so long, at most ``UNDER_WAY`` at once, and count what becomes of them."""
        began = time.perf_counter()
        tasks: set[asyncio.Task[None]] = set()
        number = 0
        while (now := time.perf_counter() - began) < seconds:
            while number < now * self.rate and len(tasks) < UNDER_WAY:
                task = asyncio.create_task(self._attempt(target, outcomes))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                number += 1
            # What could not be begun in time is not made up for.
            number = max(number, int(now * self.rate))
            await asyncio.sleep(0.002)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _attempt(self, target: Target, outcomes: Outcomes) -> None:
        outcomes["made"] += 1
        try:
            async with asyncio.timeout(PATIENCE):
                await self.one(target, outcomes)
        except TimeoutError:
            outcomes["held open"] += 1
        except ssl.SSLError as error:
            outcomes[f"alert: {(error.reason or 'TLS').lower().replace('_', ' ')}"] += 1
        except (OSError, asyncio.IncompleteReadError):
            outcomes["hung up"] += 1


async def _answers(line: Line, outcomes: Outcomes, most: int = 1) -> None:
    """Count the statuses that come, up to so many, or that the peer hangs up."""
    reader, _ = line
    for _number in range(most):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            outcomes["hung up"] += 1
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
        await reader.readexactly(length)
        outcomes[head.split(b" ", 2)[1].decode()] += 1


@contextlib.asynccontextmanager
async def _closing(line: Line) -> Any:  # noqa: ANN401 - a generator of a line
    try:
        yield line
    finally:
        line[1].transport.abort()


async def _stall(data: bytes, target: Target, outcomes: Outcomes) -> None:
    """Send what is not a whole handshake, and wait."""
    async with _closing(await target.tcp()) as line:
        line[1].write(data)
        await line[0].read()
        outcomes["hung up"] += 1


async def _connect(target: Target, outcomes: Outcomes) -> None:
    async with _closing(await target.tcp()):
        outcomes["closed by the attacker"] += 1


async def _handshake(who: str, newest: ssl.TLSVersion, target: Target, outcomes: Outcomes) -> None:
    async with _closing(await target.tls(who, newest)) as line:
        # In TLS 1.3 a client learns only by reading that its certificate was refused.
        line[1].write(target.post("/encrypt", b"{}"))
        await _answers(line, outcomes)


async def _say(
    who: str, message: Callable[[Target], bytes], most: int, target: Target, outcomes: Outcomes
) -> None:
    async with _closing(await target.tls(who)) as line:
        line[1].write(message(target))
        await _answers(line, outcomes, most)


async def _dribble(start: Callable[[Target], bytes], target: Target, outcomes: Outcomes) -> None:
    """Send the beginning, then a byte every 100 ms."""
    async with _closing(await target.tls("stranger")) as line:
        line[1].write(start(target))
        answer = asyncio.ensure_future(_answers(line, outcomes))
        try:
            while not answer.done():
                line[1].write(b"x")
                await asyncio.sleep(0.1)
        finally:
            answer.cancel()


def _raw(*lines: str, body: bytes = b"{}") -> Callable[[Target], bytes]:
    def message(target: Target) -> bytes:
        return (
            "\r\n".join(["POST /encrypt HTTP/1.1", f"Host: {target.host}", *lines]).encode()
            + b"\r\n\r\n"
            + body
        )

    return message


def _batch(target: Target) -> bytes:
    item = {"key_id": target.key_id, "plaintext": base64.b64encode(b"m" * 256).decode()}
    return target.post("/encrypt_batch", json.dumps({"items": [item] * 10_000}).encode())


def _body(size: int) -> Callable[[Target], bytes]:
    return lambda target: target.post("/encrypt", b'{"plaintext":"' + b"A" * size + b'"}')


def _flood(target: Target) -> bytes:
    return target.post("/encrypt", b"{}", *(f"X-Flood-{number}: {'x' * 60}" for number in range(2_000)))


_MIB = 2**20
_OLD, _NEW = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
_DEEP = 100
_SLOW_HEAD = b"POST /encrypt HTTP/1.1\r\nHost: x\r\nX-Slow: "

ATTACKS = [
    Attack("silent", "TCP connection, no ClientHello", 200, partial(_stall, b"")),
    Attack("half-hello", "half a ClientHello", 200, partial(_stall, HELLO)),
    Attack("tcp-flood", "TCP connections, closed at once", 2_000, _connect),
    Attack("no-certificate", "handshakes without a certificate", 50, partial(_handshake, "nobody", _NEW)),
    Attack("no-grant", "handshakes and a request without a grant", 50, partial(_handshake, "stranger", _NEW)),
    Attack(
        "no-certificate-fast",
        "the same without a certificate, faster",
        200,
        partial(_handshake, "nobody", _NEW),
    ),
    Attack("tls12", "TLS 1.2, where renegotiation would be", 200, partial(_handshake, "stranger", _OLD)),
    Attack("slow-headers", "slow headers", 20, partial(_dribble, lambda _: _SLOW_HEAD)),
    Attack(
        "slow-bodies",
        "slow bodies",
        20,
        partial(_dribble, lambda t: t.post("/encrypt", b"{" * 90_000)[:-80_000]),
    ),
    Attack(
        "cl-te",
        "Content-Length and Transfer-Encoding",
        20,
        partial(_say, "stranger", _raw("Content-Length: 2", "Transfer-Encoding: chunked"), 1),
    ),
    Attack(
        "two-cl",
        "two Content-Lengths",
        20,
        partial(_say, "stranger", _raw("Content-Length: 2", "Content-Length: 3"), 1),
    ),
    Attack("odd-cl", "Content-Length: +2", 20, partial(_say, "stranger", _raw("Content-Length: +2"), 1)),
    Attack(
        "absolute",
        "absolute-form",
        20,
        partial(
            _say,
            "stranger",
            lambda _: b"GET http://other.example/healthz HTTP/1.1\r\nHost: other.example\r\n\r\n",
            1,
        ),
    ),
    Attack(
        "connect",
        "CONNECT",
        20,
        partial(_say, "stranger", lambda _: b"CONNECT other:443 HTTP/1.1\r\nHost: other:443\r\n\r\n", 1),
    ),
    Attack("preface", "HTTP/2 preface", 20, partial(_say, "stranger", lambda _: PREFACE, 1)),
    Attack(
        "pipelining",
        "100 requests in one piece, no grant",
        2,
        partial(_say, "stranger", lambda t: t.post("/encrypt", b"{}") * _DEEP, _DEEP),
    ),
    Attack("header-flood", "2,000 headers", 20, partial(_say, "stranger", _flood, 1)),
    Attack("body-under", "body just under 2 MiB", 5, partial(_say, "stranger", _body(2 * _MIB - 100), 1)),
    Attack("body-over", "body just over 2 MiB", 5, partial(_say, "stranger", _body(2 * _MIB), 1)),
    Attack("batches", "batches of 10,000, with a grant", 2, partial(_say, "server", _batch, 1)),
    Attack(
        "batches-limited",
        "the same, limited to 1,000 operations/s",
        2,
        partial(_say, "operator", _batch, 1),
        {"operations_per_second": 1_000, "burst": 1_000},
        "dns:operator",
    ),
]

"""A small ASGI app that does what a test's path asks for."""

# ruff: noqa: ARG002 - every route gets an ASGI app's three arguments

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any


class App:
    """Answers by path.

    Attributes:
        gate: ``/wait`` answers when it is set.
        waiting: Set when a request has come to ``/wait`` or ``/deaf``.
        gone: Set when a waiting request is told that its peer has gone.
        scopes: The scopes of all requests.
        received: Bytes of bodies that ``/slowly`` has taken.
    """

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.waiting = asyncio.Event()
        self.gone = asyncio.Event()
        self.scopes: list[dict[str, Any]] = []
        self.received = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        assert scope["type"] == "http"
        self.scopes.append(scope)
        await getattr(self, "on_" + scope["path"].strip("/"))(scope, receive, send)

    async def on_who(self, scope: Any, receive: Any, send: Any) -> None:
        """Tell what the connection proved."""
        identity, session = scope["state"].get("kms.identity"), scope["state"].get("kms.session")
        await answer(send, json.dumps({"identity": str(identity), "session": session}).encode())

    async def on_echo(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer with the body and the query."""
        await answer(send, scope["query_string"] + await whole_body(receive))

    async def on_wait(self, scope: Any, receive: Any, send: Any) -> None:
        """Read the body, then wait for the gate or for the peer to go."""
        await whole_body(receive)
        self.waiting.set()
        gone = asyncio.ensure_future(receive())
        gate = asyncio.ensure_future(self.gate.wait())
        try:
            done, _ = await asyncio.wait([gone, gate], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (gone, gate):
                task.cancel()
        if gone in done:
            self.gone.set()
        else:
            await answer(send, b"waited")

    async def on_hang(self, scope: Any, receive: Any, send: Any) -> None:
        """Never answer and never look whether the peer is there."""
        self.waiting.set()
        await asyncio.Event().wait()

    async def on_stubborn(self, scope: Any, receive: Any, send: Any) -> None:
        """Wait for the gate, whatever happens."""
        self.waiting.set()
        while not self.gate.is_set():
            with suppress(asyncio.CancelledError):
                await self.gate.wait()

    async def on_early(self, scope: Any, receive: Any, send: Any) -> None:
        """Refuse without reading the body."""
        await answer(send, b"too large", status=413)

    async def on_slowly(self, scope: Any, receive: Any, send: Any) -> None:
        """Wait for the gate, then read the body."""
        self.waiting.set()
        await self.gate.wait()
        self.received = len(await whole_body(receive))
        await answer(send, b"read")

    async def on_large(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer with as many bytes as the query says."""
        await answer(send, bytes(int(scope["query_string"])))

    async def on_last(self, scope: Any, receive: Any, send: Any) -> None:
        """Let this answer be the last one."""
        scope["state"]["kms.connection"].close_after_response()
        await answer(send, b"last")

    async def on_crash(self, scope: Any, receive: Any, send: Any) -> None:
        """Fail."""
        raise RuntimeError("do not show this")

    async def on_silent(self, scope: Any, receive: Any, send: Any) -> None:
        """Return without an answer."""

    async def on_cut(self, scope: Any, receive: Any, send: Any) -> None:
        """Promise more bytes than are sent."""
        head = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]}
        await send(head)
        await send({"type": "http.response.body", "body": b"short", "more_body": False})


async def whole_body(receive: Any) -> bytes:
    """Read a request's body; ends early where the peer goes."""
    body = b""
    while True:
        event = await receive()
        body += event.get("body", b"")
        if not event.get("more_body"):
            return body


async def answer(send: Any, body: bytes, status: int = 200) -> None:
    """Send an answer."""
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

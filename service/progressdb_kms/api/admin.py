"""The admin port's app: probes and metrics over plain HTTP, and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Scope = dict[str, Any]
    Receive = Callable[[], Awaitable[dict[str, Any]]]
    Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class AdminApp:
    """A bare ASGI app: the kubelet and Prometheus ask it often, and a framework would add nothing.

    Attributes:
        dead: Says what hangs, one line each; empty when nothing does.
        unready: Says why the service is not ready, one line each; empty when it is.
        metrics: Gives the exposition.
        metrics_type: Its Content-Type.
    """

    dead: Callable[[], list[str]]
    unready: Callable[[], list[str]]
    metrics: Callable[[], bytes]
    metrics_type: str

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        status, content_type, body = self._answer(scope["method"], scope["path"])
        headers = [
            (b"content-type", content_type.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        if status == 405:  # noqa: PLR2004 - RFC 9110: such an answer says what is allowed
            headers.append((b"allow", b"GET, HEAD"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def _answer(self, method: str, path: str) -> tuple[int, str, bytes]:
        if path not in {"/livez", "/readyz", "/metrics"}:
            return 404, "text/plain", b"only /livez, /readyz and /metrics are here\n"
        if method not in {"GET", "HEAD"}:
            return 405, "text/plain", b"only GET and HEAD\n"
        if path == "/metrics":
            return 200, self.metrics_type, self.metrics()
        word, reasons = ("unready", self.unready()) if path == "/readyz" else ("hangs", self.dead())
        document = {"status": word, "reasons": reasons} if reasons else {"status": "ok"}
        return (503 if reasons else 200), "application/json", json.dumps(document).encode() + b"\n"

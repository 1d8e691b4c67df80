"""The admin port: three paths, two methods."""

from __future__ import annotations

import json
from typing import Any

import pytest

from progressdb_kms.api.admin import AdminApp


async def ask(
    method: str, path: str, reasons: list[str] | None = None
) -> tuple[int, dict[bytes, bytes], bytes]:
    """Send one request."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {}

    app = AdminApp(list, lambda: reasons or [], lambda: b"kms_up 1\n", "text/plain; version=0.0.4")
    await app({"type": "http", "method": method, "path": path}, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


@pytest.mark.parametrize(
    "path, reasons, status", [("/livez", ["x"], 200), ("/readyz", [], 200), ("/readyz", ["x"], 503)]
)
async def test_probes(path: str, reasons: list[str], status: int) -> None:
    """Live is the process; ready names each reason why not."""
    got, headers, body = await ask("GET", path, reasons)
    assert got == status
    answer = json.loads(body)
    assert answer == ({"status": "unready", "reasons": ["x"]} if status == 503 else {"status": "ok"})
    assert headers[b"cache-control"] == b"no-store"
    got, headers, empty = await ask("HEAD", path, reasons)
    assert (got, empty) == (status, b"")
    assert int(headers[b"content-length"]) == len(body)


async def test_metrics() -> None:
    """The exposition with its type."""
    status, headers, body = await ask("GET", "/metrics")
    assert (status, body) == (200, b"kms_up 1\n")
    assert headers[b"content-type"].startswith(b"text/plain; version=0.0.4")


@pytest.mark.parametrize("path", ["/", "/encrypt", "/v1/keys", "/livez/", "/metrics/x"])
async def test_nothing_else_is_there(path: str) -> None:
    """No route of the API answers without a certificate."""
    status, _, _ = await ask("GET", path)
    assert status == 404


async def test_only_reading() -> None:
    """405 says what is allowed."""
    status, headers, _ = await ask("POST", "/livez")
    assert (status, headers[b"allow"]) == (405, b"GET, HEAD")


async def test_other_protocols_are_ignored() -> None:
    """Lifespan and the like are no requests."""

    async def never(*_: Any) -> Any:
        raise AssertionError

    await AdminApp(list, list, bytes, "")({"type": "lifespan"}, never, never)


async def test_liveness_names_what_hangs() -> None:
    """Of several workers one that hangs fails the probe, with a reason."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {}

    app = AdminApp(lambda: ["worker 1 hangs"], list, bytes, "")
    await app({"type": "http", "method": "GET", "path": "/livez"}, receive, send)
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"]) == {"status": "hangs", "reasons": ["worker 1 hangs"]}

"""Ways in which the stand-in fails, one request at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from tests.client.standin import Fault, Handler, ProblemError


def refuse(status: int, code: str, headers: dict[str, str] | None = None, **extra: Any) -> Fault:
    """Answer with a problem document."""

    def fault(handler: Handler) -> bool:
        handler.problem(ProblemError(status, code, **extra), headers)
        return False

    return fault


def plain(status: int, text: bytes, headers: dict[str, str] | None = None) -> Fault:
    """Answer with any body."""

    def fault(handler: Handler) -> bool:
        handler.send(status, text, headers or {"Content-Type": "text/plain"})
        return False

    return fault


def raw(content: bytes, *, close: bool = True) -> Fault:
    """Write bytes in place of an answer."""

    def fault(handler: Handler) -> bool:
        handler.wfile.write(content)
        handler.wfile.flush()
        handler.close_connection = close
        return False

    return fault


def drop(handler: Handler) -> bool:
    """Close the connection without an answer."""
    handler.close_connection = True
    return False


def drop_after_work(handler: Handler) -> bool:
    """Carry the request out, then close the connection without an answer."""
    handler.standin.route(handler.seen, handler._decode(handler.seen.body))
    return drop(handler)


def hang(handler: Handler) -> bool:
    """Never answer."""
    handler.standin.stopping.wait()
    return drop(handler)


def hang_and_tell(started: threading.Event) -> Fault:
    """Never answer, and say when that has begun."""

    def fault(handler: Handler) -> bool:
        started.set()
        return hang(handler)

    return fault


def drip(handler: Handler) -> bool:
    """Send a header now and then, and never an end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not handler.standin.stopping.wait(0.02):
        handler.wfile.write(b"X-Drip: 1\r\n")
        handler.wfile.flush()
    return drop(handler)


def say_close(handler: Handler) -> bool:
    """Answer, and announce the end of the connection by its header."""
    handler.send_response = _with_close(handler)  # type: ignore[method-assign]
    return True


def _with_close(handler: Handler) -> Callable[..., None]:
    original = handler.send_response

    def send_response(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        handler.send_header("Connection", "close")

    return send_response

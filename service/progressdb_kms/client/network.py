"""What both HTTP senders share: pool settings, and the driver's errors in this package's words."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from typing import Any, Final, TypedDict

import h11
import httpcore

from progressdb_kms.client.endpoint import Endpoint
from progressdb_kms.client.errors import ConnectionFailed, ProtocolViolation
from progressdb_kms.client.protocol import MAX_ANSWER_BYTES, Reply
from progressdb_kms.client.tls import NO_CERTIFICATE, tls_failure
from progressdb_kms.domain.errors import DeadlineExceeded, KmsError

CONNECT_TIMEOUT: Final = 1.0
MAX_CONNECTIONS: Final = 32
KEEPALIVE_SECONDS: Final = 60.0
"""The service closes a connection that was idle for 75 s; a client that is quicker never meets that."""

DRIVER_ERRORS: Final = (
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.UnsupportedProtocol,
    # Both drivers let some errors of TLS and of sockets through as they are.
    OSError,
)


class PoolSettings(TypedDict):
    """Arguments that httpcore's async and sync pools have in common."""

    ssl_context: ssl.SSLContext | None
    uds: str | None
    max_connections: int
    max_keepalive_connections: int
    keepalive_expiry: float
    http1: bool
    http2: bool
    retries: int


def pool_settings(endpoint: Endpoint, context: ssl.SSLContext | None, max_connections: int) -> PoolSettings:
    """Return the settings of a pool. The driver's own retries are off: it knows no deadline."""
    return {
        "ssl_context": context,
        "uds": endpoint.uds,
        "max_connections": max_connections,
        "max_keepalive_connections": max_connections,
        "keepalive_expiry": KEEPALIVE_SECONDS,
        "http1": True,
        "http2": False,
        "retries": 0,
    }


def translate(error: BaseException, endpoint: Endpoint) -> KmsError:  # noqa: PLR0911 - one line for each kind
    """Return what to raise for one of ``DRIVER_ERRORS``."""
    if isinstance(error, httpcore.ConnectTimeout):
        return ConnectionFailed(f"no connection to {endpoint} in time")
    if isinstance(error, httpcore.PoolTimeout):
        return DeadlineExceeded(
            f"all connections to {endpoint} were busy; raise max_connections or call less at once"
        )
    if isinstance(error, httpcore.TimeoutException):
        return DeadlineExceeded(f"{endpoint} did not answer in time")
    if isinstance(error, httpcore.ProtocolError):
        if _disconnected(error):
            return _broken(endpoint)
        return ProtocolViolation(f"what {endpoint} sent is not HTTP/1.1")
    cause = _cause(error)
    refused = tls_failure(cause, str(endpoint))
    if refused is not None:
        return refused
    if isinstance(error, httpcore.ConnectError):
        return ConnectionFailed(f"no connection to {endpoint}: {_reason(cause)}")
    return _broken(endpoint)


def _broken(endpoint: Endpoint) -> ConnectionFailed:
    """Return the error of a connection that ended too early.

    A service that refuses a client's certificate says so in TLS, but the request that is already on its
    way can make the network drop that message: so a broken connection may be a refusal.
    """
    hint = ""
    if endpoint.tls is not None:
        given = endpoint.tls.cert is not None
        hint = "its log says whether it refuses the certificate" if given else NO_CERTIFICATE
        hint = f"; if it goes on: {hint}"
    return ConnectionFailed(f"the connection to {endpoint} broke{hint}")


def _cause(error: BaseException) -> BaseException | None:
    """Return what the driver made ``error`` of; its pool cuts ``__cause__`` off, ``__context__`` is the same.

    Only for errors that the driver always makes of another: else the context is whatever the caller was
    just handling.
    """
    return error.__context__ if isinstance(error, httpcore.NetworkError) else error


def _disconnected(error: httpcore.ProtocolError) -> bool:
    """Say whether the peer hung up, rather than send something that is not HTTP.

    The driver raises one class for both. Its own words, without h11 behind them, are for a connection that
    ended before the first byte; h11 names the end of one that was cut within an answer.
    """
    cause = error.__context__
    return not isinstance(cause, h11.ProtocolError) or "peer closed connection" in str(cause)


def _reason(error: BaseException | None) -> str:
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        error = error.__cause__
    return "refused or not reachable"


def timeouts(connect: float, remaining: float) -> dict[str, Any]:
    """Return the driver's request extension that bounds a try."""
    bounds = {"connect": min(connect, remaining), "pool": remaining, "read": remaining, "write": remaining}
    return {"timeout": bounds}


def reply(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> Reply:
    """Return an answer in this package's form."""
    fields = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
    return Reply(status, fields, body)


def check_size(size: int) -> None:
    """Refuse an answer that grows beyond all bounds.

    Raises:
        ProtocolViolation: It does.
    """
    if size > MAX_ANSWER_BYTES:
        raise ProtocolViolation(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")

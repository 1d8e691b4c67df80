"""Sends calls over HTTP without an event loop."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import httpcore

from progressdb_kms.client.endpoint import Endpoint
from progressdb_kms.client.exchange import Attempt, Options, Pause, Rules, drive, exchange
from progressdb_kms.client.network import (
    DRIVER_ERRORS,
    check_size,
    pool_settings,
    reply,
    timeouts,
    translate,
)
from progressdb_kms.client.pools import Pools
from progressdb_kms.client.protocol import Call, Reply
from progressdb_kms.client.tls import ClientTls

T = TypeVar("T")


class _Expiry(threading.local):
    """When the try that this thread makes has to end, on ``time.monotonic``."""

    at: float = float("inf")

    def bound(self, timeout: float | None) -> float:
        """Return ``timeout`` cut to what is left.

        Raises:
            httpcore.ReadTimeout: Nothing is left.
        """
        left = self.at - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the call's time is over")
        return left if timeout is None else min(timeout, left)


class _BoundedStream(httpcore.NetworkStream):
    """Bounds every read and write by the try's end, where the driver bounds each by itself.

    Without it a service that sends a byte now and then would hold a call for ever.
    """

    def __init__(self, inner: httpcore.NetworkStream, expiry: _Expiry) -> None:
        self._inner = inner
        self._expiry = expiry

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._expiry.bound(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._expiry.bound(timeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        inner = self._inner.start_tls(ssl_context, server_hostname, self._expiry.bound(timeout))
        return _BoundedStream(inner, self._expiry)

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - the driver's own signature
        return self._inner.get_extra_info(info)


class _BoundedBackend(httpcore.NetworkBackend):
    def __init__(self, expiry: _Expiry) -> None:
        self._inner = httpcore.SyncBackend()
        self._expiry = expiry

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        bound = self._expiry.bound(timeout)
        return _BoundedStream(
            self._inner.connect_tcp(host, port, bound, local_address, socket_options), self._expiry
        )

    def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        bound = self._expiry.bound(timeout)
        return _BoundedStream(self._inner.connect_unix_socket(path, bound, socket_options), self._expiry)


class SyncHttpSender:
    """Carries calls over a pool of HTTP/1.1 connections; safe to use from many threads.

    Not across ``fork``: open it in the worker, or two processes share one TLS connection.

    Args:
        endpoint: Where to.
        rules: Deadline, retries, encoding.
        connect_timeout: Seconds for TCP, and again for TLS.
        max_connections: At most so many at a time; further calls wait.
        sleep: Waits between tries.

    Raises:
        EndpointInvalid: The certificate files can't be used.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        rules: Rules,
        *,
        connect_timeout: float,
        max_connections: int,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._endpoint = endpoint
        self._rules = rules
        self._connect_timeout = connect_timeout
        self._sleep = sleep
        self._expiry = _Expiry()
        tls = ClientTls(endpoint.tls, rules.now) if endpoint.tls is not None else None

        def make(context: ssl.SSLContext | None) -> httpcore.ConnectionPool:
            return httpcore.ConnectionPool(
                **pool_settings(endpoint, context, max_connections),
                network_backend=_BoundedBackend(self._expiry),
            )

        self._pools = Pools(make, lambda: tls.context() if tls else None)

    def send(self, call: Call[T], options: Options) -> T:
        """Make a call and return its answer; see ``exchange`` for what is raised."""
        return drive(exchange(call, options, self._rules), self._perform)

    def close(self) -> None:
        """Take no more calls; those under way in other threads finish."""
        self._close(self._pools.close())

    def _perform(self, step: Attempt | Pause) -> Reply | None:
        if isinstance(step, Pause):
            self._sleep(step.seconds)
            return None
        lease, idle = self._pools.enter()
        try:
            self._close(idle)
            return self._attempt(lease.pool, step)
        finally:
            self._close(self._pools.leave(lease))

    def _attempt(self, pool: httpcore.ConnectionPool, step: Attempt) -> Reply:
        request = step.request
        self._expiry.at = time.monotonic() + step.timeout
        try:
            with pool.stream(
                request.method,
                self._endpoint.url + request.target,
                headers=request.headers,
                content=request.body or None,
                extensions=timeouts(self._connect_timeout, step.timeout),
            ) as response:
                body = bytearray()
                for chunk in response.iter_stream():
                    body += chunk
                    check_size(len(body))
                return reply(response.status, response.headers, bytes(body))
        except DRIVER_ERRORS as error:
            raise translate(error, self._endpoint) from error
        finally:
            self._expiry.at = float("inf")

    @staticmethod
    def _close(pools: list[httpcore.ConnectionPool]) -> None:
        for pool in pools:
            pool.close()

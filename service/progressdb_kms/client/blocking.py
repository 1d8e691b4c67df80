"""Sends calls over HTTP without an event loop."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpcore

from progressdb_kms.client.endpoint import Endpoint
from progressdb_kms.client.exchange import Attempt, Options, Pause, Rules, drive, exchange
from progressdb_kms.client.network import (
    DRIVER_ERRORS,
    KEEPALIVE_SECONDS,
    check_size,
    reply,
    timeouts,
    translate,
)
from progressdb_kms.client.pools import Lease, Pools
from progressdb_kms.client.protocol import Call, Reply
from progressdb_kms.client.sockets import BoundedBackend, Expiry
from progressdb_kms.client.tls import ClientTls

T = TypeVar("T")


class ConnectionPool:
    """Connections to one endpoint, each used by one thread at a time.

    The driver's own pool looks at connections that other threads are using, and may close one: the number
    of its socket then goes to another connection, and two threads read from that. Here whoever looks at a
    connection, or closes it, has taken it out first.

    Args:
        make: Makes a connection, not yet opened.
        limit: At most so many at a time.
    """

    def __init__(self, make: Callable[[], httpcore.HTTPConnection], limit: int) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._idle: list[httpcore.HTTPConnection] = []
        self._permits = threading.BoundedSemaphore(limit)

    @contextmanager
    def connection(self, timeout: float) -> Iterator[httpcore.HTTPConnection]:
        """Take a connection, and give it back if it can be used again.

        Raises:
            httpcore.PoolTimeout: None was free within ``timeout`` seconds.
        """
        if not self._permits.acquire(timeout=timeout):
            raise httpcore.PoolTimeout
        try:
            connection = self._take_idle() or self._make()
            try:
                yield connection
            finally:
                self._give_back(connection)
        finally:
            self._permits.release()

    def close(self) -> None:
        """Close the idle connections; only for a pool that nobody uses any more."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take_idle(self) -> httpcore.HTTPConnection | None:
        """Return the connection that was used last, so that those that are not needed grow old and go."""
        found = None
        expired = []
        with self._lock:
            # Asking an idle connection whether it has ended does not wait.
            while self._idle and self._idle[0].has_expired():
                expired.append(self._idle.pop(0))
            while self._idle and found is None:
                connection = self._idle.pop()
                if connection.has_expired():
                    expired.append(connection)
                else:
                    found = connection
        for connection in expired:
            connection.close()
        return found

    def _give_back(self, connection: httpcore.HTTPConnection) -> None:
        if connection.is_idle() and not connection.is_closed():
            with self._lock:
                self._idle.append(connection)
        else:
            connection.close()


Reservation = tuple[Lease[ConnectionPool], list[ConnectionPool]]


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
        self.endpoint = endpoint
        self._rules = rules
        self._connect_timeout = connect_timeout
        self._sleep = sleep
        self._expiry = Expiry()
        tls = ClientTls(endpoint.tls, rules.now) if endpoint.tls is not None else None
        origin = httpcore.URL(endpoint.url).origin

        def make(context: ssl.SSLContext | None) -> ConnectionPool:
            def connection() -> httpcore.HTTPConnection:
                return httpcore.HTTPConnection(
                    origin,
                    ssl_context=context,
                    keepalive_expiry=KEEPALIVE_SECONDS,
                    uds=endpoint.uds,
                    network_backend=BoundedBackend(self._expiry),
                )

            return ConnectionPool(connection, max_connections)

        self._pools = Pools(make, lambda: tls.context() if tls else None)

    def send(self, call: Call[T], options: Options) -> T:
        """Make a call and return its answer; see ``exchange`` for what is raised."""
        return drive(exchange(call, options, self._rules), self.perform)

    def close(self) -> None:
        """Take no more calls; those under way in other threads finish."""
        self._close(self._pools.close())

    def perform(self, step: Attempt | Pause) -> Reply | None:
        """Carry out one step of a call.

        Raises:
            KmsError: What the attempt ended in.
        """
        if isinstance(step, Pause):
            self._sleep(step.seconds)
            return None
        return self.attempt(self.reserve(), step)

    def reserve(self) -> Reservation:
        """Return a place for one attempt, which ``close`` does not take away. Use it, or ``give_back``.

        Raises:
            ProviderClosed: ``close`` was called.
            EndpointInvalid: The certificate files can't be used.
        """
        return self._pools.enter()

    def attempt(self, place: Reservation, step: Attempt) -> Reply:
        """Send a request and return its answer.

        Raises:
            KmsError: What the attempt ended in.
        """
        lease, idle = place
        try:
            self._close(idle)
            return self._attempt(lease.pool, step)
        finally:
            self._close(self._pools.leave(lease))

    def _attempt(self, pool: ConnectionPool, step: Attempt) -> Reply:
        request = step.request
        self._expiry.at = time.monotonic() + step.timeout
        try:
            with (
                pool.connection(step.timeout) as connection,
                connection.stream(
                    request.method,
                    self.endpoint.url + request.target,
                    headers=request.headers,
                    content=request.body or None,
                    extensions=timeouts(self._connect_timeout, step.timeout),
                ) as response,
            ):
                body = bytearray()
                for chunk in response.iter_stream():
                    body += chunk
                    check_size(len(body))
                return reply(response.status, response.headers, bytes(body))
        except DRIVER_ERRORS as error:
            raise translate(error, self.endpoint) from error
        finally:
            self._expiry.at = float("inf")

    def give_back(self, place: Reservation) -> None:
        """Give up a place that was not used."""
        lease, idle = place
        self._close(idle)
        self._close(self._pools.leave(lease))

    @staticmethod
    def _close(pools: list[ConnectionPool]) -> None:
        for pool in pools:
            pool.close()

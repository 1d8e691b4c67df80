"""Sends calls over HTTP with asyncio."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpcore

from progressdb_kms.client.endpoint import Endpoint
from progressdb_kms.client.exchange import Attempt, Options, Pause, Rules, adrive, exchange
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
from progressdb_kms.domain.errors import DeadlineExceeded

T = TypeVar("T")


class AsyncHttpSender:
    """Carries calls over a pool of HTTP/1.1 connections.

    Belongs to the event loop that first uses it.

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
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.endpoint = endpoint
        self._rules = rules
        self._connect_timeout = connect_timeout
        self._sleep = sleep
        tls = ClientTls(endpoint.tls, rules.now) if endpoint.tls is not None else None

        def make(context: ssl.SSLContext | None) -> httpcore.AsyncConnectionPool:
            return httpcore.AsyncConnectionPool(**pool_settings(endpoint, context, max_connections))

        self._pools = Pools(make, lambda: tls.context() if tls else None)

    async def send(self, call: Call[T], options: Options) -> T:
        """Make a call and return its answer; see ``exchange`` for what is raised."""
        return await adrive(exchange(call, options, self._rules), self.perform)

    async def close(self) -> None:
        """Take no more calls; those under way finish."""
        await self._close(self._pools.close())

    async def perform(self, step: Attempt | Pause) -> Reply | None:
        """Carry out one step of a call.

        Raises:
            KmsError: What the attempt ended in.
        """
        if isinstance(step, Pause):
            await self._sleep(step.seconds)
            return None
        lease, idle = self._pools.enter()
        try:
            await self._close(idle)
            return await self._attempt(lease.pool, step)
        finally:
            await self._close(self._pools.leave(lease))

    async def _attempt(self, pool: httpcore.AsyncConnectionPool, step: Attempt) -> Reply:
        request = step.request
        try:
            async with (
                # The driver bounds each read by itself; this bounds them all together.
                asyncio.timeout(step.timeout),
                pool.stream(
                    request.method,
                    self.endpoint.url + request.target,
                    headers=request.headers,
                    content=request.body or None,
                    extensions=timeouts(self._connect_timeout, step.timeout),
                ) as response,
            ):
                body = bytearray()
                async for chunk in response.aiter_stream():
                    body += chunk
                    check_size(len(body))
                return reply(response.status, response.headers, bytes(body))
        except TimeoutError:
            raise DeadlineExceeded(f"{self.endpoint} did not answer in time") from None
        except DRIVER_ERRORS as error:
            raise translate(error, self.endpoint) from error

    @staticmethod
    async def _close(pools: list[httpcore.AsyncConnectionPool]) -> None:
        for pool in pools:
            await pool.aclose()

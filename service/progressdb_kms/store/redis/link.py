"""One connection to one server: many commands out in one write, their replies back in order."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from typing import Any, Final, TypeAlias, cast

from hiredis import pack_command
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import ResponseError

from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.store.redis.address import Address, Endpoint
from progressdb_kms.store.settings import StoreSettings

Argument: TypeAlias = bytes | str | int
Command: TypeAlias = tuple[Argument, ...]
Reply: TypeAlias = Any
"""bytes, int, None, a list of replies, or the server's error as an exception that is not raised."""

_RESP: Final = 2


class _TlsConnection(SSLConnection):
    """TLS that trusts the given CA alone: the driver's own context trusts the system's CAs as well."""

    context: ssl.SSLContext

    def _connection_arguments(self) -> dict[str, Any]:
        return {"host": self.host, "port": self.port, "ssl": self.context}


def _tls_context(settings: StoreSettings) -> ssl.SSLContext:
    """Read the certificates anew for each connection, so that a renewed one is used without a restart."""
    try:
        context = ssl.create_default_context(cafile=settings.tls_ca or None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if settings.tls_cert:
            context.load_cert_chain(settings.tls_cert, settings.tls_key or None)
    except (OSError, ssl.SSLError) as error:
        raise StoreUnavailable(
            f"the certificates of store.tls can't be read: {error.strerror or error}"
        ) from None
    return context


class Link:
    """An open connection.

    Nothing in it retries or times out by itself: whoever runs commands gives the time, and after any failure
    the connection is closed, for its replies could no longer be told apart.
    """

    def __init__(self, connection: AbstractConnection, endpoint: Endpoint) -> None:
        self._connection: Any = connection
        self.endpoint = endpoint

    @classmethod
    async def open(
        cls, endpoint: Endpoint, address: Address, settings: StoreSettings, *, sentinel: bool = False
    ) -> Link:
        """Connect and log in, within ``connect_timeout``.

        Raises:
            StoreUnavailable: The certificates can't be read.
            redis.exceptions.RedisError, OSError, TimeoutError: No connection; see ``failures.lost``.
        """
        username, password = address.username or settings.username, address.password or settings.password
        if sentinel:
            username, password = settings.sentinel_username, settings.sentinel_password
        options: dict[str, Any] = {
            "db": 0 if sentinel else address.db,
            "username": username or None,
            "password": password or None,
            "socket_timeout": None,
            "socket_connect_timeout": settings.connect_timeout,
            "driver_info": None,
            "protocol": _RESP,
        }
        connection: AbstractConnection
        if not endpoint.port:
            connection = UnixDomainSocketConnection(path=endpoint.host, **options)
        elif address.tls:
            connection = _TlsConnection(host=endpoint.host, port=endpoint.port, **options)
            connection.context = _tls_context(settings)
        else:
            connection = Connection(host=endpoint.host, port=endpoint.port, **options)
        link = cls(connection, endpoint)
        try:
            async with asyncio.timeout(settings.connect_timeout):
                await link._connection.connect()
        except BaseException:
            await link.close()
            raise
        return link

    async def run(self, commands: Sequence[Command], seconds: float) -> list[Reply]:
        """Send commands in one write and return their replies; an error reply stands in its place.

        Raises:
            redis.exceptions.RedisError, OSError, TimeoutError: The connection broke, or ``seconds``
                have passed; what became of the commands is unknown, and the connection is closed.
        """
        connection = self._connection
        replies: list[Reply] = []
        try:
            async with asyncio.timeout(seconds):
                # The driver packs in Python, which took as long as all else that it does for a command.
                packed = b"".join([pack_command(command) for command in commands])  # type: ignore[arg-type]  # its stub takes one argument alone
                await connection.send_packed_command(packed, check_health=False)
                for _ in commands:
                    try:
                        replies.append(await connection.read_response(disconnect_on_error=False))
                    except ResponseError as error:
                        replies.append(error)
        except BaseException:
            await self.close()
            raise
        return replies

    @property
    def alive(self) -> bool:
        """Whether it is open, as far as is known."""
        return cast("bool", self._connection.is_connected)

    async def close(self) -> None:
        """Close without waiting for the other end, which may be frozen."""
        writer = self._connection._writer  # noqa: SLF001 - the driver can only close politely
        if writer is not None:
            writer.transport.abort()
        await self._connection.disconnect(nowait=True)
        # The transport lets go of its socket in the loop's next turn.
        await asyncio.sleep(0)

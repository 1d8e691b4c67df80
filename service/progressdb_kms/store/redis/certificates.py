"""A running server takes renewed certificates and users, which it reads only when it is told to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from redis.exceptions import NoPermissionError, RedisError

from progressdb_kms.domain.errors import SettingsInvalid, StoreUnavailable
from progressdb_kms.store.redis.address import Address, parse_url
from progressdb_kms.store.redis.failures import lost, translate
from progressdb_kms.store.redis.link import Link
from progressdb_kms.store.settings import StoreSettings

if TYPE_CHECKING:
    from progressdb_kms.store.redis.link import Command, Reply

_TIMEOUT: Final = 10.0


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """Paths as the server sees them, all PEM.

    Attributes:
        cert: The server's certificate with its chain.
        key: Its private key.
        ca: The CAs that certificates of the server's clients may come from.
    """

    cert: Path
    key: Path
    ca: Path


def local_address(url: str) -> Address:
    """Parse the URL of a Unix socket.

    The way to a server whose certificate has expired must not need that certificate.

    Raises:
        SettingsInvalid: It is something else.
    """
    if not url.startswith("unix://"):
        raise SettingsInvalid(
            "write unix:///path/of/the.socket: only a server beside this process is reloaded"
        )
    return parse_url(url)


async def apply_certificates(address: Address, username: str, password: str, files: CertificateFiles) -> None:
    """Make a server read its certificate, key and CA again; connections that are open stay.

    All three go in one CONFIG SET: the server tries them together and, where they do not fit, goes on with
    what it has. The paths may be the ones that it had before. Needs ``+config|set`` of the ACL user.

    Raises:
        StoreUnavailable: Not now, or not with these files; says what to do.
    """
    command: Command = (
        "CONFIG",
        "SET",
        "tls-cert-file",
        str(files.cert),
        "tls-key-file",
        str(files.key),
        "tls-ca-cert-file",
        str(files.ca),
    )
    reply = await _run(address, username, password, command)
    if isinstance(reply, RedisError):
        why = (
            "the store can't use the files: do they belong together, and stand at the same paths there? Its"
            " log says more"
            if "update TLS" in str(reply)
            else ""
        )
        raise _refused(reply, "+config|set", why)


async def load_acl(address: Address, username: str, password: str) -> None:
    """Make a server read its ACL file again: all of it, or, where a line is wrong, nothing.

    Redis before 7.2 closes the connections of all users but the default one, whatever has changed of them.
    Needs ``+acl|load`` of the ACL user.

    Raises:
        StoreUnavailable: Not now, or not with this file; says what to do.
    """
    reply = await _run(address, username, password, ("ACL", "LOAD"))
    if isinstance(reply, RedisError):
        raise _refused(
            reply, "+acl|load", "the store can't use its ACL file: its log says which line is wrong"
        )


async def _run(address: Address, username: str, password: str, command: Command) -> Reply:
    (endpoint,) = address.endpoints
    settings = StoreSettings("", username, password, connect_timeout=_TIMEOUT)
    try:
        link = await Link.open(endpoint, address, settings)
        try:
            (reply,) = await link.run([command], _TIMEOUT)
        finally:
            await link.close()
    except (RedisError, OSError, TimeoutError) as error:
        raise lost(error, endpoint).error from None
    return reply


def _refused(reply: RedisError, needed: str, why: str) -> StoreUnavailable:
    if isinstance(reply, NoPermissionError):
        return StoreUnavailable(f"the store's ACL user may not: it needs {needed}, see docs/redis-acl.md")
    failure = translate(reply)
    return StoreUnavailable(why or (failure.error.detail if failure else "the store refused"))

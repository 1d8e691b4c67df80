"""Where the store is: the URL, parsed.

::

    redis://host:port/db                            one server
    unix:///path/to/socket?db=0                     one server on this machine
    redis+sentinel://h1:p1,h2:p2/service            the primary that Sentinels name
    redis+cluster://h1:p1,h2:p2                     Redis Cluster, from any of its nodes
    rediss://, rediss+sentinel://, rediss+cluster://   the same over TLS, to Sentinels too

User and password may stand in the URL, percent-encoded, before the first host.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from progressdb_kms.domain.errors import SettingsInvalid

_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379


class Mode(StrEnum):
    """How the server for a key is found."""

    STANDALONE = "standalone"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


class Endpoint(NamedTuple):
    """A TCP address, or the path of a Unix socket (then port is 0)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.port else self.host


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed URL.

    Attributes:
        mode: How the server for a key is found.
        endpoints: The server; or Sentinels, or Cluster nodes, to ask.
        tls: Whether connections are TLS.
        service: The name that Sentinels know the primary by.
        db: Database number; 0 in a Cluster.
        username: From the URL, or empty.
        password: From the URL, or empty.
    """

    mode: Mode
    endpoints: tuple[Endpoint, ...]
    tls: bool = False
    service: str = ""
    db: int = 0
    username: str = ""
    password: str = field(default="", repr=False)


def parse_url(url: str) -> Address:
    """Parse a store URL; see the module.

    Raises:
        SettingsInvalid: Says what is wrong, without the URL, which may hold a password.
    """
    parts = urlsplit(url)
    transport, _, kind = parts.scheme.partition("+")
    query = parse_qs(parts.query)
    if set(query) - {"db"}:
        raise SettingsInvalid(
            "store.url: the only parameter it takes is db; the others are settings of their own"
        )
    userinfo, _, hosts = parts.netloc.rpartition("@")
    username, _, password = (unquote(part) for part in userinfo.partition(":"))
    if parts.scheme == "unix":
        path = unquote(f"{hosts}{parts.path}")
        if not path.startswith("/"):
            raise SettingsInvalid("store.url: write unix:///absolute/path/of/the.socket")
        return Address(
            Mode.STANDALONE,
            (Endpoint(path, 0),),
            db=_db(query.get("db", ["0"])[0]),
            username=username,
            password=password,
        )
    if transport not in {"redis", "rediss"} or kind not in {"", "sentinel", "cluster"}:
        raise SettingsInvalid(
            "store.url must start with redis://, rediss://, unix:///, redis+sentinel://, rediss+sentinel://, "
            "redis+cluster:// or rediss+cluster://"
        )
    mode = Mode(kind or Mode.STANDALONE)
    endpoints = tuple(_endpoint(host, mode) for host in hosts.split(","))
    path = parts.path.strip("/")
    service = ""
    if mode is Mode.SENTINEL:
        service, _, path = path.partition("/")
        if not service:
            raise SettingsInvalid(
                "store.url: name the service after the Sentinels: redis+sentinel://h:p/service"
            )
    elif mode is Mode.STANDALONE and len(endpoints) != 1:
        raise SettingsInvalid(
            "store.url: redis:// takes one host; several need redis+sentinel or redis+cluster"
        )
    db = _db(query.get("db", [path or "0"])[0])
    if mode is Mode.CLUSTER and db:
        raise SettingsInvalid("store.url: a Cluster has database 0 only")
    return Address(mode, endpoints, transport == "rediss", service, db, username, password)


def _db(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise SettingsInvalid("store.url: the database must be a number")
    return int(text)


def _endpoint(text: str, mode: Mode) -> Endpoint:
    try:
        split = urlsplit(f"//{text}")
        host, port = split.hostname, split.port
    except ValueError:
        raise SettingsInvalid("store.url: a host's port must be a number up to 65535") from None
    if not host:
        raise SettingsInvalid("store.url: a host is missing")
    return Endpoint(host, port or (_SENTINEL_PORT if mode is Mode.SENTINEL else _PORT))

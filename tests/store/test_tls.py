"""The store over TLS: its certificate is checked against the given CA alone, and ours is shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.domain.keys import DekRecord
from tests.store.conftest import new_dek
from tests.store.servers import Server, free_port
from tests.store.topologies import can_create
from tests.transport.pki import CLIENT, SERVER, Ca, Issued

Open = Callable[..., Any]
ENOUGH = 1.5
"""Seconds of a call that a handshake has to fit into, which a busy machine takes its time for."""


@pytest.fixture
def ca() -> Ca:
    """Give the CA of store and service."""
    return Ca("store CA")


@pytest.fixture
def files(tmp_path: Path, ca: Ca) -> dict[str, str]:
    """Give the settings of a service that may connect."""
    (tmp_path / "ca.crt").write_bytes(ca.pem)
    cert, key = ca.issue("kms", usages=CLIENT).write(tmp_path, "client")
    return {"tls_ca": str(tmp_path / "ca.crt"), "tls_cert": str(cert), "tls_key": str(key)}


def start(own_server: Callable[..., Server], folder: Path, ca: Ca, issued: Issued) -> str:
    """Start a server that wants TLS and client certificates; return its URL."""
    cert, key = issued.write(folder, "server")
    port = free_port()
    (folder / "server-ca.crt").write_bytes(ca.pem)
    own_server(
        "redis",
        tls_port=str(port),
        tls_cert_file=str(cert),
        tls_key_file=str(key),
        tls_ca_cert_file=str(folder / "server-ca.crt"),
        tls_auth_clients="yes",
    )
    return f"rediss://127.0.0.1:{port}"


async def created(store: Any) -> object:
    """Create a key."""
    (result,) = await store.keys.create([new_dek()])
    return result


async def refused(store: Any) -> str:
    """Return why nothing can be created."""
    result = await created(store)
    assert isinstance(result, StoreUnavailable)
    assert not store.health.status.reachable
    return result.detail


async def test_with_client_certificate(
    own_server: Callable[..., Server], opened: Open, tmp_path: Path, ca: Ca, files: dict[str, str]
) -> None:
    """The right CA and a client certificate get in; localhost by name does too."""
    url = start(own_server, tmp_path, ca, ca.server())
    assert isinstance(await created(await opened(url, **files)), DekRecord)
    by_name = url.replace("127.0.0.1", "localhost")
    assert isinstance(await created(await opened(by_name, **files)), DekRecord)


@pytest.mark.parametrize("missing", ["tls_cert", "tls_ca"])
async def test_without(
    own_server: Callable[..., Server],
    opened: Open,
    tmp_path: Path,
    ca: Ca,
    files: dict[str, str],
    missing: str,
) -> None:
    """Without a client certificate the store refuses us; without its CA we refuse the store."""
    url = start(own_server, tmp_path, ca, ca.server())
    settings = {**files, missing: ""} | ({"tls_key": ""} if missing == "tls_cert" else {})
    await refused(await opened(url, command_timeout=0.3, **settings))


async def test_wrong_ca(
    own_server: Callable[..., Server], opened: Open, tmp_path: Path, ca: Ca, files: dict[str, str]
) -> None:
    """A store of another CA is refused with the reason."""
    url = start(own_server, tmp_path, ca, ca.server())
    (tmp_path / "other.crt").write_bytes(Ca("other CA").pem)
    store = await opened(url, command_timeout=ENOUGH, **{**files, "tls_ca": str(tmp_path / "other.crt")})
    assert "store.tls" in await refused(store)


async def test_wrong_name(
    own_server: Callable[..., Server], opened: Open, tmp_path: Path, ca: Ca, files: dict[str, str]
) -> None:
    """A certificate for another host is refused, though the CA is right."""
    url = start(own_server, tmp_path, ca, ca.issue("redis.example", usages=SERVER))
    assert "store.tls" in await refused(await opened(url, command_timeout=ENOUGH, **files))


async def test_renewed_certificate(
    own_server: Callable[..., Server], opened: Open, tmp_path: Path, ca: Ca, files: dict[str, str]
) -> None:
    """Files are read again for each connection: a bad certificate, mended, works without a restart."""
    url = start(own_server, tmp_path, ca, ca.server())
    renewed, current = tmp_path / "client.crt", tmp_path / "current.crt"
    current.write_text("not a certificate")
    store = await opened(url, command_timeout=0.3, **{**files, "tls_cert": str(current)})
    assert "can't be read" in await refused(store)
    renewed.replace(current)
    await can_create(store)


async def test_plain_text_to_a_tls_port(
    own_server: Callable[..., Server], opened: Open, tmp_path: Path, ca: Ca
) -> None:
    """redis:// to a TLS port is unavailable, not a hang."""
    url = start(own_server, tmp_path, ca, ca.server())
    await refused(await opened(url.replace("rediss", "redis"), command_timeout=0.3, connect_timeout=0.3))

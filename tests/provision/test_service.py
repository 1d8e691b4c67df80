"""What `provision` makes is what the service needs: it serves on these Secrets as they are mounted."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from progressdb_kms.client import open_sync_provider
from progressdb_kms.domain.errors import PermissionDenied
from tests.integration.world import eventually
from tests.provision.conftest import Site
from tests.store.servers import free_port

CERTIFICATES = {
    "authorities": [
        {"name": "server", "secret": "server-ca", "common_name": "server CA"},
        {"name": "client", "secret": "client-ca", "common_name": "client CA"},
    ],
    "bundles": [{"secret": "client-trust", "authorities": ["client"]}],
    "certificates": [
        {"secret": "server-tls", "authority": "server", "usage": "server", "dns": ["localhost"]},
        {"secret": "chat", "authority": "client", "usage": "client", "dns": ["chat"], "trust": ["server"]},
        {"secret": "other", "authority": "client", "usage": "client", "dns": ["other"], "trust": ["server"]},
    ],
}


def mount(site: Site, name: str) -> Path:
    """Write a Secret as a volume with mode 0440 shows it."""
    folder = site.folder / name
    folder.mkdir()
    for key, value in site.cluster.data(name).items():
        (folder / key).write_bytes(value)
        (folder / key).chmod(0o440)
    return folder


def configure(site: Site, port: int, admin: int) -> Path:
    """Write the service's configuration over the mounted Secrets."""
    rules = [{"identities": ["dns:chat"], "permissions": ["key:create", "key:encrypt", "key:decrypt"]}]
    (site.folder / "policy.yaml").write_text(json.dumps({"rules": rules}))
    tls, trust, kek = (mount(site, name) for name in ("server-tls", "client-trust", "r-kek"))
    document = {
        "listen": {"host": "127.0.0.1", "port": port},
        "admin": {"host": "127.0.0.1", "port": admin},
        "tls": {
            "cert": str(tls / "tls.crt"),
            "key": str(tls / "tls.key"),
            "client_ca": str(trust / "ca.crt"),
        },
        "policy": "policy.yaml",
        "kek": {"path": str(kek / "kek.yaml")},
        "store": {"url": site.server.url, "id_file": str(kek / "store-id")},
        "drain": {"delay": 0},
    }
    path = site.folder / "serve.yaml"
    path.write_text(json.dumps(document))
    return path


def ready(port: int) -> bool:
    """Say whether the service is ready."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def round_trip(endpoint: str, client: Path) -> bytes:
    """Make a key as this client, encrypt and decrypt."""
    ca, cert, key = (str(client / name) for name in ("ca.crt", "tls.crt", "tls.key"))
    with open_sync_provider(endpoint, ca=ca, cert=cert, key=key) as kms:
        dek = kms.create_dek_for_thread("room:1")
        return kms.decrypt_with_dek(dek.key_id, kms.encrypt_with_dek(dek.key_id, b"message").ciphertext)


def test_the_service_runs_on_what_was_made(site: Site) -> None:
    """With what one run has made, the client that has a grant is served, and no other."""
    asyncio.run(site.run(certificates=CERTIFICATES, **site.kek()))
    port, admin = free_port(), free_port()
    config = configure(site, port, admin)
    log = site.folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "progressdb_kms.cli", "serve", "--config", str(config)],
            stdout=output,
            stderr=output,
        )
    try:
        eventually(lambda: ready(admin) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        endpoint = f"https://localhost:{port}"
        assert round_trip(endpoint, mount(site, "chat")) == b"message"
        with pytest.raises(PermissionDenied):
            round_trip(endpoint, mount(site, "other"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()

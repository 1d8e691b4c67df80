"""A cluster, a store, and runs of `provision` over them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from progressdb_kms.provision.config import parse_config
from progressdb_kms.provision.run import run
from progressdb_kms.store.redis.schema import SCHEMA_KEY
from tests.provision.cluster import Cluster
from tests.store.servers import ALWAYS, Server


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Give an empty cluster, to which the kubeconfig leads."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    made = Cluster(folder)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig))
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a durable store for the module."""
    made = Server("redis", tmp_path_factory.mktemp("store"), ALWAYS).start()
    yield made
    made.kill()


@dataclass
class Site:
    """A release that `provision` works for.

    Attributes:
        said: Lines of all runs.
    """

    cluster: Cluster
    server: Server
    folder: Path
    said: list[str] = field(default_factory=list)

    def document(self, **sections: Any) -> dict[str, Any]:
        """Return a provisioning document."""
        return {"namespace": "kms", "labels": {"part": "of"}, **sections}

    def kek(self, management: str = "create", **store: Any) -> dict[str, Any]:
        """Return the sections of a KEK over the store."""
        config = self.folder / "config.yaml"
        service = {
            "tls": {"cert": "a", "key": "b", "client_ca": "c"},
            "policy": "policy.yaml",
            "kek": {"path": "kek.yaml"},
            "store": {"url": self.server.url},
        }
        config.write_text(json.dumps(service))
        return {
            "store": {"config": str(config), "wait": 0, **store},
            "kek": {
                "secret": "r-kek",
                "management": management,
                "annotations": {"helm.sh/resource-policy": "keep"},
            },
        }

    def point_at(self, url: str) -> None:
        """Let the service's configuration name another store."""
        config = self.folder / "config.yaml"
        config.write_text(config.read_text().replace(self.server.url, url))

    def recovery_key(self) -> X25519PrivateKey:
        """Let the service's configuration name a recovery key; return its private half."""
        private = X25519PrivateKey.generate()
        encoding = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        (self.folder / "recovery.pub").write_bytes(private.public_key().public_bytes(*encoding))
        config = self.folder / "config.yaml"
        document = json.loads(config.read_text())
        config.write_text(json.dumps({**document, "escrow": {"recipients": ["recovery.pub"]}}))
        return private

    async def run(self, **sections: Any) -> list[str]:
        """Run once; return what it said."""
        lines: list[str] = []
        await run(parse_config(self.document(**sections), self.folder), lines.append)
        self.said += lines
        return lines

    def store_id(self) -> str | None:
        """Return the store's id, None where it has no registry."""
        found = self.server.ask("HGET", SCHEMA_KEY, "store_id")
        return None if found is None else found.decode()


@pytest.fixture
def site(cluster: Cluster, server: Server, tmp_path: Path) -> Site:
    """Give a release with an empty store."""
    server.ask("FLUSHALL")
    return Site(cluster, server, tmp_path)

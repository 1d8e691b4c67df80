"""Every mode of the chart, as the API server's own validation sees it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.cluster.kube import CHART, Helm, Kube, list_of, run
from tests.cluster.scene import RELEASE, Release

pytestmark = pytest.mark.cluster

Saw = Callable[[str], None]


@pytest.fixture(scope="module")
def served() -> set[tuple[str, str]]:
    """Return the kinds that this cluster knows."""
    lines = run("kubectl", "api-resources", "--no-headers").stdout.splitlines()
    words = [line.split() for line in lines]
    return {(word[-3], word[-1]) for word in words}


CLIENTS = [
    {
        "name": "chat",
        "permissions": ["key:create", "key:encrypt", "key:decrypt"],
        "threadPrefixes": ["room:"],
    },
    {"name": "mesh", "identity": "spiffe://cluster.local/ns/mesh/sa/mesh", "pinned": True},
]
EXTERNAL = {
    "redis": {"enabled": False},
    "externalStore": {"url": "rediss://redis.data.svc:6379/0", "secretName": "store"},
}
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "clients": {"clients": CLIENTS},
    "cert-manager": {"tls": {"mode": "certManager"}, "clients": CLIENTS},
    "cert-manager-issuers": {
        "tls": {
            "mode": "certManager",
            "certManager": {
                "server": {"issuerRef": {"name": "public", "kind": "ClusterIssuer"}},
                "client": {"issuerRef": {"name": "clients"}, "trustSecret": "client-cas"},
            },
        },
        "clients": CLIENTS,
    },
    "existing-secrets": {
        "tls": {"mode": "existingSecret", "existingSecret": {"server": "server", "clientCa": "client-cas"}},
        "redis": {"tls": {"mode": "generated"}},
        "kek": {"management": "existing", "secretName": "kek"},
    },
    "external": {"kek": {"management": "external", "secretName": "kek"}, **EXTERNAL},
    "s3": {"backup": {"destination": "s3", "s3": {"url": "s3://backups/kms", "secretName": "s3"}}},
    "large": {
        "autoscaling": {"enabled": True},
        "rotation": {"parallelism": 4},
        "monitoring": {
            "serviceMonitor": {"enabled": True},
            "prometheusRule": {"enabled": True},
            "dashboard": {"enabled": True},
        },
    },
    "openshift": {
        "podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None},
        "redis": {"podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}},
    },
}


@pytest.fixture(scope="module")
def dry(make_namespace: Callable[[str], Kube]) -> Kube:
    """Return a namespace for dry runs."""
    return make_namespace("dry")


@pytest.mark.parametrize("mode", MODES)
def test_server_side_dry_run(
    mode: str, image: str, served: set[tuple[str, str]], dry: Kube, saw: Saw
) -> None:
    """The API server takes every object of the mode, with no unknown field."""
    kube = dry
    helm = Helm(kube.namespace, RELEASE, image)
    rendered = helm("template", RELEASE, str(CHART), values=MODES[mode])
    objects = [one for one in yaml.safe_load_all(rendered) if one]
    known = [one for one in objects if (one["apiVersion"], one["kind"]) in served]
    others = sorted({one["kind"] for one in objects if one not in known})
    # A pod's admission looks its ServiceAccount up, so these are made, in a namespace that goes again.
    kube.apply(*[one for one in known if one["kind"] == "ServiceAccount"])
    kube("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=list_of(known))
    saw(
        f"{len(known)} objects taken"
        + (f"; not known to this cluster: {', '.join(others)}" if others else "")
    )


@pytest.mark.skipif("HELM4" not in os.environ, reason="HELM4 names no helm of version 4")
def test_helm_4(image: str, make_namespace: Callable[[str], Kube], saw: Saw) -> None:
    """Helm 4, which applies on the server's side, installs; the same values again restart nothing."""
    kube = make_namespace("helm4")
    helm = Helm(kube.namespace, RELEASE, image, os.environ["HELM4"])
    release = Release(kube, helm, {"replicaCount": 1})
    helm.install(release.values, "--wait", "--wait-for-jobs")
    before = release.all_pods()
    helm.upgrade(release.values)
    release.wait_ready()
    assert release.all_pods() == before
    out = helm("test", RELEASE, "--timeout", "3m", "--logs")
    helm("uninstall", RELEASE, "--wait", "--timeout", "4m")
    assert "without a certificate" in out
    saw(f"{helm('version', '--short').strip()}: installed, upgraded without a restart, tested, uninstalled")

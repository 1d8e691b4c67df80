"""The audit log of the whole release: chained with a key that the bootstrap made, verified in a pod."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.kube import merge, until
from tests.cluster.scene import Caller, Release

pytestmark = pytest.mark.cluster

CONFIG = "/etc/progressdb-kms/config.yaml"


def verify(release: Release) -> dict[str, Any]:
    """Run `audit verify` in a pod of the service, and return its report."""
    pod = release.service_pods()[0]["metadata"]["name"]
    done = release.kube.run(
        "exec", pod, "--", "progressdb-kms", "audit", "verify", "--config", CONFIG, "--json"
    )
    assert done.returncode in {0, 3}, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_audit(release: Release, chat: Caller, saw: Callable[[str], None]) -> None:
    """With audit.enabled changes and a rotation are chained, the log verifies, and the key is made once."""
    values = merge(release.values, {"audit": {"enabled": True}})
    release.helm.upgrade(values, "--wait", "--wait-for-jobs")
    release.values.update(values)
    release.wait_ready()
    key = release.kube.secret(f"{release.name}-audit")
    assert {"audit.yaml", "audit.pub"} == set(key.keys)
    chat("seed", "20")
    release.kube.create_job("rotate-audited", f"{release.name}-rotate")
    release.kube.wait_for_job("rotate-audited", 400)
    # A change of the bootstrap's work makes it run again.
    again = merge(values, {"jobs": {"podLabels": {"again": "yes"}}})
    release.helm.upgrade(again, "--wait", "--wait-for-jobs")
    release.values.update(again)
    release.wait_ready()
    kept = release.kube.secret(f"{release.name}-audit")
    assert kept.value("audit.yaml") == key.value("audit.yaml")
    report = until("a log that is whole", lambda: found if (found := verify(release))["intact"] else None)
    # Two pods of the service, and the rotation, at least.
    assert len(report["chains"]) >= 3
    # An intent and an outcome each.
    assert report["records"] >= 40
    saw(f"{report['records']} records in {len(report['chains'])} chains verified in a pod; the key stayed")

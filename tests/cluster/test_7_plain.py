"""The plain manifests, without Helm."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import NAMESPACES
from tests.cluster.kube import ROOT, Helm, Kube
from tests.cluster.scene import Release

pytestmark = pytest.mark.cluster

NAMESPACE = "progressdb-kms"
"""Fixed: it stands in the certificates too."""


@pytest.fixture
def plain() -> Iterator[Kube]:
    """Return the namespace of the manifests, which must not be there yet, and goes again."""
    kube = Kube(NAMESPACE)
    assert not kube.exists("namespace", NAMESPACE), f"namespace {NAMESPACE} is in use: remove it first"
    NAMESPACES.append(NAMESPACE)
    yield kube
    kube.run("delete", "namespace", NAMESPACE, "--timeout=180s")


def test_overlay_becomes_ready(plain: Kube, image: str, tmp_path: Path, saw: Callable[[str], None]) -> None:
    """`kubectl apply -k` of the overlay dev gives a ready service; applied again, it changes nothing."""
    repository, _, tag = image.rpartition(":")
    mine = {
        "resources": [os.path.relpath(ROOT / "deploy" / "k8s" / "overlays" / "dev", tmp_path)],
        "images": [{"name": "progressdb-kms", "newName": repository, "newTag": tag}],
    }
    (tmp_path / "kustomization.yaml").write_text(json.dumps(mine))
    out = plain("apply", "-k", str(tmp_path))
    release = Release(plain, Helm(NAMESPACE, NAMESPACE, image))
    release.wait_ready()
    again = plain("apply", "-k", str(tmp_path)).splitlines()
    assert [line for line in again if not line.endswith(" unchanged")] == []
    assert len(release.service_pods()) == 1
    saw(f"{len(out.splitlines())} objects applied, ready; applied again: all unchanged")

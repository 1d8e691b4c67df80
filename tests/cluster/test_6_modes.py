"""Every mode of the chart, as the API server's own validation sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.cluster.kube import CHART, Helm, Kube, run
from tests.cluster.scene import RELEASE

pytestmark = pytest.mark.cluster

Saw = Callable[[str], None]


@pytest.fixture(scope="module")
def served() -> set[tuple[str, str]]:
    """Return the kinds that this cluster knows."""
    lines = run("kubectl", "api-resources", "--no-headers").stdout.splitlines()
    words = [line.split() for line in lines]
    return {(word[-3], word[-1]) for word in words}


MODES: dict[str, dict[str, Any]] = {}


@pytest.mark.parametrize("mode", sorted(MODES))
def test_server_side_dry_run(
    mode: str, image: str, served: set[tuple[str, str]], make_namespace: Callable[[str], Kube], saw: Saw
) -> None:
    """The API server takes every object of the mode, with no unknown field."""
    kube = make_namespace(f"dry-{mode}")
    helm = Helm(kube.namespace, RELEASE, image)
    rendered = helm("template", RELEASE, str(CHART), values=MODES[mode])
    objects = [one for one in yaml.safe_load_all(rendered) if one]
    known = [one for one in objects if (one["apiVersion"], one["kind"]) in served]
    others = sorted({one["kind"] for one in objects if one not in known})
    listed = {"apiVersion": "v1", "kind": "List", "items": known}
    kube("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=json.dumps(listed))
    saw(
        f"{len(known)} objects taken"
        + (f"; not known to this cluster: {', '.join(others)}" if others else "")
    )

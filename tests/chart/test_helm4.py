"""Helm 4 beside Helm 3."""

import json
import os
import subprocess

import pytest
import yaml

from tests.chart.rendering import CHART, MODES, NAMESPACE, RELEASE, template

HELM4 = os.environ.get("HELM4")


@pytest.mark.skipif(not HELM4, reason="HELM4 names no helm of version 4")
@pytest.mark.parametrize("mode", ["default", *sorted(path.stem for path in MODES.glob("*.yaml"))])
def test_both_render_the_same(mode: str) -> None:
    """Helm 4 renders what Helm 3 does, but for empty lines."""
    values = yaml.safe_load((MODES / f"{mode}.yaml").read_text()) if mode != "default" else {}
    # A Helm built without the flags of its releases takes the cluster to be an old Kubernetes.
    version = "--kube-version=1.31.0"
    done = subprocess.run(
        [HELM4 or "", "template", RELEASE, str(CHART), "--namespace", NAMESPACE, version, "--values", "-"],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert lines(done.stdout) == lines(template(values, version))


def lines(text: str) -> list[str]:
    """Return the lines that say something."""
    return [line for line in text.splitlines() if line.strip()]

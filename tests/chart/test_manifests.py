"""The plain manifests beside the chart that they are rendered from."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chart.rendering import ROOT


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the check reads, to be spoilt."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on PATH")
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "manifests.py", tmp_path / "scripts")
    return tmp_path


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a project."""
    command = [sys.executable, str(project / "scripts" / "manifests.py"), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_manifests_are_current(project: Path) -> None:
    """deploy/k8s is what the chart renders, its overlays build, and writing it again changes no byte."""
    done = run(project, "--check")
    assert (done.returncode, done.stderr) == (0, "")
    file = project / "deploy" / "k8s" / "base" / "progressdb-kms.yaml"
    before = file.read_bytes()
    assert run(project).returncode == 0
    assert file.read_bytes() == before


def test_drift_is_shown(project: Path) -> None:
    """A manifest that was edited by hand is shown, with what to do, and stays as it is."""
    file = project / "deploy" / "k8s" / "base" / "progressdb-kms.yaml"
    text = file.read_text().replace("maxUnavailable: 0", "maxUnavailable: 1")
    file.write_text(text)
    done = run(project, "--check")
    assert done.returncode == 1
    assert "maxUnavailable: 1" in done.stderr
    assert "make manifests" in done.stderr
    assert file.read_text() == text


def test_a_broken_overlay_is_named(project: Path) -> None:
    """An overlay whose patch fits nothing fails the check by its name."""
    file = project / "deploy" / "k8s" / "overlays" / "production" / "kustomization.yaml"
    file.write_text(file.read_text().replace("/spec/replicas", "/spec/replicaz"))
    done = run(project, "--check")
    assert done.returncode == 1
    assert "overlay production" in done.stderr

"""Renders the chart into deploy/k8s/base, for those who install without Helm.

usage: scripts/manifests.py [--check]

With --check nothing is written: exit 1 if the files differ from what the chart renders, or if an overlay
does not build. Needs helm; the overlays need kubectl.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "deploy" / "helm" / "progressdb-kms"
PLAIN = ROOT / "deploy" / "k8s"
TARGET = PLAIN / "base" / "progressdb-kms.yaml"
OVERLAYS = ("dev", "production")
# Any version that the chart takes; fixed, so that the same chart gives the same bytes with every helm.
KUBERNETES = "1.31.0"
HELM_LABELS = ("helm.sh/chart:", "app.kubernetes.io/managed-by: Helm")


def render() -> str:
    """Return the manifests, without what only Helm's own bookkeeping reads."""
    command = [
        "helm",
        "template",
        "progressdb-kms",
        str(CHART),
        "--namespace",
        "progressdb-kms",
        "--skip-tests",
    ]
    command += ["--kube-version", KUBERNETES, "--values", str(PLAIN / "values.yaml")]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603 - our own
    lines = [line for line in text.splitlines() if not line.strip().startswith(HELM_LABELS)]
    return (
        "# Rendered from deploy/helm/progressdb-kms by `make manifests`: change the chart, not this file.\n"
        + ("\n".join(lines) + "\n")
    )


def build(overlay: str) -> str:
    """Return why the overlay does not build or is not valid, or nothing."""
    command = ["kubectl", "kustomize", str(PLAIN / "overlays" / overlay)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - our own
    if done.returncode != 0:
        return f"overlay {overlay}: {done.stderr.strip()}"
    # Strict, with schemas on disk. Where it is missing, make test-cluster asks an API server.
    if validator := shutil.which("kubeconform-offline"):
        checked = subprocess.run(  # noqa: S603 - our own
            [validator, "-"], input=done.stdout, check=False, capture_output=True, text=True
        )
        if checked.returncode != 0:
            return f"overlay {overlay}: {checked.stdout.strip()}"
    return ""


def main() -> int:
    """Write or check; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    check = parser.parse_args().check
    for tool in ("helm", "kubectl"):
        if shutil.which(tool) is None:
            print(f"{tool} is not on PATH", file=sys.stderr)
            return 1
    wanted = render()
    faults = []
    if check:
        found = TARGET.read_text() if TARGET.exists() else ""
        diff = difflib.unified_diff(
            found.splitlines(), wanted.splitlines(), str(TARGET), "the chart", lineterm=""
        )
        if shown := list(diff)[:60]:
            faults.append("\n".join(shown) + "\nrun `make manifests`")
    else:
        TARGET.write_text(wanted)
    faults += [fault for overlay in OVERLAYS if (fault := build(overlay))]
    print("\n".join(faults), end="\n" if faults else "", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

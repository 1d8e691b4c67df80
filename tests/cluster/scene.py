"""What the tests stand on: a release, and pods in other namespaces that call it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.cluster.kube import Helm, Kube, Manifest, identities, until

SCRIPT: Final = Path(__file__).parent / "pods" / "kms_client.py"
RELEASE: Final = "progressdb-kms"
"""Holds the chart's name, so that the release's objects have no longer one."""
USER: Final = 65532


@dataclass(frozen=True)
class Release:
    """An installed release.

    Attributes:
        kube: Its namespace.
        helm: Its helm.
        values: The values that it has now; a test that changes them leaves them changed.
    """

    kube: Kube
    helm: Helm
    values: dict[str, Any] = field(default_factory=dict)
    name: str = RELEASE

    @property
    def host(self) -> str:
        """Return the Service's name, as clients in other namespaces use it."""
        return f"{self.name}.{self.kube.namespace}.svc"

    def service_pods(self) -> list[Manifest]:
        """Return the service's pods."""
        return self.kube.pods(component="service")

    def all_pods(self) -> dict[str, int]:
        """Return uid and restarts of the service's and the store's pods."""
        return identities(self.service_pods() + self.kube.pods(component="redis"))

    def wait_ready(self) -> None:
        """Wait until all pods of the service and of the store are ready."""
        self.wait_for_store()
        self.kube("rollout", "status", f"deployment/{self.name}", "--timeout=300s", timeout=320)

    def wait_for_store(self) -> None:
        """Wait until the store's pod is ready."""
        self.kube("rollout", "status", f"statefulset/{self.name}-redis", "--timeout=300s", timeout=320)

    def provision_jobs(self) -> list[Manifest]:
        """Return the bootstrap's Jobs."""
        return list(self.kube.get("jobs", "-l", "app.kubernetes.io/component=provision"))


@dataclass(frozen=True)
class Report:
    """What traffic saw; see ``Traffic`` in pods/kms_client.py."""

    ok: int
    made: int
    failed: dict[str, int]
    wrong: int
    slowest: float
    details: list[str]

    def __str__(self) -> str:
        failed = ", ".join(f"{count} {code}" for code, count in self.failed.items()) or "none"
        return f"{self.ok} calls, {self.made} keys made, failed: {failed}, slowest {self.slowest:.2f} s"


@dataclass(frozen=True)
class Caller:
    """A pod that calls the service with the image's own client."""

    kube: Kube
    pod: str

    def __call__(self, *command: str, timeout: float = 300) -> dict[str, Any]:
        """Run one command of pods/kms_client.py in the pod and return what it found."""
        out = self.kube("exec", self.pod, "--", "python", "/scripts/kms_client.py", *command, timeout=timeout)
        return dict(json.loads(out.splitlines()[-1]))

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run any command in the pod."""
        return self.kube.run("exec", self.pod, "--", *command)

    @contextmanager
    def traffic(self) -> Iterator[list[Report]]:
        """Let the pod call the service until the block ends; then the list holds the report."""
        reports: list[Report] = []
        command = ["kubectl", "-n", self.kube.namespace, "exec", "-i", self.pod, "--"]
        with subprocess.Popen(
            [*command, "python", "/scripts/kms_client.py", "traffic"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            try:
                first = process.stdout.readline()
                assert first == "running\n", f"traffic did not begin: {first}"
                yield reports
            except BaseException:
                process.kill()
                raise
            out, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-2000:]
            reports.append(Report(**json.loads(out.splitlines()[-1])))


def caller_pod(
    name: str, image: str, host: str, secret: str | None, labels: dict[str, str]
) -> tuple[Manifest, ...]:
    """Return the manifests of a pod that waits to be told to call.

    Args:
        name: The pod's.
        image: The image under test.
        host: The service's name.
        secret: The client certificate's Secret; None for a pod that has none.
        labels: The pod's.
    """
    mounts = [{"name": "scripts", "mountPath": "/scripts"}, {"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108
    volumes: list[Manifest] = [
        {"name": "scripts", "configMap": {"name": f"{name}-scripts"}},
        {"name": "tmp", "emptyDir": {}},
    ]
    environment = [{"name": "PROGRESSDB_KMS_ENDPOINT", "value": f"https://{host}:8443"}]
    if secret:
        mounts.append({"name": "tls", "mountPath": "/tls"})
        volumes.append({"name": "tls", "secret": {"secretName": secret, "defaultMode": 0o440}})
        environment += [
            {"name": f"PROGRESSDB_KMS_{what}", "value": f"/tls/{file}"}
            for what, file in (("CA", "ca.crt"), ("CERT", "tls.crt"), ("KEY", "tls.key"))
        ]
    scripts = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-scripts"},
        "data": {SCRIPT.name: SCRIPT.read_text()},
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "caller",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["python", "-c", "import signal; signal.pause()"],
                    "env": environment,
                    "volumeMounts": mounts,
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                }
            ],
            "volumes": volumes,
        },
    }
    return scripts, pod


def start_caller(
    kube: Kube, name: str, image: str, host: str, secret: str | None, labels: dict[str, str]
) -> Caller:
    """Start a caller's pod and wait until it can be told to call."""
    kube.apply(*caller_pod(name, image, host, secret, labels))
    kube("wait", f"pod/{name}", "--for=condition=Ready", "--timeout=240s")
    caller = Caller(kube, name)
    if secret:
        # A name may not resolve at once where its Service is new.
        until(f"a connection from {name}", lambda: caller("dial", host, "8443")["connected"])
    return caller

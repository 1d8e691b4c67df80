"""kubectl and helm as the tests use them, on the cluster that KUBECONFIG names."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "progressdb-kms"

T = TypeVar("T")
Manifest = dict[str, Any]


class Feed(str):
    """Text for a command's standard input: it may hold a Secret, and a failed test shows arguments."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} characters>"


def run(*command: str, stdin: Feed | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, whatever its exit status."""
    return subprocess.run(command, input=stdin, check=False, capture_output=True, text=True, timeout=timeout)


def until(what: str, attempt: Callable[[], T | None], deadline: float = 240) -> T:
    """Return the first true answer of ``attempt``, asked twice a second.

    Args:
        what: For the message of a failure.
        attempt: Asked until its answer is true; an AssertionError counts as "not yet".
        deadline: Seconds after which it has failed: generous, since only a failure waits for it.
    """
    end = time.monotonic() + deadline
    last = ""
    while time.monotonic() < end:
        try:
            if found := attempt():
                return found
        except AssertionError as error:
            last = f": {error}"
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {deadline:.0f} s{last}")


@dataclass(frozen=True)
class Kube:
    """One namespace."""

    namespace: str

    def run(
        self, *arguments: str, stdin: Feed | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl in the namespace, whatever its exit status."""
        return run("kubectl", "-n", self.namespace, *arguments, stdin=stdin, timeout=timeout)

    def __call__(self, *arguments: str, stdin: Feed | None = None, timeout: float = 300) -> str:
        """Run kubectl in the namespace and return what it prints; it must succeed."""
        done = self.run(*arguments, stdin=stdin, timeout=timeout)
        # Its arguments are names; what it is fed may be a Secret and is not shown.
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr.strip()[-2000:]}"
        return done.stdout

    def get(self, *what: str) -> Any:
        """Return an object, or a list's items."""
        found = json.loads(self("get", *what, "-o", "json"))
        return found["items"] if found.get("kind") == "List" else found

    def apply(self, *manifests: Manifest) -> None:
        """Make or change objects."""
        self("apply", "-f", "-", stdin=list_of(manifests))

    def exists(self, *what: str) -> bool:
        """Tell whether there is such an object."""
        return self.run("get", *what).returncode == 0

    def secret(self, name: str) -> Secret:
        """Return a Secret."""
        return Secret(self.get("secret", name))

    def pods(self, **labels: str) -> list[Manifest]:
        """Return the pods with these labels (``component`` means app.kubernetes.io/component) that live."""
        return [
            pod
            for pod in self.get("pods", "-l", selector(**labels))
            if "deletionTimestamp" not in pod["metadata"]
        ]

    def create_job(self, name: str, cron_job: str, change: Callable[[Manifest], None] | None = None) -> None:
        """Make a Job from a CronJob, as operators do.

        Args:
            name: The Job's.
            cron_job: The CronJob's.
            change: Changes the container before the Job is made.
        """
        source = ("create", "job", name, f"--from=cronjob/{cron_job}")
        if change is None:
            self(*source)
            return
        job = json.loads(self(*source, "--dry-run=client", "-o", "json"))
        change(job["spec"]["template"]["spec"]["containers"][0])
        self.apply(job)

    def job_ended(self, name: str, deadline: float = 300) -> str:
        """Return ``Complete`` or ``Failed``, once the Job is."""

        def ended() -> str | None:
            conditions = self.get("job", name).get("status", {}).get("conditions", [])
            ends = [c["type"] for c in conditions if c["status"] == "True" and c["type"] in ENDS]
            return ends[0] if ends else None

        return until(f"end of Job {name}", ended, deadline)

    def job_logs(self, name: str) -> str:
        """Return what the Job's pods wrote, but those that are gone."""
        pods = self.get("pods", "-l", f"batch.kubernetes.io/job-name={name}")
        return "".join(self.run("logs", pod["metadata"]["name"]).stdout for pod in pods)

    def wait_for_job(self, name: str, deadline: float = 300) -> None:
        """Wait until the Job is complete; a failed one says why."""
        assert self.job_ended(name, deadline) == "Complete", self.job_logs(name)[-3000:]

    def events(self, reason: str) -> list[Manifest]:
        """Return the events of this reason."""
        return list(self.get("events", "--field-selector", f"reason={reason}"))


def list_of(manifests: Iterable[Manifest]) -> Feed:
    """Return objects as kubectl reads them."""
    return Feed(json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)}))


ENDS = frozenset({"Complete", "Failed"})


def selector(**labels: str) -> str:
    """Return a label selector; ``component`` and ``instance`` are the well-known labels."""
    names = {
        name: f"app.kubernetes.io/{name}" if name in {"component", "instance", "name"} else name
        for name in labels
    }
    return ",".join(f"{names[name]}={value}" for name, value in labels.items())


class Hidden(dict[str, Any]):
    """A manifest with key material: a failed test shows arguments, and not this."""

    def __repr__(self) -> str:
        return f"<{self.get('kind')} {self.get('metadata', {}).get('name')}>"


class Secret:
    """A Secret whose bytes no assertion prints."""

    def __init__(self, manifest: Manifest) -> None:
        self.metadata: Manifest = manifest["metadata"]
        self._manifest = manifest
        self.keys = sorted(manifest.get("data") or {})

    def __repr__(self) -> str:
        return f"<Secret {self.metadata['name']}: {', '.join(self.keys)}>"

    def value(self, key: str) -> bytes:
        """Return one value."""
        return base64.b64decode(self._manifest["data"][key])

    def copy(self, namespace: str, name: str | None = None) -> Hidden:
        """Return the manifest that makes it again in a namespace, annotations and labels included."""
        metadata = {
            "name": name or self.metadata["name"],
            "namespace": namespace,
            "labels": self.metadata.get("labels", {}),
            "annotations": self.metadata.get("annotations", {}),
        }
        kept = {"type": self._manifest["type"], "data": self._manifest["data"]}
        return Hidden({"apiVersion": "v1", "kind": "Secret", "metadata": metadata} | kept)


@dataclass(frozen=True)
class Helm:
    """One release of the chart."""

    namespace: str
    release: str
    image: str
    program: str = "helm"

    @property
    def image_values(self) -> Manifest:
        """Return the values that name the image under test, which no node should pull."""
        repository, _, tag = self.image.rpartition(":")
        return {"image": {"repository": repository, "tag": tag, "pullPolicy": "IfNotPresent"}}

    def run(
        self, *arguments: str, values: Mapping[str, Any] | None = None, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run helm in the namespace, whatever its exit status; ``values`` go in as a file."""
        given = [] if values is None else ["--values", "-"]
        stdin = None if values is None else Feed(json.dumps(merge(self.image_values, values)))
        return run(self.program, "-n", self.namespace, *arguments, *given, stdin=stdin, timeout=timeout)

    def __call__(self, *arguments: str, values: Mapping[str, Any] | None = None) -> str:
        """Run helm in the namespace and return what it prints; it must succeed."""
        done = self.run(*arguments, values=values)
        assert done.returncode == 0, f"helm {' '.join(arguments)}: {done.stderr.strip()[-2000:]}"
        return done.stdout

    def install(self, values: Mapping[str, Any], *arguments: str) -> str:
        """Install the chart; ``--wait`` is the caller's choice."""
        return self("install", self.release, str(CHART), *arguments, "--timeout", "4m", values=values)

    def upgrade(self, values: Mapping[str, Any], *arguments: str) -> str:
        """Upgrade the release and wait until it is ready."""
        words = ("--wait", "--timeout", "4m", *arguments)
        return self("upgrade", self.release, str(CHART), *words, values=values)


def merge(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of both; where both have one that is no mapping, the other's."""
    result = dict(one)
    for key, value in other.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return result


def identities(pods: Iterable[Manifest]) -> dict[str, int]:
    """Return uid and restarts of each pod, by which a test sees that none was replaced or restarted."""
    return {
        pod["metadata"]["uid"]: sum(s["restartCount"] for s in pod["status"].get("containerStatuses", []))
        for pod in pods
    }

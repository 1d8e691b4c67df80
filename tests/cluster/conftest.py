"""The cluster that KUBECONFIG names, a release in it, and the table of what the tests saw.

Needs kubectl and helm on PATH, and in IMAGE and CHAT_IMAGE the names of images that the nodes have: the
service's, and the chat server's on it. Namespaces are made for the run and removed after it; KEEP=1 leaves
them, to be looked at.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Generator, Iterator

import pytest

from tests.cluster.kube import Helm, Kube, merge, run, until
from tests.cluster.scene import RELEASE, Caller, Release, start_caller

RESTRICTED = {
    "pod-security.kubernetes.io/enforce": "restricted",
    "pod-security.kubernetes.io/warn": "restricted",
}
ROWS = pytest.StashKey[list[tuple[str, str, float, list[str]]]]()
SAW = pytest.StashKey[list[str]]()
NAMESPACES: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Make the table."""
    config.stash[ROWS] = []


@pytest.fixture
def saw(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Give what notes a finding for the table."""
    return request.node.stash.setdefault(SAW, []).append


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add a row to the table; show pods and logs of a failure."""
    report = yield
    if report.failed:
        report.sections.append(("cluster", "\n".join(describe(name) for name in NAMESPACES)))
    if report.when == "call" or (report.when == "setup" and not report.passed):
        what = (item.function.__doc__ or item.name).strip().splitlines()[0]  # type: ignore[attr-defined]
        row = (what, report.outcome, call.duration, item.stash.get(SAW, []))
        item.config.stash[ROWS].append(row)
    return report


def describe(namespace: str) -> str:
    """Return pods, events and the ends of logs; no Secret is read."""
    kube = Kube(namespace)
    parts = [
        f"--- {namespace}",
        kube.run("get", "pods,jobs,pvc", "-o", "wide").stdout,
        "\n".join(kube.run("get", "events", "--sort-by=.lastTimestamp").stdout.splitlines()[-25:]),
    ]
    for pod in kube.run("get", "pods", "-o", "name").stdout.split():
        logs = kube.run("logs", pod, "--all-containers", "--prefix", "--tail=12")
        parts.append(f"{logs.stdout}{logs.stderr}")
    return "\n".join(parts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table."""
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("what was seen on the cluster")
    for what, outcome, seconds, found in rows:
        terminalreporter.line(
            f"{'ok' if outcome == 'passed' else outcome.upper():<7}{seconds:6.1f} s  {what}"
        )
        for line in found:
            terminalreporter.line(f"{'':18}- {line}")


@pytest.fixture(scope="session")
def image() -> str:
    """Return the name of the image under test."""
    for tool in ("kubectl", "helm"):
        assert shutil.which(tool), f"{tool} is not on PATH"
    name = os.environ.get("IMAGE", "")
    assert ":" in name, "set IMAGE to the name and tag of an image that the cluster's nodes have"
    done = run("kubectl", "version", "-o", "json", timeout=60)
    assert done.returncode == 0, f"KUBECONFIG leads to no cluster: {done.stderr.strip()}"
    return name


@pytest.fixture(scope="session")
def chat_image() -> str:
    """Return the name of the chat server's image."""
    name = os.environ.get("CHAT_IMAGE", "")
    assert ":" in name, (
        "set CHAT_IMAGE to what `make image-chat` builds, with its tag, once the nodes have it"
    )
    return name


@pytest.fixture(scope="session")
def make_namespace() -> Iterator[Callable[[str], Kube]]:
    """Give what makes a namespace under the restricted Pod Security Standard; all go when the run ends."""
    run_id = uuid.uuid4().hex[:5]
    made: list[Kube] = []

    def make(name: str) -> Kube:
        kube = Kube(f"{name}-{run_id}")
        labels = ",".join(f"{key}={value}" for key, value in RESTRICTED.items())
        kube("create", "namespace", kube.namespace)
        kube("label", "namespace", kube.namespace, *labels.split(","))
        made.append(kube)
        NAMESPACES.append(kube.namespace)
        return kube

    yield make
    if not os.environ.get("KEEP"):
        for kube in made:
            kube.run("delete", "namespace", kube.namespace, "--wait=false")
        for kube in made:
            kube.run("wait", "--for=delete", f"namespace/{kube.namespace}", "--timeout=180s")


@pytest.fixture(scope="session")
def bare(image: str, make_namespace: Callable[[str], Kube]) -> Release:
    """Return a release installed with no values but its image."""
    kube = make_namespace("kms")
    release = Release(kube, Helm(kube.namespace, RELEASE, image))
    release.helm.install({}, "--wait", "--wait-for-jobs")
    return release


@pytest.fixture(scope="session")
def client_namespace(make_namespace: Callable[[str], Kube]) -> Kube:
    """Return the namespace of the clients."""
    return make_namespace("chat")


@pytest.fixture(scope="session")
def release(bare: Release, client_namespace: Kube) -> Release:
    """Return the release with its clients: ``chat`` may use keys of rooms, ``ops`` may look."""
    values = merge(bare.values, {"clients": client_values(client_namespace.namespace)})
    bare.helm.upgrade(values, "--wait-for-jobs")
    bare.values.update(values)
    return bare


def client_values(namespace: str) -> list[dict[str, object]]:
    """Return the clients of the life test."""
    return [
        {
            "name": "chat",
            "namespace": namespace,
            "permissions": ["key:create", "key:encrypt", "key:decrypt"],
            "threadPrefixes": ["room:"],
        },
        {"name": "ops", "namespace": namespace, "permissions": ["key:read", "rotation:run"]},
    ]


def _caller(release: Release, kube: Kube, name: str) -> Caller:
    secret = f"{release.name}-client-{name}"
    until(f"the certificate of {name}", lambda: kube.exists("secret", secret))
    return start_caller(kube, name, release.helm.image, release.host, secret, {"app": name})


@pytest.fixture(scope="session")
def chat(release: Release, client_namespace: Kube) -> Caller:
    """Return the pod that uses keys."""
    return _caller(release, client_namespace, "chat")


@pytest.fixture(scope="session")
def ops(release: Release, client_namespace: Kube) -> Caller:
    """Return the pod that looks at keys."""
    return _caller(release, client_namespace, "ops")


@pytest.fixture(autouse=True)
def healthy(request: pytest.FixtureRequest) -> None:
    """Begin each test with a release that is ready, whatever the last one did."""
    if "release" in request.fixturenames:
        request.getfixturevalue("release").wait_ready()


@pytest.fixture
def stopwatch() -> Callable[[], float]:
    """Give the seconds since the test began."""
    began = time.monotonic()
    return lambda: time.monotonic() - began

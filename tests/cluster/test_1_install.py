"""From nothing to clients that call; and who is kept out."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.cluster.kube import Kube
from tests.cluster.scene import USER, Caller, Release, start_caller

pytestmark = pytest.mark.cluster

Saw = Callable[[str], None]


def test_install_without_values(bare: Release, saw: Saw) -> None:
    """`helm install` with no value but the image: ready, its KEK made and kept."""
    pods = bare.service_pods()
    assert len(pods) == 2
    kek = bare.kube.secret(f"{bare.name}-kek")
    assert {"kek.yaml", "store-id"} <= set(kek.keys)
    assert "ownerReferences" not in kek.metadata
    assert "app.kubernetes.io/instance" not in kek.metadata.get("labels", {})
    assert kek.metadata["annotations"]["helm.sh/resource-policy"] == "keep"
    users = {pod["spec"]["securityContext"]["runAsUser"] for pod in pods}
    nodes = {pod["spec"]["nodeName"] for pod in pods}
    assert users == {USER}
    saw(f"{len(pods)} pods on {len(nodes)} node(s), Secret {kek.metadata['name']} with {', '.join(kek.keys)}")


def test_service_account_has_no_rights(bare: Release, saw: Saw) -> None:
    """The service's pods hold no token and may do nothing; the rotation's may use one Secret."""
    for pod in bare.service_pods():
        assert pod["spec"]["automountServiceAccountToken"] is False
    account = f"system:serviceaccount:{bare.kube.namespace}:"
    kek = f"secret/{bare.name}-kek"

    def may(who: str, verb: str, what: str) -> bool:
        return bare.kube.run("auth", "can-i", verb, what, f"--as={account}{who}").returncode == 0

    service = bare.service_pods()[0]["spec"]["serviceAccountName"]
    rotation = bare.kube.get("cronjob", f"{bare.name}-rotate")["spec"]["jobTemplate"]["spec"]["template"][
        "spec"
    ]
    job = rotation["serviceAccountName"]
    assert job != service
    assert not may(service, "get", kek)
    assert may(job, "get", kek)
    assert may(job, "patch", kek)
    assert not may(job, "delete", kek)
    assert not may(job, "get", f"secret/{bare.name}-redis-auth")
    assert not may(job, "list", "secrets")
    saw(f"{service}: nothing; {job}: get and patch {kek}")


def test_helm_test(release: Release, saw: Saw) -> None:
    """`helm test` makes a round trip over mTLS and sees a connection without a certificate refused."""
    out = release.helm("test", release.name, "--timeout", "3m", "--logs")
    assert "Phase:          Succeeded" in out, out[-2000:]
    saw(next((line.strip() for line in reversed(out.splitlines()) if line.strip()), ""))


def test_two_clients(chat: Caller, ops: Caller, saw: Saw) -> None:
    """Two clients in pods of another namespace may do what their grants say, and nothing else."""
    chat("seed", "10")
    mine, theirs = chat("may"), ops("may", chat("key")["key"])
    assert mine == {
        "create": "ok",
        "create elsewhere": "permission_denied",
        "encrypt": "ok",
        "decrypt": "ok",
        "census": "permission_denied",
        "rotations": "permission_denied",
    }
    assert theirs == {
        "create": "permission_denied",
        "create elsewhere": "permission_denied",
        "encrypt": "permission_denied",
        "census": "ok",
        "rotations": "ok",
    }
    saw(f"chat may {allowed(mine)}; ops may {allowed(theirs)}; else permission_denied")


def allowed(answers: dict[str, str]) -> str:
    """Return what was answered."""
    return ", ".join(sorted(call for call, answer in answers.items() if answer == "ok"))


def test_without_certificate(chat: Caller, release: Release, saw: Saw) -> None:
    """A connection without a client certificate is refused, from a pod that may reach the port."""
    answer = chat("naked", release.host, "8443")
    assert answer["refused"], answer
    saw(f"TLS alert: {answer['reason']}")


@pytest.fixture(scope="module")
def stranger(release: Release, make_namespace: Callable[[str], Kube]) -> Caller:
    """Return a pod in a namespace that no client is listed for."""
    return start_caller(make_namespace("outside"), "stranger", release.helm.image, release.host, None, {})


def test_network_policy(chat: Caller, stranger: Caller, release: Release, saw: Saw) -> None:
    """A pod outside the NetworkPolicy reaches nothing; a client reaches the API alone."""
    store = f"{release.name}-redis.{release.kube.namespace}.svc"
    pod = release.service_pods()[0]["status"]["podIP"]
    targets = {"API": (release.host, "8443"), "admin": (pod, "9090"), "store": (store, "6379")}
    assert chat("dial", *targets["API"])["connected"]
    for what in ("admin", "store"):
        assert not chat("dial", *targets[what])["connected"], what
    for what, target in targets.items():
        assert not stranger("dial", *target)["connected"], what
    saw("client: API only; stranger: nothing (enforced by whatever enforces policies in this cluster)")


def test_unchanged_upgrade(release: Release, saw: Saw) -> None:
    """`helm upgrade` with unchanged values restarts nothing and changes no object."""

    def generations() -> dict[str, int]:
        kinds = "deployments,statefulsets,jobs,cronjobs,networkpolicies,poddisruptionbudgets"
        return {
            item["metadata"]["uid"]: item["metadata"].get("generation", 0) for item in release.kube.get(kinds)
        }

    before, objects = release.all_pods(), generations()
    release.helm.upgrade(release.values)
    release.wait_ready()
    assert release.all_pods() == before
    assert generations() == objects
    saw(f"{len(before)} pods and {len(objects)} objects as they were")


def test_certificates_are_required_by_every_render(release: Release, saw: Saw) -> None:
    """The configuration in the cluster has a client CA, and the Service no port but the API's."""
    config = release.kube.get("configmap", "-l", f"app.kubernetes.io/instance={release.name}")
    assert any("client_ca" in text for one in config for text in (one.get("data") or {}).values())
    ports = {port["port"] for port in release.kube.get("service", release.name)["spec"]["ports"]}
    assert 8443 in ports
    saw(f"Service ports {sorted(ports)}; policy {json.dumps(sorted(release.values))}")

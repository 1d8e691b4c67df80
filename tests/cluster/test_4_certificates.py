"""Certificates renewed without a restart, by the chart's own Job and by cert-manager."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.cluster.conftest import client_values
from tests.cluster.kube import Helm, Kube, run, until
from tests.cluster.scene import RELEASE, Caller, Release, start_caller

pytestmark = pytest.mark.cluster

Saw = Callable[[str], None]
MINUTES = 600
"""A Secret's way into a pod takes a second here and a minute or two elsewhere."""


def store_serial(release: Release) -> str:
    """Return the serial number of the store's certificate, asked for from a pod of the service."""
    pod = release.service_pods()[0]["metadata"]["name"]
    ask = (
        "import ssl; from cryptography import x509; "
        f"pem = ssl.get_server_certificate(('{release.name}-redis', 6379), timeout=10); "
        "print(format(x509.load_pem_x509_certificate(pem.encode()).serial_number, 'x'))"
    )
    return release.kube("exec", pod, "--", "python", "-c", ask).strip()


def renew(release: Release, name: str) -> None:
    """Let the renewal's CronJob run once, now."""
    release.kube.create_job(name, f"{release.name}-renew")
    release.kube.wait_for_job(name)


def test_generated_server_certificate(release: Release, chat: Caller, saw: Saw) -> None:
    """Mode generated: a renewed server certificate is served by the same pods, with no failed call."""
    pods, old = release.all_pods(), chat("serial", release.host, "8443")["serial"]
    authority = release.kube.secret(f"{release.name}-server-ca").metadata["uid"]
    with chat.traffic() as reports:
        release.kube("delete", "secret", f"{release.name}-server-tls")
        renew(release, "renew-server")

        def renewed() -> bool:
            return old not in {chat("serial", release.host, "8443")["serial"] for _ in range(4)}

        until("the new certificate from all pods", renewed, MINUTES)
    assert reports[0].failed == {}, reports[0].details
    assert release.all_pods() == pods
    assert release.kube.secret(f"{release.name}-server-ca").metadata["uid"] == authority
    saw(f"{old[:12]}... replaced; {reports[0]}")


def test_generated_store_certificate(release: Release, chat: Caller, saw: Saw) -> None:
    """Mode generated: the store takes its renewed certificate without a restart, and calls go on."""
    pods, old = release.all_pods(), store_serial(release)
    release.kube("delete", "secret", f"{release.name}-redis-tls")
    renew(release, "renew-store")
    until("the store's new certificate", lambda: store_serial(release) != old, MINUTES)
    assert release.all_pods() == pods
    assert chat("may")["create"] == "ok"
    saw(f"{old[:12]}... replaced by CONFIG SET")


def test_generated_client_certificate(
    release: Release, chat: Caller, client_namespace: Kube, saw: Saw
) -> None:
    """Mode generated: a client goes on with its renewed certificate, and its pod with its connections."""
    name = f"{release.name}-client-chat"
    old = client_namespace.secret(name).value("tls.crt")
    with chat.traffic() as reports:
        client_namespace("delete", "secret", name)
        renew(release, "renew-client")

        def arrived() -> bool:
            return chat.run("cat", "/tls/tls.crt").stdout.encode() not in {b"", old}

        until("the new certificate in the pod", arrived, MINUTES)
        assert chat("may")["create"] == "ok"
    assert reports[0].failed == {}, reports[0].details
    saw(str(reports[0]))


def test_renewal_leaves_what_is_not_due(release: Release, saw: Saw) -> None:
    """A renewal with nothing due changes no Secret."""

    def versions() -> dict[str, str]:
        found = release.kube.get("secrets")
        mine = [one["metadata"] for one in found if one["metadata"]["name"].startswith(release.name)]
        return {metadata["name"]: metadata["resourceVersion"] for metadata in mine}

    before = versions()
    renew(release, "renew-nothing")
    assert versions() == before
    saw(f"{len(before)} Secrets as they were")


@pytest.fixture(scope="module")
def certified(image: str, make_namespace: Callable[[str], Kube]) -> Iterator[tuple[Release, Caller]]:
    """Return a release whose certificates cert-manager issues, and a client of it."""
    installed = run("kubectl", "get", "crd", "certificates.cert-manager.io").returncode == 0
    if not installed:
        pytest.skip("cert-manager is not installed in this cluster")
    kube, clients = make_namespace("certs"), make_namespace("certs-chat")
    values = {"tls": {"mode": "certManager"}, "clients": client_values(clients.namespace)[:1]}
    release = Release(kube, Helm(kube.namespace, RELEASE, image), values)
    release.helm.install(values, "--wait", "--wait-for-jobs")
    secret = f"{release.name}-client-chat"
    until("the client's certificate", lambda: clients.exists("secret", secret))
    yield release, start_caller(clients, "chat", image, release.host, secret, {"app": "chat"})
    release.helm.run("uninstall", release.name, "--wait")


def test_cert_manager(certified: tuple[Release, Caller], saw: Saw) -> None:
    """Mode certManager: server and client speak with what cert-manager issued, by CAs of their own."""
    release, chat = certified
    assert chat("may")["create"] == "ok"
    assert chat("naked", release.host, "8443")["refused"]
    authorities = {
        release.kube.secret(f"{release.name}-server-tls").value("ca.crt"),
        release.kube.secret(f"{release.name}-redis-tls").value("ca.crt"),
    }
    assert len(authorities) == 2, "the server's CA and the store's are two"
    made = release.kube.get("certificates.cert-manager.io")
    saw(f"{len(made)} Certificates issued: {', '.join(sorted(one['metadata']['name'] for one in made))}")


def test_cert_manager_renews(certified: tuple[Release, Caller], saw: Saw) -> None:
    """Mode certManager: what cert-manager issues anew is served by the same pods, under traffic."""
    release, chat = certified
    pods, old = release.all_pods(), chat("serial", release.host, "8443")["serial"]
    store = store_serial(release)
    with chat.traffic() as reports:
        for name in ("server-tls", "redis-tls"):
            release.kube("delete", "secret", f"{release.name}-{name}")
        until("the new certificate", lambda: chat("serial", release.host, "8443")["serial"] != old, MINUTES)
        until("the store's new certificate", lambda: store_serial(release) != store, MINUTES)
    assert reports[0].failed == {}, reports[0].details
    assert release.all_pods() == pods
    saw(f"server {old[:12]}... and store {store[:12]}... replaced; {reports[0]}")

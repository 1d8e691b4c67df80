"""What is left when something is gone: uninstalled and installed again, the KEK lost, the store lost."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable

import pytest

from tests.cluster.kube import Helm, Kube, Manifest, identities, until
from tests.cluster.scene import RELEASE, Caller, Release

pytestmark = pytest.mark.cluster

Saw = Callable[[str], None]
SEED = "200"


def reinstall(release: Release, *arguments: str) -> None:
    """Install the release again with the values that it had."""
    release.helm.install(release.values, *arguments)


def refusal(release: Release) -> str:
    """Return what the bootstrap says for its refusal, once it has refused."""

    def said() -> str | None:
        jobs = {job["metadata"]["name"] for job in release.provision_jobs()}
        for pod in release.kube.get("pods", "-l", "app.kubernetes.io/component=provision"):
            if pod["metadata"].get("labels", {}).get("batch.kubernetes.io/job-name") not in jobs:
                continue
            for status in pod["status"].get("containerStatuses", []):
                for state in (status["state"], status.get("lastState", {})):
                    ended = state.get("terminated", {})
                    if ended.get("exitCode") and ended.get("message"):
                        return str(ended["message"]).strip()
        return None

    return until("the bootstrap's refusal", said)


def bootstrap_again(release: Release) -> None:
    """Make the bootstrap's Job anew: it is tried again by itself, with a growing pause."""
    for job in release.provision_jobs():
        release.kube("delete", "job", job["metadata"]["name"])
    release.helm.upgrade(release.values, "--wait-for-jobs")
    release.wait_ready()


def test_reinstall_finds_everything(release: Release, chat: Caller, ops: Caller, saw: Saw) -> None:
    """Uninstall and install again: the same KEK, the same data, the same CAs; clients go on calling."""
    chat("seed", SEED)
    before = ops("census")
    kept = {
        name: release.kube.secret(f"{release.name}-{name}").metadata["uid"] for name in ("kek", "server-ca")
    }
    release.helm("uninstall", release.name, "--wait", "--timeout", "5m")
    assert not release.service_pods()
    reinstall(release, "--wait", "--wait-for-jobs")
    assert {name: release.kube.secret(f"{release.name}-{name}").metadata["uid"] for name in kept} == kept
    after, ledger = ops("census"), chat("check")
    assert after == before
    assert ledger["lost"] == {}
    saw(f"KEK version {after['active']}, all {ledger['keys']} keys decrypt, clients' certificates still good")


def test_lost_kek_stops_the_install(release: Release, chat: Caller, saw: Saw) -> None:
    """With data but no KEK Secret an install stops with a message; with the Secret back it goes on."""
    release.helm("uninstall", release.name, "--wait", "--timeout", "5m")
    kek = release.kube.secret(f"{release.name}-kek")
    release.kube("delete", "secret", f"{release.name}-kek")
    reinstall(release)
    message = refusal(release)
    made = release.kube.exists("secret", f"{release.name}-kek")
    release.kube.apply(kek.copy(release.kube.namespace))
    assert not made, "a lost KEK is never replaced by a new one"
    assert "KEK" in message
    bootstrap_again(release)
    assert chat("check")["lost"] == {}
    saw(message[:160])


def export_job(container: Manifest) -> None:
    """Turn a backup's container into one that waits to be told what to do."""
    container["command"] = ["python", "-c", "import signal; signal.pause()"]
    container["args"] = []


def drill_pod(kube: Kube, name: str, cron_job: str) -> str:
    """Start a pod with the backup's mounts, and return its name once it runs."""
    kube.create_job(name, cron_job, export_job)

    def running() -> str | None:
        pods = kube.get("pods", "-l", f"batch.kubernetes.io/job-name={name}")
        return next((p["metadata"]["name"] for p in pods if p["status"]["phase"] == "Running"), None)

    return until(f"pod of {name}", running)


def newest_export(kube: Kube, pod: str) -> str:
    """Return the name of the newest export in a pod's backups."""
    listing = kube("exec", pod, "--", "python", "-c", "import os; print(*os.listdir('/backups'))")
    return max(name for name in listing.split() if name.endswith(".export"))


def import_export(kube: Kube, pod: str, name: str) -> str:
    """Verify and import an export in a pod, and return what the command says."""
    config = ("--config", "/etc/progressdb-kms/config.yaml")
    command = ("exec", pod, "--", "progressdb-kms", "backup")
    kube(*command, "verify", f"/backups/{name}", *config, timeout=600)
    return kube(*command, "import", f"/backups/{name}", *config, timeout=600)


def is_ready(pod: Manifest) -> bool:
    """Tell whether a pod gets calls."""
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))


def copy_file(source: tuple[Kube, str, str], target: tuple[Kube, str, str]) -> str:
    """Copy a file from pod to pod and return its SHA-256."""
    kube, pod, path = source
    read = ["kubectl", "-n", kube.namespace, "exec", pod, "--", "cat", path]
    content = subprocess.run(read, check=True, capture_output=True, timeout=120).stdout
    kube, pod, path = target
    save = "import sys; open(sys.argv[1], 'wb').write(sys.stdin.buffer.read())"
    write = ["kubectl", "-n", kube.namespace, "exec", "-i", pod, "--", "python", "-c", save, path]
    subprocess.run(write, input=content, check=True, capture_output=True, timeout=120)
    return hashlib.sha256(content).hexdigest()


def test_restore_drill(
    release: Release, chat: Caller, ops: Caller, make_namespace: Callable[[str], Kube], saw: Saw
) -> None:
    """The daily backup, imported into an empty store in another namespace with a copy of the KEK."""
    chat("seed", SEED)
    census = ops("census")
    release.kube.create_job("backup-1", f"{release.name}-backup")
    release.kube.wait_for_job("backup-1")

    # Another namespace: a copy of the KEK Secret first, then the release.
    kube = make_namespace("drill")
    kube.apply(release.kube.secret(f"{release.name}-kek").copy(kube.namespace))
    drill = Release(kube, Helm(kube.namespace, RELEASE, release.helm.image))
    kek = {"management": "existing", "secretName": f"{release.name}-kek", "storeIdKey": "store-id"}
    drill_values = release.values | {"kek": kek, "clients": []}
    drill.helm.install(drill_values)

    source = drill_pod(release.kube, "drill-source", f"{release.name}-backup")
    target = drill_pod(kube, "drill-target", f"{release.name}-backup")
    name = newest_export(release.kube, source)
    digest = copy_file((release.kube, source, f"/backups/{name}"), (kube, target, f"/backups/{name}"))

    unready = [pod for pod in drill.service_pods() if not is_ready(pod)]
    assert len(unready) == len(drill.service_pods())
    drill.wait_for_store()
    out = import_export(kube, target, name)
    drill.wait_ready()
    for where, job in ((release.kube, "drill-source"), (kube, "drill-target")):
        where("delete", "job", job)
    restored = drill_census(drill)
    assert restored == census["deks"]
    assert set(identities(drill.service_pods()).values()) == {0}, "who waits for an import ends at nothing"
    saw(f"{name} ({digest[:12]}...): {' '.join(out.split())[:120]}")
    saw(
        f"{len(unready)} pods were unready until the import; keys by KEK version {restored}, as in the source"
    )


def drill_census(drill: Release) -> dict[str, int]:
    """Return the keys by KEK version of a release without clients, as its metrics tell them."""
    url = "http://localhost:9090/metrics"
    ask = f"import urllib.request as u; print(u.urlopen('{url}', timeout=10).read().decode())"
    pod = drill.service_pods()[0]["metadata"]["name"]

    def told() -> dict[str, int]:
        text = drill.kube("exec", pod, "--", "python", "-c", ask)
        rows = [line for line in text.splitlines() if line.startswith("kms_kek_census{")]
        return {row.split('"')[1]: int(float(row.rsplit(" ", 1)[1])) for row in rows}

    return until("the census", told)


def test_lost_store_stops_the_install(release: Release, chat: Caller, saw: Saw) -> None:
    """With the KEK but an emptied store an install stops; the last backup brings all back."""
    release.kube.create_job("backup-2", f"{release.name}-backup")
    release.kube.wait_for_job("backup-2")
    release.helm("uninstall", release.name, "--wait", "--timeout", "4m")
    release.kube("delete", "pvc", f"data-{release.name}-redis-0", "--timeout=120s")
    reinstall(release)
    message = refusal(release)
    pods = release.service_pods()
    assert pods
    assert not [pod for pod in pods if is_ready(pod)]
    pod = drill_pod(release.kube, "import", f"{release.name}-backup")
    out = import_export(release.kube, pod, newest_export(release.kube, pod))
    release.kube("delete", "job", "import")
    bootstrap_again(release)
    ledger = chat("check")
    assert ledger["lost"] == {}
    saw(message[:160])
    saw(f"{' '.join(out.split())[:120]}; all {ledger['keys']} keys decrypt")

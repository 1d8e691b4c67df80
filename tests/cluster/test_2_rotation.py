"""The KEK's rotation by a Job from the CronJob, under traffic, killed, and seen in Events."""

from __future__ import annotations

import base64
import json
import re
import secrets
from collections.abc import Callable

import pytest

from tests.cluster.kube import Feed, Manifest, until
from tests.cluster.scene import Caller, Release

pytestmark = pytest.mark.cluster

Saw = Callable[[str], None]
KEYS = 5_000


def kek_versions(release: Release) -> list[int]:
    """Return the versions in the KEK Secret, without a look at the keys."""
    content = release.kube.secret(f"{release.name}-kek").value("kek.yaml").decode()
    if re.search(r"^master_key_hex:", content, re.MULTILINE):
        return [1]
    return sorted(int(found) for found in re.findall(r"^\s+'?(\d+)'?:", content, re.MULTILINE))


def test_rotation_under_traffic(
    release: Release, chat: Caller, ops: Caller, saw: Saw, stopwatch: Callable[[], float]
) -> None:
    """A Job from the CronJob rotates 5,000 keys under traffic with no failed request and no restart."""
    total = chat("seed", str(KEYS), timeout=600)["keys"]
    assert total >= KEYS
    before, pods, store = ops("census"), release.all_pods(), release.kube.secret(f"{release.name}-kek")
    began = stopwatch()
    with chat.traffic() as reports:
        release.kube.create_job("rotate-1", f"{release.name}-rotate")
        release.kube.wait_for_job("rotate-1", 400)
    seconds = stopwatch() - began
    after = ops("census")
    assert reports[0].failed == {}, reports[0].details
    assert reports[0].wrong == 0
    assert after["active"] == before["active"] + 1
    assert after["rotation"]["outcome"] == "clean"
    assert sum(n for version, n in after["deks"].items() if version != str(after["active"])) == 0
    assert release.all_pods() == pods
    assert kek_versions(release) == list(range(1, after["active"] + 1))
    assert release.kube.secret(f"{release.name}-kek").value("store-id") == store.value("store-id")
    saw(f"{after['deks'][str(after['active'])]} keys in {seconds:.0f} s with the pod's start; {reports[0]}")
    saw(f"Secret {release.name}-kek: versions {kek_versions(release)}, by the job's own patch")


def test_rotation_killed_midway(release: Release, chat: Caller, ops: Caller, saw: Saw) -> None:
    """The rotation's pod is killed midway; the next one finishes the same rotation."""
    if ops("census")["deks"].get(str(ops("census")["active"]), 0) < KEYS:
        chat("seed", str(KEYS), timeout=600)
    before = ops("census")

    def slowly(container: Manifest) -> None:
        container["args"] = [*container.get("args", []), "--max-rate", "400"]

    release.kube.create_job("rotate-2", f"{release.name}-rotate", slowly)

    def midway() -> str | None:
        newest = ops("census")["rotation"]
        begun = newest and newest["id"] != (before["rotation"] or {}).get("id")
        return newest["id"] if begun and newest["step"] == "rewrap" else None

    rotation = until("a rotation under way", midway)
    killed = release.kube.get("pods", "-l", "batch.kubernetes.io/job-name=rotate-2")[0]["metadata"]["name"]
    release.kube("delete", "pod", killed, "--grace-period=0", "--force")
    unfinished = ops("census")["rotation"]
    release.kube.wait_for_job("rotate-2", 600)
    after = ops("census")
    assert unfinished["outcome"] == "running"
    assert after["rotation"] == {"id": rotation, "step": "complete", "outcome": "clean"}
    assert after["active"] == before["active"] + 1
    finisher = [
        pod["metadata"]["name"]
        for pod in release.kube.get("pods", "-l", "batch.kubernetes.io/job-name=rotate-2")
        if pod["status"]["phase"] == "Succeeded"
    ]
    assert finisher
    assert killed not in finisher
    assert chat("check")["lost"] == {}
    saw(f"killed at step {unfinished['step']}; {finisher[0]} finished {rotation}")


def test_events(release: Release, saw: Saw) -> None:
    """Events tell of the rotations, on the pods that led them."""
    started, completed = release.kube.events("RotationStarted"), release.kube.events("RotationCompleted")
    assert started
    assert completed
    assert {event["involvedObject"]["kind"] for event in started + completed} == {"Pod"}
    saw(
        f"{len(started)} RotationStarted, {len(completed)} RotationCompleted: {completed[-1]['message'][:90]}"
    )


def test_parallel_workers(release: Release, chat: Caller, ops: Caller, saw: Saw) -> None:
    """With `rotation.parallelism` the pods of an Indexed Job share one rotation."""
    before = ops("census")
    release.helm.upgrade(release.values | {"rotation": {"parallelism": 3}})
    release.kube.create_job("rotate-3", f"{release.name}-rotate")
    release.kube.wait_for_job("rotate-3", 600)
    after = ops("census")
    release.helm.upgrade(release.values)
    assert after["active"] == before["active"] + 1
    assert after["rotation"]["outcome"] == "clean"
    assert chat("check")["lost"] == {}
    indexes = release.kube.get("job", "rotate-3")["status"]["completedIndexes"]
    saw(f"indexes {indexes} completed {after['rotation']['id']}")


def test_dry_run_changes_nothing(release: Release, ops: Caller, saw: Saw) -> None:
    """The CronJob for dry runs prints the census and changes nothing."""
    before = ops("census")
    release.kube.create_job("rotate-dry", f"{release.name}-rotate-dry-run")
    release.kube.wait_for_job("rotate-dry")
    assert ops("census") == before
    saw(release.kube.job_logs("rotate-dry").strip().splitlines()[-1][:100])


def test_suspended_by_value(release: Release, saw: Saw) -> None:
    """The schedule can be suspended by a value, and a Job by hand is still to be had."""
    release.helm.upgrade(release.values | {"rotation": {"suspend": True}})
    assert release.kube.get("cronjob", f"{release.name}-rotate")["spec"]["suspend"] is True
    release.helm.upgrade(release.values)
    spec = release.kube.get("cronjob", f"{release.name}-rotate")["spec"]
    assert spec.get("suspend", False) is False
    assert spec["concurrencyPolicy"] == "Forbid"
    saw(f"schedule {spec['schedule']}, {spec['concurrencyPolicy']}")


def add_version(release: Release, version: int) -> None:
    """Add a KEK version to the Secret, as GitOps or External Secrets do."""
    name = f"{release.name}-kek"
    content = release.kube.secret(name).value("kek.yaml").decode().rstrip("\n")
    assert re.search(r"^versions:", content, re.MULTILINE), "the file holds more than one version by now"
    content += f"\n  {version}: {secrets.token_hex(32)}\n"
    patch = Feed(json.dumps({"data": {"kek.yaml": base64.b64encode(content.encode()).decode()}}))
    release.kube("patch", "secret", name, "--type=merge", "--patch-file=/dev/stdin", stdin=patch)


def test_external_kek(release: Release, chat: Caller, ops: Caller, saw: Saw) -> None:
    """Management external: the rotation takes the version that the operator added, and touches no Secret."""
    kek = f"{release.name}-kek"
    external = {"management": "external", "secretName": kek, "storeIdKey": "store-id"}
    release.helm.upgrade(release.values | {"kek": external})
    wanted = ops("census")["active"] + 1
    account = f"--as=system:serviceaccount:{release.kube.namespace}:{release.name}-rotate"
    may = [
        verb
        for verb in ("get", "patch")
        if release.kube.run("auth", "can-i", verb, f"secret/{kek}", account).returncode == 0
    ]
    add_version(release, wanted)
    release.kube.create_job("rotate-external", f"{release.name}-rotate")
    release.kube.wait_for_job("rotate-external", 600)
    after, versions = ops("census"), kek_versions(release)
    release.helm.upgrade(release.values)
    release.wait_ready()
    assert may == []
    assert after["active"] == wanted
    assert after["rotation"]["outcome"] == "clean"
    assert max(versions) == wanted
    assert chat("check")["lost"] == {}
    saw(f"version {wanted} was added by hand and taken; the job's account may neither get nor patch {kek}")

"""Pods that go away, upgrades and rollbacks, under traffic."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cluster.kube import merge, until
from tests.cluster.scene import Caller, Release

pytestmark = pytest.mark.cluster

Saw = Callable[[str], None]
LATER = {"store_unavailable", "deadline_exceeded", "connection_failed"}
"""Answers with which a caller is told to try again: 503 with Retry-After, or no answer in time."""


def test_service_pod_deleted(release: Release, chat: Caller, saw: Saw) -> None:
    """A pod of the service is deleted: it drains, and no request fails."""
    old = {pod["metadata"]["uid"] for pod in release.service_pods()}
    with chat.traffic() as reports:
        release.kube("delete", "pod", release.service_pods()[0]["metadata"]["name"], timeout=180)
        until("a new pod", lambda: {pod["metadata"]["uid"] for pod in release.service_pods()} - old)
        release.wait_ready()
    assert reports[0].failed == {}, reports[0].details
    saw(str(reports[0]))


def test_store_pod_deleted(release: Release, chat: Caller, saw: Saw) -> None:
    """The one pod of the store is deleted: callers are told to try again, and no acknowledged key is lost."""
    pods = release.all_pods()
    with chat.traffic() as reports:
        before = release.kube.get("pod", f"{release.name}-redis-0")["metadata"]["uid"]
        release.kube("delete", "pod", f"{release.name}-redis-0", timeout=180)

        def replaced() -> bool:
            return bool(release.kube.get("pod", f"{release.name}-redis-0")["metadata"]["uid"] != before)

        until("a new pod of the store", replaced)
        release.wait_ready()
        until("a key made again", lambda: chat("may")["create"] == "ok")
    kept = chat("check")
    assert set(reports[0].failed) <= LATER, reports[0].details
    assert reports[0].wrong == 0
    assert kept["lost"] == {}
    assert len(set(pods) & set(release.all_pods())) == len(pods) - 1, "the service's pods stay"
    saw(f"{reports[0]} (to be tried again); all {kept['keys']} acknowledged keys decrypt")


def test_upgrade_under_traffic(release: Release, chat: Caller, saw: Saw) -> None:
    """`helm upgrade` with changed values replaces the pods with no failed request."""
    old = set(release.all_pods())
    values = merge(release.values, {"podAnnotations": {"example.com/changed": "yes"}})
    with chat.traffic() as reports:
        release.helm.upgrade(values)
        release.wait_ready()
    release.values.update(values)
    new = {pod["metadata"]["uid"] for pod in release.service_pods()}
    assert not new & old
    assert reports[0].failed == {}, reports[0].details
    saw(str(reports[0]))


def test_rollback_under_traffic(release: Release, chat: Caller, saw: Saw) -> None:
    """`helm rollback` goes back to the last values with no failed request; KEK and data stay."""
    kek = release.kube.secret(f"{release.name}-kek").metadata["uid"]
    old = set(release.all_pods())
    with chat.traffic() as reports:
        release.helm("rollback", release.name, "--wait", "--timeout", "4m")
        release.wait_ready()
    release.values.pop("podAnnotations", None)
    assert not {pod["metadata"]["uid"] for pod in release.service_pods()} & old
    assert reports[0].failed == {}, reports[0].details
    assert release.kube.secret(f"{release.name}-kek").metadata["uid"] == kek
    assert chat("check")["lost"] == {}
    saw(str(reports[0]))


def test_policy_is_reloaded(release: Release, chat: Caller, saw: Saw) -> None:
    """A changed grant counts without a restart, as soon as the ConfigMap has reached the pods."""
    pods = release.all_pods()
    clients = [dict(client) for client in release.values["clients"]]
    clients[0]["permissions"] = ["key:encrypt", "key:decrypt"]
    release.helm.upgrade(release.values | {"clients": clients})
    until("the grant is gone", lambda: [chat("may")["create"] for _ in range(4)] == ["permission_denied"] * 4)
    release.helm.upgrade(release.values)
    until("the grant is back", lambda: [chat("may")["create"] for _ in range(4)] == ["ok"] * 4)
    assert release.all_pods() == pods
    saw("key:create taken away and given back, the same pods throughout")

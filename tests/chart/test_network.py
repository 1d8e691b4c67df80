"""Who reaches whom: deny by default, and each way that is open is named."""

import pytest

from tests.chart.rendering import mode, objects, one

INSTANCE = {"app.kubernetes.io/name": "progressdb-kms", "app.kubernetes.io/instance": "kms"}


def policy(suffix, values=None):
    """Return the spec of a NetworkPolicy."""
    return one("NetworkPolicy", suffix, objects(values))["spec"]


def component(name):
    """Return the peer that is one component of the release."""
    return {"podSelector": {"matchLabels": {**INSTANCE, "app.kubernetes.io/component": name}}}


def test_everything_is_denied_first():
    """One policy takes every pod of the release and lets nothing in or out."""
    spec = policy("-deny")
    assert spec == {"podSelector": {"matchLabels": INSTANCE}, "policyTypes": ["Ingress", "Egress"]}


def test_with_no_clients_only_the_test_may_call():
    """By default the API's port is open to the release's own test, and to nobody else."""
    api, admin = policy("-service")["ingress"]
    assert api == {"ports": [{"port": 8443, "protocol": "TCP"}], "from": [component("test")]}
    assert admin["ports"] == [{"port": 9090, "protocol": "TCP"}]
    assert admin["from"] == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    ]


def test_clients_come_from_their_namespaces_and_pods():
    """A client is let in from its namespace, and where podLabels are given from such pods alone."""
    clients = [
        {"name": "chat", "namespace": "chat", "podLabels": {"app": "chat"}},
        {"name": "b", "namespace": "b"},
    ]
    extra = [{"ipBlock": {"cidr": "10.0.0.0/8"}}]
    sources = policy("-service", {"clients": clients, "networkPolicy": {"extraClients": extra}})["ingress"][
        0
    ]["from"]
    assert sources == [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "chat"}},
            "podSelector": {"matchLabels": {"app": "chat"}},
        },
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "b"}}},
        component("test"),
        *extra,
    ]


def test_the_store_is_reached_by_its_callers_and_reaches_nobody():
    """Redis takes calls of the service and of three jobs, and has no egress, not even DNS."""
    spec = policy("-redis")
    [rule] = spec["ingress"]
    [source] = rule["from"]
    assert source["podSelector"]["matchLabels"] == INSTANCE
    assert source["podSelector"]["matchExpressions"][0]["values"] == [
        "service",
        "rotate",
        "backup",
        "provision",
    ]
    # No rule at all: with the policy type named, that denies. The API server would drop an empty list.
    assert "Egress" in spec["policyTypes"]
    assert "egress" not in spec


@pytest.mark.parametrize(
    "job,store,api",
    [
        ("rotate", True, True),
        ("provision", True, True),
        ("backup", True, True),
        ("renew", False, True),
        ("test", False, False),
    ],
)
def test_jobs_take_no_calls_and_make_few(job, store, api):
    """A job has no ingress, and egress to DNS, the store and the API server only where it needs them."""
    spec = policy(f"-{job}")
    assert spec["podSelector"]["matchLabels"] == {**INSTANCE, "app.kubernetes.io/component": job}
    assert "Ingress" in spec["policyTypes"]
    assert "ingress" not in spec
    ports = {port["port"] for rule in spec["egress"] for port in rule["ports"]}
    assert ports == {53} | ({6379} if store else set()) | ({443, 6443} if api else set()) | (
        {8443} if job == "test" else set()
    )


def test_every_pod_has_a_policy_of_its_own():
    """Each component that has pods is named by one policy: nothing is only denied, nothing forgotten."""
    rendered = objects()
    named = {
        item["spec"]["podSelector"]["matchLabels"].get("app.kubernetes.io/component")
        for item in rendered
        if item["kind"] == "NetworkPolicy"
    }
    assert named == {None, "service", "redis", "rotate", "backup", "provision", "renew", "test"}


def test_an_external_store_and_s3_may_be_narrowed():
    """Egress to a store or storage elsewhere goes to the given addresses, on its ports."""
    values = mode("existing")
    values["externalStore"]["networkPolicyTo"] = [{"ipBlock": {"cidr": "10.9.0.0/16"}}]
    values["networkPolicy"] = {"apiServer": {"cidrs": ["10.0.0.1/32"]}}
    egress = policy("-backup", values)["egress"]
    assert {
        "ports": [{"port": 6379, "protocol": "TCP"}, {"port": 26379, "protocol": "TCP"}],
        "to": [{"ipBlock": {"cidr": "10.9.0.0/16"}}],
    } in egress
    assert {"ports": [{"port": 9000, "protocol": "TCP"}]} in egress
    assert [rule["to"] for rule in egress if rule["ports"][0]["port"] == 443] == [
        [{"ipBlock": {"cidr": "10.0.0.1/32"}}]
    ]


def test_can_be_left_to_the_cluster():
    """networkPolicy.enabled: false leaves all of them out."""
    assert not [i for i in objects({"networkPolicy": {"enabled": False}}) if i["kind"] == "NetworkPolicy"]

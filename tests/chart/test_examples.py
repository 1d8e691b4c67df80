"""The examples of deploy/examples fit the chart that they are installed beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from progressdb_kms.domain.policy import parse_policy
from tests.chart.rendering import ROOT, objects

FOLDER = ROOT / "deploy" / "examples" / "chat-server"
RELEASE = "progressdb-kms"


def documents(path: Path) -> list[dict[str, Any]]:
    """Return the documents of a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


@pytest.fixture(scope="module")
def chart() -> list[dict[str, Any]]:
    """What the chart renders with the example's values."""
    return objects(yaml.safe_load((FOLDER / "values.yaml").read_text()), release=RELEASE)


@pytest.fixture(scope="module")
def example() -> dict[str, dict[str, Any]]:
    """The example's own objects, by kind."""
    return {document["kind"]: document for document in documents(FOLDER / "chat-server.yaml")}


def named(chart: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """Return the object of this kind and name."""
    (found,) = [each for each in chart if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def test_the_policy_grants_what_the_server_uses(chart: list[dict[str, Any]]) -> None:
    """Its identity may do five things with threads of its prefix, and nothing with others'."""
    text = named(chart, "ConfigMap", f"{RELEASE}-policy")["data"]["policy.yaml"]
    rules = yaml.safe_load(text)["rules"]
    (rule,) = [rule for rule in rules if rule["identities"] == ["dns:chat-server.chat.svc"]]
    assert rule["permissions"] == ["key:create", "key:encrypt", "key:decrypt", "key:admin", "key:destroy"]
    assert rule["thread_prefixes"] == ["chat:"]
    parse_policy(yaml.safe_load(text))


def test_the_certificate_is_mounted_whole(
    chart: list[dict[str, Any]], example: dict[str, dict[str, Any]]
) -> None:
    """The Secret that the pod mounts is the one that the chart hands over, in the same namespace."""
    pod = example["Deployment"]["spec"]["template"]["spec"]
    (secret,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    configs = [each["data"] for each in chart if each["kind"] == "ConfigMap"]
    text = next(data["provision.yaml"] for data in configs if "provision.yaml" in data)
    issued = yaml.safe_load(text)["certificates"]["certificates"]
    (mine,) = [each for each in issued if each["secret"] == secret["secretName"]]
    assert (mine["namespace"], mine["usage"], mine["dns"]) == ("chat", "client", ["chat-server.chat.svc"])
    assert example["Deployment"]["metadata"]["namespace"] == "chat"
    (container,) = pod["containers"]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "kms"]
    assert mount == {"name": "kms", "mountPath": "/kms", "readOnly": True}


def test_the_two_reach_each_other_and_nobody_else(
    chart: list[dict[str, Any]], example: dict[str, dict[str, Any]]
) -> None:
    """The endpoint is the chart's Service; both network policies let this traffic, and only this, through."""
    deployment, policy = example["Deployment"], example["NetworkPolicy"]
    pod = deployment["spec"]["template"]
    environment = {each["name"]: each.get("value") for each in pod["spec"]["containers"][0]["env"]}
    assert environment["PROGRESSDB_KMS_ENDPOINT"] == f"https://{RELEASE}.kms.svc:8443"
    service = named(chart, "Service", RELEASE)
    assert (service["metadata"]["namespace"], service["spec"]["ports"][0]["port"]) == ("kms", 8443)
    dns, kms = policy["spec"]["egress"]
    assert [port["port"] for port in dns["ports"]] == [53, 53]
    ((peer,), (port,)) = kms["to"], kms["ports"]
    assert port == {"port": 8443, "protocol": "TCP"}
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kms"}
    labels = named(chart, "Deployment", RELEASE)["spec"]["template"]["metadata"]["labels"]
    assert peer["podSelector"]["matchLabels"].items() <= labels.items()
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    admitted = named(chart, "NetworkPolicy", f"{RELEASE}-service")["spec"]["ingress"][0]["from"]
    assert {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "chat"}},
        "podSelector": {"matchLabels": pod["metadata"]["labels"]},
    } in admitted


def test_the_pod_has_no_rights_to_lose(example: dict[str, dict[str, Any]]) -> None:
    """Not root, a read-only root, no capabilities, no token, bounded resources; the namespace enforces it."""
    pod = example["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    security = container["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"] is security["readOnlyRootFilesystem"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert (security["allowPrivilegeEscalation"], pod["automountServiceAccountToken"]) == (False, False)
    for kind in ("requests", "limits"):
        assert set(container["resources"][kind]) == {"cpu", "memory", "ephemeral-storage"}
    (namespace,) = documents(FOLDER / "namespace.yaml")
    assert namespace["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}

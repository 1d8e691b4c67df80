"""What the tutorial installs, without a cluster; tests/cluster runs all of it on one."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.rendering import ROOT, objects
from tests.docs.walkthrough import steps


@pytest.mark.parametrize("image", ["progressdb-kms:0.1.0", "registry.example:5000/kms:1.2"])
def test_values_of_the_tutorial(image: str, tmp_path: Path) -> None:
    """What its commands write are good values, whatever the image is called; clients get certificates."""
    commands = [step.command for step in steps((ROOT / "docs" / "tutorial.md").read_text())["cluster"]]
    written = [
        command[command.index("cat >") : command.index("\nEND\n") + 5]
        for command in commands
        if "cat >" in command
    ]
    assert len(written) == 3
    subprocess.run(
        ["bash", "-euc", "".join(written)], cwd=tmp_path, env=os.environ | {"IMAGE": image}, check=True
    )
    values: dict[str, Any] = {}
    for path in sorted(tmp_path.iterdir()):
        values |= yaml.safe_load(path.read_text())
    rendered = objects(values, release="progressdb-kms")
    by_kind = {(one["kind"], one["metadata"]["name"]): one for one in rendered}
    service = by_kind["Deployment", "progressdb-kms"]["spec"]["template"]
    assert [container["image"] for container in service["spec"]["containers"]] == [image]
    # What further commands name.
    assert service["spec"]["containers"][0]["name"] == "kms"
    assert service["metadata"]["labels"]["app.kubernetes.io/component"] == "service"
    assert ("CronJob", "progressdb-kms-rotate") in by_kind
    policy = yaml.safe_load(by_kind["ConfigMap", "progressdb-kms-policy"]["data"]["policy.yaml"])
    example = yaml.safe_load((ROOT / "deploy" / "examples" / "chat-server" / "values.yaml").read_text())
    assert values["clients"][1:] == example["clients"]
    rules = {
        rule["identities"][0]: rule["thread_prefixes"]
        for rule in policy["rules"]
        if "thread_prefixes" in rule
    }
    assert rules.items() >= {"dns:chat.chat.svc": ["room:"], "dns:chat-server.chat.svc": ["chat:"]}.items()
    provision = by_kind["ConfigMap", "progressdb-kms-provision"]["data"]["provision.yaml"]
    secrets = {each["secret"] for each in yaml.safe_load(provision)["certificates"]["certificates"]}
    assert {"progressdb-kms-client-chat", "progressdb-kms-client-chat-server"} <= secrets

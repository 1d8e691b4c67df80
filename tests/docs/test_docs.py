"""Documentation that can be checked against the code."""

import re
from pathlib import Path

import click
import msgspec
import pytest
import yaml

from progressdb_kms.cli.app import app
from progressdb_kms.domain.policy import Permission, parse_policy
from progressdb_kms.provision.config import parse_config
from progressdb_kms.settings import parse_settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_every_permission_is_documented():
    """docs/configuration.md names each permission."""
    text = (DOCS / "configuration.md").read_text()
    assert not [permission for permission in Permission if f"`{permission}`" not in text]


def test_configuration_of_the_readme_is_valid():
    """The configuration and the policy that README shows are accepted as they stand."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    configuration, policy = (yaml.safe_load(block) for block in blocks)
    assert parse_settings(configuration, ROOT).store.username == "kms"
    assert len(parse_policy(policy).rules) == 2


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/audit.md",
        "docs/configuration.md",
        "docs/moving-in.md",
        "docs/operations.md",
        "docs/operator-page.md",
        "docs/provisioning.md",
        "docs/rotation.md",
        "docs/ca-rollover.md",
        "docs/cryptography.md",
        "docs/disaster-recovery.md",
        "docs/durability.md",
        "docs/metrics.md",
        "docs/policies.md",
        "docs/restore-drill.md",
        "docs/tutorial.md",
        "CONTRIBUTING.md",
    ],
)
def test_commands_in_the_documents_exist(name):
    """Every `progressdb-kms ...` that a document shows is a command with those options."""
    text = (ROOT / name).read_text()
    for line in re.findall(r"(?<!helm install )(?<!helm upgrade )progressdb-kms ([a-z][^`\n|>#]*)", text):
        words = line.split()
        command: click.Command | None = app
        context = click.Context(app)
        while words and isinstance(command, click.Group):
            command = command.get_command(context, words.pop(0))
        assert command is not None, line
        options = {option for parameter in command.params for option in parameter.opts}
        assert not [word for word in words if word.startswith("--") and word not in options], line


def test_provisioning_file_of_the_document_is_valid():
    """The example in docs/provisioning.md is taken as it stands."""
    text = (DOCS / "provisioning.md").read_text()
    document = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    config = parse_config(document, DOCS)
    sections = {field.name for field in msgspec.structs.fields(type(config))}
    assert sections == set(document)
    fields = {field.encode_name for field in msgspec.structs.fields(type(config.certificates))}
    assert fields == set(document["certificates"])


def test_policies_of_the_guide_are_valid():
    """Each rule that docs/policies.md shows is accepted as it stands."""
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "policies.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        assert parse_policy(yaml.safe_load(block)).rules


def test_links_lead_somewhere():
    """Relative links of all documents point at files that exist."""
    broken = []
    for document in [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
        broken += [
            f"{document.relative_to(ROOT)}: {target}"
            for target in targets
            if not (document.parent / target).exists()
        ]
    assert not broken

"""Documentation that can be checked against the code."""

import re
from pathlib import Path

import click
import msgspec
import pytest
import yaml

from progressdb_kms.api.routes import ROUTES
from progressdb_kms.cli.app import app
from progressdb_kms.domain.policy import Permission, parse_policy
from progressdb_kms.provision.config import parse_config
from progressdb_kms.settings import Settings, parse_settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def _setting_names(kind: type, prefix: str = "") -> list[str]:
    names = []
    for field in msgspec.structs.fields(kind):
        types = [t for t in getattr(field.type, "__args__", (field.type,)) if isinstance(t, type)]
        section = next((t for t in types if issubclass(t, msgspec.Struct)), None)
        name = prefix + field.name
        names += _setting_names(section, f"{name}.") if section else [name]
    return names


def test_every_setting_is_documented():
    """docs/configuration.md names each setting, and none that does not exist."""
    sections = "|".join(field.name for field in msgspec.structs.fields(Settings))
    rows = [
        row.split("|")[1]
        for row in (DOCS / "configuration.md").read_text().splitlines()
        if re.match(rf"\| `({sections})\b", row)
    ]
    documented = {name for row in rows for name in re.findall(r"`([a-z0-9_.]+)`", row)}
    assert documented == set(_setting_names(Settings))


def test_every_permission_is_documented():
    """docs/configuration.md names each permission."""
    text = (DOCS / "configuration.md").read_text()
    assert not [permission for permission in Permission if f"`{permission}`" not in text]


def test_every_route_is_documented():
    """docs/api.md names each route of the table."""
    text = (DOCS / "api.md").read_text()
    missing = []
    for route in ROUTES:
        path = re.sub(r"<(\w+)>", r"{\1}", route.path)
        tail = "/" + path.rsplit("/", 1)[1]
        if f"{route.method} {path}" not in text and f"`{tail}`" not in text:
            missing.append(f"{route.method} {path}")
    assert not missing


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


def test_metrics_in_the_documents_exist():
    """docs/operations.md and docs/audit.md name only metrics that the service has."""
    source = (ROOT / "service/progressdb_kms/observability/metrics.py").read_text()
    source += (ROOT / "service/progressdb_kms/bootstrap/gauges.py").read_text()
    source += (ROOT / "service/progressdb_kms/observability/sums.py").read_text()
    for name in set(
        re.findall(r"`(kms_[a-z_]+)", (DOCS / "operations.md").read_text() + (DOCS / "audit.md").read_text())
    ):
        assert f'"{name.removesuffix("_total")}"' in source, name

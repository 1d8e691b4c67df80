"""The generated parts of the reference say what the code has."""

import re
from pathlib import Path

import click
import msgspec
import pytest

from progressdb_kms.api.problems import STATUS
from progressdb_kms.api.routes import ROUTES
from progressdb_kms.cli.app import app
from progressdb_kms.settings import Settings
from scripts import reference

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", reference.PAGES)
def test_page_is_current(name: str) -> None:
    """What is committed is what `make reference` writes."""
    text = (DOCS / name).read_text()
    assert reference.PART.search(text), "the page has no generated part"
    assert reference.fresh(text) == text, "run make reference"


def test_each_part_is_on_one_page() -> None:
    """Every part that can be generated has one page, so that nothing is kept twice."""
    found = [match[2] for page in DOCS.rglob("*.md") for match in reference.PART.finditer(page.read_text())]
    assert sorted(found) == sorted(reference.PARTS)


def _setting_names(kind: type, prefix: str = "") -> list[str]:
    names = []
    for field in msgspec.structs.fields(kind):
        types = [t for t in getattr(field.type, "__args__", (field.type,)) if isinstance(t, type)]
        section = next((t for t in types if issubclass(t, msgspec.Struct)), None)
        name = prefix + field.name
        names += _setting_names(section, f"{name}.") if section else [name]
    return names


def test_every_setting_is_in_the_reference() -> None:
    """Each setting has a row with a meaning, and none that does not exist has one."""
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \|.*\| (.+) \|$", reference.settings(), re.MULTILINE)
    assert [name for name, _ in rows if name not in _setting_names(Settings)] == []
    assert sorted(name for name, _ in rows) == sorted(_setting_names(Settings))


def test_every_route_is_in_the_reference() -> None:
    """Each route of the table has a row that names what it needs."""
    rows = dict(re.findall(r"^\| `([A-Z]+ [^`]+)` \|.*\| (.*) \|$", reference.routes(), re.MULTILINE))
    for route in ROUTES:
        path = re.sub(r"<(\w+)>", r"{\1}", route.path)
        for permission in filter(None, (route.permission, route.also)):
            assert f"`{permission}`" in rows[f"{route.method} {path}"]


def test_every_code_is_in_the_reference() -> None:
    """Each error code has a row with its status."""
    assert dict(re.findall(r"^\| (\d+) \| `(\w+)`", reference.codes(), re.MULTILINE)) != {}
    for code, status in STATUS.items():
        assert f"| {status} | `{code}` |" in reference.codes()


def _paths(command: click.Command, path: str) -> list[str]:
    found = [path]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            sub = command.get_command(context, name)
            assert sub is not None
            found += [] if sub.hidden else _paths(sub, f"{path} {name}")
    return found


def test_every_command_is_in_the_reference() -> None:
    """Each command has a heading, with the options that it takes below."""
    text = reference.commands()
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == _paths(app, "progressdb-kms")
    assert "--dev-dir DIRECTORY" in text


def test_metrics_of_the_documents_exist() -> None:
    """Whatever a page calls a metric is one."""
    known = reference.every_metric()
    pages = [*DOCS.glob("*.md")]
    named = {name for page in pages for name in re.findall(r"`(kms_[a-z_]+)", page.read_text())}
    assert {"kms_ready", "kms_requests_total", "kms_rotation_running", "kms_audit_conflicts_total"} <= named
    assert named <= set(known)


def test_a_setting_without_words_is_refused() -> None:
    """A setting that its class does not describe can't get into the reference unnoticed."""

    class Bare(msgspec.Struct):
        """A section.

        Attributes:
            known: Described.
        """

        known: int = 1
        unknown: int = 2

    with pytest.raises(KeyError, match="unknown"):
        list(reference._setting_rows(Bare, "bare."))

"""Write the generated parts of the reference in docs/.

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end of generated -->`` in a page whose
other text is written by hand. The parts are committed, so that a checkout and a review show them without a
build, and ``tests/docs/test_reference.py`` holds them to the code, so that they can't lie.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import click
import msgspec
from msgspec import inspect as types

from progressdb_kms.api.openapi import openapi_document
from progressdb_kms.api.problems import all_codes
from progressdb_kms.bootstrap.gauges import add_gauges
from progressdb_kms.cli.app import app
from progressdb_kms.observability.metrics import ROTATION, Metrics
from progressdb_kms.settings import Limits, Settings

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
PART: Final = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end of generated -->)", re.DOTALL)
_WIDTH: Final = 100


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", r"\|")


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def attributes(kind: type) -> dict[str, str]:
    """Return what the section ``Attributes`` of a class's docstring says of each attribute."""
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if match := re.match(r"    (\w+): (.*)", line):
            name = match[1]
            found[name] = match[2]
        elif name:
            found[name] += f" {line.strip()}"
    return found


def _section_of(kind: types.Type) -> type | None:
    choices = kind.types if isinstance(kind, types.UnionType) else (kind,)
    return next((choice.cls for choice in choices if isinstance(choice, types.StructType)), None)


def _values(kind: types.Type) -> str:
    """Say in words what a setting takes."""
    match kind:
        case types.UnionType():
            return _values(next(one for one in kind.types if not isinstance(one, types.NoneType)))
        case types.LiteralType():
            return " or ".join(f"`{value}`" for value in kind.values)
        case types.VarTupleType():
            return f"list: {_values(kind.item_type)}"
        case types.IntType() | types.FloatType():
            return _bounds(kind)
        case types.CustomType(cls=cls) if cls is Path:
            return "path"
    # Whatever else a setting may become one day needs words of its own.
    return {types.StrType: "text", types.BoolType: "`true` or `false`"}[type(kind)]


def _bounds(kind: types.IntType | types.FloatType) -> str:
    if kind.gt is not None:
        return f"above {kind.gt:g}, up to {kind.le:g}"
    return " to ".join(str(bound) for bound in (kind.ge, kind.le) if bound is not None) or "whole number"


def _default(field: types.Field) -> str:
    if field.required:
        return "needed"
    value = field.default
    if value in {None, "", msgspec.NODEFAULT} or value == ():
        return ""
    if isinstance(value, bool):
        value = str(value).lower()
    size = ""
    if field.name.endswith("bytes") and value % 1024 == 0:
        size = f" ({value >> 20} MiB)" if value % 2**20 == 0 else f" ({value >> 10} KiB)"
    return f"`{value}`{size}"


def _prose(kind: type) -> str:
    """Return what a class's docstring says before its attributes."""
    text, _, _ = inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:\n")
    return "\n\n".join(_cell(paragraph) for paragraph in text.strip().split("\n\n"))


def _subsections(kind: type, prefix: str) -> Iterator[str]:
    """Say what the sections within a section are."""
    info = types.type_info(kind)
    assert isinstance(info, types.StructType)  # noqa: S101 - narrows for the type checker
    for field in info.fields:
        section = _section_of(field.type)
        if section is not None:
            name = f"{prefix}{field.name}"
            yield f"`{name}`: {_cell(_prose(section))}"
            yield from _subsections(section, f"{name}.")


def _setting_rows(kind: type, prefix: str) -> Iterator[list[str]]:
    described = attributes(kind)
    info = types.type_info(kind)
    assert isinstance(info, types.StructType)  # noqa: S101 - narrows for the type checker
    for field in info.fields:
        # A setting that its class does not describe has no place in the reference: KeyError says which.
        text = described[field.name]
        section = _section_of(field.type)
        if section is not None:
            yield from _setting_rows(section, f"{prefix}{field.name}.")
        else:
            yield [f"`{prefix}{field.name}`", _values(field.type), _default(field), _cell(text)]


def settings() -> str:
    """Return every setting, in a table for each section of the file."""
    info = types.type_info(Settings)
    assert isinstance(info, types.StructType)  # noqa: S101 - narrows for the type checker
    described = attributes(Settings)
    columns = ["setting", "values", "default", "meaning"]
    top: list[list[str]] = []
    parts: list[str] = []
    for field in info.fields:
        section = _section_of(field.type)
        if section is None:
            top.append(
                [f"`{field.name}`", _values(field.type), _default(field), _cell(described[field.name])]
            )
            continue
        rows = list(_setting_rows(section, f"{field.name}."))
        paragraphs = [_prose(section), *_subsections(section, f"{field.name}."), _table(columns, rows)]
        parts.append("\n\n".join([f"### `{field.name}`", *paragraphs]))
    return "\n\n".join([_table(columns, top), *parts])


def codes() -> str:
    """Return every error code that the API answers with."""
    rows = [
        [str(facts["status"]), f"`{code}`", facts["title"], "yes" if facts["retryable"] else ""]
        for code, facts in all_codes().items()
    ]
    return _table(["status", "code", "meaning", "retry"], rows)


def commands() -> str:
    """Return the help of every command."""
    return "\n\n".join(_help(app, "progressdb-kms", None))


def _help(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    context = click.Context(
        command, parent=parent, info_name=name, terminal_width=_WIDTH, max_content_width=_WIDTH,
        help_option_names=["-h", "--help"],
    )  # fmt: skip
    yield f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```"
    if isinstance(command, click.Group):
        for sub in command.list_commands(context):
            found = command.get_command(context, sub)
            if found is not None and not found.hidden:
                yield from _help(found, sub, context)


def routes() -> str:
    """Return every route of the OpenAPI document."""
    document = openapi_document(Limits())
    schemas = document["components"]["schemas"]
    rows = [
        [
            f"`{method.upper()} {path}`",
            _cell(operation["summary"]),
            _takes(operation, schemas),
            ", ".join(_fields(_json(operation["responses"]["200"]), schemas)),
            " and ".join(re.findall(r"`[^`]+`", operation.get("description", ""))),
        ]
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    return _table(["route", "does", "takes", "gives", "needs"], rows)


def _json(content: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = content["content"]["application/json"]["schema"]
    return schema


def _fields(schema: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """Return the names of an object's fields, a question mark behind those that may be left out."""
    while "$ref" in schema:
        schema = schemas[schema["$ref"].rpartition("/")[2]]
    required = schema.get("required", [])
    found = []
    for name, field in schema.get("properties", {}).items():
        items = field.get("items", {})
        choices = [_fields(choice, schemas) for choice in items.get("anyOf", [items])]
        inner = f": [{', '.join(choices[0])}]" if choices[0] else ""
        found.append(f"`{name}{'' if name in required else '?'}{inner.replace('`', '')}`")
    return found


def _takes(operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    parts = []
    if "requestBody" in operation:
        parts.append(", ".join(_fields(_json(operation["requestBody"]), schemas)))
    for where in ("query", "header"):
        names = [
            f"`{one['name']}{'' if one['required'] else '?'}`"
            for one in operation.get("parameters", ())
            if one["in"] == where
        ]
        if names:
            parts.append(f"{where} {', '.join(names)}")
    return "; ".join(parts)


def every_metric() -> dict[str, tuple[str, str, list[str]]]:
    """Return type, help and labels of every metric, by the name that Prometheus shows."""
    metrics = Metrics()
    tls = SimpleNamespace(client_crl=Path())
    service: Any = SimpleNamespace(metrics=metrics, audit=None, tls=tls, settings=SimpleNamespace(tls=tls))
    service.rotations = SimpleNamespace(facts=lambda _: {})
    service.speaker, service.unready = None, list
    service.place = SimpleNamespace(board=SimpleNamespace(places=(), restarts=0))
    add_gauges(service, cast("Any", None))
    found = {name: ("gauge", text, [label] if label else []) for name, (label, text) in ROTATION.items()}
    # The library lists its collectors, and the labels of what has no samples, nowhere else.
    for collector in cast("Any", metrics.registry)._collector_to_names:  # noqa: SLF001 - see above
        labels = getattr(collector, "_labelnames", None)
        # Described, not collected, where that can be: the gauges' functions have nothing behind them here.
        for family in getattr(collector, "describe", list)() or collector.collect():
            if family.name.startswith("kms_"):
                name = family.name + ("_total" if family.type == "counter" else "")
                names = family._labelnames if labels is None else labels  # noqa: SLF001 - see above
                found[name] = (family.type, family.documentation, list(names))
    return found


def metrics() -> str:
    """Return every metric."""
    rows = [
        [f"`{name}`", kind, ", ".join(f"`{label}`" for label in labels), _cell(text)]
        for name, (kind, text, labels) in sorted(every_metric().items())
    ]
    return _table(["metric", "type", "labels", "meaning"], rows)


PARTS: Final[dict[str, Callable[[], str]]] = {
    "codes": codes,
    "commands": commands,
    "metrics": metrics,
    "routes": routes,
    "settings": settings,
}
PAGES: Final = ("api.md", "cli.md", "configuration.md", "errors.md", "metrics.md")


def fresh(text: str) -> str:
    """Return a page with its generated parts as the code has them now."""
    return PART.sub(lambda match: f"{match[1]}\n{PARTS[match[2]]()}\n\n{match[3]}", text)


def main() -> None:
    """Write the pages."""
    for name in PAGES:
        page = DOCS / name
        page.write_text(fresh(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

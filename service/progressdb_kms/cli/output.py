"""What commands print: tables for people, JSON with ``--json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

json_option: Callable[..., Any] = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_json(value: object) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table: drawn on a terminal, plain columns that no width cuts elsewhere."""
    console = Console(highlight=False, markup=False)
    if console.is_terminal:
        table = Table(header_style="bold")
    else:
        table = Table(box=None, pad_edge=False)
        console.width = 10_000
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_text(cell) for cell in row))
    console.print(table)


def print_fields(fields: dict[str, object]) -> None:
    """Print one thing: a line for each field."""
    width = max(map(len, fields))
    for name, value in fields.items():
        click.echo(f"{name:<{width}}  {_text(value)}")


def show_fields(fields: dict[str, Any], *, as_json: bool) -> None:
    """Print one thing, lists and mappings in it too, as JSON or for people."""
    if as_json:
        print_json(fields)
    else:
        print_fields({name: _flat(value) for name, value in fields.items()})


def _flat(value: object) -> object:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name}: {item}" for name, item in value.items())
    return value


def _text(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)

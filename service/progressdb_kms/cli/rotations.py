"""``rotations``: what rotations there were, and how far the present one is."""

from __future__ import annotations

from dataclasses import asdict

import click

from progressdb_kms.cli.connection import Connection, connection_options
from progressdb_kms.cli.output import json_option, print_fields, print_json, print_table

_COLUMNS = ("rotation_id", "source_version", "target_version", "step", "outcome", "started_at", "finished_at")


@click.group()
def rotations() -> None:
    """Rotations of the KEK."""


@rotations.command("list")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="At most so many.")
@connection_options
@json_option
def list_rotations(limit: int, connection: Connection, *, as_json: bool) -> None:
    """List rotations, the latest first."""
    with connection.admin() as service:
        found = [asdict(rotation) for rotation in service.rotations(limit)]
    if as_json:
        print_json(found)
    else:
        print_table(_COLUMNS, ([rotation[column] for column in _COLUMNS] for rotation in found))


@rotations.command()
@click.argument("rotation_id")
@connection_options
@json_option
def show(rotation_id: str, connection: Connection, *, as_json: bool) -> None:
    """Show one rotation."""
    with connection.admin() as service:
        found = asdict(service.rotation(rotation_id))
    if as_json:
        print_json(found)
        return
    counts = found.pop("counts")
    print_fields(found | {f"counts.{name}": count for name, count in sorted(counts.items())})

"""``kek escrow``: recovery keys, what is sealed to them, and getting KEKs back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import click

from progressdb_kms import bootstrap
from progressdb_kms.cli.exportfiles import chunks_of
from progressdb_kms.cli.output import json_option, print_json, print_table
from progressdb_kms.domain.errors import KekFileInvalid
from progressdb_kms.kek.atomic import write_once
from progressdb_kms.kek.escrow import (
    PRIVATE_NAME,
    PUBLIC_NAME,
    load_recovery_key,
    make_recovery_key,
)
from progressdb_kms.kek.escrow import (
    recover as open_escrow,
)
from progressdb_kms.kek.keyfile import render_entries
from progressdb_kms.settings import load_settings

_config = click.option(
    "--config",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The service's configuration file; only its store is used.",
)


@click.group()
def escrow() -> None:
    """KEK versions sealed to recovery keys."""


@escrow.command()
@click.option(
    "--out",
    "directory",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Directory for {PRIVATE_NAME} and {PUBLIC_NAME}.",
)
@json_option
def keygen(directory: Path, *, as_json: bool) -> None:
    """Make a recovery key pair. Never overwrites."""
    name = make_recovery_key(directory)
    if as_json:
        files = {"private": str(directory / PRIVATE_NAME), "public": str(directory / PUBLIC_NAME)}
        print_json(files | {"fingerprint": name})
    else:
        click.echo(
            f"{directory / PUBLIC_NAME} ({name[:16]}) goes into escrow.recipients. Take {PRIVATE_NAME}"
            " offline: whoever has it and the store can read every message."
        )


@escrow.command("list")
@_config
@json_option
def list_escrow(config: Path, *, as_json: bool) -> None:
    """List which KEK versions are sealed to which recovery keys."""
    kept, view = asyncio.run(bootstrap.read_escrow(load_settings(config), "kek escrow list"))
    columns = ("version", "kek_id", "state", "recipients")
    rows = [
        (version, kek.kek_id, str(kek.state), [item.recipient for item in kept.get(version, ())])
        for version, kek in sorted(view.keks.items())
    ]
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        print_table(columns, ([*row, ", ".join(recipients)] for *row, recipients in rows))


@escrow.command()
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The service's configuration file; only its store is used.",
)
@click.option(
    "--export",
    type=click.Path(path_type=Path, dir_okay=False),
    help="An export, where the store is gone.",
)
@click.option(
    "--recovery-key",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"The {PRIVATE_NAME} of a recovery key pair.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The KEK file to make."
)
@json_option
def recover(
    config: Path | None, export: Path | None, recovery_key: Path, out: Path, *, as_json: bool
) -> None:
    """Make a KEK file of all versions that are sealed to a recovery key. Never overwrites."""
    if (config is None) == (export is None):
        raise click.UsageError("give either --config, for the store, or --export")
    private = load_recovery_key(recovery_key)
    if config is not None:
        kept, view = asyncio.run(bootstrap.read_escrow(load_settings(config), "kek escrow recover"))
    else:
        kept, view = bootstrap.exported_escrow(lambda: chunks_of(cast("Path", export)))
    keys = open_escrow(kept, view, private)
    try:
        write_once(out, render_entries(keys), 0o600)
    except FileExistsError:
        raise KekFileInvalid(f"{out} exists already and is never overwritten; choose another --out") from None
    except OSError as error:
        raise KekFileInvalid(f"can't write {out}: {error.strerror}") from None
    missing = sorted(
        version for version, kek in view.keks.items() if version not in keys and kek.state != "retired"
    )
    if as_json:
        print_json({"file": str(out), "versions": sorted(keys), "missing": missing})
        return
    click.echo(f"{out}: KEK versions {', '.join(map(str, sorted(keys)))}")
    if missing:
        click.echo(
            f"not escrowed to this recovery key: versions {', '.join(map(str, missing))};"
            " add them from elsewhere",
            err=True,
        )

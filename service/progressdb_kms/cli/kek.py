"""``kek``: make a KEK file, and see which versions the running service knows."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path

import click

from progressdb_kms.cli.connection import Connection, connection_options
from progressdb_kms.cli.kek_escrow import escrow
from progressdb_kms.cli.operator import config_option
from progressdb_kms.cli.output import json_option, print_json, print_table
from progressdb_kms.cli.retire import retire
from progressdb_kms.domain.keyring import kek_id_of
from progressdb_kms.kek.init import init_kek_file
from progressdb_kms.kek.keyfile import parse_key_name


@click.group()
def kek() -> None:
    """Key-encryption keys."""


kek.add_command(escrow)
kek.add_command(retire)


@kek.command()
@click.option("--file", "path", required=True, type=click.Path(path_type=Path), help="The file to make.")
@json_option
def init(path: Path, *, as_json: bool) -> None:
    """Make a KEK file with one random key, mode 0600. Never overwrites."""
    kek_id = kek_id_of(init_kek_file(path))
    if as_json:
        print_json({"file": str(path), "version": 1, "kek_id": kek_id})
    else:
        click.echo(
            f"{path}: KEK version 1, {kek_id}. Keep a copy in a safe place: no key can be read without it."
        )


@kek.command()
@config_option
@click.option("--generate", is_flag=True, help="Make the key first; for pkcs11:LABEL only.")
@json_option
@click.argument("key")
def add(config: Path, key: str, *, generate: bool, as_json: bool) -> None:
    """Add KEY as the next version: pkcs11:LABEL, vault:KEY@VERSION or aws:ARN.

    It is tried first. Keys are wrapped under it once `rotate` has run.
    """
    # Only here: commands that call the service need neither Quart nor Redis.
    from progressdb_kms.bootstrap import add_kek  # noqa: PLC0415 - see above
    from progressdb_kms.settings import load_settings  # noqa: PLC0415 - see above

    name = parse_key_name(key)
    settings = load_settings(config)
    version = asyncio.run(add_kek(settings, name, generate=generate))
    if as_json:
        print_json({"version": version, "source": name.kind, "source_key": name.name})
    else:
        click.echo(f"KEK version {version} is {name}. It is used once `rotate` has run.")


@kek.command()
@connection_options
@json_option
def status(connection: Connection, *, as_json: bool) -> None:
    """Show the KEK versions of the running service, and how many keys each one wraps."""
    with connection.admin() as service:
        census = service.keks()
    if as_json:
        versions = [asdict(kek) | {"fingerprint": kek.kek_id} for kek in census.keks]
        print_json({"active": census.active, "versions": versions})
        return
    columns = (
        "version",
        "kek_id",
        "state",
        "source",
        "deks",
        "wraps",
        "loaded",
        "created_at",
        "activated_at",
    )
    print_table(columns, ([getattr(kek, column) for column in columns] for kek in census.keks))

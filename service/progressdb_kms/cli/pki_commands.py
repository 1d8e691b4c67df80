"""``pki``: certificates for development."""

from __future__ import annotations

from pathlib import Path

import click

from progressdb_kms.cli.output import json_option, print_json
from progressdb_kms.cli.pki import CA_DAYS, LEAF_DAYS, Issued, init_ca, issue

_directory = click.option(
    "--dir", "directory", required=True, type=click.Path(path_type=Path), help="Holds ca.crt and ca.key."
)


@click.group()
def pki() -> None:
    """Certificates for development: a CA whose key lies beside it. Not for production."""


@pki.command()
@_directory
@click.option("--days", default=CA_DAYS, show_default=True, type=click.IntRange(1, 36500))
@json_option
def init(directory: Path, days: int, *, as_json: bool) -> None:
    """Make a CA. Never overwrites one."""
    _show(init_ca(directory, days=days), as_json=as_json)


@pki.command("issue")
@click.argument("name")
@_directory
@click.option("--server", is_flag=True, help="For a server; without it, for a client with identity dns:NAME.")
@click.option("--dns", multiple=True, help="DNS name of a server; may be repeated.")
@click.option("--ip", "ips", multiple=True, help="IP address of a server; may be repeated.")
@click.option("--days", default=LEAF_DAYS, show_default=True, type=click.IntRange(1, 36500))
@json_option
def issue_command(
    name: str,
    directory: Path,
    dns: tuple[str, ...],
    ips: tuple[str, ...],
    days: int,
    *,
    server: bool,
    as_json: bool,
) -> None:
    """Issue NAME.crt and NAME.key, replacing those that are there."""
    _show(issue(directory, name, server=server, dns=dns, ips=ips, days=days), as_json=as_json)


def _show(issued: Issued, *, as_json: bool) -> None:
    not_after = issued.not_after.strftime("%Y-%m-%dT%H:%M:%SZ")
    if as_json:
        print_json({"cert": str(issued.cert), "key": str(issued.key), "not_after": not_after})
    else:
        click.echo(f"{issued.cert}, {issued.key}: valid until {not_after}")

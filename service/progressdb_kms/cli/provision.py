"""``provision``: the first start in a cluster, and the renewal of its certificates."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import click

from progressdb_kms.domain.errors import KmsError


@click.command()
@click.option(
    "--config",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="What to make (docs/provisioning.md).",
)
@click.option(
    "--termination-log",
    default="/dev/termination-log",
    show_default=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where Kubernetes reads why it failed; left alone where it is not there.",
)
def provision(config: Path, termination_log: Path) -> None:
    """Make the Secrets of a release that are missing, and renew certificates that are due.

    Never makes a KEK for a store that has data, nor a second CA. Safe to run again, and beside another run.
    """
    # Only here: needs the extra `kubernetes`, which no other command does.
    from progressdb_kms.provision.config import load_config  # noqa: PLC0415 - see above
    from progressdb_kms.provision.run import run  # noqa: PLC0415 - see above

    try:
        asyncio.run(run(load_config(config), click.echo))
    except KmsError as error:
        if termination_log.exists():
            with suppress(OSError):
                termination_log.write_text(f"{error.detail}\n")
        raise
    click.echo("all is there")

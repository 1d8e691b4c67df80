"""``restore``: put back keys that are damaged or missing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from progressdb_kms.cli.exportfiles import chunks_of
from progressdb_kms.cli.operator import INCOMPLETE, config_option, export_file, on_store
from progressdb_kms.cli.output import json_option, print_json
from progressdb_kms.usecases.restore import Restored, Restorer

if TYPE_CHECKING:
    from progressdb_kms.usecases.keks import KekBook
    from progressdb_kms.usecases.vault import Vault


@click.command()
@config_option
@click.option("--rotation", "rotation_id", help="From the snapshot of this rotation.")
@click.option("--file", "path", type=export_file, help="From this export; brings back missing records too.")
@click.option("--key-id", "key_ids", multiple=True, help="Only this key; may be given again.")
@click.option(
    "--force", is_flag=True, help="Also replace what may be newer than the copy; what is lost is named."
)
@json_option
def restore(
    config: Path,
    rotation_id: str | None,
    path: Path | None,
    key_ids: tuple[str, ...],
    *,
    force: bool,
    as_json: bool,
) -> int:
    """Put back keys whose stored form is damaged or missing.

    A healthy key is left as it is, and a destroyed one stays destroyed. No state is restored.
    """
    if (rotation_id is None) == (path is None):
        raise click.UsageError("give either --rotation ID or --file PATH")

    async def action(vault: Vault, keks: KekBook) -> Restored:
        restorer = Restorer(vault, keks, force=force)
        if rotation_id is not None:
            return await restorer.from_snapshot(rotation_id, key_ids)
        file = path or Path()
        return await restorer.from_file(lambda: chunks_of(file), key_ids)

    found = on_store(config, "restore", action)
    if as_json:
        print_json(asdict(found))
    else:
        click.echo(
            f"restored {len(found.restored)}, added {len(found.added)}, healthy {found.healthy}, destroyed"
            f" {found.destroyed}, refused {len(found.refused)}"
        )
        for key_id, reason in found.refused.items():
            click.echo(f"{key_id}: refused: {reason}")
        for key_id, loss in found.lost.items():
            click.echo(f"{key_id}: replaced by force: {loss}")
        for key_id in found.absent:
            click.echo(f"{key_id}: not in the backup")
    return INCOMPLETE if found.refused or found.absent else 0

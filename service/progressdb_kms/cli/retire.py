"""``kek retire``: say that nothing needs a KEK version any more."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from progressdb_kms.cli.exportfiles import chunks_of
from progressdb_kms.cli.operator import config_option, export_file, on_store
from progressdb_kms.usecases.retire import retire as retire_version

if TYPE_CHECKING:
    from progressdb_kms.domain.backup import ExportNote
    from progressdb_kms.usecases.keks import KekBook
    from progressdb_kms.usecases.vault import Vault


@click.command()
@click.argument("version", type=click.IntRange(min=1))
@config_option
@click.option(
    "--export",
    "path",
    required=True,
    type=export_file,
    help="A complete export that does without the version: backup create, after the rotation.",
)
def retire(version: int, config: Path, path: Path) -> None:
    """Mark KEK VERSION as retired, if nothing in the store needs it.

    Records, snapshots and quarantine are read through, and the export is verified whole. The KEK file is not
    touched: what to remove is printed.
    """

    async def action(vault: Vault, _: KekBook) -> list[ExportNote]:
        await retire_version(vault, version, lambda: chunks_of(path))
        return [note for note in await vault.backups.exports() if version in note.kek_versions]

    useless = on_store(config, "kek retire", action)
    click.echo(
        f"KEK version {version} is retired. Now remove version {version} from the KEK file (kek.path in"
        f" {config}) of every instance, and from wherever else it is kept: the Secret, copies, the escrow."
        " Then what still needs it can never be read again."
    )
    for note in useless:
        click.echo(f"export {note.export_id} (sha256 {note.sha256 or 'unknown'}) needs it, and ends with it")

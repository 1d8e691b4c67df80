"""``backup``: exports and snapshots."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from progressdb_kms.cli.backup_create import create, fetch
from progressdb_kms.cli.exportfiles import chunks_of, new_export
from progressdb_kms.cli.operator import INCOMPLETE, config_option, export_file, on_store, on_vault
from progressdb_kms.cli.output import json_option, print_json, print_table, show_fields
from progressdb_kms.domain.errors import BackupInvalid
from progressdb_kms.usecases import backup as usecase
from progressdb_kms.usecases import snapshots as usecase_snapshots
from progressdb_kms.usecases.importing import import_export
from progressdb_kms.usecases.vault import named

if TYPE_CHECKING:
    from progressdb_kms.domain.backup import ExportNote
    from progressdb_kms.usecases.backup import Inspected
    from progressdb_kms.usecases.exportfile import Counts
    from progressdb_kms.usecases.keks import KekBook
    from progressdb_kms.usecases.snapshots import SnapshotReport
    from progressdb_kms.usecases.vault import Vault

_out = click.option("--out", required=True, type=export_file, help="The file to make; never overwritten.")


@click.group()
def backup() -> None:
    """Backups: exports to a file, and the snapshots that rotations leave in the store.

    They hold wrapped keys only: without the KEKs they open nothing, and the KEKs are not in them.
    """


backup.add_command(create)
backup.add_command(fetch)


@backup.command()
@click.argument("rotation_id")
@config_option
@_out
@json_option
def export(rotation_id: str, config: Path, out: Path, *, as_json: bool) -> int:
    """Export the snapshot of rotation ROTATION_ID to a file of the same form."""

    async def action(vault: Vault, _: KekBook) -> tuple[ExportNote, Counts]:
        with new_export(out) as sink:
            return await usecase.export_snapshot(vault, rotation_id, sink)

    return _exported(out, *on_store(config, "backup export", action), as_json=as_json)


def _exported(out: Path, note: ExportNote, counts: Counts, *, as_json: bool) -> int:
    fields: dict[str, Any] = {
        "file": str(out),
        "export_id": note.export_id,
        "records": counts.records,
        "tombstones": counts.tombstones,
        "kek_versions": sorted(counts.by_version),
        "damaged": list(counts.damaged),
        "sha256": note.sha256,
    }
    show_fields(fields, as_json=as_json)
    if counts.damaged:
        click.echo(f"{len(counts.damaged)} records are damaged: {named(counts.damaged)}", err=True)
        return INCOMPLETE
    return 0


@backup.command("list")
@config_option
@json_option
def list_backups(config: Path, *, as_json: bool) -> None:
    """List the snapshots in the store, and the exports that were made of it."""

    async def action(vault: Vault) -> tuple[list[dict[str, Any]], list[ExportNote]]:
        snapshots = await vault.backups.snapshots()
        rows = [
            {
                "rotation_id": rotation_id,
                "slots": len(manifests),
                "records": sum(max(manifest.count, 0) for manifest in manifests.values()),
                "unsealed": sum(manifest.count < 0 for manifest in manifests.values()),
            }
            for rotation_id, manifests in sorted(snapshots.items())
        ]
        return rows, await vault.backups.exports()

    snapshots, exports = on_vault(config, "backup list", action)
    if as_json:
        print_json({"snapshots": snapshots, "exports": [asdict(note) for note in exports]})
        return
    columns = ("rotation_id", "slots", "records", "unsealed")
    print_table(columns, ([row[column] for column in columns] for row in snapshots))
    names = (
        "export_id",
        "kind",
        "began_at",
        "finished_at",
        "records",
        "tombstones",
        "kek_versions",
        "sha256",
    )
    print_table(names, ([_cell(getattr(note, name)) for name in names] for note in exports))


def _cell(value: object) -> object:
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


@backup.command()
@click.argument("name")
@config_option
@json_option
def show(name: str, config: Path, *, as_json: bool) -> None:
    """Show the export or the snapshot NAME: an export_id or a rotation_id."""

    async def action(vault: Vault) -> dict[str, Any]:
        for note in await vault.backups.exports():
            if note.export_id == name:
                return asdict(note)
        manifests = (await vault.backups.snapshots()).get(name)
        if not manifests:
            raise BackupInvalid(f"the store knows neither an export nor a snapshot {name}")
        quarantined = await usecase_snapshots.quarantined(vault, name, manifests)
        return {
            "rotation_id": name,
            "slots": len(manifests),
            "records": sum(max(manifest.count, 0) for manifest in manifests.values()),
            "unsealed": sum(manifest.count < 0 for manifest in manifests.values()),
            "quarantined": quarantined,
        }

    show_fields(on_vault(config, "backup show", action), as_json=as_json)


@backup.command()
@click.argument("what")
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The service's configuration: also check the seal, and that the keys unwrap.",
)
@click.option("--sample", type=click.IntRange(min=1), help="Unwrap about so many keys of a file, not all.")
@json_option
def verify(what: str, config: Path | None, sample: int | None, *, as_json: bool) -> int:
    """Check WHAT: a file, or a rotation_id for the snapshot in the store.

    Without --config a file's structure and digest are checked, for which no KEK is needed.
    """
    path = Path(what)
    if config is None:
        if not path.exists():
            raise click.UsageError(f"there is no file {what}; a snapshot in the store needs --config")
        return _verified(usecase.inspect_export(lambda: chunks_of(path)), None, as_json=as_json)
    if path.exists():
        # Straight from the KEKs: the store need not be there to check a file.
        from progressdb_kms.bootstrap import kek_source  # noqa: PLC0415 - as in cli.operator
        from progressdb_kms.settings import load_settings  # noqa: PLC0415 - as in cli.operator

        source = kek_source(load_settings(config))
        found, bad = asyncio.run(usecase.verify_export(source, lambda: chunks_of(path), sample or 0))
        return _verified(found, bad, as_json=as_json)

    async def action(vault: Vault, _: KekBook) -> SnapshotReport:
        return await usecase_snapshots.verify_snapshot(vault, what)

    report = on_store(config, "backup verify", action)
    show_fields({"rotation_id": what, "sound": report.sound, **asdict(report)}, as_json=as_json)
    return 0 if report.sound else 1


def _verified(export: Inspected, bad: list[str] | None, *, as_json: bool) -> int:
    header, counts = export.header, export.counts
    fields: dict[str, Any] = {
        "export_id": header.export_id,
        "kind": str(header.kind),
        "store_id": header.store_id,
        "created_at": header.created_at,
        "release": header.release,
        "records": counts.records,
        "tombstones": counts.tombstones,
        "damaged": list(counts.damaged),
        "keks": {kek.version: kek.kek_id for kek in export.needed},
        "sha256": export.ending.sha256,
        "seal": "not checked (give --config)" if bad is None else "good",
    }
    if bad is not None:
        fields["bad"] = bad
    show_fields(fields, as_json=as_json)
    return INCOMPLETE if bad or counts.damaged else 0


@backup.command("import")
@click.argument("file", type=export_file)
@config_option
@click.option("--merge", is_flag=True, help="Add what is missing to a store that has data; replaces nothing.")
@click.option(
    "--accept-resurrection",
    is_flag=True,
    help="Take an export over 7 days old, though keys destroyed since would live again.",
)
@json_option
def import_file(file: Path, config: Path, *, merge: bool, accept_resurrection: bool, as_json: bool) -> int:
    """Fill an empty store from FILE. An import that was interrupted is run again in the same way."""

    async def action(vault: Vault) -> Any:  # noqa: ANN401 - handed through
        return await import_export(
            vault, lambda: chunks_of(file), merge=merge, accept_resurrection=accept_resurrection
        )

    report = on_vault(config, "backup import", action)
    fields: dict[str, Any] = {**dict(report.counts), "destroyed_here": report.destroyed_here}
    fields |= {"bad": report.bad, "collisions": report.collisions}
    show_fields(fields, as_json=as_json)
    return INCOMPLETE if report.bad or report.collisions else 0


@backup.command()
@click.argument("rotation_id", required=False)
@click.option("--older-than", "days", type=click.IntRange(min=0), help="All finished over so many days ago.")
@click.option("--force", is_flag=True, help="Though keys are in quarantine that it may be the only copy of.")
@config_option
def purge(rotation_id: str | None, days: int | None, config: Path, *, force: bool) -> None:
    """Remove the snapshot of ROTATION_ID, or old ones, from the store."""
    if (rotation_id is None) == (days is None):
        raise click.UsageError("give either ROTATION_ID or --older-than DAYS")

    async def action(vault: Vault) -> list[str]:
        if rotation_id is None:
            return await usecase_snapshots.purge_older(vault, days or 0, force=force)
        await usecase_snapshots.purge(vault, rotation_id, force=force)
        return [rotation_id]

    for purged in on_vault(config, "backup purge", action):
        click.echo(f"{purged}: purged")

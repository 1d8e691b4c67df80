"""Imports: an export's records and registry into an empty store, or merged into one that has some."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from progressdb_kms.domain.backup import SHORTEST_WAIT_DAYS, Destruction, ExportNote, may_resurrect
from progressdb_kms.domain.errors import BackupInvalid, KekMismatch, RegistryLost
from progressdb_kms.domain.keyring import KekState
from progressdb_kms.ports import Extras, Imported, RegistryView
from progressdb_kms.usecases.backup import (
    Inspected,
    authenticate_export,
    bad_blobs,
    inspect_export,
    records_of,
)
from progressdb_kms.usecases.destroyer import Destroyer
from progressdb_kms.usecases.exclusive import LEASE, exclusive
from progressdb_kms.usecases.vault import audited

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from progressdb_kms.usecases.vault import Vault


@dataclass(slots=True)
class ImportReport:
    """What an import did.

    Attributes:
        counts: Records by what became of them (``Imported``).
        bad: Key ids whose wrapped keys do not unwrap; they were imported as they are.
        collisions: Key ids that the store has under another thread; they were left out.
        destroyed_here: Key ids that the export knows as destroyed and the store had alive: destroyed now.
    """

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    collisions: list[str] = field(default_factory=list)
    destroyed_here: list[str] = field(default_factory=list)


async def import_export(
    vault: Vault,
    chunks: Callable[[], Iterable[bytes]],
    *,
    merge: bool = False,
    accept_resurrection: bool = False,
) -> ImportReport:
    """Fill a store from an export; every record is durable when this returns.

    The registry is written last: until then no service starts on the store, and the same import can be run
        again.

    Args:
        vault: The store and the KEKs.
        chunks: Opens the file.
        merge: Add what is missing to a store that has data. A record is never replaced, and a tombstone on
            either side wins.
        accept_resurrection: Take an export that is so old that keys may have been destroyed since.

    Raises:
        BackupInvalid: The file is damaged or forged, or made under other KEKs; or the store has other data.
        KekMismatch: The KEKs belong to another store than the one that this would make.
        RotationRunning: A rotation or another such command is running on the store.
        Fenced: The lock was lost meanwhile; run it again.
        StoreUnavailable, StoreNotDurable: Run it again.
    """
    export = inspect_export(chunks)
    await authenticate_export(vault.source, export)
    async with exclusive(vault.ledger, vault.owner) as lock:
        view = await _target(vault, export, merge=merge)
        if (
            may_resurrect(export.header.created_at, vault.now())
            and (view is None or view.store_id != export.header.store_id)
            and not accept_resurrection
        ):
            raise BackupInvalid(
                f"the export is over {SHORTEST_WAIT_DAYS} days old: keys that were destroyed since would live"
                " again; use a newer one, or say --accept-resurrection and destroy them again"
            )
        async with audited(
            vault, "backup.import", f"{export.header.export_id} sha256 {export.ending.sha256}"
        ):
            report = ImportReport()
            destroyer = Destroyer(vault)
            await vault.backups.raise_floors(export.registry.active if view is None else view.active)
            for records in records_of(chunks, export):
                report.bad += await bad_blobs(vault.source, records)
                # A version that they need can't be retired while the lock is held, and it may have been lost.
                await vault.ledger.renew(lock, LEASE)
                results = await vault.backups.import_records(records)
                report.counts.update(str(result) for result in results)
                for record, result in zip(records, results, strict=True):
                    if result is Imported.COLLISION:
                        report.collisions.append(record.key_id)
                    elif result is Imported.ALIVE:
                        await vault.destruction.owe_rewrite()
                        await destroyer.destroy(
                            Destruction(record.key_id, record.changed_at or int(vault.now())), merged=True
                        )
                        report.destroyed_here.append(record.key_id)
            await _remember(vault, export)
            await vault.backups.finish_import(*_registry(export, view), lock)
    return report


async def _target(vault: Vault, export: Inspected, *, merge: bool) -> RegistryView | None:
    """Return the registry of the store to fill, None where the store is to be filled whole.

    Raises:
        BackupInvalid, KekMismatch: It must not be filled.
    """
    # Before anything is written: a store without a registry that is filled gets the export's id.
    if vault.store_id not in {"", export.header.store_id} and not await _registered(vault):
        raise KekMismatch(
            f"the export is of store {export.header.store_id}, but this KEK belongs to store {vault.store_id}"
            " (store.id_file): import an export of that store, or write the export's id there"
        )
    if await vault.backups.begin_import(export.ending.sha256):
        return None
    if not merge:
        raise BackupInvalid(
            "the store has other data, or another import into it was interrupted: use an empty store, finish"
            " the other import, or add what is missing with --merge"
        )
    view = await vault.registry.load()
    if view is None:
        raise BackupInvalid("another import into the store was interrupted: finish it first")
    for kek in export.needed:
        known = view.keks.get(kek.version)
        if known is not None and known.check_value != kek.check_value:
            raise BackupInvalid(
                f"the export's KEK version {kek.version} is {kek.kek_id}, and the store's is {known.kek_id}:"
                " they can't be merged"
            )
        if known is not None and known.state is KekState.RETIRED:
            raise BackupInvalid(
                f"the export needs KEK version {kek.version} ({kek.kek_id}), which is retired in the store"
            )
    return view


async def _registered(vault: Vault) -> bool:
    try:
        return await vault.registry.load() is not None
    except RegistryLost:
        return False


def _registry(export: Inspected, view: RegistryView | None) -> tuple[RegistryView, Extras]:
    registry, header = export.registry, export.header
    if view is None:
        keks = {kek.version: kek for kek in registry.keks}
        filled = RegistryView(header.store_id, keks, registry.active, 1)
        return filled, Extras(registry.wraps, registry.escrow)
    # Into a store that goes on: only the versions that the imported records need and it does not have.
    missing = [kek for kek in export.needed if kek.version not in view.keks]
    keks = {kek.version: replace(kek, state=KekState.DECRYPT_ONLY) for kek in missing}
    names = set(keks)
    return RegistryView(view.store_id, keks or dict(view.keks), view.active, view.revision), Extras(
        {version: count for version, count in registry.wraps.items() if version in names},
        {version: entry for version, entry in registry.escrow.items() if int(version) in names},
    )


async def _remember(vault: Vault, export: Inspected) -> None:
    """Note the export in the store that it fills, so that later destructions name it."""
    header, counts = export.header, export.counts
    if any(note.export_id == header.export_id for note in await vault.backups.exports()):
        return
    await vault.backups.note_export(
        ExportNote(
            header.export_id,
            header.kind,
            header.created_at,
            # Whatever was made until now may be in it as far as this store can know.
            int(vault.now()),
            header.rotation_id,
            counts.records,
            counts.tombstones,
            export.ending.sha256,
            tuple(sorted(counts.by_version)),
        )
    )

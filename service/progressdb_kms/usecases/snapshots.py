"""The snapshots that rotations leave in the store: checked, and purged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from progressdb_kms.domain.backup import DAY
from progressdb_kms.domain.errors import BackupInvalid, KmsError, RotationRefused
from progressdb_kms.domain.keys import DekRecord
from progressdb_kms.domain.rotation import bucket_digest, slot_digest
from progressdb_kms.usecases.exclusive import exclusive
from progressdb_kms.usecases.vault import Sealed, Vault, audited, named, unwrap_all

if TYPE_CHECKING:
    from collections.abc import Iterable

    from progressdb_kms.ports import Manifest


async def manifests_of(vault: Vault, rotation_id: str) -> dict[str, Manifest]:
    """Return the manifests of a rotation's snapshot by slot tag.

    Raises:
        BackupInvalid: There is no such snapshot.
    """
    found = dict((await vault.backups.snapshots()).get(rotation_id, {}))
    if not found:
        raise BackupInvalid(f"the store holds no snapshot of a rotation {rotation_id}")
    return found


@dataclass(slots=True)
class SnapshotReport:
    """What a check of a snapshot found.

    Attributes:
        records: Copies that were looked at.
        bad: Key ids of copies that do not unwrap.
        orphans: Key ids of copies whose record is gone.
        unsealed: Slots whose manifest was never sealed, or was opened by a change since.
        differing: Slots whose copies are not those that were sealed.
    """

    records: int = 0
    bad: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    unsealed: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether all is as it was sealed and unwraps."""
        return not (self.bad or self.orphans or self.differing)


async def verify_snapshot(vault: Vault, rotation_id: str) -> SnapshotReport:
    """Check a rotation's snapshot: manifests and that each copy unwraps.

    Raises:
        BackupInvalid: There is no such snapshot, or a KEK of the registry is loaded wrongly.
    """
    report = SnapshotReport()
    for tag, manifest in sorted((await manifests_of(vault, rotation_id)).items()):
        digests = []
        count = 0
        for bucket in range(manifest.buckets):
            entries = await vault.slots.read_bucket(tag, rotation_id, bucket)
            digests.append(bucket_digest(entries))
            count += len(entries)
            await _verify_copies(vault, entries, report)
        report.records += count
        if manifest.count < 0:
            report.unsealed.append(tag)
        elif (count, slot_digest(digests)) != (manifest.count, manifest.digest):
            report.differing.append(tag)
    return report


async def _verify_copies(vault: Vault, entries: list[tuple[str, bytes]], report: SnapshotReport) -> None:
    records = await vault.backups.read([key_id for key_id, _ in entries])
    sealed = []
    for (key_id, blob), record in zip(entries, records, strict=True):
        if isinstance(record, DekRecord):
            sealed.append(Sealed(key_id, record.thread_id, blob))
        else:
            report.orphans.append(key_id)
    for key, opened in zip(sealed, await unwrap_all(vault.source, sealed), strict=True):
        if isinstance(opened, KmsError):
            report.bad.append(key.key_id)


async def quarantined(vault: Vault, rotation_id: str, tags: Iterable[str]) -> list[str]:
    """Return the key ids that a rotation could not deal with, in these slots."""
    return [record.key_id for tag in tags for record in await vault.slots.quarantined(tag, rotation_id)]


async def purge(vault: Vault, rotation_id: str, *, force: bool = False) -> int:
    """Remove a rotation's snapshot from the store; return how many slots had a part of it.

    Raises:
        BackupInvalid: There is no such snapshot.
        RotationRefused: The rotation is not finished; or, without ``force``, records are in quarantine, for
            which the snapshot may hold the only good copy.
    """
    async with exclusive(vault.ledger, vault.owner):
        return await _purge(vault, rotation_id, force=force)


async def purge_older(vault: Vault, days: int, *, force: bool = False) -> list[str]:
    """Remove the snapshots of rotations that were finished over ``days`` ago; return their ids.

    Raises:
        RotationRefused: As ``purge``; what was removed before is removed.
    """
    limit = vault.now() - days * DAY
    purged = []
    async with exclusive(vault.ledger, vault.owner):
        for rotation_id in sorted(await vault.backups.snapshots()):
            rotation = await vault.ledger.get(rotation_id)
            if rotation is not None and rotation.finished_at is not None and rotation.finished_at < limit:
                await _purge(vault, rotation_id, force=force)
                purged.append(rotation_id)
    return purged


async def _purge(vault: Vault, rotation_id: str, *, force: bool) -> int:
    manifests = await manifests_of(vault, rotation_id)
    rotation = await vault.ledger.get(rotation_id)
    if rotation is not None and rotation.finished_at is None:
        raise RotationRefused(
            f"rotation {rotation_id} is not finished and needs its snapshot: finish it first"
        )
    left = await quarantined(vault, rotation_id, manifests)
    if left and not force:
        raise RotationRefused(
            f"the snapshot of {rotation_id} may hold the only good copy of {len(left)} quarantined keys:"
            f" {named(left)}; restore them, or purge with --force"
        )
    async with audited(vault, "backup.purge", rotation_id):
        for tag in manifests:
            await vault.backups.purge(tag, rotation_id)
    return len(manifests)

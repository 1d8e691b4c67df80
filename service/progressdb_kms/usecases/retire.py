"""Retirement of a KEK version: only when nothing in the store needs it, and an export without it exists.

It trusts no index: records are found by themselves on every primary, snapshots and quarantine are read
through.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.envelope import parse_blob
from progressdb_kms.domain.errors import BackupInvalid, KmsError, RotationRefused, WrappedKeyInvalid
from progressdb_kms.domain.keyring import KekState
from progressdb_kms.domain.keys import ALL_TAGS, DekRecord, KeyState
from progressdb_kms.ports import Damaged
from progressdb_kms.usecases.backup import current_view, records_of, verify_export
from progressdb_kms.usecases.exclusive import exclusive
from progressdb_kms.usecases.vault import Sealed, Vault, audited, named, unwrap_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from progressdb_kms.ports import Quarantined, RegistryView

_ROTATIONS: Final = 1000


@dataclass(slots=True)
class Needs:
    """What still needs a KEK version.

    Attributes:
        records: Key ids of records under it.
        damaged: Key ids of records that can't be read, so that nobody knows what they need.
        snapshots: Copies under it, by rotation id.
        quarantined: Key ids in quarantine that have no good record under another version.
        low_floors: Slots in which a wrap under it could still be written.
        live: Key ids of all records that are not destroyed.
    """

    records: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    snapshots: Counter[str] = field(default_factory=Counter)
    quarantined: list[str] = field(default_factory=list)
    low_floors: list[str] = field(default_factory=list)
    live: set[str] = field(default_factory=set)

    def reasons(self, version: int) -> list[str]:
        """Return why the version can't be retired, one line each."""
        found = []
        if self.records:
            found.append(
                f"{len(self.records)} keys are wrapped under it: {named(self.records)}; rotate first"
            )
        if self.damaged:
            found.append(
                f"{len(self.damaged)} records can't be read, so that nobody knows what they need:"
                f" {named(self.damaged)}; restore or remove them"
            )
        for rotation_id, count in sorted(self.snapshots.items()):
            found.append(
                f"the snapshot of {rotation_id} holds {count} copies under it; backup purge {rotation_id}"
            )
        if self.quarantined:
            found.append(
                f"{len(self.quarantined)} keys are in quarantine: {named(self.quarantined)}; restore them"
            )
        if self.low_floors:
            found.append(
                f"{len(self.low_floors)} slots still take wraps under version {version}; finish the rotation"
            )
        return found


async def needs(vault: Vault, version: int) -> Needs:
    """Look through records, snapshots, quarantine and floors for what needs a KEK version.

    Raises:
        StoreUnavailable: Not now; start again.
    """
    found = Needs()
    # Floors first: what is found above the version after this can't sink below it again.
    found.low_floors = [tag for tag, floor in (await vault.backups.floors()).items() if floor <= version]
    await _look_at_records(vault, version, found)
    snapshots = await vault.backups.snapshots()
    for rotation_id, manifests in snapshots.items():
        for tag, manifest in manifests.items():
            for bucket in range(manifest.buckets):
                for _, blob in await vault.slots.read_bucket(tag, rotation_id, bucket):
                    found.snapshots[rotation_id] += _names(blob, version)
    found.snapshots = +found.snapshots
    rotations = {rotation.rotation_id for rotation in await vault.ledger.list_rotations(_ROTATIONS)}
    for rotation_id in rotations | set(snapshots):
        noted = await asyncio.gather(*(vault.slots.quarantined(tag, rotation_id) for tag in ALL_TAGS))
        found.quarantined += await _unhealed(vault, [entry for slot in noted for entry in slot], version)
    found.quarantined.sort()
    return found


async def _look_at_records(vault: Vault, version: int, found: Needs) -> None:
    under: set[str] = set()
    damaged: set[str] = set()
    async for batch in vault.backups.records():
        for record in batch:
            if isinstance(record, Damaged) or _unreadable(record):
                damaged.add(record.key_id)
            elif record.state is not KeyState.DESTROYED:
                found.live.add(record.key_id)
                if version in {record.kek_version, parse_blob(record.wrapped).kek_version}:
                    under.add(record.key_id)
    found.records, found.damaged = sorted(under), sorted(damaged)


def _unreadable(record: DekRecord) -> bool:
    if record.state is KeyState.DESTROYED:
        return False
    try:
        parse_blob(record.wrapped)
    except WrappedKeyInvalid:
        return True
    return False


def _names(blob: bytes, version: int) -> bool:
    """Say whether a copy needs the version; one that can't be read may."""
    try:
        return parse_blob(blob).kek_version == version
    except WrappedKeyInvalid:
        return True


async def _unhealed(vault: Vault, noted: list[Quarantined], version: int) -> list[str]:
    concerned = [entry.key_id for entry in noted if entry.kek_version == version]
    if not concerned:
        return []
    bad = []
    for key_id, record in zip(concerned, await vault.backups.read(concerned), strict=True):
        if isinstance(record, DekRecord):
            if record.state is KeyState.DESTROYED:
                continue
            (opened,) = await unwrap_all(
                vault.source, [Sealed(record.key_id, record.thread_id, record.wrapped)]
            )
            if not isinstance(opened, KmsError) and not _names(record.wrapped, version):
                continue
        bad.append(key_id)
    return bad


async def retire(vault: Vault, version: int, chunks: Callable[[], Iterable[bytes]]) -> RegistryView:
    """Mark a KEK version as retired; repeating it is fine.

    Args:
        vault: The store.
        version: Which one.
        chunks: Opens a complete export that does without the version.

    Raises:
        RotationRefused: Something needs the version, it is not decrypt-only, or a rotation is not finished;
            the detail says what to do.
        BackupInvalid: The export is not verified, not complete, or needs the version itself.
        RotationRunning: A rotation or another such command is running.
        Fenced: The lock was lost meanwhile, and something may need the version by now.
    """
    async with exclusive(vault.ledger, vault.owner) as lock:
        view = await current_view(vault)
        kek = view.keks.get(version)
        if kek is not None and kek.state is KekState.RETIRED:
            return view
        if kek is None or kek.state is not KekState.DECRYPT_ONLY:
            state = "not registered" if kek is None else kek.state
            raise RotationRefused(f"KEK version {version} is {state}: only a decrypt-only one can be retired")
        under_way = await vault.ledger.current()
        if under_way is not None:
            raise RotationRefused(f"rotation {under_way.rotation_id} is not finished: finish it first")
        found = await needs(vault, version)
        reasons = found.reasons(version)
        if reasons:
            raise RotationRefused(f"KEK version {version} is still needed: {'; '.join(reasons)}")
        await _require_export(vault, version, chunks, found.live, view.store_id)
        async with audited(vault, "kek.retire", f"kek {version}"):
            view = await vault.registry.retire(version, lock=lock)
    return view


async def _require_export(
    vault: Vault, version: int, chunks: Callable[[], Iterable[bytes]], live: set[str], store_id: str
) -> None:
    export, bad = await verify_export(vault.source, chunks)
    if export.header.store_id != store_id:
        raise BackupInvalid("the export is of another store")
    if version in export.counts.by_version or export.header.seal_version == version:
        raise BackupInvalid(
            f"the export needs KEK version {version} itself: make a new one with backup create"
        )
    if bad:
        raise BackupInvalid(f"{len(bad)} keys of the export do not unwrap: {named(bad)}")
    missing = set(live)
    for records in records_of(chunks, export):
        missing.difference_update(
            record.key_id for record in records if record.state is not KeyState.DESTROYED
        )
    if missing:
        raise BackupInvalid(
            f"the export lacks {len(missing)} of {len(live)} keys: {named(sorted(missing))}; make a new one"
        )

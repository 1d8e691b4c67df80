"""Restoring records whose wrapped key is damaged or missing, from a snapshot or an export."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.envelope import parse_blob
from progressdb_kms.domain.errors import BackupInvalid, KekUnavailable, KmsError, StaleKek
from progressdb_kms.domain.keys import DekRecord, KeyState, locate
from progressdb_kms.ports import AuditEvent, Damaged, Imported
from progressdb_kms.usecases.backup import authenticate_export, inspect_export, records_of
from progressdb_kms.usecases.exclusive import exclusive
from progressdb_kms.usecases.vault import Sealed, Vault, audited, unwrap_all

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence

    from progressdb_kms.usecases.keks import KekBook

_BATCH: Final = 250


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of a key in a backup.

    Attributes:
        wrapped: The wrapped key.
        record: The record that goes with it, where the backup has one.
    """

    key_id: str
    wrapped: bytes = field(repr=False)
    record: DekRecord | None = None


@dataclass(slots=True)
class Restored:
    """What a restore did.

    Attributes:
        restored: Key ids whose wrapped key was put back.
        added: Key ids whose record was missing.
        healthy: Records that unwrap, and were left as they are.
        destroyed: Records of destroyed keys, which stay destroyed.
        refused: Key ids that were left as they are, with the reason; ``force`` would change those in
            ``forcible``.
        forcible: Key ids for which only ``force`` was missing.
        lost: With ``force``: key ids, and what of each was given up.
        absent: Key ids that were asked for and are not in the backup.
    """

    restored: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    healthy: int = 0
    destroyed: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    forcible: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)


class Restorer:
    """Puts wrapped keys back.

    A copy is unwrapped under the KEK version that it names and wrapped under the active one, so that the
    floor stands, and it replaces exactly the blob that was looked at. No state is ever restored.

    Args:
        vault: The store.
        keks: Wraps under the active version.
        force: Also replace what may be newer or better than the copy.
    """

    def __init__(self, vault: Vault, keks: KekBook, *, force: bool = False) -> None:
        self._vault = vault
        self._keks = keks
        self._force = force
        self._report = Restored()

    async def from_snapshot(self, rotation_id: str, key_ids: Collection[str] = ()) -> Restored:
        """Restore from a rotation's snapshot, all that needs it or only ``key_ids``.

        Raises:
            BackupInvalid: There is no such snapshot.
            RotationRunning: A rotation or another such command is running.
            StoreUnavailable, StoreNotDurable: Run it again.
        """
        async with exclusive(self._vault.ledger, self._vault.owner):
            manifests = (await self._vault.backups.snapshots()).get(rotation_id)
            if not manifests:
                raise BackupInvalid(f"the store holds no snapshot of a rotation {rotation_id}")
            tags = sorted({locate(key_id) for key_id in key_ids}) if key_ids else sorted(manifests)
            return await self._run(
                self._copies(rotation_id, {t: manifests[t].buckets for t in tags if t in manifests}),
                key_ids,
                rotation_id,
            )

    async def from_file(
        self, chunks: Callable[[], Iterable[bytes]], key_ids: Collection[str] = ()
    ) -> Restored:
        """Restore from an export, also records that are missing altogether.

        Raises:
            BackupInvalid: It is damaged or forged, needs other KEKs, or is of another store.
            RotationRunning, StoreUnavailable, StoreNotDurable: As ``from_snapshot``.
        """
        export = inspect_export(chunks)
        await authenticate_export(self._vault.source, export)
        if export.header.store_id != self._keks.view.store_id:
            raise BackupInvalid(
                "the export is of another store: import it there, or merge it with backup import"
            )

        async def copies() -> AsyncIterator[list[Copy]]:
            for records in records_of(chunks, export):
                yield [Copy(record.key_id, record.wrapped, record) for record in records]

        async with exclusive(self._vault.ledger, self._vault.owner):
            return await self._run(copies(), key_ids, export.header.export_id)

    async def _copies(self, rotation_id: str, buckets: dict[str, int]) -> AsyncIterator[list[Copy]]:
        for tag, count in buckets.items():
            for bucket in range(count):
                entries = await self._vault.slots.read_bucket(tag, rotation_id, bucket)
                yield [Copy(key_id, blob) for key_id, blob in entries]

    async def _run(
        self, batches: AsyncIterator[list[Copy]], key_ids: Collection[str], where: str
    ) -> Restored:
        async with audited(self._vault, "backup.restore", where):
            wanted, seen = set(key_ids), set()
            async for copies in batches:
                chosen = [copy for copy in copies if not wanted or copy.key_id in wanted]
                seen |= {copy.key_id for copy in chosen} if wanted else set()
                for first in range(0, len(chosen), _BATCH):
                    await self._restore(chosen[first : first + _BATCH])
            self._report.absent = sorted(wanted - seen)
            await self._release()
            await self._vault.audit.record(
                [
                    AuditEvent("key.restore", "ok", self._vault.owner, "", key_id, detail=where)
                    for key_id in (*self._report.restored, *self._report.added)
                ]
            )
        return self._report

    async def _restore(self, copies: Sequence[Copy]) -> None:
        report = self._report
        records = await self._vault.backups.read([copy.key_id for copy in copies])
        present: list[tuple[Copy, DekRecord]] = []
        for copy, record in zip(copies, records, strict=True):
            if record is None:
                await self._add(copy)
            elif isinstance(record, Damaged):
                self._refuse(
                    copy.key_id, f"its record can't be read ({record.reason}): remove it, then restore again"
                )
            elif record.state is KeyState.DESTROYED:
                report.destroyed += 1
            elif copy.record is not None and copy.record.state is KeyState.DESTROYED:
                self._refuse(copy.key_id, "the backup knows it as destroyed")
            else:
                present.append((copy, record))
        live = await unwrap_all(
            self._vault.source, [_sealed(record, record.wrapped) for _, record in present]
        )
        kept = await unwrap_all(
            self._vault.source, [_sealed(record, copy.wrapped) for copy, record in present]
        )
        for (copy, record), now, then in zip(present, live, kept, strict=True):
            if isinstance(now, bytes) and now == then:
                report.healthy += 1
            elif not isinstance(then, bytes):
                if isinstance(now, bytes):
                    report.healthy += 1
                else:
                    self._refuse(copy.key_id, "the copy does not unwrap either")
            else:
                await self._decide(record, now, then)

    async def _decide(self, record: DekRecord, now: bytes | KmsError, then: bytes) -> None:
        """Replace a blob by a copy that unwraps, unless the blob may be worth more."""
        loss = ""
        if isinstance(now, bytes):
            loss = "it unwraps to another key than the copy: what was encrypted under it would be lost"
        elif isinstance(now, KekUnavailable):
            version = parse_blob(record.wrapped).kek_version
            loss = (
                f"it is under KEK version {version}, which is not loaded here: with that KEK it may be whole"
            )
        if loss and not self._force:
            self._refuse(record.key_id, loss)
            self._report.forcible.append(record.key_id)
            return
        if await self._replace(record, then):
            self._report.restored.append(record.key_id)
            if loss:
                self._report.lost[record.key_id] = loss
        else:
            self._refuse(record.key_id, "it was changed meanwhile by somebody else: restore again")

    async def _replace(self, record: DekRecord, dek: bytes) -> bool:
        version, kek_id, (blob,) = await self._wrap(record, dek)
        try:
            return await self._vault.keys.rewrap(record, blob, kek_id, version)
        except StaleKek:
            await self._keks.refresh()
            version, kek_id, (blob,) = await self._wrap(record, dek)
            return await self._vault.keys.rewrap(record, blob, kek_id, version)

    async def _wrap(self, record: DekRecord, dek: bytes) -> tuple[int, str, list[bytes]]:
        version, kek_id, blobs = await self._keks.wrap([dek], [(record.key_id, record.thread_id)])
        (check,) = await unwrap_all(self._vault.source, [_sealed(record, blobs[0])])
        if check != dek:
            raise BackupInvalid(
                f"the new wrap of {record.key_id} does not unwrap to the same key; it was not written"
            )
        return version, kek_id, blobs

    async def _add(self, copy: Copy) -> None:
        """Put back a record that is missing, with the state that the export knows: there is no other."""
        if copy.record is None:
            self._refuse(
                copy.key_id, "its record is gone, which a snapshot does not hold: restore it from an export"
            )
            return
        record = copy.record
        if record.state is not KeyState.DESTROYED:
            (dek,) = await unwrap_all(self._vault.source, [_sealed(record, record.wrapped)])
            if isinstance(dek, KmsError):
                self._refuse(copy.key_id, "the copy does not unwrap either")
                return
            version, kek_id, (blob,) = await self._wrap(record, dek)
            record = replace(record, wrapped=blob, kek_id=kek_id, kek_version=version)
        (result,) = await self._vault.backups.import_records([record])
        if result is Imported.ADDED:
            self._report.added.append(copy.key_id)
        else:
            self._refuse(copy.key_id, "it was made meanwhile by somebody else")

    async def _release(self) -> None:
        """Take what was restored out of every quarantine."""
        by_tag: dict[str, list[str]] = {}
        for key_id in (*self._report.restored, *self._report.added):
            by_tag.setdefault(locate(key_id), []).append(key_id)
        if not by_tag:
            return
        for rotation in await self._vault.ledger.list_rotations(1000):
            for tag, key_ids in by_tag.items():
                await self._vault.backups.release(tag, rotation.rotation_id, key_ids)

    def _refuse(self, key_id: str, reason: str) -> None:
        self._report.refused[key_id] = reason


def _sealed(record: DekRecord, blob: bytes) -> Sealed:
    return Sealed(record.key_id, record.thread_id, blob)

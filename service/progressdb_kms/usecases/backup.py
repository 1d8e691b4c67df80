"""Exports: live records or a rotation's snapshot to one file, and such files verified."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from progressdb_kms.domain.backup import ExportKind, ExportNote
from progressdb_kms.domain.envelope import parse_blob
from progressdb_kms.domain.errors import BackupInvalid, KmsError, WrappedKeyInvalid
from progressdb_kms.domain.export import SEAL_LABEL
from progressdb_kms.domain.keys import DekRecord, KeyState
from progressdb_kms.ports import Damaged
from progressdb_kms.usecases.exportfile import (
    Counts,
    Ending,
    ExportBuilder,
    Header,
    Registry,
    read_export,
)
from progressdb_kms.usecases.snapshots import manifests_of
from progressdb_kms.usecases.vault import Sealed, Vault, event, require_keks, same, unwrap_all

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from progressdb_kms.domain.keyring import KekInfo
    from progressdb_kms.ports import KekSource, Manifest, RegistryView

Chunks = "Callable[[], Iterable[bytes]]"
"""Opens a file and gives its bytes; called once for each reading."""


class Sink(Protocol):
    """A file that appears whole or not at all."""

    def write(self, data: bytes) -> object:
        """Take some bytes."""

    def commit(self) -> None:
        """Make the file durable under its name."""


async def current_view(vault: Vault) -> RegistryView:
    """Return the registry.

    Raises:
        BackupInvalid: There is none.
        RegistryLost, StoreUnavailable: As ``KekRegistry.load``.
    """
    view = await vault.registry.load()
    if view is None:
        raise BackupInvalid("the store is empty: there is nothing in it")
    return view


def new_export_id() -> str:
    """Return a name for an export that no other has."""
    return f"x_{secrets.token_hex(8)}"


async def export_live(vault: Vault, sink: Sink, export_id: str = "") -> tuple[ExportNote, Counts]:
    """Write all live records, tombstones and the registry to a file, while traffic goes on.

    Args:
        vault: The ports.
        sink: The file.
        export_id: Of ``new_export_id``, for who has to know it before; else a new one.

    Raises:
        BackupInvalid: The store is empty, or the active KEK is not loaded as registered.
        StoreUnavailable, StoreNotDurable: Not now; no file was made.
        OSError: The file can't be written.
    """
    return await _export(vault, sink, ExportKind.LIVE, "", vault.backups.records(), export_id)


async def export_snapshot(vault: Vault, rotation_id: str, sink: Sink) -> tuple[ExportNote, Counts]:
    """Write a rotation's snapshot to a file of the same form: its blobs with the present metadata.

    Raises:
        BackupInvalid: There is no such snapshot; and as ``export_live``.
    """
    manifests = await manifests_of(vault, rotation_id)
    return await _export(
        vault, sink, ExportKind.ROTATION, rotation_id, _snapshot_records(vault, rotation_id, manifests)
    )


async def _export(
    vault: Vault,
    sink: Sink,
    kind: ExportKind,
    rotation_id: str,
    batches: AsyncIterator[list[DekRecord | Damaged]],
    export_id: str = "",
) -> tuple[ExportNote, Counts]:
    view = await current_view(vault)
    kek = view.keks[view.active]
    await require_keks(vault.source, [kek], "the export's seal")
    note = ExportNote(export_id or new_export_id(), kind, int(vault.now()), rotation_id=rotation_id)
    await vault.audit.record(
        [event(vault, "backup.export", "intent", f"{note.export_id} {kind} {rotation_id}")]
    )
    # Before the first record is read: a key that is destroyed from now on may be in the file.
    await vault.backups.note_export(note)
    header = Header(
        note.export_id,
        kind,
        view.store_id,
        note.began_at,
        vault.release,
        kek.version,
        kek.kek_id,
        rotation_id,
    )
    builder = ExportBuilder(header, sink.write)
    damaged: list[str] = []
    async for batch in batches:
        for record in batch:
            _add(builder, record, damaged)
    # Only now: a rotation may have begun meanwhile, and records are under the version that it brought.
    view = await current_view(vault)
    extras = await vault.backups.extras()
    registry = Registry(view.active, tuple(view.keks.values()), dict(extras.wraps), dict(extras.escrow))
    counts = builder.counts(damaged)
    digest = builder.close(registry, damaged)
    sha256 = builder.seal(await vault.source.seal(kek, SEAL_LABEL, digest))
    sink.commit()
    note = replace(
        note,
        finished_at=int(vault.now()),
        records=counts.records,
        tombstones=counts.tombstones,
        sha256=sha256,
        kek_versions=tuple(sorted(counts.by_version)),
    )
    await vault.backups.note_export(note)
    await vault.audit.record([event(vault, "backup.export", "ok", f"{note.export_id} sha256 {sha256}")])
    return note, counts


def _add(builder: ExportBuilder, record: DekRecord | Damaged, damaged: list[str]) -> None:
    if isinstance(record, Damaged):
        damaged.append(record.key_id)
        return
    if record.state is KeyState.DESTROYED:
        builder.add(replace(record, wrapped=b""), 0)
        return
    if not record.wrapped:
        damaged.append(record.key_id)
        return
    try:
        version = parse_blob(record.wrapped).kek_version
    except WrappedKeyInvalid:
        # It goes along as it is: whoever restores may have better means than we.
        damaged.append(record.key_id)
        version = record.kek_version
    builder.add(record, version)


async def _snapshot_records(
    vault: Vault, rotation_id: str, manifests: dict[str, Manifest]
) -> AsyncIterator[list[DekRecord | Damaged]]:
    keks = (await current_view(vault)).keks
    for tag, manifest in sorted(manifests.items()):
        for bucket in range(manifest.buckets):
            entries = await vault.slots.read_bucket(tag, rotation_id, bucket)
            records = await vault.backups.read([key_id for key_id, _ in entries])
            yield [
                _with_blob(key_id, blob, record, keks)
                for (key_id, blob), record in zip(entries, records, strict=True)
            ]


def _with_blob(
    key_id: str, blob: bytes, record: DekRecord | Damaged | None, keks: dict[int, KekInfo] | object
) -> DekRecord | Damaged:
    if not isinstance(record, DekRecord):
        return Damaged(key_id, "its record is gone, which alone says what its thread is")
    if record.state is KeyState.DESTROYED:
        return record
    try:
        version = parse_blob(blob).kek_version
    except WrappedKeyInvalid as error:
        return Damaged(key_id, error.detail)
    kek = keks.get(version) if isinstance(keks, dict) else None
    return replace(record, wrapped=blob, kek_id=kek.kek_id if kek else "", kek_version=version)


@dataclass(frozen=True, slots=True)
class Inspected:
    """An export whose structure and digest are in order."""

    header: Header
    registry: Registry
    counts: Counts
    ending: Ending

    @property
    def needed(self) -> list[KekInfo]:
        """The KEKs that its wrapped keys need."""
        return [kek for kek in self.registry.keks if kek.version in self.counts.by_version]


def inspect_export(chunks: Callable[[], Iterable[bytes]]) -> Inspected:
    """Read an export to its end and check structure and digest, for which no KEK is needed.

    Raises:
        BackupInvalid: It is damaged.
        OSError: It can't be read.
    """
    ending = Ending()
    header: Header | None = None
    registry: Registry | None = None
    counts = Counts()
    for part in read_export(chunks(), ending):
        if isinstance(part, Header):
            header = part
        elif isinstance(part, Registry):
            registry = part
        elif isinstance(part, Counts):
            counts = part
    if header is None or registry is None:  # pragma: no cover - the order of the parts has been checked
        raise BackupInvalid("the export is damaged: its parts are not in order")
    known = {kek.version for kek in registry.keks}
    if set(counts.by_version) - known:
        raise BackupInvalid(
            "the export is damaged: it holds keys under a KEK that its registry does not know"
        )
    return Inspected(header, registry, counts, ending)


async def authenticate_export(source: KekSource, export: Inspected) -> None:
    """Check the seal, and that the KEKs that the export needs are loaded.

    Raises:
        BackupInvalid: They are not, or the seal does not match: the file was forged.
    """
    sealing = [kek for kek in export.registry.keks if kek.version == export.header.seal_version]
    await require_keks(
        source, [*export.needed, *(kek for kek in sealing if kek not in export.needed)], "the export"
    )
    if not sealing:
        raise BackupInvalid("the export is damaged: its registry does not know the KEK of its seal")
    seal = await source.seal(sealing[0], SEAL_LABEL, export.ending.sealed)
    if not same(seal, export.ending.seal):
        raise BackupInvalid("the export's seal does not match: it was changed by somebody without the KEK")


def records_of(chunks: Callable[[], Iterable[bytes]], export: Inspected) -> Iterable[list[DekRecord]]:
    """Yield the records of an inspected export.

    Raises:
        BackupInvalid: The file is not the one that was inspected.
    """
    ending = Ending()
    for part in read_export(chunks(), ending):
        if isinstance(part, list):
            yield part
    if ending.sha256 != export.ending.sha256:
        raise BackupInvalid("the export has changed while it was read")


async def bad_blobs(source: KekSource, records: Sequence[DekRecord]) -> list[str]:
    """Return the key ids among records whose wrapped keys do not unwrap."""
    live = [record for record in records if record.state is not KeyState.DESTROYED]
    sealed = [Sealed(record.key_id, record.thread_id, record.wrapped) for record in live]
    opened = await unwrap_all(source, sealed)
    return [record.key_id for record, key in zip(live, opened, strict=True) if isinstance(key, KmsError)]


async def verify_export(
    source: KekSource, chunks: Callable[[], Iterable[bytes]], sample: int = 0
) -> tuple[Inspected, list[str]]:
    """Check an export whole: structure, digest, seal, and that its wrapped keys unwrap.

    Args:
        source: The KEKs.
        chunks: Opens the file.
        sample: Unwrap about so many keys, evenly spread; 0 for all.

    Returns:
        What it holds, and the key ids of those that do not unwrap.

    Raises:
        BackupInvalid: As ``inspect_export`` and ``authenticate_export``.
    """
    export = inspect_export(chunks)
    await authenticate_export(source, export)
    every = max(export.counts.records // sample, 1) if sample else 1
    bad: list[str] = []
    number = 0
    for records in records_of(chunks, export):
        chosen = [record for at, record in enumerate(records, number) if at % every == 0]
        number += len(records)
        bad += await bad_blobs(source, chosen)
    return export, bad

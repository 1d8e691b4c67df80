"""Bodies of the routes beside the hot ones (those are in ``usecases.messages``)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from msgspec import UNSET, Struct, UnsetType

if TYPE_CHECKING:
    from progressdb_kms.domain.keys import DekRecord
    from progressdb_kms.domain.rotation import Rotation


class KeyView(Struct, frozen=True):
    """A key as administrators see it: everything but the wrapped DEK. Times are RFC 3339."""

    key_id: str
    thread_id: str
    version: str
    state: str
    kek_id: str
    kek_version: str
    created_at: str
    created_by: str
    changed_at: str
    uses: int
    destroy_at: str | UnsetType = UNSET


class KeyList(Struct, frozen=True):
    """A page of keys; go on with ``cursor`` until it is null. A key may appear twice."""

    keys: list[KeyView]
    cursor: str | None


class ScheduleDestruction(Struct, frozen=True, forbid_unknown_fields=True):
    """Waiting period in days, 7 to 30; the configured one where absent."""

    waiting_days: int | UnsetType = UNSET


class KekView(Struct, frozen=True):
    """A KEK version: what the registry knows, how many DEKs it wraps, whether this instance has it loaded."""

    version: str
    kek_id: str
    state: str
    source: str
    deks: int
    wraps: int
    created_at: str
    activated_at: str | None
    loaded: bool


class KekList(Struct, frozen=True):
    """All KEK versions, and the one that new wraps use."""

    active: str
    keks: list[KekView]


class RotationView(Struct, frozen=True):
    """A rotation of the KEK: what it brings, its step, what it has done so far, and how it ended."""

    rotation_id: str
    source_version: str
    target_version: str
    step: str
    started_at: str
    step_at: str
    finished_at: str | None
    outcome: str
    counts: dict[str, int]


class RotationList(Struct, frozen=True):
    """The latest rotations, newest first."""

    rotations: list[RotationView]


class SnapshotView(Struct, frozen=True):
    """A rotation's snapshot in the store: sealed copies, and slots whose part is not sealed."""

    rotation_id: str
    slots: int
    records: int
    unsealed: int
    finished_at: str | None


class ExportView(Struct, frozen=True):
    """A file that was exported; without ``finished_at`` it was interrupted."""

    export_id: str
    kind: str
    began_at: str
    finished_at: str | None
    rotation_id: str
    records: int
    tombstones: int
    sha256: str
    kek_versions: list[str]


class BackupList(Struct, frozen=True):
    """Snapshots in the store, and exports that were made of it."""

    snapshots: list[SnapshotView]
    exports: list[ExportView]


class AuditRecords(Struct, frozen=True):
    """Audit records, the oldest first, each as it was written; go on with ``cursor`` until it is null."""

    records: list[str]
    cursor: str | None


class Health(Struct, frozen=True):
    """Said while the service serves."""

    status: str


def rfc3339(at: float) -> str:
    """Write Unix seconds as RFC 3339 in UTC."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def view_of(record: DekRecord) -> KeyView:
    """Return what may be shown of a record."""
    return KeyView(
        key_id=record.key_id,
        thread_id=record.thread_id,
        version=str(record.version),
        state=str(record.state),
        kek_id=record.kek_id,
        kek_version=str(record.kek_version),
        created_at=rfc3339(record.created_at),
        created_by=record.created_by,
        changed_at=rfc3339(record.changed_at or record.created_at),
        uses=record.uses,
        destroy_at=UNSET if record.destroy_at is None else rfc3339(record.destroy_at),
    )


def rotation_view(rotation: Rotation) -> RotationView:
    """Return what is shown of a rotation."""
    return RotationView(
        rotation_id=rotation.rotation_id,
        source_version=str(rotation.source_version),
        target_version=str(rotation.target_version),
        step=str(rotation.step),
        started_at=rfc3339(rotation.started_at),
        step_at=rfc3339(rotation.step_at),
        finished_at=None if rotation.finished_at is None else rfc3339(rotation.finished_at),
        outcome=rotation.outcome or "running",
        counts=dict(rotation.counts),
    )

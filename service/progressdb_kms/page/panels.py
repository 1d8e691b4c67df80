"""What each part of the page shows. Each asks what its API route would ask, and answers to no one else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from progressdb_kms.api.models import view_of
from progressdb_kms.domain.errors import InvalidThreadId, KeyNotFound, KmsError, PermissionDenied
from progressdb_kms.domain.keys import check_thread_id, locate
from progressdb_kms.domain.policy import Permission
from progressdb_kms.domain.rotation import FINISHED, ORDER, Step
from progressdb_kms.page.sources import Expiry
from progressdb_kms.usecases import audittail, lifecycle, rotationwatch
from progressdb_kms.usecases.audittail import Entry, Proof
from progressdb_kms.usecases.instances import SILENT_AFTER, list_instances

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping, Sequence

    from progressdb_kms.api.models import KeyView
    from progressdb_kms.domain.keyring import KekInfo
    from progressdb_kms.domain.policy import Grants
    from progressdb_kms.domain.rotation import Rotation
    from progressdb_kms.page.sources import Sources
    from progressdb_kms.ports import Heartbeat
    from progressdb_kms.usecases.session import Session

Found = TypeVar("Found")

KEYS: Final = 50
"""Keys of a thread on one page."""
ROTATIONS: Final = 20
INSTANCES: Final = 100
VERSIONS: Final = 50
PROBLEMS: Final = 20
PROOFS: Final = {
    Proof.HOLDS: "MAC holds",
    Proof.SIGNED: "signed",
    Proof.UNPROVEN: "not proven",
    Proof.BROKEN: "DOES NOT HOLD",
}


@dataclass(frozen=True, slots=True)
class Panel(Generic[Found]):
    """A part of a page: what was found, or why nothing could be."""

    found: Found | None
    trouble: str = ""


async def panel(reading: Awaitable[Found]) -> Panel[Found] | None:
    """Return a part of a page; None for what the caller may not see.

    One part that can't be had leaves the others standing: a page is needed most when something is away.
    """
    try:
        return Panel(await reading)
    except PermissionDenied:
        return None
    except KmsError as error:
        return Panel(None, error.detail or error.title)


def require_some(grants: Grants) -> None:
    """Return if there is any part of the page that the caller may see.

    Raises:
        PermissionDenied: There is none.
    """
    if not (grants.allows_some(Permission.READ) or grants.allows(Permission.ROTATE)):
        if grants.allows(Permission.AUDIT):
            return
        grants.require(Permission.READ)


def places(grants: Grants) -> list[tuple[str, str]]:
    """Return path and name of the pages that the caller may open."""
    found = [("/ui/", "Overview")]
    if grants.allows(Permission.ROTATE) or grants.allows(Permission.READ):
        found.append(("/ui/rotations", "Rotations"))
    if grants.allows_some(Permission.READ):
        found.append(("/ui/keys", "Keys"))
    if grants.allows(Permission.AUDIT):
        found.append(("/ui/audit", "Audit"))
    return found


@dataclass(frozen=True, slots=True)
class Census:
    """KEK versions, the latest first, with the keys under each as they were counted last.

    Attributes:
        rows: Version, what is known of it, keys (None where they have not been counted), loaded here.
        total: Keys in all.
        most: Keys under the version that has most.
        active: The version that new wraps use.
        seen_at: When they were counted, in Unix seconds; None for not yet.
        left_out: Older versions that are not in ``rows``.
    """

    rows: Sequence[tuple[int, KekInfo, int | None, bool]]
    total: int
    most: int
    active: int
    seen_at: float | None
    left_out: int


async def census(sources: Sources, session: Session) -> Census:
    """Return the census. Needs ``key:read`` for all threads, as ``GET /v1/keks`` does.

    Raises:
        PermissionDenied: The caller may not.
        NotReady: The registry has not been read yet.
    """
    session.grants().require(Permission.READ)
    keks, watch = sources.api.kms.keks, sources.watch
    view, usable, counts = keks.view, keks.usable, watch.census
    versions = sorted(view.keks, reverse=True)
    rows = [
        (
            version,
            view.keks[version],
            None if watch.seen_at is None else counts.get(version, 0),
            version in usable,
        )
        for version in versions[:VERSIONS]
    ]
    return Census(
        rows,
        sum(counts.values()),
        max(counts.values(), default=0),
        view.active,
        watch.seen_at,
        max(0, len(versions) - VERSIONS),
    )


@dataclass(frozen=True, slots=True)
class Progress:
    """Rotations, the latest first, and how far the first one is.

    Attributes:
        rotations: The rotations.
        running: The one that runs, or none.
        steps: Its steps with ``done``, ``now`` or ``to come``.
        moved: Keys under its target version when they were counted last.
        total: Keys in all, then.
    """

    rotations: Sequence[Rotation]
    running: Rotation | None
    steps: Sequence[tuple[str, str]]
    moved: int
    total: int


async def rotations(sources: Sources, session: Session, limit: int = ROTATIONS) -> Progress:
    """Return the latest rotations. Needs what ``GET /v1/rotations`` does.

    Raises:
        PermissionDenied: The caller may not.
        StoreUnavailable: Not now.
    """
    found = await rotationwatch.list_rotations(sources.api.rotations, session, limit)
    running = found[0] if found and found[0].finished_at is None else None
    counts = sources.watch.census
    moved = 0 if running is None else counts.get(running.target_version, 0)
    return Progress(found, running, _steps(running), moved, sum(counts.values()))


def _steps(rotation: Rotation | None) -> list[tuple[str, str]]:
    if rotation is None:
        return []
    if rotation.step in ORDER:
        at = ORDER.index(rotation.step)
        names = ("done", "now", "to come")
        return [(str(step), names[(place >= at) + (place > at)]) for place, step in enumerate(ORDER)]
    finished = rotation.step in FINISHED
    return [(str(Step.ROLLBACK), "done" if finished else "now"), (str(Step.ROLLED_BACK), "to come")]


@dataclass(frozen=True, slots=True)
class Instances:
    """Instances, the one heard of last first.

    Attributes:
        rows: Last heartbeat, seconds since then, whether it is silent, whether it is this one.
        left_out: How many more are known.
    """

    rows: Sequence[tuple[Heartbeat, float, bool, bool]]
    left_out: int


async def instances(sources: Sources, session: Session) -> Instances:
    """Return who runs.

    Raises:
        PermissionDenied: The caller may not.
        StoreUnavailable: Not now.
    """
    now = sources.api.kms.now()
    found, known = await list_instances(sources.heartbeats, session, INSTANCES)
    rows = [
        (beat, now - beat.at, now - beat.at > SILENT_AFTER, beat.instance == sources.instance)
        for beat in found
    ]
    return Instances(rows, known - len(rows))


def expiries(sources: Sources, session: Session) -> list[Expiry]:
    """Return what expires, the caller's own certificate first."""
    own = session.identity.not_after
    mine = [] if own is None else [Expiry("your certificate", session.name, own)]
    return [*mine, *sources.expiries()]


async def key(sources: Sources, session: Session, key_id: str) -> KeyView:
    """Return what may be shown of a key; the wrapped DEK never gets further than here.

    Raises:
        PermissionDenied, KeyNotFound, StoreUnavailable: As ``lifecycle.get_key``.
    """
    return view_of(await lifecycle.get_key(sources.api.kms, session, key_id))


async def thread(
    sources: Sources, session: Session, thread_id: str, cursor: str | None
) -> tuple[list[KeyView], str | None]:
    """Return keys of a thread, and where to go on.

    Raises:
        PermissionDenied, InvalidThreadId, InvalidParameter, StoreUnavailable: As ``lifecycle.list_keys``.
    """
    page = await lifecycle.list_keys(
        sources.api.kms, session, thread_id=thread_id, state=None, limit=KEYS, cursor=cursor
    )
    return [view_of(record) for record in page.records], page.cursor


def audit_rows(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return what is shown of audit records: members by name, none of which is sure to be there."""
    return [_audit_row(entry) for entry in entries]


def _audit_row(entry: Entry) -> dict[str, Any]:
    fields: Mapping[str, Any] = {} if entry.record is None else entry.record.fields
    row: dict[str, Any] = {
        name: fields.get(name, "")
        for name in ("at", "audit", "outcome", "identity", "key_id", "thread_id", "detail", "instance")
    }
    row["key_link"] = row["key_id"] if _is_key_id(row["key_id"]) else ""
    row["thread_link"] = row["thread_id"] if _is_thread_id(row["thread_id"]) else ""
    row["place"] = "" if entry.record is None else f"{entry.record.chain[:8]} #{entry.record.seq}"
    row["readable"] = entry.record is not None
    row["proof"] = str(entry.proof)
    row["proven"] = PROOFS[entry.proof]
    return row


def _is_key_id(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(locate(value))
    except KeyNotFound:
        return False


def _is_thread_id(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(check_thread_id(value))
    except InvalidThreadId:
        return False


async def tail(sources: Sources, session: Session, before: str | None) -> dict[str, Any]:
    """Return a part of the audit log.

    Raises:
        PermissionDenied, InvalidParameter, StoreUnavailable: As ``audit_tail``.
    """
    found = await audittail.audit_tail(sources.api.audit, session, sources.audit_keys, before)
    proofs = [entry.proof for entry in found.entries]
    return {
        "rows": audit_rows(found.entries),
        "older": found.older,
        "problems": found.problems[:PROBLEMS],
        "more_problems": max(0, len(found.problems) - PROBLEMS),
        "intact": not found.problems and not proofs.count(Proof.BROKEN),
        "unproven": proofs.count(Proof.UNPROVEN),
        "keyed": found.keyed,
        "at_end": found.at_end,
        "kept": found.kept,
    }


async def history(sources: Sources, session: Session, key_id: str, before: str | None) -> dict[str, Any]:
    """Return what a part of the audit log says of a key.

    Raises:
        PermissionDenied, InvalidParameter, StoreUnavailable: As ``key_history``.
    """
    found = await audittail.key_history(sources.api.audit, session, sources.audit_keys, key_id, before)
    return {"rows": audit_rows(found.entries), "looked_at": found.looked_at, "older": found.older}

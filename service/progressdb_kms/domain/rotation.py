"""Rotation of the key-encryption key: its steps, its record, its decisions. Pure.

Order of the steps, and why:

1. ``distribute``: version n+1 exists at the source, is registered as staged, escrowed, and loaded by every
   live instance, before anything is wrapped under it.
2. ``activate``: n+1 becomes the active version, then the floor of every slot: from here no script writes a
   wrap below n+1, so that the census of older versions only shrinks.
3. ``snapshot``: every record under an older version is copied, and the copies verified, before any is
   changed.
4. ``rewrap``: each record's DEK is wrapped under n+1 and put in the old blob's place by compare-and-set.
5. ``verify``: every record unwraps to the same DEK as its copy; census and records agree.
6. ``complete``: the manifests are sealed and the report is written.

From any step on, a rotation can be turned back instead (``rollback``, then ``rolled_back``): its target
version is bad or lost, and the source version becomes the active one again.

Each step may be repeated, and a run after a kill goes on at the step that the record names.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.errors import InstancesMissing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class Step(StrEnum):
    """Where a rotation is. The steps before ``complete`` are the next thing to do."""

    DISTRIBUTE = "distribute"
    ACTIVATE = "activate"
    SNAPSHOT = "snapshot"
    REWRAP = "rewrap"
    VERIFY = "verify"
    COMPLETE = "complete"
    ROLLBACK = "rollback"
    ROLLED_BACK = "rolled_back"


ORDER: Final = (Step.DISTRIBUTE, Step.ACTIVATE, Step.SNAPSHOT, Step.REWRAP, Step.VERIFY, Step.COMPLETE)
SHARED: Final = frozenset({Step.ACTIVATE, Step.SNAPSHOT, Step.REWRAP, Step.VERIFY})
"""Steps that are done slot by slot, so that several workers can share them."""
FINISHED: Final = frozenset({Step.COMPLETE, Step.ROLLED_BACK})


class Outcome(StrEnum):
    """How a finished rotation ended."""

    CLEAN = "clean"
    INCOMPLETE = "incomplete"
    ROLLED_BACK = "rolled_back"


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotation as it is persisted after each step.

    Attributes:
        rotation_id: ``r_`` and the target version, then random characters.
        source_version: The active version when it began.
        target_version: The version that it makes active.
        step: What is to be done next.
        started_at: Unix seconds.
        step_at: When the present step began, in Unix seconds.
        finished_at: Unix seconds, None while it runs.
        outcome: Empty while it runs.
        verify_sample: Records to verify, 0 for all.
        counts: What was done so far, by name: ``snapshot``, ``rewrapped``, ``verified``, ``quarantined``, ...
    """

    rotation_id: str
    source_version: int
    target_version: int
    step: Step
    started_at: int
    step_at: int
    finished_at: int | None = None
    outcome: str = ""
    verify_sample: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)


def advance(rotation: Rotation, *, now: int, quarantined: int = 0) -> Rotation:
    """Return the rotation with its present step done.

    Args:
        rotation: An unfinished rotation.
        now: Unix seconds.
        quarantined: Records that could not be rewrapped or verified.
    """
    step = ORDER[ORDER.index(rotation.step) + 1]
    if step is not Step.COMPLETE:
        return replace(rotation, step=step, step_at=now)
    outcome = Outcome.INCOMPLETE if quarantined else Outcome.CLEAN
    return replace(rotation, step=step, step_at=now, finished_at=now, outcome=str(outcome))


def bucket_digest(entries: Iterable[tuple[str, bytes]]) -> bytes:
    """Return the digest of one bucket of a snapshot: SHA-256 over its entries in order of key id.

    Lengths stand before the parts, so that no two lists of entries read the same.
    """
    digest = hashlib.sha256()
    for key_id, blob in sorted(entries):
        name = key_id.encode()
        digest.update(len(name).to_bytes(4, "big") + name + len(blob).to_bytes(4, "big") + blob)
    return digest.digest()


def slot_digest(buckets: Iterable[bytes]) -> str:
    """Return the digest of one slot's snapshot from those of its buckets, in order, in hex."""
    digest = hashlib.sha256()
    for bucket in buckets:
        digest.update(bucket)
    return digest.hexdigest()


def instances_missing(version: int, instances: Sequence[str]) -> InstancesMissing:
    """Return the error that names the live instances without a version."""
    return InstancesMissing(
        f"KEK version {version} is not loaded by: {', '.join(instances)}; bring it to them or stop them, then"
        " run again"
    )

"""Ports of rotations, backups and destruction.

Fencing: every claim of a slot comes with a token out of one counter. The slot remembers the highest that it
has seen, and a script with a lower one is refused (``Fenced``): a worker that lost its claim can't write any
more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from progressdb_kms.domain.rotation import Rotation, Step


@dataclass(frozen=True, slots=True)
class Lock:
    """The right to lead a rotation: ``token`` fences whoever held it before."""

    owner: str
    token: int


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to work on one slot."""

    tag: str
    token: int


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A record as far as rotation needs it.

    Attributes:
        backup: The copy in the rotation's snapshot, empty where there is none or none was asked for.
    """

    key_id: str
    thread_id: str
    wrapped: bytes = field(repr=False)
    kek_version: int
    backup: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class SlotPage:
    """Records of one slot under one KEK version. ``cursor`` is 0 at the end; a record may come twice.

    Attributes:
        missing: Key ids that the census names but that have no record, or one under another version.
    """

    records: tuple[StoredBlob, ...]
    cursor: int
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Swap:
    """A blob to put in an old one's place."""

    key_id: str
    old: bytes = field(repr=False)
    new: bytes = field(repr=False)


class SwapResult(StrEnum):
    """What became of a ``Swap``."""

    DONE = "done"
    CHANGED = "changed"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a snapshot holds of one slot.

    Attributes:
        buckets: Hashes that it is packed into.
        count: Records, or -1 before it has been verified.
        digest: ``domain.rotation.slot_digest`` of it, empty before.
    """

    tag: str
    buckets: int
    count: int = -1
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A record that could not be rewrapped or verified, and why. It is left as it was."""

    key_id: str
    reason: str
    kek_version: int


class RotationLedger(Protocol):
    """The lock, the persisted rotation, and the sharing of its work.

    Raises StoreUnavailable and StoreNotDurable.
    """

    async def acquire(self, owner: str, lease: float) -> Lock:
        """Take the lock, with a new token.

        Args:
            owner: Who asks, for the message to others: host, process, instance.
            lease: Seconds that it holds without ``renew``.

        Raises:
            RotationRunning: Another holds it; the detail names it and its age.
        """

    async def renew(self, lock: Lock, lease: float) -> None:
        """Go on holding the lock.

        Raises:
            Fenced: Another has taken it.
        """

    async def release(self, lock: Lock) -> None:
        """Give the lock back; nothing happens if another has it."""

    async def pulse(self) -> str:
        """Return what changes whenever the lock is taken or renewed, and stands still when nobody does."""

    async def save(self, rotation: Rotation, lock: Lock) -> None:
        """Persist a rotation, and whether it is the one under way (as its step says).

        Raises:
            Fenced: The lock is another's.
        """

    async def current(self) -> Rotation | None:
        """Return the unfinished rotation with its counts, if there is one."""

    async def get(self, rotation_id: str) -> Rotation | None:
        """Return a rotation with its counts."""

    async def list_rotations(self, limit: int) -> list[Rotation]:
        """Return the latest rotations, newest first."""

    async def open_work(self, rotation_id: str, step: Step, tags: Sequence[str], lock: Lock) -> None:
        """Offer slots for a step, once: what was offered for this step before is left as it is.

        Raises:
            Fenced: The lock is another's.
        """

    async def claim(self, rotation_id: str, step: Step, worker: str, count: int, lease: float) -> list[Claim]:
        """Claim up to ``count`` slots that are free, or whose lease ran out, with new tokens."""

    async def extend(self, rotation_id: str, step: Step, claims: Sequence[Claim], lease: float) -> None:
        """Go on holding claims; one that another has taken is left to it."""

    async def finish(self, rotation_id: str, step: Step, claim: Claim, counts: Mapping[str, int]) -> None:
        """Mark a slot's part of a step as done, and add to the rotation's counts, both once.

        Raises:
            Fenced: Another has claimed the slot since.
        """

    async def outstanding(self, rotation_id: str, step: Step) -> int:
        """Return the number of slots whose part of a step is not done."""


class RotationStore(Protocol):
    """What a worker does to one slot.

    Raises StoreUnavailable and StoreNotDurable, and ``Fenced`` where a claim is given.
    """

    async def take(self, claims: Sequence[Claim]) -> None:
        """Raise the slots' fences to the claims' tokens; has to come before all else.

        Raises:
            Fenced: A slot has seen a higher token.
        """

    async def set_floor(self, claims: Sequence[Claim], version: int, *, lower: bool = False) -> None:
        """Raise the least KEK version that may be written; with ``lower``, set it even below what it is."""

    async def count(self, tag: str, version: int) -> int:
        """Return the number of records in the slot under a KEK version."""

    async def page(self, tag: str, version: int, cursor: int, count: int, *, backup: str = "") -> SlotPage:
        """Return some records under a KEK version, with their copies in snapshot ``backup`` if named."""

    async def begin_snapshot(self, claim: Claim, rotation_id: str, records: int) -> Manifest:
        """Make the manifest of a slot's snapshot, fit for ``records``; an existing one is kept."""

    async def snapshot(self, claim: Claim, rotation_id: str, version: int, cursor: int, count: int) -> int:
        """Copy some records under a KEK version into the snapshot, never over an existing copy.

        Returns:
            The cursor to go on with, 0 at the end.
        """

    async def read_bucket(self, tag: str, rotation_id: str, bucket: int) -> list[tuple[str, bytes]]:
        """Return a bucket of a slot's snapshot: key ids and blobs."""

    async def seal_snapshot(self, claim: Claim, rotation_id: str, count: int, digest: str) -> bool:
        """Write what the verified snapshot of a slot holds into its manifest.

        Returns:
            False where it holds something else by now: a key was destroyed since it was read.
        """

    async def manifest(self, tag: str, rotation_id: str) -> Manifest | None:
        """Return the manifest of a slot's snapshot."""

    async def swap(
        self, claim: Claim, rotation_id: str, swaps: Sequence[Swap], kek_id: str, kek_version: int
    ) -> list[SwapResult]:
        """Replace blobs by compare-and-set, move the keys in the census, and copy first what has no copy.

        Raises:
            Fenced: As ever.
            StaleKek: ``kek_version`` is below the floor.
        """

    async def quarantine(self, claim: Claim, rotation_id: str, records: Sequence[Quarantined]) -> None:
        """Note records that could not be dealt with; a record that was noted before gets the newer reason."""

    async def quarantined(self, tag: str, rotation_id: str) -> list[Quarantined]:
        """Return what was noted for a slot."""

    async def headroom(self) -> str:
        """Return why a snapshot does not fit below 80 % of a node's maxmemory, or an empty string."""


class KekStager(Protocol):
    """Brings a new KEK version into the source."""

    async def stage(self, version: int) -> None:
        """Make sure that ``version`` is at the source and loaded here; only ever adds, adopts what is there.

        Raises:
            RotationRefused: The source is not ours to write and lacks the version; says what to do.
            KekFileInvalid: The source can't be read.
        """

    async def escrow(self, version: int) -> int:
        """Seal the version to the configured recovery keys and keep the result; return how many there are."""

"""Ports of backups and destruction. All may raise StoreUnavailable, writing ones StoreNotDurable."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from progressdb_kms.domain.backup import Destruction, ExportNote
    from progressdb_kms.domain.keys import DekRecord
    from progressdb_kms.ports.rotation import Lock, Manifest
    from progressdb_kms.ports.service import RegistryView


@dataclass(frozen=True, slots=True)
class Damaged:
    """A record whose fields can't be read."""

    key_id: str
    reason: str


class Imported(StrEnum):
    """What became of a record that was imported."""

    ADDED = "added"
    PRESENT = "present"
    DESTROYED = "destroyed"
    """The store has its tombstone, which stays."""
    ALIVE = "alive"
    """A tombstone was imported, and the store has the key alive; nothing was changed."""
    COLLISION = "collision"
    """The store has the key under another thread."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What belongs to the registry besides its KEKs.

    Attributes:
        wraps: Wraps counted so far, by KEK version.
        escrow: KEKs sealed to recovery keys, by version, as they are stored; they open to no key of the
            service.
    """

    wraps: Mapping[int, int] = field(default_factory=dict)
    escrow: Mapping[str, bytes] = field(default_factory=dict, repr=False)


class BackupStore(Protocol):
    """Reads all that a service needs, and puts it back."""

    def records(self) -> AsyncIterator[list[DekRecord | Damaged]]:
        """Yield every record of every primary, found by itself and not through an index.

        In no order, and one may come twice. A record that changes meanwhile comes in one of its states; one
        that was there all the time is never left out.

        Raises:
            StoreUnavailable: Or a server was restarted or replaced meanwhile: start again.
        """

    async def read(self, key_ids: Sequence[str]) -> list[DekRecord | Damaged | None]:
        """Return records, in order; None where there is none."""

    async def empty(self) -> bool:
        """Say whether the store holds neither registry nor records."""

    async def extras(self) -> Extras:
        """Return what belongs to the registry besides its KEKs."""

    async def begin_import(self, sha256: str) -> bool:
        """Mark the store as being filled from a file.

        Returns:
            Whether it may be filled: it is empty, or is being filled from the same file.
        """

    async def import_records(self, records: Sequence[DekRecord]) -> list[Imported]:
        """Add records with their indexes where they are missing; never replace one."""

    async def raise_floors(self, version: int) -> None:
        """Raise the least KEK version that may be written in every slot."""

    async def finish_import(self, view: RegistryView, extras: Extras, lock: Lock) -> None:
        """Write the registry, which makes the store usable, and take away the mark of the import.

        A registry that is there already is kept; versions that it lacks are added as decrypt-only.

        Raises:
            Fenced: The lock has been taken over: a version that the records need may be retired by now.
        """

    async def floors(self) -> Mapping[str, int]:
        """Return the least KEK version that may be written by slot tag, 0 where none was set."""

    async def snapshots(self) -> Mapping[str, Mapping[str, Manifest]]:
        """Return the manifests of all snapshots in the store: by rotation id, then by slot tag."""

    async def manifests(self, tag: str) -> Mapping[str, Manifest]:
        """Return the manifests of one slot's snapshots, by rotation id."""

    async def purge(self, tag: str, rotation_id: str) -> None:
        """Remove a slot's part of a snapshot and of its quarantine, in bounded steps."""

    async def release(self, tag: str, rotation_id: str, key_ids: Sequence[str]) -> None:
        """Take records out of a rotation's quarantine: they have been restored."""

    async def note_export(self, note: ExportNote) -> None:
        """Remember an export, by its id."""

    async def exports(self) -> list[ExportNote]:
        """Return what is remembered of exports, oldest first."""


class Destroyed(StrEnum):
    """What became of a destruction."""

    DONE = "done"
    NOT_DUE = "not_due"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class Resealed:
    """A snapshot's manifest for one slot, as it is and as it is to be once a key has left it."""

    rotation_id: str
    before: Manifest
    after: Manifest


class DestructionStore(Protocol):
    """Destroys keys whose waiting period is over."""

    async def lease(self, owner: str, seconds: float) -> bool:
        """Take or prolong the right to destroy; False where another has it. 0 seconds give it back."""

    async def due(self, now: int) -> Mapping[str, Sequence[str]]:
        """Return the keys that are due at ``now`` (Unix seconds), by slot tag, at most 100 a slot."""

    async def destroy(
        self, destruction: Destruction, snapshots: Sequence[Resealed] = (), *, merged: bool = False
    ) -> Destroyed:
        """Remove a key's blob from its record and from every snapshot of its slot; leave a tombstone.

        A notice goes first, as with every change of state. Repeating it is fine.

        Args:
            destruction: Which key, when, and who holds it still.
            snapshots: Those of the key's slot, all of them. Manifests change together with the copies.
            merged: A tombstone came by an import: destroy the key in whatever state it is.

        Returns:
            NOT_DUE where the key is not (any more) due: cancelled, or its time has not come by the store's
            clock. CHANGED, and nothing is done, where the slot's snapshots are not those that were named.
        """

    async def destructions(self, key_ids: Sequence[str]) -> list[Destruction | None]:
        """Return what was written down of destroyed keys, in order."""

    async def owe_rewrite(self) -> None:
        """Note, before keys are destroyed, that append-only files will have to be rewritten."""

    async def rewrite_owed(self) -> bool:
        """Say whether keys were destroyed whose blobs may still stand in an append-only file."""

    async def rewrite_files(self) -> list[str]:
        """Have every node, replicas too, rewrite its append-only file; return why not, one line a node.

        Waits, bounded, until the files are written. What was owed at the beginning is settled when no node
        had a reason.
        """

"""Backups and destruction over the store in this process's memory: the rules of ``store.redis.backups``."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from progressdb_kms.domain.backup import Destruction, ExportNote
from progressdb_kms.domain.keyring import KekState
from progressdb_kms.domain.keys import ALL_TAGS, DekRecord, KeyState, locate
from progressdb_kms.ports import Damaged, Destroyed, Extras, Imported, Manifest, RegistryView, Resealed

if TYPE_CHECKING:
    from progressdb_kms.ports.rotation import Lock
    from progressdb_kms.store.memory_rotation import MemorySlots


@dataclass
class Shelves:
    """What a ``MemoryStore`` shares with its backups."""

    records: dict[str, DekRecord]
    threads: dict[str, list[str]]
    slots: dict[str, list[str]]
    floors: dict[str, int]
    wraps: Counter[int]


class MemoryBackups:
    """Implements ``BackupStore``.

    Args:
        shelves: The store's records and indexes.
        rotation: Its snapshots.
        view: Gives the registry.
        register: Replaces it.
        require: Raises Fenced unless a lock is held.
    """

    def __init__(
        self,
        shelves: Shelves,
        rotation: MemorySlots,
        view: Callable[[], RegistryView | None],
        register: Callable[[RegistryView], None],
        require: Callable[[Lock], None],
    ) -> None:
        self._shelves = shelves
        self._rotation = rotation
        self._view = view
        self._register = register
        self._require = require
        self._importing = ""
        self._notes: dict[str, ExportNote] = {}
        self._escrow: dict[str, bytes] = {}

    async def records(self) -> AsyncIterator[list[DekRecord | Damaged]]:
        """Yield every record."""
        for key_id in list(self._shelves.records):
            yield [self._shelves.records[key_id]]

    async def read(self, key_ids: Sequence[str]) -> list[DekRecord | Damaged | None]:
        """Return records, in order; None where there is none."""
        return [self._shelves.records.get(key_id) for key_id in key_ids]

    async def empty(self) -> bool:
        """Say whether the store holds neither registry nor records."""
        return self._view() is None and not self._shelves.records

    async def extras(self) -> Extras:
        """Return what belongs to the registry besides its KEKs."""
        return Extras(dict(self._shelves.wraps), dict(self._escrow))

    @property
    def importing(self) -> bool:
        """Whether the store is being filled from a file."""
        return bool(self._importing)

    async def begin_import(self, sha256: str) -> bool:
        """Mark the store as being filled from a file; see ``BackupStore.begin_import``."""
        allowed = self._importing == sha256 if self._importing else await self.empty()
        if allowed:
            self._importing = sha256
        return allowed

    async def import_records(self, records: Sequence[DekRecord]) -> list[Imported]:
        """Add records with their indexes where they are missing; never replace one."""
        return [self._import(record) for record in records]

    def _import(self, record: DekRecord) -> Imported:
        known = self._shelves.records.get(record.key_id)
        dead = record.state is KeyState.DESTROYED
        if known is not None:
            if known.thread_id != record.thread_id:
                return Imported.COLLISION
            if known.state is KeyState.DESTROYED:
                return Imported.PRESENT if dead else Imported.DESTROYED
            return Imported.ALIVE if dead else Imported.PRESENT
        self._shelves.records[record.key_id] = record
        siblings = self._shelves.threads.setdefault(record.thread_id, [])
        siblings.append(record.key_id)
        siblings.sort(key=lambda key_id: self._shelves.records[key_id].version)
        self._shelves.slots.setdefault(locate(record.key_id), []).append(record.key_id)
        return Imported.ADDED

    async def raise_floors(self, version: int) -> None:
        """Raise the least KEK version that may be written in every slot."""
        floors = self._shelves.floors
        floors.update({tag: max(version, floors.get(tag, 0)) for tag in ALL_TAGS})

    async def finish_import(self, view: RegistryView, extras: Extras, lock: Lock) -> None:
        """Write the registry and take away the mark of the import; see ``BackupStore.finish_import``."""
        self._require(lock)
        known = self._view()
        if known is None:
            self._register(replace(view, revision=1))
        else:
            added = {
                version: replace(kek, state=KekState.DECRYPT_ONLY) if kek.state is KekState.ACTIVE else kek
                for version, kek in view.keks.items()
                if version not in known.keks
            }
            self._register(replace(known, keks={**known.keks, **added}, revision=known.revision + 1))
        self._shelves.wraps.update(extras.wraps)
        self._escrow = {**extras.escrow, **self._escrow}
        self._importing = ""

    async def floors(self) -> Mapping[str, int]:
        """Return the least KEK version that may be written by slot tag, 0 where none was set."""
        return {tag: self._shelves.floors.get(tag, 0) for tag in ALL_TAGS}

    async def snapshots(self) -> Mapping[str, Mapping[str, Manifest]]:
        """Return the manifests of all snapshots in the store: by rotation id, then by slot tag."""
        found: dict[str, dict[str, Manifest]] = {}
        for (tag, rotation_id), manifest in self._rotation.manifests.items():
            found.setdefault(rotation_id, {})[tag] = manifest
        return found

    async def manifests(self, tag: str) -> Mapping[str, Manifest]:
        """Return the manifests of one slot's snapshots, by rotation id."""
        return {name: each for (slot, name), each in self._rotation.manifests.items() if slot == tag}

    async def purge(self, tag: str, rotation_id: str) -> None:
        """Remove a slot's part of a snapshot and of its quarantine."""
        place = (tag, rotation_id)
        self._rotation.manifests.pop(place, None)
        self._rotation.copies.pop(place, None)
        self._rotation.noted.pop(place, None)

    async def release(self, tag: str, rotation_id: str, key_ids: Sequence[str]) -> None:
        """Take records out of a rotation's quarantine: they have been restored."""
        for key_id in key_ids:
            self._rotation.noted.get((tag, rotation_id), {}).pop(key_id, None)

    async def note_export(self, note: ExportNote) -> None:
        """Remember an export, by its id."""
        self._notes[note.export_id] = note

    async def exports(self) -> list[ExportNote]:
        """Return what is remembered of exports, oldest first."""
        return sorted(self._notes.values(), key=lambda note: (note.began_at, note.export_id))


class MemoryDestruction:
    """Implements ``DestructionStore``.

    Args:
        shelves: The store's records.
        rotation: Its snapshots.
        notice: Puts a notice of a change.
        now: Gives Unix seconds.
    """

    def __init__(
        self,
        shelves: Shelves,
        rotation: MemorySlots,
        notice: Callable[[str], None],
        now: Callable[[], float],
    ) -> None:
        self._shelves = shelves
        self._rotation = rotation
        self._notice = notice
        self._now = now
        self._owner = ""
        self._until = 0.0
        self._written: dict[str, Destruction] = {}
        self._owed = False

    async def lease(self, owner: str, seconds: float) -> bool:
        """Take or prolong the right to carry out destructions; False where another has it."""
        if self._owner not in {"", owner} and self._until > self._now():
            return False
        self._owner, self._until = owner, self._now() + seconds
        return True

    async def due(self, now: int) -> Mapping[str, Sequence[str]]:
        """Return the keys that are due at ``now``, by slot tag."""
        found: dict[str, list[str]] = {}
        for record in self._shelves.records.values():
            if record.destroy_at is not None and record.destroy_at <= now:
                found.setdefault(locate(record.key_id), []).append(record.key_id)
        return found

    async def destroy(
        self, destruction: Destruction, snapshots: Sequence[Resealed] = (), *, merged: bool = False
    ) -> Destroyed:
        """Remove a key's blob from its record and from every snapshot; see ``DestructionStore.destroy``."""
        key_id, now = destruction.key_id, destruction.destroyed_at
        self._notice(key_id)
        record = self._shelves.records.get(key_id)
        if record is None:
            return Destroyed.NOT_DUE
        if record.state is KeyState.DESTROYED:
            return Destroyed.DONE
        waiting = record.state is KeyState.PENDING_DESTRUCTION and record.destroy_at is not None
        over = waiting and (record.destroy_at or 0) <= min(now, self._now())
        if not merged and not over:
            return Destroyed.NOT_DUE
        tag = locate(key_id)
        known = {(tag, each.rotation_id): each for each in snapshots}
        held = {place: each for place, each in self._rotation.manifests.items() if place[0] == tag}
        if any(place not in known or known[place].before != each for place, each in held.items()):
            return Destroyed.CHANGED
        for place in held:
            if self._rotation.copies[place].pop(key_id, None) is not None:
                self._rotation.manifests[place] = known[place].after
        for noted in self._rotation.noted.values():
            noted.pop(key_id, None)
        self._shelves.records[key_id] = replace(
            record,
            wrapped=b"",
            state=KeyState.DESTROYED,
            changed_at=now,
            destroy_at=None,
            resume_state=KeyState.ENABLED,
        )
        self._written[key_id] = destruction
        return Destroyed.DONE

    async def destructions(self, key_ids: Sequence[str]) -> list[Destruction | None]:
        """Return what was written down of destroyed keys, in order."""
        return [self._written.get(key_id) for key_id in key_ids]

    async def owe_rewrite(self) -> None:
        """Note it; there are no files here."""
        self._owed = True

    async def rewrite_owed(self) -> bool:
        """Say whether it was noted and not settled."""
        return self._owed

    async def rewrite_files(self) -> list[str]:
        """Settle it: there are no files here."""
        self._owed = False
        return []

"""Rotations over the store in this process's memory: the same rules as ``store.redis.rotation_*``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from progressdb_kms.domain.errors import Fenced, RotationRefused, RotationRunning, StaleKek
from progressdb_kms.domain.keys import DekRecord
from progressdb_kms.domain.rotation import FINISHED, Rotation, Step
from progressdb_kms.ports import Claim, Lock, Manifest, Quarantined, SlotPage, StoredBlob, Swap, SwapResult
from progressdb_kms.store.buckets import bucket_count, bucket_of


@dataclass
class _Work:
    """A step's slots that are not done, by the end of their lease (0 is unclaimed), and the last claims."""

    left: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


@dataclass
class _Held:
    """A lock and its times."""

    lock: Lock
    since: float
    until: float


class MemoryLedger:
    """Implements ``RotationLedger``.

    Args:
        clock: Seconds on a clock that only goes forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._token = 0
        self._held: _Held | None = None
        self._rotations: dict[str, Rotation] = {}
        self._counts: dict[str, Counter[str]] = {}
        self._current = ""
        self._work: dict[tuple[str, Step], _Work] = {}

    def require(self, lock: Lock) -> None:
        """Return if the lock is held under this token.

        Raises:
            Fenced: It is not.
        """
        if self._held is None or self._held.lock.token != lock.token:
            raise Fenced("another run has taken the lock of rotations")

    async def acquire(self, owner: str, lease: float) -> Lock:
        """Take the lock, with a new token; its present owner may take it again.

        Raises:
            RotationRunning: Another holds it; the detail names it and its age.
        """
        held, now = self._held, self._clock()
        if held is not None and held.lock.owner != owner and held.until > now:
            raise RotationRunning(
                f"{held.lock.owner} has been leading a rotation for {int(now - held.since)} s: wait for it,"
                " or join it as a worker"
            )
        lock = Lock(owner, self._next())
        self._held = _Held(lock, now, now + lease)
        return lock

    async def renew(self, lock: Lock, lease: float) -> None:
        """Go on holding the lock.

        Raises:
            Fenced: Another has taken it.
        """
        self.require(lock)
        if self._held is not None:
            self._held.until = self._clock() + lease

    async def release(self, lock: Lock) -> None:
        """Give the lock back; nothing happens if another has it."""
        if self._held is not None and self._held.lock.token == lock.token:
            self._held = None

    async def pulse(self) -> str:
        """Return what changes whenever the lock is taken or renewed, and stands still when nobody does."""
        return "" if self._held is None else f"{self._held.lock.token}:{self._held.until}"

    async def save(self, rotation: Rotation, lock: Lock) -> None:
        """Persist a rotation, and whether it is the one under way. Its counts are those of ``finish``.

        Raises:
            Fenced: The lock is another's.
        """
        self.require(lock)
        self._rotations[rotation.rotation_id] = rotation
        if rotation.step not in FINISHED:
            self._current = rotation.rotation_id
            return
        if self._current == rotation.rotation_id:
            self._current = ""
        for step in Step:
            self._work.pop((rotation.rotation_id, step), None)

    async def current(self) -> Rotation | None:
        """Return the unfinished rotation with its counts, if there is one."""
        return await self.get(self._current)

    async def get(self, rotation_id: str) -> Rotation | None:
        """Return a rotation with its counts."""
        rotation = self._rotations.get(rotation_id)
        counts = dict(self._counts.get(rotation_id, {}))
        return None if rotation is None else replace(rotation, counts=counts)

    async def list_rotations(self, limit: int) -> list[Rotation]:
        """Return the latest rotations, newest first."""
        order = sorted(
            self._rotations.values(), key=lambda one: (one.started_at, one.rotation_id), reverse=True
        )
        found = [await self.get(rotation.rotation_id) for rotation in order[:limit]]
        return [rotation for rotation in found if rotation is not None]

    async def open_work(self, rotation_id: str, step: Step, tags: Sequence[str], lock: Lock) -> None:
        """Offer slots for a step, once: what was offered for this step before is left as it is.

        Raises:
            Fenced: The lock is another's.
        """
        self.require(lock)
        self._work.setdefault((rotation_id, step), _Work(dict.fromkeys(tags, 0.0)))

    async def claim(self, rotation_id: str, step: Step, worker: str, count: int, lease: float) -> list[Claim]:  # noqa: ARG002 - the worker's name is for whoever looks into a store
        """Claim up to ``count`` slots that nobody works on, or whose lease ran out, with new tokens."""
        work, now = self._work.get((rotation_id, step), _Work()), self._clock()
        claims = []
        for tag in [tag for tag, until in work.left.items() if until <= now][:count]:
            claims.append(Claim(tag, self._next()))
            work.left[tag] = now + lease
            work.tokens[tag] = claims[-1].token
        return claims

    async def extend(self, rotation_id: str, step: Step, claims: Sequence[Claim], lease: float) -> None:
        """Go on holding claims; one that another has taken is left to it."""
        work = self._work.get((rotation_id, step), _Work())
        for claim in claims:
            if claim.tag in work.left and work.tokens.get(claim.tag) == claim.token:
                work.left[claim.tag] = self._clock() + lease

    async def finish(self, rotation_id: str, step: Step, claim: Claim, counts: Mapping[str, int]) -> None:
        """Mark a slot's part of a step as done, and add to the rotation's counts, both once.

        Raises:
            Fenced: Another has claimed the slot since.
        """
        work = self._work.get((rotation_id, step), _Work())
        if work.tokens.get(claim.tag) != claim.token:
            raise Fenced(f"another worker has claimed slot {claim.tag} since")
        if work.left.pop(claim.tag, None) is not None:
            self._counts.setdefault(rotation_id, Counter()).update(counts)

    async def outstanding(self, rotation_id: str, step: Step) -> int:
        """Return the number of slots whose part of a step is not done."""
        return len(self._work.get((rotation_id, step), _Work()).left)

    def _next(self) -> int:
        self._token += 1
        return self._token


class MemorySlots:
    """Implements ``RotationStore`` over the records of a ``MemoryStore``.

    Args:
        records: Its records by key_id.
        slots: Key ids by tag, in the order in which they came.
        floors: Least KEK version by tag.
    """

    def __init__(
        self, records: dict[str, DekRecord], slots: Mapping[str, Sequence[str]], floors: dict[str, int]
    ) -> None:
        self._records = records
        self._slots = slots
        self._floors = floors
        self._fences: dict[str, int] = {}
        self.manifests: dict[tuple[str, str], Manifest] = {}
        self.copies: dict[tuple[str, str], dict[str, bytes]] = {}
        self.noted: dict[tuple[str, str], dict[str, Quarantined]] = {}

    async def take(self, claims: Sequence[Claim]) -> None:
        """Raise the slots' fences to the claims' tokens; has to come before all else.

        Raises:
            Fenced: A slot has seen a higher token.
        """
        for claim in claims:
            if self._fences.get(claim.tag, 0) > claim.token:
                raise _fenced(claim)
            self._fences[claim.tag] = claim.token

    async def set_floor(self, claims: Sequence[Claim], version: int, *, lower: bool = False) -> None:
        """Raise the least KEK version that may be written; with ``lower``, set it even below what it is."""
        for claim in claims:
            self._require(claim)
            before = 0 if lower else self._floors.get(claim.tag, 0)
            self._floors[claim.tag] = max(version, before)

    async def count(self, tag: str, version: int) -> int:
        """Return the number of records in the slot under a KEK version."""
        return len(self._under(tag, version))

    async def page(self, tag: str, version: int, cursor: int, count: int, *, backup: str = "") -> SlotPage:
        """Return some records under a KEK version, with their copies in snapshot ``backup`` if named."""
        copies = self.copies.get((tag, backup), {})
        records, following = self._step(tag, version, cursor, count)
        return SlotPage(
            tuple(
                StoredBlob(
                    record.key_id,
                    record.thread_id,
                    record.wrapped,
                    version,
                    copies.get(record.key_id, b""),
                )
                for record in records
            ),
            following,
        )

    async def begin_snapshot(self, claim: Claim, rotation_id: str, records: int) -> Manifest:
        """Make the manifest of a slot's snapshot, fit for ``records``; an existing one is returned."""
        self._require(claim)
        place = (claim.tag, rotation_id)
        self.copies.setdefault(place, {})
        return self.manifests.setdefault(place, Manifest(claim.tag, bucket_count(records)))

    async def snapshot(self, claim: Claim, rotation_id: str, version: int, cursor: int, count: int) -> int:
        """Copy some records under a KEK version into the snapshot, never over an existing copy.

        Raises:
            RotationRefused: The snapshot has not been begun.
        """
        self._require(claim)
        if (claim.tag, rotation_id) not in self.manifests:
            raise _unbegun(claim)
        records, following = self._step(claim.tag, version, cursor, count)
        for record in records:
            self._copy(claim.tag, rotation_id, record)
        return following

    async def read_bucket(self, tag: str, rotation_id: str, bucket: int) -> list[tuple[str, bytes]]:
        """Return a bucket of a slot's snapshot: key ids and blobs."""
        manifest = self.manifests.get((tag, rotation_id))
        if manifest is None:
            return []
        copies = self.copies[tag, rotation_id]
        return [item for item in copies.items() if bucket_of(item[0], manifest.buckets) == bucket]

    async def seal_snapshot(self, claim: Claim, rotation_id: str, count: int, digest: str) -> bool:
        """Write what the verified snapshot of a slot holds into its manifest.

        Returns:
            False where it holds something else by now: a key was destroyed since it was read.

        Raises:
            RotationRefused: The snapshot has not been begun.
        """
        self._require(claim)
        place = (claim.tag, rotation_id)
        if place not in self.manifests:
            raise _unbegun(claim)
        if count != len(self.copies.get(place, ())):
            return False
        self.manifests[place] = replace(self.manifests[place], count=count, digest=digest)
        return True

    async def manifest(self, tag: str, rotation_id: str) -> Manifest | None:
        """Return the manifest of a slot's snapshot."""
        return self.manifests.get((tag, rotation_id))

    async def swap(
        self, claim: Claim, rotation_id: str, swaps: Sequence[Swap], kek_id: str, kek_version: int
    ) -> list[SwapResult]:
        """Replace blobs by compare-and-set, move the keys in the census, and copy first what has no copy.

        Raises:
            Fenced: Another worker has the slot.
            StaleKek: ``kek_version`` is below the floor.
        """
        self._require(claim)
        if kek_version < self._floors.get(claim.tag, 0):
            raise StaleKek
        await self.begin_snapshot(claim, rotation_id, len(self._slots.get(claim.tag, ())))
        return [self._swap(claim.tag, rotation_id, swap, kek_id, kek_version) for swap in swaps]

    def _swap(self, tag: str, rotation_id: str, swap: Swap, kek_id: str, kek_version: int) -> SwapResult:
        record = self._records.get(swap.key_id)
        if record is None or not record.wrapped:
            return SwapResult.GONE
        if record.wrapped == swap.new:
            return SwapResult.DONE
        if record.wrapped != swap.old:
            return SwapResult.CHANGED
        self._copy(tag, rotation_id, record)
        self._records[swap.key_id] = replace(record, wrapped=swap.new, kek_id=kek_id, kek_version=kek_version)
        return SwapResult.DONE

    async def quarantine(self, claim: Claim, rotation_id: str, records: Sequence[Quarantined]) -> None:
        """Note records that could not be dealt with; a record that was noted before gets the newer reason."""
        self._require(claim)
        noted = self.noted.setdefault((claim.tag, rotation_id), {})
        noted.update({record.key_id: record for record in records})

    async def quarantined(self, tag: str, rotation_id: str) -> list[Quarantined]:
        """Return what was noted for a slot."""
        return list(self.noted.get((tag, rotation_id), {}).values())

    async def headroom(self) -> str:
        """Return an empty string: this process's memory has no bound of its own."""
        return ""

    def _require(self, claim: Claim) -> None:
        if self._fences.get(claim.tag) != claim.token:
            raise _fenced(claim)

    def _under(self, tag: str, version: int) -> list[DekRecord]:
        records = [self._records[key_id] for key_id in self._slots.get(tag, ())]
        return [record for record in records if record.kek_version == version and record.wrapped]

    def _step(self, tag: str, version: int, cursor: int, count: int) -> tuple[list[DekRecord], int]:
        """Look at ``count`` keys of the slot from the cursor, a number of keys: they stay in their order."""
        key_ids = self._slots.get(tag, ())
        following = cursor + count
        records = [self._records[key_id] for key_id in key_ids[cursor:following]]
        found = [record for record in records if record.kek_version == version and record.wrapped]
        return found, following if following < len(key_ids) else 0

    def _copy(self, tag: str, rotation_id: str, record: DekRecord) -> None:
        place = (tag, rotation_id)
        if record.key_id not in self.copies[place]:
            self.copies[place][record.key_id] = record.wrapped
            # What was sealed before is no longer what it was.
            self.manifests[place] = replace(self.manifests[place], count=-1, digest="")


def _fenced(claim: Claim) -> Fenced:
    return Fenced(f"another worker has slot {claim.tag}, or it was not taken before")


def _unbegun(claim: Claim) -> RotationRefused:
    return RotationRefused(f"the snapshot of slot {claim.tag} has not been begun, or was purged meanwhile")

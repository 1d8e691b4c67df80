"""Turning a rotation back: its target version is bad or lost, so its source version becomes active again.

Under a new fence, slot by slot: the floor is lowered, and where a record is under the target version and
has a copy in the rotation's snapshot, that copy takes its place by compare-and-set. A record without a copy
was made since, under the target version alone: it is left as it is and named, for it needs that version. No
state is ever restored, and a destroyed key stays destroyed: it has no blob to compare with.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from progressdb_kms.domain.envelope import parse_blob, wrap_aad
from progressdb_kms.domain.errors import KmsError, RotationRefused
from progressdb_kms.domain.keyring import KekState
from progressdb_kms.domain.keys import ALL_TAGS
from progressdb_kms.domain.rotation import Outcome, Rotation, Step
from progressdb_kms.ports import StoredBlob, Swap, SwapResult
from progressdb_kms.usecases.crew import IDLE, Conduct, Crew, Parts, by_life

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from progressdb_kms.ports import Claim, Heartbeat, Lock, RegistryView

_PASSES = 20
"""Passes over a slot: instances that have not heard of the rollback may still wrap under the target."""


@dataclass(slots=True)
class Leftovers:
    """Keys that a rollback left under the target version.

    Attributes:
        made_since: Without a copy: made or wrapped under the target version alone.
        bad_copy: With a copy that does not unwrap.
    """

    made_since: list[str] = field(default_factory=list)
    bad_copy: list[str] = field(default_factory=list)


class Rollback(Crew):
    """Rolls the latest rotation back. Arguments as of ``Crew``."""

    def __init__(self, parts: Parts, conduct: Conduct, worker: str) -> None:
        super().__init__(parts, conduct, worker)
        self.leftovers = Leftovers()

    async def run(self) -> Rotation:
        """Roll the unfinished rotation back, or else the latest; resumes a rollback that was ended.

        Returns:
            The rotation, rolled back. ``leftovers`` says what still needs its target version.

        Raises:
            RotationRunning: Another run leads.
            RotationRefused: There is nothing to roll back, or it can't be.
            Fenced, Interrupted, StoreUnavailable, StoreNotDurable: As ``Rotator.run``.
        """
        parts = self._parts
        async with self._leading() as lock:
            rotation = await self._patiently(self._candidate)
            if rotation.step is Step.DISTRIBUTE:
                # Nothing is wrapped under the target version: it stays staged, and a later rotation takes it.
                return await self._finish(rotation, lock)
            if rotation.step is not Step.ROLLBACK:
                rotation = replace(
                    rotation, step=Step.ROLLBACK, step_at=int(parts.now()), finished_at=None, outcome=""
                )
                await self._note("rotation.rollback", "intent", rotation)
                await self._patiently(lambda: parts.ledger.save(rotation, lock))
            parts.progress.step(rotation, len(ALL_TAGS))
            parts.reached("rollback:begun")
            source = rotation.source_version
            view = await self._patiently(
                lambda: parts.registry.activate(source, now=int(parts.now()), lock=lock)
            )
            await self._patiently(parts.keks.refresh)
            parts.reached("rollback:activated")
            await self._await_instances(view)
            await self._share(rotation, lock)
            return await self._finish(rotation, lock)

    async def _finish(self, rotation: Rotation, lock: Lock) -> Rotation:
        parts = self._parts
        now = int(parts.now())
        done = replace(
            rotation, step=Step.ROLLED_BACK, step_at=now, finished_at=now, outcome=str(Outcome.ROLLED_BACK)
        )
        await self._patiently(lambda: parts.ledger.save(done, lock))
        await self._note("rotation.rollback", "ok", done)
        return await parts.ledger.get(rotation.rotation_id) or done

    async def _candidate(self) -> Rotation:
        """Return the rotation to roll back."""
        parts = self._parts
        rotation = await parts.ledger.current()
        if rotation is None:
            latest = await parts.ledger.list_rotations(1)
            if not latest or latest[0].step is Step.ROLLED_BACK:
                raise RotationRefused("there is no rotation to roll back")
            rotation = latest[0]
            if parts.keks.active != rotation.target_version:
                raise RotationRefused(
                    f"KEK version {parts.keks.active} is active and not {rotation.target_version}, which"
                    f" rotation {rotation.rotation_id} brought"
                )
        source = parts.keks.view.keks.get(rotation.source_version)
        if source is None or source.state is KekState.RETIRED:
            raise RotationRefused(
                f"KEK version {rotation.source_version} is retired: it can't be active again"
            )
        if source.version not in parts.keks.usable:
            raise RotationRefused(
                f"KEK version {rotation.source_version}, which would be active again, is not loaded: add it"
            )
        return rotation

    async def _await_instances(self, view: RegistryView) -> None:
        """Wait until live instances wrap under the active version again, and say which do not in time.

        The version that they name does not tell by itself: one whose last word is of before the rotation
        names the old one too, and wraps under the new one since.
        """
        parts = self._parts

        def is_late(beat: Heartbeat) -> bool:
            return beat.active != view.active or 0 < beat.revision < view.revision

        deadline = parts.now() + self._conduct.wait
        while True:
            live, gone = by_life(await self._patiently(parts.heartbeats.live), parts.now())
            late = [beat.instance for beat in live if is_late(beat)]
            if not late or parts.now() >= deadline:
                break
            parts.progress.waiting(late, [beat.instance for beat in gone])
            self._go_on()
            await asyncio.sleep(IDLE)
        if late or gone:
            names = ", ".join([*late, *(beat.instance for beat in gone)])
            parts.progress.warning(
                f"stop these instances: until they have read the registry again they may make keys under the"
                f" version that is rolled back: {names}"
            )

    async def _slot(self, rotation: Rotation, claim: Claim) -> Mapping[str, int]:
        slots, target = self._parts.slots, rotation.target_version
        await slots.set_floor([claim], rotation.source_version, lower=True)
        counts: Counter[str] = Counter()
        made_since: set[str] = set()
        bad: set[str] = set()
        for _ in range(_PASSES):
            before = counts["rolled_back"]
            cursor = 0
            while True:
                page = await slots.page(
                    claim.tag, target, cursor, self._conduct.page, backup=rotation.rotation_id
                )
                made_since.update(record.key_id for record in page.records if not record.backup)
                copied = [record for record in page.records if record.backup and record.key_id not in bad]
                counts["rolled_back"] += await self._put_back(rotation, claim, copied, bad)
                cursor = page.cursor
                if not cursor:
                    break
            if counts["rolled_back"] == before:
                break
        counts["made_since"] = len(made_since)
        counts["bad_copy"] = len(bad)
        self.leftovers.made_since += sorted(made_since)
        self.leftovers.bad_copy += sorted(bad)
        return counts

    async def _put_back(
        self, rotation: Rotation, claim: Claim, records: Sequence[StoredBlob], bad: set[str]
    ) -> int:
        """Put copies in place of blobs under the target version; return how many."""
        keks, source = self._parts.keks, rotation.source_version
        swaps: list[Swap] = []
        older: list[tuple[StoredBlob, bytes]] = []
        for record in records:
            # A copy replaces a blob that may be good, so it has to open first.
            try:
                blob = parse_blob(record.backup)
                aad = wrap_aad(record.key_id, record.thread_id)
                (dek,) = await keks.unwrap(blob.kek_version, [blob.body], [aad])
            except KmsError:
                bad.add(record.key_id)
                continue
            if isinstance(dek, KmsError):
                bad.add(record.key_id)
            elif blob.kek_version == source:
                swaps.append(Swap(record.key_id, record.wrapped, record.backup))
            else:
                older.append((record, dek))
        if older:
            # Below the floor: wrapped under the version that is active again.
            names = [(record.key_id, record.thread_id) for record, _ in older]
            version, _, blobs = await keks.wrap([dek for _, dek in older], names)
            if version != source:
                raise RotationRefused(f"KEK version {version} is active and not {source}")
            swaps += [
                Swap(record.key_id, record.wrapped, blob)
                for (record, _), blob in zip(older, blobs, strict=True)
            ]
        if not swaps:
            return 0
        kek_id = keks.view.keks[source].kek_id
        results = await self._parts.slots.swap(claim, rotation.rotation_id, swaps, kek_id, source)
        return sum(result is SwapResult.DONE for result in results)

"""What a rotation does to the records of one slot, step by step. Every part may be done again."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.envelope import parse_blob, wrap_aad
from progressdb_kms.domain.errors import (
    KekUnavailable,
    KekUnreachable,
    KmsError,
    RotationRefused,
    WrappedKeyInvalid,
)
from progressdb_kms.domain.keys import ALL_TAGS
from progressdb_kms.domain.rotation import Rotation, Step, bucket_digest, slot_digest
from progressdb_kms.ports import Quarantined, StoredBlob, Swap, SwapResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from progressdb_kms.ports import Claim, RotationStore
    from progressdb_kms.usecases.keks import KekBook

_PASSES: Final = 20
"""Passes over a slot's old records: others may be rewrapping the same ones, and each pass leaves fewer."""


class SlotWork:
    """The work on slots.

    Args:
        slots: The store.
        keks: Wraps and unwraps.
        page: Records in one script call.
        max_rate: Records a second over all slots of this process, 0 for no bound.
    """

    def __init__(self, slots: RotationStore, keks: KekBook, page: int, max_rate: int) -> None:
        self._slots = slots
        self._keks = keks
        self._page = page
        self._pace = _Pace(max_rate)

    async def do(self, rotation: Rotation, claim: Claim) -> Counter[str]:
        """Do a step's part on one slot and return what was done, by name.

        Raises:
            Fenced: Another worker has the slot.
            RotationRefused: A copy does not agree with its record; the rotation must not go on.
            StoreUnavailable, StoreNotDurable: Do it again.
        """
        if rotation.step is Step.ACTIVATE:
            await self._slots.set_floor([claim], rotation.target_version)
            return Counter()
        if rotation.step is Step.SNAPSHOT:
            return await self._snapshot(rotation, claim)
        if rotation.step is Step.REWRAP:
            return await self._rewrap(rotation, claim)
        return await self._verify(rotation, claim)

    async def count_quarantined(self, rotation: Rotation) -> int:
        """Return the number of records that the rotation could not deal with."""
        total = 0
        for tag in ALL_TAGS:
            total += len(await self._slots.quarantined(tag, rotation.rotation_id))
        return total

    def _old(self, rotation: Rotation) -> list[int]:
        return [version for version in sorted(self._keks.view.keks) if version < rotation.target_version]

    async def _snapshot(self, rotation: Rotation, claim: Claim) -> Counter[str]:
        slots, rotation_id = self._slots, rotation.rotation_id
        versions = self._old(rotation)
        counts = {version: await slots.count(claim.tag, version) for version in versions}
        records = sum(counts.values())
        if not records:
            return Counter()
        manifest = await slots.begin_snapshot(claim, rotation_id, records)
        for version, number in counts.items():
            cursor, left = 0, number
            while True:
                await self._pace.wait(min(left, self._page))
                left = max(0, left - self._page)
                cursor = await slots.snapshot(claim, rotation_id, version, cursor, self._page)
                if not cursor:
                    break
        for _ in range(_PASSES):
            digests = []
            count = 0
            for bucket in range(manifest.buckets):
                # A blob that can't be unwrapped is copied like any other: rewrap quarantines its record.
                entries = await slots.read_bucket(claim.tag, rotation_id, bucket)
                count += len(entries)
                digests.append(bucket_digest(entries))
            # Records can leave a census meanwhile (rewrapped, destroyed), never join it: the floor stands.
            if count < sum([await slots.count(claim.tag, version) for version in versions]):
                await self._require_copies(rotation, claim, versions)
            if await slots.seal_snapshot(claim, rotation_id, count, slot_digest(digests)):
                return Counter(snapshot=count)
        raise RotationRefused(f"the snapshot of slot {claim.tag} changes all the time; run again")

    async def _require_copies(self, rotation: Rotation, claim: Claim, versions: Sequence[int]) -> None:
        """Look at each record: a census may name keys that have no record, which rewrap puts in quarantine.

        Raises:
            RotationRefused: A record has no copy.
        """
        for version in versions:
            cursor = 0
            while True:
                page = await self._slots.page(
                    claim.tag, version, cursor, self._page, backup=rotation.rotation_id
                )
                lacking = sum(not record.backup for record in page.records)
                if lacking:
                    raise RotationRefused(
                        f"the snapshot of slot {claim.tag} lacks {lacking} records or more: nothing was"
                        " changed; run again, and if it stays so look for what else writes to the store"
                    )
                cursor = page.cursor
                if not cursor:
                    break

    async def _rewrap(self, rotation: Rotation, claim: Claim) -> Counter[str]:
        counts: Counter[str] = Counter()
        bad: dict[str, Quarantined] = {}
        for version in self._old(rotation):
            for _ in range(_PASSES):
                if await self._slots.count(claim.tag, version) <= sum(
                    record.kek_version == version for record in bad.values()
                ):
                    break
                cursor = 0
                while True:
                    page = await self._slots.page(claim.tag, version, cursor, self._page)
                    await self._pace.wait(len(page.records))
                    for key_id in page.missing:
                        bad[key_id] = Quarantined(
                            key_id, "the census names it, but its record differs", version
                        )
                    todo = [record for record in page.records if record.key_id not in bad]
                    counts["rewrapped"] += await self._swap(rotation, claim, todo, bad)
                    cursor = page.cursor
                    if not cursor:
                        break
        if bad:
            await self._slots.quarantine(claim, rotation.rotation_id, list(bad.values()))
            counts["quarantined"] = len(bad)
        return counts

    async def _swap(
        self, rotation: Rotation, claim: Claim, records: Sequence[StoredBlob], bad: dict[str, Quarantined]
    ) -> int:
        aads = [wrap_aad(record.key_id, record.thread_id) for record in records]
        deks = await self._unwrap([record.wrapped for record in records], aads)
        good: list[tuple[StoredBlob, bytes, bytes]] = []
        for record, dek, aad in zip(records, deks, aads, strict=True):
            if isinstance(dek, KmsError):
                bad[record.key_id] = Quarantined(record.key_id, dek.code, record.kek_version)
            else:
                good.append((record, dek, aad))
        if not good:
            return 0
        names = [(record.key_id, record.thread_id) for record, _, _ in good]
        version, kek_id, blobs = await self._keks.wrap([dek for _, dek, _ in good], names)
        if version != rotation.target_version:
            await self._keks.refresh()
            raise RotationRefused(
                f"KEK version {version} is active, not {rotation.target_version}, which this rotation brings"
            )
        # A new blob is trusted only once it has been opened: what is written replaces the only other one.
        bodies = [parse_blob(blob).body for blob in blobs]
        opened = await self._keks.unwrap(version, bodies, [aad for _, _, aad in good])
        swaps = []
        for (record, dek, _), blob, check in zip(good, blobs, opened, strict=True):
            if check == dek:
                swaps.append(Swap(record.key_id, record.wrapped, blob))
            else:
                bad[record.key_id] = Quarantined(record.key_id, "rewrap_check_failed", record.kek_version)
        results = await self._slots.swap(claim, rotation.rotation_id, swaps, kek_id, version)
        return sum(result is SwapResult.DONE for result in results)

    async def _verify(self, rotation: Rotation, claim: Claim) -> Counter[str]:
        counts: Counter[str] = Counter()
        bad: dict[str, Quarantined] = {}
        sample = rotation.verify_sample
        share = -(-sample // len(ALL_TAGS)) if sample else 0
        cursor = 0
        while True:
            size = min(self._page, share) if share else self._page
            page = await self._slots.page(
                claim.tag, rotation.target_version, cursor, size, backup=rotation.rotation_id
            )
            for key_id in page.missing:
                bad[key_id] = Quarantined(
                    key_id, "the census names it, but its record differs", rotation.target_version
                )
            records = page.records
            await self._pace.wait(len(records))
            aads = [wrap_aad(record.key_id, record.thread_id) for record in records]
            deks = await self._unwrap([record.wrapped for record in records], aads)
            copied = [number for number, record in enumerate(records) if record.backup]
            copies = await self._unwrap(
                [records[number].backup for number in copied], [aads[number] for number in copied]
            )
            wanted: list[bytes | KmsError] = list(deks)
            for number, copy in zip(copied, copies, strict=True):
                wanted[number] = copy
            for record, dek, copy in zip(records, deks, wanted, strict=True):
                if isinstance(dek, KmsError):
                    bad[record.key_id] = Quarantined(record.key_id, dek.code, record.kek_version)
                elif copy != dek:
                    bad[record.key_id] = Quarantined(record.key_id, "differs_from_backup", record.kek_version)
                else:
                    counts["verified"] += 1
            cursor = page.cursor
            if not cursor or (share and counts["verified"] >= share):
                break
        # What was read could still be taken back by a power cut where reads see what is not durable yet. This
        # write comes after it in the store's log, and so does its confirmation.
        await self._slots.take([claim])
        if bad:
            await self._slots.quarantine(claim, rotation.rotation_id, list(bad.values()))
            counts["quarantined"] = len(bad)
        return counts

    async def _unwrap(self, blobs: Sequence[bytes], aads: Sequence[bytes]) -> list[bytes | KmsError]:
        results: list[bytes | KmsError] = [WrappedKeyInvalid()] * len(blobs)
        groups: dict[int, list[tuple[int, bytes, bytes]]] = {}
        for number, (wrapped, aad) in enumerate(zip(blobs, aads, strict=True)):
            try:
                blob = parse_blob(wrapped)
            except WrappedKeyInvalid as error:
                results[number] = error
                continue
            groups.setdefault(blob.kek_version, []).append((number, blob.body, aad))
        for version, group in groups.items():
            try:
                keys = await self._keks.unwrap(
                    version, [item[1] for item in group], [item[2] for item in group]
                )
            except KekUnavailable as error:
                if version in self._keks.usable:
                    # It was there a moment ago: no key is put aside because its place is in disorder.
                    raise KekUnreachable(error.detail) from None
                keys = [error] * len(group)
            for (number, _, _), key in zip(group, keys, strict=True):
                results[number] = key
        return results


class _Pace:
    """Keeps to a number of records a second."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._free_at = 0.0

    async def wait(self, records: int) -> None:
        """Wait for as long as so many records take. Never for pages: most slots have less than one."""
        if not self._rate or not records:
            return
        now = time.monotonic()
        self._free_at = max(self._free_at, now) + records / self._rate
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)

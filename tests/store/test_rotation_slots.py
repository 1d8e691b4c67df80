"""What every store promises of a rotation's work on the records of one slot."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from progressdb_kms.domain.errors import Fenced, KmsError, RotationRefused, StaleKek
from progressdb_kms.domain.keys import ALL_TAGS, DekRecord, StateChange, new_key_id, slot_tag
from progressdb_kms.domain.rotation import bucket_digest, slot_digest
from progressdb_kms.ports import Claim, Quarantined, RotationStore, StoredBlob, Swap, SwapResult
from progressdb_kms.store.buckets import bucket_count, bucket_of
from tests.store.conftest import Harness, new_dek
from tests.store.servers import Server

R = "r_2_aa"
THREAD = "room:1"
TAG = slot_tag(THREAD)
CLAIM = Claim(TAG, 7)
DONE, CHANGED, GONE = SwapResult.DONE, SwapResult.CHANGED, SwapResult.GONE


async def fill(harness: Harness, keys: int, kek_version: int = 1) -> dict[str, bytes]:
    """Create keys in one slot, take it, and return the blobs."""
    await harness.store.rotation_slots.take([CLAIM])
    results = await harness.store.keys.create([new_dek(THREAD, kek_version=kek_version) for _ in range(keys)])
    return {record.key_id: record.wrapped for record in results if isinstance(record, DekRecord)}


async def pages(
    slots: RotationStore, version: int = 1, count: int = 50, backup: str = ""
) -> dict[str, StoredBlob]:
    """Read all pages."""
    found: dict[str, StoredBlob] = {}
    cursor = 0
    while True:
        page = await slots.page(TAG, version, cursor, count, backup=backup)
        assert page.missing == ()
        found |= {record.key_id: record for record in page.records}
        if not (cursor := page.cursor):
            return found


async def snapshot(slots: RotationStore, records: int, claim: Claim = CLAIM) -> int:
    """Take a whole snapshot of version 1 and return the number of its buckets."""
    manifest = await slots.begin_snapshot(claim, R, records)
    cursor = 0
    while True:
        cursor = await slots.snapshot(claim, R, 1, cursor, 50)
        if not cursor:
            return manifest.buckets


async def held(slots: RotationStore, buckets: int) -> dict[str, bytes]:
    """Return all that a snapshot holds."""
    return dict([entry for bucket in range(buckets) for entry in await slots.read_bucket(TAG, R, bucket)])


class TestFence:
    """Tokens of claims."""

    async def test_lower_token_is_refused_everywhere(self, harness: Harness) -> None:
        """Once a higher token was seen, whatever writes under a lower one is refused and changes nothing."""
        slots = harness.store.rotation_slots
        blobs = await fill(harness, 3)
        buckets = await snapshot(slots, 3)
        (key_id, old), *_ = blobs.items()
        await slots.take([Claim(TAG, 8)])
        actions: tuple[Callable[[], Awaitable[object]], ...] = (
            lambda: slots.take([CLAIM]),
            lambda: slots.set_floor([CLAIM], 5),
            lambda: slots.begin_snapshot(CLAIM, R, 1),
            lambda: slots.snapshot(CLAIM, R, 1, 0, 10),
            lambda: slots.seal_snapshot(CLAIM, R, 3, "aa"),
            lambda: slots.swap(CLAIM, R, [Swap(key_id, old, b"n" * 64)], "kek_2", 2),
            lambda: slots.quarantine(CLAIM, R, [Quarantined(key_id, "bad", 1)]),
        )
        for action in actions:
            with pytest.raises(Fenced, match=TAG):
                await action()
        assert (await pages(slots))[key_id].wrapped == old
        assert await slots.quarantined(TAG, R) == []
        manifest = await slots.manifest(TAG, R)
        assert manifest is not None
        assert (manifest.count, manifest.buckets) == (-1, buckets)
        (created,) = await harness.store.keys.create([new_dek(THREAD)])
        assert isinstance(created, DekRecord)

    async def test_take_comes_first(self, harness: Harness) -> None:
        """A token that the slot has not seen writes nothing; taking again under the same token is fine."""
        slots = harness.store.rotation_slots
        with pytest.raises(Fenced):
            await slots.set_floor([CLAIM], 2)
        await slots.take([CLAIM])
        await slots.take([CLAIM])
        await slots.set_floor([CLAIM], 2)


class TestFloor:
    """``set_floor``."""

    async def test_only_rises(self, harness: Harness) -> None:
        """A lower version leaves the floor; ``lower`` sets it."""
        slots, keys = harness.store.rotation_slots, harness.store.keys
        other = next(tag for tag in ALL_TAGS if tag != TAG)
        claims = [CLAIM, Claim(other, 3)]
        await slots.take(claims)
        await slots.set_floor(claims, 3)
        await slots.set_floor(claims, 2)
        stale, right = await keys.create([new_dek(THREAD, kek_version=2), new_dek(THREAD, kek_version=3)])
        assert isinstance(stale, StaleKek)
        assert isinstance(right, DekRecord)
        await slots.set_floor([CLAIM], 2, lower=True)
        (again,) = await keys.create([new_dek(THREAD, kek_version=2)])
        assert isinstance(again, DekRecord)

    async def test_swap_below_it(self, harness: Harness) -> None:
        """A swap below the floor is refused."""
        slots = harness.store.rotation_slots
        ((key_id, old),) = (await fill(harness, 1)).items()
        await slots.set_floor([CLAIM], 3)
        with pytest.raises(StaleKek):
            await slots.swap(CLAIM, R, [Swap(key_id, old, b"n" * 64)], "kek_2", 2)
        assert (await pages(slots))[key_id].wrapped == old


class TestPages:
    """``count`` and ``page``."""

    async def test_all_records_of_a_version(self, harness: Harness) -> None:
        """Pages together give every record of the version as it is, and none of another version."""
        slots = harness.store.rotation_slots
        blobs = await fill(harness, 300)
        await fill(harness, 2, kek_version=2)
        found = await pages(slots)
        assert {key_id: record.wrapped for key_id, record in found.items()} == blobs
        assert {(r.thread_id, r.kek_version, r.backup) for r in found.values()} == {(THREAD, 1, b"")}
        assert (await slots.count(TAG, 1), await slots.count(TAG, 2), await slots.count(TAG, 3)) == (
            300,
            2,
            0,
        )

    async def test_with_copies(self, harness: Harness) -> None:
        """Where a snapshot is named, a record's copy comes along, and none where there is none."""
        slots = harness.store.rotation_slots
        blobs = await fill(harness, 60)
        await snapshot(slots, 60)
        (late,) = await fill(harness, 1)
        found = await pages(slots, backup=R)
        assert {key_id: record.backup for key_id, record in found.items()} == {**blobs, late: b""}
        assert {record.backup for record in (await pages(slots, backup="r_9_zz")).values()} == {b""}

    async def test_long_and_odd_names(self, harness: Harness) -> None:
        """Thread ids of any length and alphabet arrive whole."""
        slots = harness.store.rotation_slots
        thread = "ü" * 128
        tag = slot_tag(thread)
        await harness.store.keys.create([new_dek(thread, wrapped=b"\0" * 200)])
        page = await slots.page(tag, 1, 0, 10)
        assert [(record.thread_id, record.wrapped) for record in page.records] == [(thread, b"\0" * 200)]


class TestSnapshot:
    """The copies that are made before anything changes."""

    async def test_holds_every_record(self, harness: Harness) -> None:
        """A snapshot holds each blob once, where its id says; the manifest stays when begun again."""
        slots = harness.store.rotation_slots
        blobs = await fill(harness, 400)
        buckets = await snapshot(slots, 400)
        assert buckets == bucket_count(400)
        assert await held(slots, buckets) == blobs
        for bucket in range(buckets):
            for key_id, _ in await slots.read_bucket(TAG, R, bucket):
                assert bucket_of(key_id, buckets) == bucket
        assert (await slots.begin_snapshot(CLAIM, R, 9_000)).buckets == buckets

    async def test_never_written_over(self, harness: Harness) -> None:
        """Taken again after records have changed, it still holds what was there first."""
        slots = harness.store.rotation_slots
        blobs = await fill(harness, 5)
        buckets = await snapshot(slots, 5)
        for record in await harness.store.keys.get(list(blobs)):
            assert record is not None
            await harness.store.keys.rewrap(record, secrets.token_bytes(64), "kek_1", 1)
        await snapshot(slots, 5)
        assert await held(slots, buckets) == blobs

    async def test_sealed(self, harness: Harness) -> None:
        """The manifest keeps count and digest, which is the same each time; a new copy unseals it."""
        slots = harness.store.rotation_slots
        assert await slots.manifest(TAG, R) is None
        await fill(harness, 100)
        buckets = await snapshot(slots, 100)

        async def digest() -> str:
            return slot_digest([bucket_digest(await slots.read_bucket(TAG, R, n)) for n in range(buckets)])

        first = await digest()
        assert not await slots.seal_snapshot(CLAIM, R, 101, first)  # one was destroyed since it was read
        assert await slots.seal_snapshot(CLAIM, R, 100, first)
        await snapshot(slots, 100)
        assert await digest() == first
        manifest = await slots.manifest(TAG, R)
        assert manifest is not None
        assert (manifest.tag, manifest.buckets, manifest.count, manifest.digest) == (TAG, buckets, 100, first)
        await fill(harness, 1)
        await snapshot(slots, 1)
        manifest = await slots.manifest(TAG, R)
        assert manifest is not None
        assert (manifest.count, manifest.digest) == (-1, "")

    async def test_has_to_be_begun(self, harness: Harness) -> None:
        """Without a manifest nothing is copied or sealed."""
        slots = harness.store.rotation_slots
        await fill(harness, 1)
        with pytest.raises(RotationRefused, match=TAG):
            await slots.snapshot(CLAIM, R, 1, 0, 10)
        with pytest.raises(RotationRefused, match=TAG):
            await slots.seal_snapshot(CLAIM, R, 0, "")
        assert await slots.read_bucket(TAG, R, 0) == []

    @pytest.mark.parametrize("records", [0, 1, 48, 49, 1_000, 3_456, 20_000])
    def test_buckets_stay_small(self, records: int) -> None:
        """Buckets hold at most 128 entries each, also where the number of buckets has awkward factors."""
        buckets = bucket_count(records)
        ids = [new_key_id(THREAD, secrets.token_bytes(17)) for _ in range(records)]
        filled = Counter(bucket_of(key_id, buckets) for key_id in ids)
        assert max(filled.values(), default=0) <= 128
        assert set(filled) <= set(range(buckets))
        assert bucket_of("k_17", buckets) == 0


class TestSwap:
    """``swap``."""

    async def test_replaces_and_moves(self, harness: Harness) -> None:
        """Swapped records have the new blob and KEK and are in the new version's census alone."""
        slots = harness.store.rotation_slots
        blobs = await fill(harness, 40)
        await snapshot(slots, 40)
        swaps = [Swap(key_id, old, secrets.token_bytes(64)) for key_id, old in blobs.items()]
        assert await slots.swap(CLAIM, R, swaps, "kek_2", 2) == [DONE] * 40
        records = await harness.store.keys.get(list(blobs))
        for swap, record in zip(swaps, records, strict=True):
            assert record is not None
            assert (record.wrapped, record.kek_id, record.kek_version) == (swap.new, "kek_2", 2)
        assert (await slots.count(TAG, 1), await slots.count(TAG, 2)) == (0, 40)
        assert {key_id: r.backup for key_id, r in (await pages(slots, 2, backup=R)).items()} == blobs

    async def test_compares_each(self, harness: Harness) -> None:
        """Changed, destroyed and unknown records are told apart and left; a retry finds its own blob."""
        slots = harness.store.rotation_slots
        ids = list(blobs := await fill(harness, 4))
        harness.destroy(ids[2])
        unknown = new_dek(THREAD).key_id
        swaps = [
            Swap(ids[0], blobs[ids[0]], b"a" * 64),
            Swap(ids[1], b"other", b"b" * 64),
            Swap(ids[2], blobs[ids[2]], b"c" * 64),
            Swap(unknown, b"old", b"d" * 64),
            Swap(ids[3], blobs[ids[3]], b"e" * 70),
        ]
        for _ in range(2):
            assert await slots.swap(CLAIM, R, swaps, "kek_2", 2) == [DONE, CHANGED, GONE, GONE, DONE]
        records = await harness.store.keys.get([*ids, unknown])
        assert [record and record.wrapped for record in records] == [
            b"a" * 64,
            blobs[ids[1]],
            b"",
            b"e" * 70,
            None,
        ]
        assert await slots.swap(CLAIM, R, [], "kek_2", 2) == []

    async def test_copies_what_has_no_copy(self, harness: Harness) -> None:
        """A record is copied before it changes, also where no snapshot was begun, and an older copy stays."""
        slots = harness.store.rotation_slots
        blobs = await fill(harness, 100)
        for new in (b"a" * 64, b"b" * 64):
            present = await harness.store.keys.get(list(blobs))
            swaps = [Swap(record.key_id, record.wrapped, new) for record in present if record]
            assert await slots.swap(CLAIM, R, swaps, "kek_2", 2) == [DONE] * 100
        manifest = await slots.manifest(TAG, R)
        assert manifest is not None
        assert manifest.count == -1
        assert await held(slots, manifest.buckets) == blobs

    async def test_other_fields_stay(self, harness: Harness) -> None:
        """State, uses and the rest of a record are what they were."""
        slots, keys = harness.store.rotation_slots, harness.store.keys
        ((key_id, old),) = (await fill(harness, 1)).items()
        await keys.reserve_uses({key_id: 5})
        before = await keys.change_state(key_id, StateChange.DISABLE, now=3)
        await slots.swap(CLAIM, R, [Swap(key_id, old, b"n" * 64)], "kek_2", 2)
        (after,) = await keys.get([key_id])
        assert after is not None
        assert (after.state, after.uses, after.version) == (before.state, 5, before.version)


class TestQuarantine:
    """Records that could not be dealt with."""

    async def test_noted(self, harness: Harness) -> None:
        """What was noted is found by rotation, and a newer reason replaces an older one."""
        slots = harness.store.rotation_slots
        await slots.take([CLAIM])
        ids = [new_dek(THREAD).key_id for _ in range(300)]
        await slots.quarantine(CLAIM, R, [Quarantined(key_id, "first", 1) for key_id in ids])
        await slots.quarantine(CLAIM, R, [Quarantined(ids[0], "sécond", 2)])
        found = {record.key_id: record for record in await slots.quarantined(TAG, R)}
        assert len(found) == 300
        assert found[ids[0]] == Quarantined(ids[0], "sécond", 2)
        assert found[ids[1]] == Quarantined(ids[1], "first", 1)
        assert await slots.quarantined(TAG, "r_9_zz") == []


class TestRedis:
    """What only a real server can show."""

    async def test_census_and_records_disagree(
        self, own_server: Callable[..., Server], opened: Callable
    ) -> None:
        """Names in a census without a record, a blob, or of another version are given as missing."""
        server = own_server()
        store = await opened(server.url)
        created = await store.keys.create([new_dek(THREAD) for _ in range(4)])
        ids = [record.key_id for record in created if not isinstance(record, KmsError)]
        prefix = f"kms:{{{TAG}}}:"
        server.ask("DEL", f"{prefix}dek:{ids[0]}")
        server.ask("HDEL", f"{prefix}dek:{ids[1]}", "wrapped")
        server.ask("HSET", f"{prefix}dek:{ids[2]}", "kek_version", 9)
        page = await store.rotation_slots.page(TAG, 1, 0, 10)
        assert sorted(page.missing) == sorted(ids[:3])
        assert [record.key_id for record in page.records] == [ids[3]]

    async def test_buckets_are_packed(self, own_server: Callable[..., Server], opened: Callable) -> None:
        """Each bucket of a snapshot is in the compact form, and all keys are in the slot."""
        server = own_server()
        store = await opened(server.url)
        slots = store.rotation_slots
        await slots.take([CLAIM])
        await store.keys.create([new_dek(THREAD) for _ in range(600)])
        await snapshot(slots, 600)
        keys = server.ask("KEYS", f"kms:{{{TAG}}}:backup:{R}:*")
        assert len(keys) == bucket_count(600)
        assert {server.ask("OBJECT", "ENCODING", key) for key in keys} == {b"listpack"}

    async def test_headroom(self, own_server: Callable[..., Server], opened: Callable) -> None:
        """Without a bound there is room; near the bound the answer names node, figures and what to do."""
        server = own_server()
        store = await opened(server.url)
        slots = store.rotation_slots
        assert await slots.headroom() == ""
        server.configure(maxmemory=str(1 << 30))
        assert await slots.headroom() == ""
        used = int(server.ask("INFO", "memory").split(b"used_memory:")[1].split()[0])
        server.configure(maxmemory=str(int(used * 1.1)))
        reason = await slots.headroom()
        assert str(server.socket) in reason
        assert "raise maxmemory to at least" in reason
        assert "0 records" in reason

    async def test_headroom_counts_records(self, own_server: Callable[..., Server], opened: Callable) -> None:
        """What the copies would take is added to what is used."""
        server = own_server()
        store = await opened(server.url)
        server.ask("HSET", "kms:{ctl}:keks", "1", "{}", "active", "1", "rev", "1")
        many = "for n = 1, 200000 do redis.call('SADD', KEYS[1], n) end"
        server.ask("EVAL", many, 1, f"kms:{{{TAG}}}:kek:1")
        used = int(server.ask("INFO", "memory").split(b"used_memory:")[1].split()[0])
        server.configure(maxmemory=str(int((used + 16_000_000) / 0.8)))
        assert "200,000 records" in await store.rotation_slots.headroom()
        server.configure(maxmemory=str(int((used + 48_000_000) / 0.8)))
        assert await store.rotation_slots.headroom() == ""

    async def test_what_is_acknowledged_writes(
        self, own_server: Callable[..., Server], opened: Callable
    ) -> None:
        """Repeated calls write too, for WAIT and WAITAOF speak of writes only."""
        server = own_server()
        store = await opened(server.url)
        slots = store.rotation_slots
        await slots.take([CLAIM])
        (record,) = await store.keys.create([new_dek(THREAD)])
        swap = Swap(record.key_id, record.wrapped, b"n" * 64)
        for call in (
            lambda: slots.take([CLAIM]),
            lambda: slots.set_floor([CLAIM], 1),
            lambda: slots.begin_snapshot(CLAIM, R, 1),
            lambda: slots.snapshot(CLAIM, R, 1, 0, 10),
            lambda: slots.swap(CLAIM, R, [swap], "kek_2", 2),
        ):
            await call()
            before = server.ask("INFO", "persistence").split(b"rdb_changes_since_last_save:")[1].split()[0]
            await call()
            after = server.ask("INFO", "persistence").split(b"rdb_changes_since_last_save:")[1].split()[0]
            assert after != before

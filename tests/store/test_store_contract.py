"""What every store promises; see ``progressdb_kms.ports``."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from progressdb_kms.domain.errors import (
    InvalidParameter,
    InvalidTransition,
    KeyDestroyed,
    KeyNotFound,
    KmsError,
    StaleKek,
)
from progressdb_kms.domain.keyring import KekState
from progressdb_kms.domain.keys import DekRecord, KeyState, StateChange
from progressdb_kms.ports import Heartbeat
from tests.store.conftest import Harness, new_dek, new_kek

ENABLE, DISABLE = StateChange.ENABLE, StateChange.DISABLE
SCHEDULE, CANCEL = StateChange.SCHEDULE_DESTRUCTION, StateChange.CANCEL_DESTRUCTION
UNKNOWN = "k_AAAAAAAAAAAAAAAAAAAAAAAAAAAA"


async def create(harness: Harness, *threads: str, kek_version: int = 1) -> list[DekRecord]:
    """Create a key for each thread."""
    results = await harness.store.keys.create(
        [new_dek(thread, kek_version=kek_version) for thread in threads]
    )
    records = [result for result in results if isinstance(result, DekRecord)]
    assert len(records) == len(threads)
    return records


async def stored(harness: Harness, key_id: str) -> DekRecord:
    """Read a record that must be there."""
    (record,) = await harness.store.keys.get([key_id])
    assert record is not None
    return record


class TestCreate:
    """``KeyStore.create``."""

    async def test_returns_and_stores_the_record(self, harness: Harness) -> None:
        """A created key is returned as it is stored, with every field."""
        dek = new_dek("room:é")
        (record,) = await harness.store.keys.create([dek])
        assert record == DekRecord(
            dek.key_id,
            "room:é",
            dek.wrapped,
            dek.kek_id,
            1,
            1,
            KeyState.ENABLED,
            dek.created_at,
            dek.created_by,
        )
        assert await stored(harness, dek.key_id) == record

    async def test_numbers_the_keys_of_a_thread(self, harness: Harness) -> None:
        """Versions count up within a thread, and each thread has its own."""
        records = await create(harness, "room:1", "room:1", "room:2", "room:1")
        assert [record.version for record in records] == [1, 2, 1, 3]

    async def test_fifty_at_once_make_one_record(self, harness: Harness) -> None:
        """The same id sent 50 times at once gives one record with one blob, and all 50 are told of it."""
        key_id = new_dek("room:1").key_id
        deks = [new_dek("room:1", key_id=key_id) for _ in range(50)]
        results = await asyncio.gather(*[harness.store.keys.create([dek]) for dek in deks])
        assert len({record.wrapped for (record,) in results if isinstance(record, DekRecord)}) == 1
        assert {record.version for (record,) in results if isinstance(record, DekRecord)} == {1}
        page = await harness.store.keys.list_keys(thread_id="room:1", state=None, limit=10, cursor=None)
        assert [record.key_id for record in page.records] == [key_id]

    async def test_replay_returns_what_is_stored(self, harness: Harness) -> None:
        """A replay long after gives the record as it has become, and changes nothing."""
        (record,) = await create(harness, "room:1")
        await harness.store.keys.rewrap(record, b"n" * 64, "kek_2", 2)
        await harness.store.keys.change_state(record.key_id, DISABLE, now=5)
        before = await stored(harness, record.key_id)
        assert await harness.store.keys.create([new_dek("room:1", key_id=record.key_id)]) == [before]
        assert await stored(harness, record.key_id) == before

    async def test_replay_of_a_destroyed_key_does_not_revive_it(self, harness: Harness) -> None:
        """A tombstone is returned as it is."""
        (record,) = await create(harness, "room:1")
        harness.destroy(record.key_id)
        (again,) = await harness.store.keys.create([new_dek("room:1", key_id=record.key_id)])
        assert isinstance(again, DekRecord)
        assert (again.state, again.wrapped) == (KeyState.DESTROYED, b"")

    async def test_id_of_another_thread_is_an_error(self, harness: Harness) -> None:
        """An id that another thread of the same slot has is refused, and its record stays."""
        first = new_dek("room:1")
        await harness.store.keys.create([first])
        twin = next(t for n in range(100_000) if new_dek(t := f"twin:{n}").key_id[:4] == first.key_id[:4])
        (result,) = await harness.store.keys.create([new_dek(twin, key_id=first.key_id)])
        assert isinstance(result, KmsError)
        assert (await stored(harness, first.key_id)).thread_id == "room:1"

    async def test_below_the_floor_is_stale(self, harness: Harness) -> None:
        """Nothing is written below the slot's floor; at the floor it is, and a replay does not mind."""
        (old,) = await create(harness, "room:1")
        harness.set_floor("room:1", 2)
        late, right = new_dek("room:1"), new_dek("room:1", kek_version=2)
        replay = new_dek("room:1", key_id=old.key_id)
        results = await harness.store.keys.create([late, right, replay])
        assert isinstance(results[0], StaleKek)
        assert isinstance(results[1], DekRecord)
        assert results[2] == old
        assert await harness.store.keys.get([late.key_id]) == [None]

    async def test_many_in_one_call_keep_their_order(self, harness: Harness) -> None:
        """Each result stands where its key stood."""
        deks = [new_dek(f"room:{n % 40}") for n in range(1200)]
        results = await harness.store.keys.create(deks)
        assert [r.key_id for r in results if isinstance(r, DekRecord)] == [dek.key_id for dek in deks]

    async def test_nothing_asked_nothing_done(self, harness: Harness) -> None:
        """Empty calls return at once."""
        assert await harness.store.keys.create([]) == []
        assert await harness.store.keys.get([]) == []
        assert await harness.store.keys.reserve_uses({}) == {}

    async def test_longest_thread_id(self, harness: Harness) -> None:
        """A thread id of 256 bytes is kept whole."""
        (record,) = await create(harness, "ü" * 128)
        assert (await stored(harness, record.key_id)).thread_id == "ü" * 128


class TestGet:
    """``KeyStore.get``."""

    async def test_answers_in_order_with_gaps(self, harness: Harness) -> None:
        """Unknown and malformed ids are None in their places."""
        first, second = await create(harness, "room:1", "room:2")
        found = await harness.store.keys.get([second.key_id, UNKNOWN, "not an id", first.key_id])
        assert found == [second, None, None, first]


EXPECTED: dict[tuple[KeyState, StateChange], KeyState | type[KmsError]] = {
    (KeyState.ENABLED, DISABLE): KeyState.DISABLED,
    (KeyState.ENABLED, ENABLE): KeyState.ENABLED,
    (KeyState.ENABLED, SCHEDULE): KeyState.PENDING_DESTRUCTION,
    (KeyState.ENABLED, CANCEL): InvalidTransition,
    (KeyState.DECRYPT_ONLY, DISABLE): KeyState.DISABLED,
    (KeyState.DECRYPT_ONLY, ENABLE): KeyState.DECRYPT_ONLY,
    (KeyState.DECRYPT_ONLY, SCHEDULE): KeyState.PENDING_DESTRUCTION,
    (KeyState.DECRYPT_ONLY, CANCEL): InvalidTransition,
    (KeyState.DISABLED, DISABLE): KeyState.DISABLED,
    (KeyState.DISABLED, ENABLE): KeyState.ENABLED,
    (KeyState.DISABLED, SCHEDULE): KeyState.PENDING_DESTRUCTION,
    (KeyState.DISABLED, CANCEL): KeyState.DISABLED,
    (KeyState.PENDING_DESTRUCTION, DISABLE): InvalidTransition,
    (KeyState.PENDING_DESTRUCTION, ENABLE): InvalidTransition,
    (KeyState.PENDING_DESTRUCTION, SCHEDULE): KeyState.PENDING_DESTRUCTION,
    (KeyState.PENDING_DESTRUCTION, CANCEL): KeyState.DISABLED,
    (KeyState.DESTROYED, DISABLE): KeyDestroyed,
    (KeyState.DESTROYED, ENABLE): KeyDestroyed,
    (KeyState.DESTROYED, SCHEDULE): KeyDestroyed,
    (KeyState.DESTROYED, CANCEL): KeyDestroyed,
}


async def key_in(harness: Harness, state: KeyState) -> str:
    """Make a key and bring it into a state."""
    (record,) = await create(harness, "room:1")
    if state is KeyState.DECRYPT_ONLY:
        harness.set_decrypt_only(record.key_id)
    elif state is KeyState.DESTROYED:
        harness.destroy(record.key_id)
    elif state is KeyState.DISABLED:
        await harness.store.keys.change_state(record.key_id, DISABLE, now=1)
    elif state is KeyState.PENDING_DESTRUCTION:
        await harness.store.keys.change_state(record.key_id, SCHEDULE, now=1, destroy_at=900)
    return record.key_id


class TestChangeState:
    """``KeyStore.change_state``."""

    @pytest.mark.parametrize("state, change", EXPECTED, ids=str)
    async def test_state_machine(self, harness: Harness, state: KeyState, change: StateChange) -> None:
        """Each change of each state does what the table says, and a refused one changes nothing."""
        key_id = await key_in(harness, state)
        before = await stored(harness, key_id)
        expected = EXPECTED[state, change]
        if isinstance(expected, KeyState):
            after = await harness.store.keys.change_state(key_id, change, now=700, destroy_at=1000)
            assert after.state is expected
            assert after.changed_at == (700 if state is not expected else before.changed_at)
            assert await stored(harness, key_id) == after
        else:
            with pytest.raises(expected) as caught:
                await harness.store.keys.change_state(key_id, change, now=700, destroy_at=1000)
            assert await stored(harness, key_id) == before
            if expected is InvalidTransition:
                assert state in caught.value.detail
                assert change in caught.value.detail

    async def test_destruction_date(self, harness: Harness) -> None:
        """The date is set once, kept when asked again, and gone when cancelled."""
        key_id = await key_in(harness, KeyState.ENABLED)
        first = await harness.store.keys.change_state(key_id, SCHEDULE, now=1, destroy_at=1000)
        again = await harness.store.keys.change_state(key_id, SCHEDULE, now=2, destroy_at=9999)
        assert (first.destroy_at, again.destroy_at, again.changed_at) == (1000, 1000, 1)
        cancelled = await harness.store.keys.change_state(key_id, CANCEL, now=3)
        assert cancelled.destroy_at is None

    async def test_a_superseded_key_resumes_as_superseded(self, harness: Harness) -> None:
        """Disable, schedule, cancel and enable lead a decrypt_only key back to where it was, and stay."""
        key_id = await key_in(harness, KeyState.DECRYPT_ONLY)
        for change in (DISABLE, SCHEDULE, CANCEL):
            record = await harness.store.keys.change_state(key_id, change, now=1, destroy_at=2)
            assert record.resume_state is KeyState.DECRYPT_ONLY
        resumed = await harness.store.keys.change_state(key_id, ENABLE, now=2)
        assert resumed.state is KeyState.DECRYPT_ONLY
        assert await harness.store.keys.change_state(key_id, ENABLE, now=3) == resumed

    @pytest.mark.parametrize("key_id", [UNKNOWN, "k_1", ""])
    async def test_unknown_key(self, harness: Harness, key_id: str) -> None:
        """There is no key, or none can have this id."""
        with pytest.raises(KeyNotFound):
            await harness.store.keys.change_state(key_id, DISABLE, now=1)

    async def test_notice_comes_with_the_change(self, harness: Harness) -> None:
        """Whoever reads the notices learns of every change."""
        key_id = await key_in(harness, KeyState.ENABLED)
        start = await harness.store.keys.changes(None, 0)
        await harness.store.keys.change_state(key_id, DISABLE, now=1)
        seen = await harness.store.keys.changes(start.cursor, 0)
        assert seen.complete
        assert seen.key_ids == {key_id}


class TestRewrap:
    """``KeyStore.rewrap``."""

    async def test_replaces_the_blob_and_moves_the_census(self, harness: Harness) -> None:
        """Blob, KEK and census change; nothing else does."""
        await harness.store.registry.initialise(new_kek())
        await harness.store.registry.reserve_wraps(2, 1)
        first, second = await create(harness, "room:1", "room:2")
        assert await harness.store.keys.census() == {1: 2}
        assert await harness.store.keys.rewrap(first, b"n" * 64, "kek_2", 2)
        assert await harness.store.keys.census() == {1: 1, 2: 1}
        assert await stored(harness, first.key_id) == replace(
            first, wrapped=b"n" * 64, kek_id="kek_2", kek_version=2
        )
        assert await stored(harness, second.key_id) == second

    async def test_compares_before_it_sets(self, harness: Harness) -> None:
        """A blob that is another by now stays; repeating the same rewrap is fine."""
        (record,) = await create(harness, "room:1")
        assert await harness.store.keys.rewrap(record, b"n" * 64, "kek_2", 2)
        assert not await harness.store.keys.rewrap(record, b"m" * 64, "kek_3", 3)
        assert await harness.store.keys.rewrap(record, b"n" * 64, "kek_2", 2)
        assert (await stored(harness, record.key_id)).wrapped == b"n" * 64

    async def test_within_one_version(self, harness: Harness) -> None:
        """A rewrap under the same KEK keeps the key in the census."""
        await harness.store.registry.initialise(new_kek())
        (record,) = await create(harness, "room:1")
        assert await harness.store.keys.rewrap(record, b"n" * 64, record.kek_id, 1)
        assert await harness.store.keys.census() == {1: 1}

    async def test_below_the_floor_is_stale(self, harness: Harness) -> None:
        """A KEK below the floor is refused."""
        (record,) = await create(harness, "room:1")
        harness.set_floor("room:1", 3)
        with pytest.raises(StaleKek):
            await harness.store.keys.rewrap(record, b"n" * 64, "kek_2", 2)
        assert await stored(harness, record.key_id) == record

    async def test_nothing_to_rewrap(self, harness: Harness) -> None:
        """An unknown key and a destroyed one have no blob."""
        (record,) = await create(harness, "room:1")
        with pytest.raises(KeyNotFound):
            await harness.store.keys.rewrap(replace(record, key_id=UNKNOWN), b"n" * 64, "kek_2", 2)
        harness.destroy(record.key_id)
        with pytest.raises(KeyDestroyed):
            await harness.store.keys.rewrap(record, b"n" * 64, "kek_2", 2)


class TestUses:
    """``KeyStore.reserve_uses``."""

    async def test_counts_and_leaves_out_unknown_keys(self, harness: Harness) -> None:
        """Totals add up over calls; a key that is not there has none."""
        first, second = await create(harness, "room:1", "room:2")
        asked = {first.key_id: 65_536, second.key_id: 1, UNKNOWN: 5, "not an id": 5}
        assert await harness.store.keys.reserve_uses(asked) == {first.key_id: 65_536, second.key_id: 1}
        assert await harness.store.keys.reserve_uses({first.key_id: 2**31}) == {first.key_id: 2**31 + 65_536}
        assert (await stored(harness, first.key_id)).uses == 2**31 + 65_536
        assert await harness.store.keys.get([UNKNOWN]) == [None]


async def walk(
    harness: Harness, limit: int, thread_id: str | None = None, state: KeyState | None = None
) -> list[DekRecord]:
    """Read a listing to its end."""
    records: list[DekRecord] = []
    cursor = None
    while True:
        page = await harness.store.keys.list_keys(
            thread_id=thread_id, state=state, limit=limit, cursor=cursor
        )
        assert len(page.records) <= limit
        records += page.records
        if page.cursor is None:
            return records
        cursor = page.cursor


class TestListing:
    """``KeyStore.list_keys``."""

    @pytest.mark.parametrize("limit", [1, 7, 1000])
    async def test_all_keys_page_by_page(self, harness: Harness, limit: int) -> None:
        """Every key is in some page, whatever the pages' size, and no page is larger than asked."""
        created = await create(harness, *[f"room:{n}" for n in range(60)])
        listed = await walk(harness, limit)
        assert {record.key_id: record for record in listed} == {record.key_id: record for record in created}

    @pytest.mark.parametrize("limit", [1, 2, 5, 1000])
    async def test_a_thread_by_version(self, harness: Harness, limit: int) -> None:
        """A thread's keys come in the order of their versions, each once."""
        created = await create(harness, "room:1", "room:1", "room:2", "room:1", "room:1", "room:1")
        assert await walk(harness, limit, thread_id="room:1") == [
            r for r in created if r.thread_id == "room:1"
        ]
        assert await walk(harness, limit, thread_id="nobody's") == []

    @pytest.mark.parametrize("thread_id", [None, "room:1"])
    async def test_by_state(self, harness: Harness, thread_id: str | None) -> None:
        """Only keys in the asked state are listed, in pages that go on."""
        created = await create(harness, *["room:1"] * 12)
        wanted = {record.key_id for record in created[::3]}
        for key_id in wanted:
            await harness.store.keys.change_state(key_id, DISABLE, now=1)
        listed = await walk(harness, 3, thread_id=thread_id, state=KeyState.DISABLED)
        assert {record.key_id for record in listed} == wanted

    @pytest.mark.parametrize("thread_id", [None, "room:1"])
    async def test_foreign_cursors(self, harness: Harness, thread_id: str | None) -> None:
        """A cursor that was made up or belongs to other filters is refused."""
        await create(harness, *["room:1"] * 9)
        keys = harness.store.keys
        page = await keys.list_keys(thread_id=thread_id, state=None, limit=2, cursor=None)
        assert page.cursor is not None
        other = None if thread_id else "room:1"
        for cursor in ("x", "ü", "AAAA", "e30", "WzFd", page.cursor[:-3], "A" * 5000):
            with pytest.raises(InvalidParameter):
                await keys.list_keys(thread_id=thread_id, state=None, limit=2, cursor=cursor)
        with pytest.raises(InvalidParameter):
            await keys.list_keys(thread_id=other, state=None, limit=2, cursor=page.cursor)
        with pytest.raises(InvalidParameter):
            await keys.list_keys(thread_id=thread_id, state=KeyState.ENABLED, limit=2, cursor=page.cursor)


class TestCensus:
    """``KeyStore.census``."""

    async def test_counts_live_keys(self, harness: Harness) -> None:
        """Empty stores count nothing; a destroyed key is not counted."""
        assert await harness.store.keys.census() == {}
        await harness.store.registry.initialise(new_kek())
        records = await create(harness, *[f"room:{n}" for n in range(30)])
        harness.destroy(records[0].key_id)
        assert await harness.store.keys.census() == {1: 29}


class TestChanges:
    """``KeyStore.changes``."""

    async def test_starts_at_the_end(self, harness: Harness) -> None:
        """The first read has no notices and is complete, on an empty stream as on a used one."""
        empty = await harness.store.keys.changes(None, 0)
        key_id = await key_in(harness, KeyState.DISABLED)
        used = await harness.store.keys.changes(None, 5)
        for start in (empty, used):
            assert start.complete
            assert start.key_ids == set()
        assert (await harness.store.keys.changes(empty.cursor, 0)).key_ids == {key_id}
        assert (await harness.store.keys.changes(used.cursor, 0)).key_ids == set()

    async def test_wakes_up_for_a_notice(self, harness: Harness) -> None:
        """A reader that waits has the notice as soon as it is there."""
        key_id = await key_in(harness, KeyState.ENABLED)
        start = await harness.store.keys.changes(None, 0)
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(harness.store.keys.changes(start.cursor, 60))
            await asyncio.sleep(0.05)
            tasks.create_task(harness.store.keys.change_state(key_id, DISABLE, now=1))
        assert reader.result().key_ids == {key_id}

    async def test_nothing_new(self, harness: Harness) -> None:
        """A wait that ends without a notice is complete, and its cursor goes on."""
        start = await harness.store.keys.changes(None, 0)
        waited = await harness.store.keys.changes(start.cursor, 0.01)
        assert waited.complete
        assert waited.key_ids == set()
        key_id = await key_in(harness, KeyState.DISABLED)
        assert (await harness.store.keys.changes(waited.cursor, 0)).key_ids == {key_id}

    async def test_says_when_notices_were_lost(self, harness: Harness) -> None:
        """Who reads after more notices than are kept is told that some are missing."""
        start = await harness.store.keys.changes(None, 0)
        await harness.flood_notices()
        late = await harness.store.keys.changes(start.cursor, 0)
        assert not late.complete
        assert (await harness.store.keys.changes(late.cursor, 0)).complete


class TestRegistry:
    """``KekRegistry``."""

    async def test_is_made_once(self, harness: Harness) -> None:
        """Of many that start at once, one makes the registry and all see it."""
        registry = harness.store.registry
        assert await registry.load() is None
        views = await asyncio.gather(*[registry.initialise(new_kek(version)) for version in range(1, 21)])
        assert all(view == views[0] for view in views)
        view = await registry.load()
        assert view == views[0]
        (kek,) = view.keks.values()
        assert (kek.version, kek.state, kek.activated_at) == (view.active, KekState.ACTIVE, kek.created_at)
        assert len(view.store_id) == 32

    async def test_counts_wraps(self, harness: Harness) -> None:
        """Wrap counts add up by version."""
        registry = harness.store.registry
        assert await registry.wraps() == {}
        assert await registry.reserve_wraps(1, 65_536) == 65_536
        assert await registry.reserve_wraps(1, 1) == 65_537
        assert await registry.reserve_wraps(2, 7) == 7
        assert await registry.wraps() == {1: 65_537, 2: 7}


class TestHeartbeats:
    """``Heartbeats``."""

    async def test_beat_leave_and_forget(self, harness: Harness) -> None:
        """The last beat of each instance is kept until it leaves or has been silent for a day."""
        beats = harness.store.heartbeats
        old = Heartbeat("old", 1000.0, 900.0, "0.1", (1,), 1, "aa")
        new = Heartbeat("new", 1000.0 + 90_000, 900.5, "0.2", (1, 2), 2, "bb")
        assert await beats.live() == []
        await beats.beat(old)
        later = replace(old, at=1001.0)
        await beats.beat(later)
        assert await beats.live() == [later]
        await beats.beat(new)
        assert await beats.live() == [new]
        await beats.leave("new")
        assert await beats.live() == []


class TestHealth:
    """``StoreHealth``."""

    async def test_is_fit(self, harness: Harness) -> None:
        """A store that is set up as the documentation says has no problem, and says what it is."""
        status = await harness.store.health.check()
        assert (status.reachable, status.problems) == (True, ())
        assert status.facts["server"]
        assert harness.store.health.status == status

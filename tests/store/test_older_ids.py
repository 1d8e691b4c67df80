"""Keys under ids of the older service, over every store: they do not live in their thread's slot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from progressdb_kms.domain.errors import InternalError, StaleKek, StoreUnavailable
from progressdb_kms.domain.keys import DekRecord, KeyState, StateChange, locate, slot_tag
from progressdb_kms.store.redis import keys as redis_keys
from tests.store.conftest import Harness, MemoryHarness, RedisHarness, new_dek, new_kek
from tests.store.servers import Server

NOW = 1_700_000_000
OLD = "k_1712345678901234567"
SECOND = "k_1712345678901234999"
NEIGHBOUR = next(name for n in range(100_000) if slot_tag(name := f"n:{n}") == locate(OLD))
"""A thread that lives where the older key does."""


async def made(harness: Harness, thread_id: str, *key_ids: str) -> list[DekRecord]:
    """Make keys under ids, an empty one for one of ours."""
    found = await harness.store.keys.create([new_dek(thread_id, key_id=key_id) for key_id in key_ids])
    records = [record for record in found if isinstance(record, DekRecord)]
    assert len(records) == len(key_ids)
    return records


async def listed(harness: Harness, thread_id: str | None, limit: int = 100) -> list[str]:
    """Return the ids of a thread's keys, page by page."""
    found: list[str] = []
    cursor = None
    while True:
        page = await harness.store.keys.list_keys(thread_id=thread_id, state=None, limit=limit, cursor=cursor)
        found += [record.key_id for record in page.records]
        cursor = page.cursor
        if cursor is None:
            return found


async def state(harness: Harness, key_id: str) -> KeyState:
    """Return a key's state."""
    (record,) = await harness.store.keys.get([key_id])
    assert record is not None
    return record.state


@pytest.mark.parametrize("thread", ["room:1", NEIGHBOUR, OLD])
async def test_created_found_and_counted(harness: Harness, thread: str) -> None:
    """It is a thread's key among others: numbered with them, listed with them, in the census, and found."""
    await harness.store.registry.initialise(new_kek())
    ((first,), (older,), (last,)) = [await made(harness, thread, key_id) for key_id in ("", OLD, "")]
    assert [record.version for record in (first, older, last)] == [1, 2, 3]
    assert (older.key_id, older.state) == (OLD, KeyState.ENABLED)
    assert await harness.store.keys.get([OLD]) == [older]
    assert await made(harness, thread, OLD) == [older]
    for limit in (1, 2, 100):
        assert await listed(harness, thread, limit) == [first.key_id, OLD, last.key_id]
    assert sorted(await listed(harness, None)) == sorted([first.key_id, OLD, last.key_id])
    assert await harness.store.keys.census() == {1: 3}
    assert await harness.store.keys.reserve_uses({OLD: 5}) == {OLD: 5}


async def test_results_stand_in_order(harness: Harness) -> None:
    """Ids of both forms in one call are each answered in their place, an id given twice too."""
    ids = ["", OLD, "", SECOND, "", "k_7", OLD]
    records = await made(harness, "a", *ids)
    assert [record.key_id for record in records if record.key_id in ids] == [OLD, SECOND, "k_7", OLD]
    assert records[1] == records[6]
    assert sorted({record.version for record in records}) == [1, 2, 3, 4, 5, 6]


async def test_many_at_once_make_one(harness: Harness) -> None:
    """The same id sent at once is one record with one version."""
    results = await asyncio.gather(
        *(harness.store.keys.create([new_dek("a", key_id=OLD)]) for _ in range(20))
    )
    assert len({record.wrapped for (record,) in results if isinstance(record, DekRecord)}) == 1
    assert {record.version for (record,) in results if isinstance(record, DekRecord)} == {1}
    assert await listed(harness, "a") == [OLD]


async def test_another_threads_id_is_refused(harness: Harness) -> None:
    """The record stays, and no listing shows it under the other thread."""
    (record,) = await made(harness, "a", OLD)
    (refused,) = await harness.store.keys.create([new_dek("b", key_id=OLD)])
    assert isinstance(refused, InternalError)
    assert await harness.store.keys.get([OLD]) == [record]
    assert (await listed(harness, "a"), await listed(harness, "b")) == ([OLD], [])
    both = await harness.store.keys.create([new_dek("c", key_id=SECOND), new_dek("d", key_id=SECOND)])
    assert [isinstance(each, InternalError) for each in both] == [False, True]
    assert (await listed(harness, "c"), await listed(harness, "d")) == ([SECOND], [])
    # Nor does the other thread's next DEK change it.
    await harness.store.keys.rotate(new_dek("d"))
    assert await state(harness, SECOND) is KeyState.ENABLED


async def test_the_floor_of_its_own_slot_holds(harness: Harness) -> None:
    """A wrap below it is stale, a replay is not."""
    harness.set_floor(NEIGHBOUR, 2)
    (stale,) = await harness.store.keys.create([new_dek("a", key_id=OLD)])
    assert isinstance(stale, StaleKek)
    assert await listed(harness, "a") == []
    (right,) = await harness.store.keys.create([new_dek("a", key_id=OLD, kek_version=2)])
    assert await harness.store.keys.create([new_dek("a", key_id=OLD)]) == [right]


async def test_a_destroyed_one_is_not_revived(harness: Harness) -> None:
    """A replay gives the tombstone."""
    await made(harness, "a", OLD)
    harness.destroy(OLD)
    (again,) = await made(harness, "a", OLD)
    assert (again.state, again.wrapped) == (KeyState.DESTROYED, b"")


@pytest.mark.parametrize("thread", ["room:1", NEIGHBOUR])
async def test_the_threads_next_dek_supersedes_it(harness: Harness, thread: str) -> None:
    """It only decrypts from then on, with a notice; what rests comes back so; other threads' keys stay."""
    await made(harness, thread, OLD, SECOND, "")
    await made(harness, "b", "k_7")
    await harness.store.keys.change_state(SECOND, StateChange.DISABLE, now=NOW)
    cursor = (await harness.store.keys.changes(None, 0)).cursor
    record = await harness.store.keys.rotate(new_dek(thread))
    assert record.version == 4
    assert [await state(harness, each) for each in (OLD, "k_7")] == [KeyState.DECRYPT_ONLY, KeyState.ENABLED]
    assert OLD in (await harness.store.keys.changes(cursor, 0)).key_ids
    back = await harness.store.keys.change_state(SECOND, StateChange.ENABLE, now=NOW)
    assert back.state is KeyState.DECRYPT_ONLY
    await harness.store.keys.rotate(new_dek(thread))
    assert await state(harness, OLD) is KeyState.DECRYPT_ONLY


async def test_a_replayed_rotation_leaves_what_was_moved_in_since(harness: Harness) -> None:
    """It supersedes only what was there before the DEK that it made."""
    dek = new_dek("a")
    await harness.store.keys.rotate(dek)
    await made(harness, "a", OLD)
    await harness.store.keys.rotate(dek)
    assert await state(harness, OLD) is KeyState.ENABLED


async def test_hundreds_in_one_thread(harness: Harness) -> None:
    """All of them are superseded."""
    ids = [f"k_{n}" for n in range(600)]
    await made(harness, "a", *ids)
    await harness.store.keys.rotate(new_dek("a"))
    assert {await state(harness, each) for each in ids} == {KeyState.DECRYPT_ONLY}


def ask(harness: Harness, *command: str | int) -> Any:
    """Do something behind a server's back; the memory store has no parts that could be torn."""
    assert isinstance(harness, RedisHarness | MemoryHarness)
    return harness.server.ask(*command) if isinstance(harness, RedisHarness) else None


async def test_broken_off_before_its_record(harness: Harness) -> None:
    """An entry of the index whose record is not there is no key, disturbs nothing, and is taken up again."""
    index = f"kms:{{{slot_tag('a')}}}:thread:a"
    ask(harness, "ZADD", index, 1, OLD)
    assert await listed(harness, "a") == []
    record = await harness.store.keys.rotate(new_dek("a"))
    assert await listed(harness, "a") == [record.key_id]
    await made(harness, "a", OLD)
    assert sorted(await listed(harness, "a")) == sorted([OLD, record.key_id])
    if isinstance(harness, RedisHarness):
        assert [found.version for found in await harness.store.keys.get([OLD]) if found] == [1]


async def test_an_index_that_lost_its_entry_gets_it_back(harness: Harness) -> None:
    """Whoever moves the key in again mends the listing, with the version that the record has."""
    for key_id in ("", OLD, ""):
        await made(harness, "a", key_id)
    before = await listed(harness, "a")
    ask(harness, "ZREM", f"kms:{{{slot_tag('a')}}}:thread:a", OLD)
    await made(harness, "a", OLD)
    assert await listed(harness, "a") == before
    assert before[1] == OLD


async def test_rotation_broken_off_between_the_two_slots(
    own_server: Callable[..., Server], opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next DEK is there, the older one still encrypts, and nobody was answered: a repeat ends it."""
    store = await opened(own_server("redis").url)
    await store.keys.create([new_dek("a", key_id=OLD)])

    async def dies(*_: object) -> None:
        raise StoreUnavailable("died")

    dek = new_dek("a")
    with monkeypatch.context() as patched:
        patched.setattr(redis_keys, "supersede_older", dies)
        with pytest.raises(StoreUnavailable, match="died"):
            await store.keys.rotate(dek)
    assert [found.state for found in await store.keys.get([OLD, dek.key_id])] == [KeyState.ENABLED] * 2
    await store.keys.rotate(dek)
    found = [record.state for record in await store.keys.get([OLD, dek.key_id])]
    assert found == [KeyState.DECRYPT_ONLY, KeyState.ENABLED]


async def test_always_late(
    own_server: Callable[..., Server], opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where notices always are too old, the older key's state does not change, and the caller is told so."""
    monkeypatch.setattr("progressdb_kms.store.redis.older.NOTICE_MAX_AGE_MS", -1)
    store = await opened(own_server("redis").url, command_timeout=1.5)
    await store.keys.create([new_dek("a", key_id=OLD)])
    with pytest.raises(StoreUnavailable, match="in time"):
        await store.keys.rotate(new_dek("a"))
    assert [found.state for found in await store.keys.get([OLD])] == [KeyState.ENABLED]


async def test_every_key_of_a_script_lies_in_one_slot(
    own_server: Callable[..., Server], opened: Callable[..., Any]
) -> None:
    """What belongs to the key has the tag of its id, its thread's index the thread's."""
    server = own_server("redis")
    store = await opened(server.url)
    await store.keys.create([new_dek("a", key_id=OLD)])
    names = {name.decode() for name in server.ask("KEYS", "kms:*")}
    own, thread = f"kms:{{{locate(OLD)}}}:", f"kms:{{{slot_tag('a')}}}:"
    assert names == {f"{own}dek:{OLD}", f"{own}kek:1", f"{thread}thread:a", f"{thread}ctl"}

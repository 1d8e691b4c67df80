"""``KeyStore.rotate`` over every store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from progressdb_kms.domain.errors import InternalError, StaleKek, StoreUnavailable
from progressdb_kms.domain.keys import DekRecord, KeyState, NewDek, StateChange, slot_tag
from progressdb_kms.store.redis.thread_rotation import ThreadRotation
from tests.store.conftest import Harness, new_dek, new_kek
from tests.store.servers import Server

NOW = 1_700_000_000


async def _make(harness: Harness, *deks: NewDek) -> list[DekRecord]:
    return [record for record in await harness.store.keys.create(deks) if isinstance(record, DekRecord)]


async def _state(harness: Harness, key_id: str) -> KeyState:
    (record,) = await harness.store.keys.get([key_id])
    assert record is not None
    return record.state


async def test_older_keys_only_decrypt(harness: Harness) -> None:
    """All enabled keys of the thread are superseded, those of other threads are not; notices go first."""
    await harness.store.registry.initialise(new_kek())
    first, second, other = await _make(harness, new_dek("a"), new_dek("a"), new_dek("b"))
    cursor = (await harness.store.keys.changes(None, 0)).cursor
    record = await harness.store.keys.rotate(new_dek("a"))
    assert (record.version, record.state) == (3, KeyState.ENABLED)
    assert await harness.store.keys.get([record.key_id]) == [record]
    for key_id in (first.key_id, second.key_id):
        assert await _state(harness, key_id) is KeyState.DECRYPT_ONLY
    assert await _state(harness, other.key_id) is KeyState.ENABLED
    changes = await harness.store.keys.changes(cursor, 0)
    assert changes.key_ids == {first.key_id, second.key_id}
    assert await harness.store.keys.census() == {1: 4}


async def test_thread_with_many_keys(harness: Harness) -> None:
    """A thread that was given hundreds of keys is rotated like any other."""
    await _make(harness, *(new_dek("a") for _ in range(600)))
    record = await harness.store.keys.rotate(new_dek("a"))
    assert record.version == 601
    page = await harness.store.keys.list_keys(thread_id="a", state=KeyState.ENABLED, limit=1000, cursor=None)
    assert [found.key_id for found in page.records] == [record.key_id]


async def _enabled(harness: Harness, thread_id: str) -> list[str]:
    page = await harness.store.keys.list_keys(
        thread_id=thread_id, state=KeyState.ENABLED, limit=1000, cursor=None
    )
    return [record.key_id for record in page.records]


async def test_replay_in_a_thread_with_many_keys(harness: Harness) -> None:
    """Keys made since a rotation stay enabled when it is asked for again, however many they are."""
    dek = new_dek("a")
    made = await harness.store.keys.rotate(dek)
    await _make(harness, *(new_dek("a") for _ in range(300)))
    assert await harness.store.keys.rotate(dek) == made
    assert len(await _enabled(harness, "a")) == 301


async def test_floor_holds_in_a_thread_with_many_keys(harness: Harness) -> None:
    """A wrap below the floor supersedes nothing, however many keys there are."""
    await _make(harness, *(new_dek("a") for _ in range(300)))
    harness.set_floor("a", 2)
    with pytest.raises(StaleKek):
        await harness.store.keys.rotate(new_dek("a"))
    assert len(await _enabled(harness, "a")) == 300


async def test_broken_off_between_two_parts(
    own_server: Callable[..., Server], opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever dies in the middle leaves the latest keys enabled, and the thread can be rotated."""
    keys = (await opened(own_server("redis").url)).keys
    made = [record.key_id for record in await keys.create([new_dek("a") for _ in range(600)])]

    async def enabled() -> list[str]:
        page = await keys.list_keys(thread_id="a", state=KeyState.ENABLED, limit=1000, cursor=None)
        return [record.key_id for record in page.records]

    async def dies(*_: object) -> None:
        raise StoreUnavailable("died")

    with monkeypatch.context() as patched:
        patched.setattr(ThreadRotation, "_store", dies)
        with pytest.raises(StoreUnavailable, match="died"):
            await keys.rotate(new_dek("a"))
    left = await enabled()
    assert 0 < len(left) <= 256
    assert left == made[-len(left) :]
    record = await keys.rotate(new_dek("a"))
    assert await enabled() == [record.key_id]


async def test_replay_changes_nothing(harness: Harness) -> None:
    """The same rotation again finds its key, and leaves what has been made since as it is."""
    dek = new_dek("a")
    made = await harness.store.keys.rotate(dek)
    (later,) = await _make(harness, new_dek("a"))
    assert await harness.store.keys.rotate(dek) == made
    assert await _state(harness, later.key_id) is KeyState.ENABLED
    assert await _state(harness, made.key_id) is KeyState.ENABLED


@pytest.mark.parametrize("change", [StateChange.DISABLE, StateChange.SCHEDULE_DESTRUCTION])
async def test_resting_keys_come_back_to_decrypt_only(harness: Harness, change: StateChange) -> None:
    """A key that rests while its thread is rotated can't encrypt when it is enabled again."""
    (record,) = await _make(harness, new_dek("a"))
    await harness.store.keys.change_state(record.key_id, change, now=NOW, destroy_at=NOW + 10**9)
    await harness.store.keys.rotate(new_dek("a"))
    if change is StateChange.SCHEDULE_DESTRUCTION:
        await harness.store.keys.change_state(record.key_id, StateChange.CANCEL_DESTRUCTION, now=NOW)
    back = await harness.store.keys.change_state(record.key_id, StateChange.ENABLE, now=NOW)
    assert back.state is KeyState.DECRYPT_ONLY


async def test_floor_holds(harness: Harness) -> None:
    """A wrap below the floor is refused, and nothing is superseded by it."""
    (record,) = await _make(harness, new_dek("a"))
    harness.set_floor("a", 2)
    with pytest.raises(StaleKek):
        await harness.store.keys.rotate(new_dek("a"))
    assert await _state(harness, record.key_id) is KeyState.ENABLED


async def test_id_of_another_thread_is_refused(harness: Harness) -> None:
    """A key id that another thread of the slot has is not taken over."""
    (record,) = await _make(harness, new_dek("room:0"))
    with pytest.raises((InternalError, ValueError)):
        await harness.store.keys.rotate(new_dek(_same_slot("room:0"), key_id=record.key_id))


def _same_slot(thread_id: str) -> str:
    return next(
        name
        for name in (f"other:{number}" for number in range(100_000))
        if slot_tag(name) == slot_tag(thread_id)
    )


async def test_rotations_at_once_leave_one_enabled(harness: Harness) -> None:
    """However many rotate a thread at the same time, one key is enabled after it, the last one."""
    await _make(harness, new_dek("a"))
    made = await asyncio.gather(*(harness.store.keys.rotate(new_dek("a")) for _ in range(5)))
    page = await harness.store.keys.list_keys(thread_id="a", state=None, limit=100, cursor=None)
    enabled = [record for record in page.records if record.state is KeyState.ENABLED]
    assert [record.version for record in enabled] == [6]
    assert sorted(record.version for record in made) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [1, 300])
async def test_always_late(
    own_server: Callable[..., Server],
    opened: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """Where notices always are too old, a rotation ends with an error, and has changed nothing."""
    monkeypatch.setattr("progressdb_kms.store.redis.thread_rotation.NOTICE_MAX_AGE_MS", -1)
    keys = (await opened(own_server("redis").url, command_timeout=1.5)).keys
    await keys.create([new_dek("a") for _ in range(number)])
    with pytest.raises(StoreUnavailable, match="in time"):
        await keys.rotate(new_dek("a"))
    page = await keys.list_keys(thread_id="a", state=KeyState.ENABLED, limit=1000, cursor=None)
    assert len(page.records) == number

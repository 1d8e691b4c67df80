"""Fetching cold keys: shared, cancelled, slow, stale, worn out."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.domain import errors
from progressdb_kms.domain.envelope import USES_LIMIT, USES_WARN
from progressdb_kms.domain.keys import KeyState, StateChange
from progressdb_kms.usecases.keycache import FREE_USES
from progressdb_kms.usecases.loading import AWAY_FOR
from tests.unit.helpers import World, make_world, write_keks


async def cold(world: World, thread_id: str = "room:1") -> str:
    """Make a key that is not in memory."""
    key_id = await world.key(thread_id)
    world.cache.restart()
    world.clock.at += 10
    world.vouch()
    world.store.calls.clear()
    return key_id


async def stirred() -> None:
    """Let every task run as far as it gets."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_cold_key_is_fetched_once_and_stays(world: World) -> None:
    """The first request loads it, the next finds it in memory."""
    key_id = await cold(world)
    await world.encrypt(key_id)
    await world.encrypt(key_id)
    assert world.store.calls["get"] == 1
    assert world.watcher.counts["miss"] == 1


async def test_calls_at_the_same_time_share_a_load(world: World) -> None:
    """Fifty requests for one cold key are one question to the store."""
    key_id = await cold(world)
    world.store.gate = asyncio.Event()
    tasks = [asyncio.create_task(world.encrypt(key_id)) for _ in range(50)]
    await stirred()
    world.store.gate.set()
    answers = await asyncio.gather(*tasks)
    assert len({answer["ciphertext"] for answer in answers}) == 50
    assert world.store.calls["get"] == 1


async def test_a_cancelled_load_leaves_nobody_waiting(world: World) -> None:
    """Who shares the load of a request that goes away gets a retryable error; who comes later loads anew."""
    key_id = await cold(world)
    world.store.gate = asyncio.Event()
    owner = asyncio.create_task(world.encrypt(key_id))
    await stirred()
    sharer = asyncio.create_task(world.encrypt(key_id))
    await stirred()
    owner.cancel()
    with pytest.raises(errors.StoreUnavailable):
        await sharer
    with pytest.raises(asyncio.CancelledError):
        await owner
    world.store.gate.set()
    assert await world.encrypt(key_id)


async def test_a_cancelled_sharer_harms_nobody(world: World) -> None:
    """The load goes on for the others."""
    key_id = await cold(world)
    world.store.gate = asyncio.Event()
    owner = asyncio.create_task(world.encrypt(key_id))
    await stirred()
    sharer = asyncio.create_task(world.encrypt(key_id))
    await stirred()
    sharer.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await sharer
    world.store.gate.set()
    assert await owner


async def test_a_shared_error_is_not_one_object(world: World) -> None:
    """Each caller raises its own."""
    world.store.gate = asyncio.Event()
    tasks = [asyncio.create_task(world.encrypt("k_" + "A" * 28)) for _ in range(3)]
    await stirred()
    world.store.gate.set()
    raised = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(error, errors.KeyNotFound) for error in raised)
    assert len({id(error) for error in raised}) == 3


async def test_an_answer_over_a_second_old_is_asked_again_once(world: World) -> None:
    """What a slow store said says nothing about now; twice slow is store_unavailable."""
    key_id = await cold(world)
    delays = [1.5, 0.0]

    def late() -> None:
        world.clock.at += delays.pop(0)

    world.store.late["get"] = late
    assert await world.encrypt(key_id)
    assert world.store.calls["get"] == 2
    world.cache.forget([key_id])
    delays = [1.5, 1.5]
    with pytest.raises(errors.StoreUnavailable, match="too slowly"):
        await world.encrypt(key_id)


async def test_a_key_fetched_before_a_slow_reservation_is_fetched_again(world: World) -> None:
    """A state that has become over a second old while uses were reserved is not answered with."""
    key_id = await cold(world)
    world.cache.forget([key_id])  # noticed: serves requests, but is not cached

    def slow() -> None:
        record = world.store._records[key_id]
        world.store._records[key_id] = replace(record, state=KeyState.DISABLED)
        world.clock.at += 1.5

    world.store.late["reserve_uses"] = slow
    items = [{"key_id": key_id, "plaintext": b""}] * (FREE_USES + 1)
    answer = await world.answer(world.hot.encrypt_batch, {"items": items})
    assert {result.get("error", {}).get("code") for result in answer["results"]} == {"key_disabled"}


async def test_an_away_store_is_store_unavailable(world: World) -> None:
    """A cold key can't be had, and is once the store is back."""
    key_id = await cold(world)
    world.store.down = True
    with pytest.raises(errors.StoreUnavailable, match="down"):
        await world.encrypt(key_id)
    world.store.down = False
    await world.encrypt(key_id)


async def test_stale_keys_serve_only_while_the_store_is_away(world: World) -> None:
    """Away, a cached key goes on for max_stale after the last read; then no more."""
    key_id = await cold(world)
    sealed = (await world.encrypt(key_id))["ciphertext"]
    world.store.down = True
    world.clock.at += 29
    world.loader.tick()
    assert await world.encrypt(key_id)
    assert await world.decrypt(key_id, sealed)
    assert world.watcher.counts["stale"] >= 2
    world.clock.at += 1.1
    with pytest.raises(errors.StoreUnavailable):
        await world.encrypt(key_id)


async def test_who_slept_does_not_take_the_store_for_away(world: World) -> None:
    """A call whose time was over when the process woke says nothing of the store; nor does an old failure."""
    key_id = await cold(world)
    await world.encrypt(key_id)
    world.loader.tick()
    began = world.clock()
    await world.store.change_state(key_id, StateChange.DISABLE, now=0)
    world.clock.at += 1.1
    world.loader.store_failed(began)
    assert not world.loader.store_away
    with pytest.raises(errors.KeyDisabled):
        await world.encrypt(key_id)
    world.clock.at += 0.1
    world.loader.store_failed(world.clock() - 0.05)
    assert world.loader.store_away
    world.loader.store_answered()
    assert not world.loader.store_away
    world.loader.store_failed(world.clock())
    world.clock.at += AWAY_FOR + 0.1
    assert not world.loader.store_away


async def test_max_stale_zero_serves_nothing(tmp_path: Path) -> None:
    """The operator's choice holds."""
    world = await make_world(tmp_path, max_stale=0)
    key_id = await world.key()
    world.store.down = True
    world.clock.at += 1.1
    world.loader.tick()
    with pytest.raises(errors.StoreUnavailable):
        await world.encrypt(key_id)


@pytest.mark.parametrize("key_id", ["k_" + "A" * 28, "k_1", "", "x" * 5000])
async def test_an_unknown_key_is_not_found(world: World, key_id: str) -> None:
    """Well-formed or not; the id is not in the message."""
    with pytest.raises(errors.KeyNotFound) as raised:
        await world.encrypt(key_id)
    assert not key_id or key_id not in raised.value.detail


async def test_a_destroyed_key_is_destroyed(world: World) -> None:
    """Its blob is gone; the answer says so, and the thread's permission still counts."""
    key_id = await cold(world, "mail:1")
    world.store._records[key_id] = replace(
        world.store._records[key_id], wrapped=b"", state=KeyState.DESTROYED
    )
    with pytest.raises(errors.KeyDestroyed):
        await world.encrypt(key_id)
    with pytest.raises(errors.PermissionDenied):
        await world.encrypt(key_id, name="room")


@pytest.mark.parametrize("forgery", ["copied", "thread", "flipped", "empty", "format"])
async def test_a_forged_record_does_not_unwrap(world: World, forgery: str) -> None:
    """Whoever writes the store can't make one key pass for another; it is counted, and others still serve."""
    key_id, other = await cold(world), await cold(world, "mail:1")
    records = world.store._records
    blob = records[key_id].wrapped
    changes: dict[str, Any] = {
        "copied": {"wrapped": records[other].wrapped},
        "thread": {"thread_id": "room:2"},
        "flipped": {"wrapped": blob[:-1] + bytes([blob[-1] ^ 1])},
        "empty": {"wrapped": b""},
        "format": {"wrapped": b"\x02" + blob[1:]},
    }
    records[key_id] = replace(records[key_id], **changes[forgery])
    with pytest.raises(errors.WrappedKeyInvalid):
        await world.encrypt(key_id)
    assert world.watcher.counts["invalid"] == 1
    assert await world.encrypt(other)


async def test_a_blob_under_an_unknown_kek_is_unavailable(world: World) -> None:
    """The header's version is tried, and no other."""
    key_id = await cold(world)
    record = world.store._records[key_id]
    world.store._records[key_id] = replace(record, wrapped=b"\x01\x00\x00\x09" + record.wrapped[4:])
    with pytest.raises(errors.KekUnavailable, match="version 9"):
        await world.encrypt(key_id)
    assert world.watcher.counts["invalid"] == 0


async def test_a_kek_that_does_not_match_unwraps_nothing(world: World) -> None:
    """A version that is not what the registry says is not used to unwrap."""
    key_id = await cold(world)
    write_keks(world.kek_path, v1="another key")
    world.source.reload({})
    await world.keks.refresh()
    with pytest.raises(errors.KekUnavailable):
        await world.encrypt(key_id)


async def test_a_worn_key_is_refused_at_the_limit(world: World) -> None:
    """Reservations stop at the limit: what was reserved below it may be spent, nothing after."""
    key_id = await cold(world)
    world.store._records[key_id] = replace(world.store._records[key_id], uses=USES_LIMIT - 1)
    batch = {"items": [{"key_id": key_id, "plaintext": b""}] * (FREE_USES + 1)}
    answer = await world.answer(world.hot.encrypt_batch, batch)
    assert "ciphertext" in answer["results"][0]
    assert world.watcher.counts["warning dek"] == 1
    held = world.cache.lookup(key_id)
    assert held is not None
    held.spend(held.uses_left)
    with pytest.raises(errors.KeyExhausted):
        await world.encrypt(key_id)
    with pytest.raises(errors.KeyExhausted):
        await world.encrypt(await worn(world))


async def worn(world: World) -> str:
    """Make a cold key whose record says that it is worn out."""
    key_id = await cold(world, "room:2")
    world.store._records[key_id] = replace(world.store._records[key_id], uses=USES_LIMIT)
    return key_id


async def test_reservations_past_the_threshold_warn(world: World) -> None:
    """Operators hear of it long before the limit."""
    key_id = await cold(world)
    world.store._records[key_id] = replace(world.store._records[key_id], uses=USES_WARN)
    await world.answer(
        world.hot.encrypt_batch, {"items": [{"key_id": key_id, "plaintext": b""}] * (FREE_USES + 1)}
    )
    assert world.watcher.counts["warning dek"] == 1


async def test_an_uncached_key_reserves_what_it_needs_only(world: World) -> None:
    """A key that serves one request burns no block; small uses are owed, and reported later."""
    key_id = await cold(world)
    world.cache.forget([key_id])
    await world.answer(world.hot.encrypt_batch, {"items": [{"key_id": key_id, "plaintext": b""}] * 300})
    (record,) = await world.store.get([key_id])
    assert record is not None
    owed = world.cache.take_owed().get(key_id, 0)
    assert 300 <= record.uses + owed <= 300 + FREE_USES
    await world.encrypt(key_id)
    assert world.cache.take_owed() == {key_id: 1}


async def test_a_reservation_that_fails_encrypts_nothing(world: World) -> None:
    """Uses are in the store before they are spent, or they are not made."""
    key_id = await cold(world)
    await world.encrypt(key_id)
    held = world.cache.lookup(key_id)
    assert held is not None
    held.spend(held.uses_left)
    world.store.down = True
    with pytest.raises(errors.StoreUnavailable):
        await world.encrypt(key_id)
    assert world.watcher.counts["encrypt"] == 1

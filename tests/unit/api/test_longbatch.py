"""A long batch is worked off in slices: others get their turn, and each slice looks at the world anew."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import msgspec
import pytest

from progressdb_kms.api.call import Call
from progressdb_kms.api.handlers import create_dek_batch, decrypt_batch, encrypt_batch
from progressdb_kms.api.longbatch import SLICE_ITEMS
from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.domain.keys import StateChange
from progressdb_kms.usecases.creation import GROUP
from progressdb_kms.usecases.messages import JSON, MSGPACK
from progressdb_kms.usecases.session import Session
from tests.unit.helpers import World, make_world

ITEMS = 5 * SLICE_ITEMS


@pytest.fixture
async def world(tmp_path: Path) -> World:
    """Put a service together."""
    return await make_world(tmp_path)


def call_of(world: World, items: list[Any], content_type: str = JSON, session: Session | None = None) -> Call:
    """Return a batch's request, whose answer is to be JSON."""
    return Call(
        kms=world.kms,
        hot=world.hot,
        loader=world.loader,
        rotations=world.store.rotation_ledger,
        audit=world.store.audit,
        session=session or world.session("server"),
        request_id="r",
        content_type=content_type,
        accept=JSON,
        body=(msgspec.json if content_type == JSON else msgspec.msgpack).encode({"items": items}),
    )


async def encrypt(world: World, items: list[Any], content_type: str = JSON) -> list[dict[str, Any]]:
    """Encrypt a long batch."""
    answer = await encrypt_batch(call_of(world, items, content_type))
    assert isinstance(answer, list)
    return list(msgspec.json.decode(b"".join(answer))["results"])


async def decrypt(world: World, items: list[Any]) -> list[dict[str, Any]]:
    """Decrypt a long batch."""
    answer = await decrypt_batch(call_of(world, items))
    assert isinstance(answer, list)
    return list(msgspec.json.decode(b"".join(answer))["results"])


@pytest.mark.parametrize("content_type", [JSON, MSGPACK])
async def test_each_item_has_its_result_in_its_place(world: World, content_type: str) -> None:
    """Also where items are bad, and keys are not in memory."""
    key_id = await world.key()
    items: list[Any] = [{"key_id": key_id, "plaintext": b"%d" % number} for number in range(ITEMS)]
    items[SLICE_ITEMS] = 7
    items[2 * SLICE_ITEMS - 1] = {"key_id": "k_" + "A" * 28, "plaintext": b""}
    sealed = await encrypt(world, items, content_type)
    assert {number for number, result in enumerate(sealed) if "error" in result} == {
        SLICE_ITEMS,
        2 * SLICE_ITEMS - 1,
    }
    good = [result for result in sealed if "error" not in result]
    opened = await decrypt(world, [{"key_id": key_id, "ciphertext": each["ciphertext"]} for each in good])
    wanted = [item["plaintext"] for number, item in enumerate(items) if "error" not in sealed[number]]
    assert [msgspec.json.decode(f'"{each["plaintext"]}"', type=bytes) for each in opened] == wanted


async def test_others_get_their_turn(world: World) -> None:
    """Between two slices whatever else is ready runs; a slice is bounded in bytes too."""
    key_id = await world.key()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    other = asyncio.create_task(count())
    await encrypt(world, [{"key_id": key_id, "plaintext": b""}] * ITEMS)
    assert turns >= ITEMS // SLICE_ITEMS
    turns = 0
    await encrypt(world, [{"key_id": key_id, "plaintext": bytes(2**17)}] * 20)
    assert turns >= 10
    other.cancel()


@pytest.mark.parametrize("content_type", [JSON, MSGPACK])
async def test_errors_leave_nothing_for_the_garbage_collector(world: World, content_type: str) -> None:
    """Looking at the errors of 10,000 items, and all that they hold, would take it some 15 ms."""
    mail = await world.key("mail:1")
    items: list[Any] = [
        7,
        {"key_id": "k_" + "A" * 28, "plaintext": b""},
        {"key_id": mail, "plaintext": b""},
        {"key": mail},
    ]
    call = call_of(world, items * SLICE_ITEMS, content_type, world.session("room"))
    await encrypt_batch(call)
    gc.collect()
    gc.disable()
    try:
        await encrypt_batch(call)
        assert gc.collect() < SLICE_ITEMS
    finally:
        gc.enable()


async def test_a_change_in_between_counts(world: World) -> None:
    """A key that is disabled while its batch is under way is refused in the slices that are left."""
    key_id = await world.key()
    await world.encrypt(key_id)
    key = world.cache.lookup(key_id)
    assert key is not None
    left = key.uses_left

    async def disable() -> None:
        while key.uses_left == left:  # noqa: ASYNC110 - the first slice tells nobody that it is done
            await asyncio.sleep(0)
        await world.store.change_state(key_id, StateChange.DISABLE, now=0)
        world.cache.forget([key_id])

    disabling = asyncio.create_task(disable())
    results = await encrypt(world, [{"key_id": key_id, "plaintext": b""}] * ITEMS)
    await disabling
    codes = [result.get("error", {}).get("code") for result in results]
    refused = codes.index("key_disabled")
    assert 0 < refused < ITEMS
    assert codes == [None] * refused + ["key_disabled"] * (ITEMS - refused)


async def test_it_is_charged_as_a_whole(world: World) -> None:
    """Each item beyond the first is an operation more."""
    key_id = await world.key()
    charged: list[int] = []
    session = world.session("server")
    session_class = type("Session", (type(session),), {"charge": lambda _, count: charged.append(count)})
    counted = session_class(session.identity, world.book, world.now)
    await encrypt_batch(call_of(world, [{"key_id": key_id, "plaintext": b""}] * ITEMS, session=counted))
    assert charged == [ITEMS - 1]


async def created(world: World, items: list[Any]) -> list[dict[str, Any]]:
    """Make DEKs in a batch."""
    return list(msgspec.json.decode(await create_dek_batch(call_of(world, items)))["results"])


async def test_deks_are_made_in_slices(world: World) -> None:
    """Each in its place, bad ones and repeated ones too; others get their turn in between."""
    items: list[Any] = [{"thread_id": f"room:{number}"} for number in range(3 * GROUP)]
    items[GROUP] = {"thread_id": ""}
    items[1] = items[-1] = {"thread_id": "room:once", "idempotency_key": "once"}
    results = await created(world, items)
    assert world.store.calls["create"] == 3
    assert [number for number, result in enumerate(results) if "error" in result] == [GROUP]
    assert results[1]["key_id"] == results[-1]["key_id"]
    assert len({result["key_id"] for result in results if "error" not in result}) == len(items) - 2


async def test_what_has_been_made_is_told_though_a_later_slice_fails(world: World) -> None:
    """A store that goes away in between: what is left has its error, and is not tried."""
    world.store.late["create"] = lambda: setattr(world.store, "down", True)
    items: list[Any] = [{"thread_id": "room:1"}] * (3 * GROUP)
    items[-1] = 7
    codes = [result.get("error", {}).get("code") for result in await created(world, items)]
    assert codes == [None] * GROUP + ["store_unavailable"] * (2 * GROUP - 1) + ["invalid_field"]
    assert world.store.calls["create"] == 2
    with pytest.raises(StoreUnavailable):
        await created(world, items)


async def test_an_empty_batch_makes_nothing(world: World) -> None:
    """And is no mistake."""
    assert await created(world, []) == []

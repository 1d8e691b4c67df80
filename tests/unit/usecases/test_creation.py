"""Making DEKs: one by one, many at once, many callers together."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import structlog

from progressdb_kms.domain import errors
from progressdb_kms.domain.envelope import parse_blob
from progressdb_kms.domain.keys import DekRecord, KeyState, locate, new_key_id, slot_tag
from progressdb_kms.usecases.context import Bounds
from progressdb_kms.usecases.creation import GROUP, Order, Wanted, create_deks
from progressdb_kms.usecases.lifecycle import get_key, rewrap
from tests.unit.helpers import World, activate, create


async def test_a_key_is_made(world: World) -> None:
    """The record holds the thread, the maker, the wrap under the active KEK; audited once."""
    record = await create(world)
    assert locate(record.key_id) == slot_tag("room:1")
    assert (record.thread_id, record.version, record.state) == ("room:1", 1, KeyState.ENABLED)
    assert (record.created_by, record.created_at, record.kek_version) == ("dns:server", 1_700_000_000, 1)
    assert parse_blob(record.wrapped).kek_version == 1
    (event,) = world.trail.events
    assert (event.action, event.outcome, event.identity) == ("key.create", "ok", "dns:server")
    assert (event.key_id, event.thread_id, event.request_id) == (record.key_id, "room:1", "r")


async def test_a_second_create_makes_another_key(world: World) -> None:
    """Without an idempotency key each call makes one; the thread's other keys stay enabled."""
    one, two = await create(world), await create(world)
    assert one.key_id != two.key_id
    assert (one.version, two.version) == (1, 2)
    assert (await get_key(world.kms, world.session(), one.key_id)).state is KeyState.ENABLED


async def test_the_same_idempotency_key_finds_the_same_key(world: World) -> None:
    """Again, after a rewrap, and within one batch; from another identity or thread it is another key."""
    first = await create(world, key="once")
    assert await create(world, key="once") == first
    wanted = [Wanted("room:1", "once"), Wanted("room:1", "twice"), Wanted("room:1", "twice")]
    results = await create_deks(world.kms, world.session(), wanted, "r")
    assert results[0] == first
    assert results[1] == results[2]
    await activate(world)
    await world.keks.refresh()
    await rewrap(world.kms, world.session("operator"), first.key_id, "r")
    again = await create(world, key="once")
    assert again.key_id == first.key_id
    assert again.kek_version == 2
    others = [await create(world, key="once", name="operator"), await create(world, "room:2", "once")]
    assert len({first.key_id, *(other.key_id for other in others)}) == 3


async def test_a_replay_encrypts_with_the_first_key(world: World) -> None:
    """The second create's own DEK is thrown away: what the first encrypted, the second's caller decrypts."""
    first = await create(world, key="once")
    sealed = (await world.encrypt(first.key_id))["ciphertext"]
    await create(world, key="once")
    assert await world.decrypt(first.key_id, sealed)
    world.cache.restart()
    assert await world.decrypt(first.key_id, sealed)


async def test_a_replay_of_a_destroyed_key_says_so(world: World) -> None:
    """A destroyed key does not come back by a retry."""
    first = await create(world, key="once")
    world.store._records[first.key_id] = replace(first, wrapped=b"", state=KeyState.DESTROYED)
    (result,) = await create_deks(world.kms, world.session(), [Wanted("room:1", "once")], "r")
    assert isinstance(result, errors.KeyDestroyed)


async def test_errors_stay_in_their_places(world: World) -> None:
    """One bad item of a batch is an error where it stands."""
    wanted: list[Any] = [
        Wanted("room:1"),
        errors.InvalidField("bad"),
        Wanted(""),
        Wanted("mail:1"),
        Wanted("room:2", "a b"),
        Wanted("room:2", ""),
        Wanted("room:3", "ok"),
    ]
    results = await create_deks(world.kms, world.session("room"), wanted, "r")
    assert [getattr(result, "code", None) for result in results] == [
        None,
        "invalid_field",
        "invalid_thread_id",
        "permission_denied",
        "invalid_header",
        "invalid_header",
        None,
    ]
    assert world.trail.said() == [("key.create", "ok")] * 2
    assert await create_deks(world.kms, world.session(), [], "r") == []


async def test_creating_needs_a_grant_and_a_bounded_batch(world: World) -> None:
    """Refused as a whole, and nothing is stored."""
    with pytest.raises(errors.PermissionDenied):
        await create_deks(world.kms, world.session("stranger"), [Wanted("room:1")], "r")
    with pytest.raises(errors.BatchTooLarge):
        await create_deks(world.kms, world.session(), [Wanted("t")] * (Bounds().batch_items + 1), "r")
    assert not world.store.calls["create"]


async def test_a_stale_kek_is_refreshed_and_wrapped_again(world: World) -> None:
    """An instance that slept through a rotation learns the new KEK and uses it; nothing is audited twice."""
    await activate(world)
    world.store.set_floor("room:1", 2)
    results = await create_deks(world.kms, world.session(), [Wanted("room:1"), Wanted("room:other")], "r")
    stored = [result for result in results if isinstance(result, DekRecord)]
    assert [record.kek_version for record in stored if record.thread_id == "room:1"] == [2]
    assert len(stored) == 2
    assert world.trail.said() == [("key.create", "ok")] * 2
    assert await world.encrypt(stored[0].key_id)


async def test_a_kek_that_stays_stale_is_an_error(world: World) -> None:
    """Where no newer KEK is found the item fails, retryably, and is not stored."""
    world.store.set_floor("room:1", 9)
    (result,) = await create_deks(world.kms, world.session(), [Wanted("room:1")], "r")
    assert isinstance(result, errors.StaleKek)
    assert result.retryable
    assert world.store.calls["create"] == 3
    assert not world.trail.events


async def test_what_was_made_is_audited_though_the_rest_failed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry that can't be read in the middle of a batch does not hide the keys that exist."""
    real = world.store.create

    async def half(deks):
        (first,) = await real(deks[:1])
        return [first, errors.StaleKek()]

    async def away():
        raise errors.StoreUnavailable

    monkeypatch.setattr(world.store, "create", half)
    monkeypatch.setattr(world.kms.keks, "refresh", away)
    wanted = [Wanted("room:1"), Wanted("room:2")]
    first, second = await create_deks(world.kms, world.session(), wanted, "r")
    assert isinstance(first, DekRecord)
    assert isinstance(second, errors.StaleKek)
    assert [event.key_id for event in world.trail.events] == [first.key_id]


async def test_a_replay_is_audited_as_one(world: World) -> None:
    """The log tells a new key from one that was found again."""
    for _ in range(2):
        await create_deks(world.kms, world.session(), [Wanted("room:1", "again")], "r")
    assert [event.detail for event in world.trail.events] == ["", "replay"]


class Gate:
    """Holds calls of a method until it is opened; counts those that wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.open = asyncio.Event()
        self.waiting = 0
        self.sizes: list[int] = []
        real = getattr(owner, name)

        async def held(items: Any) -> Any:
            self.sizes.append(len(items))
            self.waiting += 1
            await self.open.wait()
            self.waiting -= 1
            return await real(items)

        monkeypatch.setattr(owner, name, held)

    async def until(self, waiting: int) -> None:
        """Return once so many wait."""
        while self.waiting != waiting:  # noqa: ASYNC110 - the loop's own turns are what is counted
            await asyncio.sleep(0)


async def make(world: World, thread_id: str, name: str = "server", request_id: str = "r") -> Any:
    """Make a key alone, and return it or its error."""
    try:
        (result,) = await create_deks(world.kms, world.session(name), [Wanted(thread_id)], request_id)
    except errors.KmsError as error:
        return error
    return result


async def test_callers_who_come_meanwhile_share_a_group(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups wait for the store; whoever comes then is made in one more, each with its own names."""
    gate = Gate(monkeypatch, world.store, "create")
    calls = []
    for _ in range(2):
        calls.append(asyncio.create_task(make(world, "room:early")))
        await gate.until(len(calls))
    calls += [asyncio.create_task(make(world, f"room:{n}", request_id=f"r{n}")) for n in range(20)]
    await asyncio.sleep(0)
    assert gate.waiting == 2
    gate.open.set()
    records = await asyncio.gather(*calls)
    assert gate.sizes == [1, 1, 20]
    assert [record.thread_id for record in records[2:]] == [f"room:{n}" for n in range(20)]
    assert len({record.key_id for record in records}) == len({record.wrapped for record in records}) == 22
    told = {(event.key_id, event.request_id) for event in world.trail.events if event.request_id != "r"}
    assert told == {(record.key_id, f"r{n}") for n, record in enumerate(records[2:])}
    for record in records:
        assert await world.decrypt(record.key_id, (await world.encrypt(record.key_id))["ciphertext"])


async def test_nobody_waits_for_groups_that_hang(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store does not answer: whoever comes then waits for it, and not for those who wait already."""
    gate = Gate(monkeypatch, world.store, "create")
    calls = [asyncio.create_task(make(world, "room:1"))]
    await gate.until(1)
    for waiting in (2, 3, 4):
        calls.append(asyncio.create_task(make(world, "room:1")))
        world.kms.creation._late = 0  # as after some time
        await gate.until(waiting)
    gate.open.set()
    assert {type(each) for each in await asyncio.gather(*calls)} == {DekRecord}


async def test_a_group_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One caller's slices are never put together with so many others that the event loop is held."""
    gate = Gate(monkeypatch, world.store, "create")
    many = [Wanted("room:many")] * GROUP
    calls = [asyncio.create_task(create_deks(world.kms, world.session(), many, "r"))]
    calls += [asyncio.create_task(create_deks(world.kms, world.session(), many[:50], "r")) for _ in range(5)]
    gate.open.set()
    assert [len(results) for results in await asyncio.gather(*calls)] == [GROUP] + [50] * 5
    assert max(gate.sizes) <= GROUP
    assert sum(gate.sizes) == GROUP + 250


async def test_each_caller_gets_its_own_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one group one fails for its thread's slot, the others are made."""
    gate = Gate(monkeypatch, world.store, "create")
    early = [asyncio.create_task(make(world, "room:early")) for _ in range(1)]
    await gate.until(1)
    early.append(asyncio.create_task(make(world, "room:early")))
    await gate.until(2)
    world.store.set_floor("room:bad", 9)
    calls = [asyncio.create_task(make(world, thread)) for thread in ("room:1", "room:bad", "room:2")]
    await asyncio.sleep(0)
    gate.open.set()
    one, bad, two = await asyncio.gather(*calls)
    assert isinstance(bad, errors.StaleKek)
    assert (one.thread_id, two.thread_id) == ("room:1", "room:2")
    await asyncio.gather(*early)


async def test_what_fails_a_group_fails_all_of_it_and_not_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No intent can be written: nothing is stored, for none of them; later it goes on."""
    record = world.trail.record
    monkeypatch.setattr(world.trail, "durable", True)

    async def broken(events: Any) -> None:
        raise errors.AuditUnavailable

    monkeypatch.setattr(world.trail, "record", broken)
    found = await asyncio.gather(*(make(world, f"room:{n}") for n in range(3)))
    assert {type(each) for each in found} == {errors.AuditUnavailable}
    assert not world.store.calls["create"]
    monkeypatch.setattr(world.trail, "record", record)
    assert isinstance(await make(world, "room:1"), DekRecord)
    assert world.trail.said() == [("key.create", "intent"), ("key.create", "ok")]


async def test_a_bug_leaves_nobody_waiting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is raised reaches all callers of the group, and the next group is made."""

    async def broken(deks: Any) -> Any:
        raise LookupError

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "create", broken)
        found = await asyncio.gather(*(make(world, f"room:{n}") for n in range(3)), return_exceptions=True)
        assert {type(each) for each in found} == {LookupError}
    assert isinstance(await make(world, "room:1"), DekRecord)


async def test_whoever_is_cancelled_stops_nobody_else(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group goes on: the others have their keys, and what was made for it is written down."""
    gate = Gate(monkeypatch, world.store, "create")
    calls = [asyncio.create_task(make(world, f"room:{n}")) for n in range(3)]
    await gate.until(1)
    calls[0].cancel()
    await asyncio.sleep(0)
    assert calls[0].cancelled()
    assert world.kms.creation._groups
    gate.open.set()
    await world.kms.creation.settle()
    assert not world.kms.creation._groups
    assert [each.thread_id for each in await asyncio.gather(*calls[1:])] == ["room:1", "room:2"]
    assert {event.thread_id for event in world.trail.events} == {"room:0", "room:1", "room:2"}


async def test_a_group_logs_in_nobodys_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is logged while a group is made carries no request id: it would be the first caller's."""
    seen = []
    real = world.store.create

    async def noting(deks: Any) -> Any:
        seen.append(structlog.contextvars.get_contextvars())
        return await real(deks)

    monkeypatch.setattr(world.store, "create", noting)
    with structlog.contextvars.bound_contextvars(request_id="the first caller's"):
        await make(world, "room:1")
    assert seen == [{}]


async def test_whoever_comes_as_the_last_group_ends_is_made(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups' outcomes are in one write of the audit log, so that both end in one pass of the event loop.

    Who comes in that very pass finds two groups that look for nobody any more.
    """
    writing: list[asyncio.Future[None]] = []

    async def record(events: Any) -> None:
        writing.append(asyncio.get_running_loop().create_future())
        await writing[-1]

    async def written(count: int) -> None:
        while len(writing) < count:  # noqa: ASYNC110 - the loop's own turns are what is counted
            await asyncio.sleep(0)
        for each in writing:
            each.set_result(None)
        writing.clear()

    monkeypatch.setattr(world.trail, "durable", True)
    monkeypatch.setattr(world.trail, "record", record)
    creation = world.kms.creation
    told: list[Any] = []
    for number in (1, 2):
        creation.order((_order(number),), told.append)
        await asyncio.sleep(0)
    await written(2)  # intents
    await written(2)  # outcomes
    asyncio.get_running_loop().call_soon(creation.order, (_order(3),), told.append)
    async with asyncio.timeout(5):
        await written(1)
        await written(1)
        await creation.settle()
        await asyncio.sleep(0)
    assert len(told) == 3


async def test_a_share_of_any_size_is_made(world: World) -> None:
    """One that is larger than a group is a group by itself, and holds up nobody."""
    records = await world.kms.creation.make([_order(number) for number in range(GROUP + 1)])
    assert len({record.key_id for record in records if isinstance(record, DekRecord)}) == GROUP + 1


def _order(number: int) -> Order:
    return Order(new_key_id("room:1", (number << 20).to_bytes(17)), "room:1", "dns:server", "r")

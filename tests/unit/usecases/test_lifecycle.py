"""The life of a key: made once, replayed, changed, rewrapped, and each of it written down."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import pytest

from progressdb_kms.domain import errors
from progressdb_kms.domain.envelope import parse_blob
from progressdb_kms.domain.keyring import KekInfo, KekState, kek_id_of
from progressdb_kms.domain.keys import DekRecord, KeyState, StateChange, locate, slot_tag
from progressdb_kms.usecases.context import Bounds
from progressdb_kms.usecases.lifecycle import (
    DAY,
    Wanted,
    change_state,
    create_deks,
    get_key,
    get_wrapped,
    list_keys,
    rewrap,
)
from tests.unit.helpers import World, make_world, write_keks


async def create(
    world: World, thread_id: str = "room:1", key: str | None = None, name: str = "server"
) -> DekRecord:
    """Make or find a key."""
    (record,) = await create_deks(world.kms, world.session(name), [Wanted(thread_id, key)], "r")
    assert isinstance(record, DekRecord)
    return record


async def activate(world: World, version: int = 2) -> None:
    """Rotate the KEK as a rotation does: load, register, activate."""
    write_keks(world.kek_path, v1="kek 1", v2="kek 2")
    world.source.reload(world.keks.required())
    value = await world.source.check_value(version)
    view = world.store._view
    assert view is not None
    info = KekInfo(version, kek_id_of(value), "file", str(version), value, KekState.ACTIVE, 0, 0)
    old = replace(view.keks[1], state=KekState.DECRYPT_ONLY)
    world.store._view = replace(view, keks={1: old, version: info}, active=version, revision=2)


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


async def test_reading_a_key_needs_a_grant_for_its_thread(world: World) -> None:
    """Unknown is 404 for who may read at all, and 403 for who may not."""
    record = await create(world, "mail:1")
    assert await get_key(world.kms, world.session(), record.key_id) == record
    with pytest.raises(errors.PermissionDenied):
        await get_key(world.kms, world.session("room"), record.key_id)
    with pytest.raises(errors.KeyNotFound):
        await get_key(world.kms, world.session("room"), "k_" + "A" * 28)
    with pytest.raises(errors.PermissionDenied):
        await get_key(world.kms, world.session("stranger"), "k_" + "A" * 28)


async def test_get_wrapped_ends_with_the_key(world: World) -> None:
    """A disabled key still has a wrapped form, a destroyed one has none."""
    record = await create(world)
    await change_state(world.kms, world.session("operator"), record.key_id, StateChange.DISABLE, "r")
    assert (await get_wrapped(world.kms, world.session(), record.key_id)).wrapped == record.wrapped
    world.store._records[record.key_id] = replace(record, wrapped=b"", state=KeyState.DESTROYED)
    with pytest.raises(errors.KeyDestroyed):
        await get_wrapped(world.kms, world.session(), record.key_id)


async def test_listing_shows_what_may_be_read(world: World) -> None:
    """Others' threads are left out of a page; asking for them by name is refused."""
    mine, theirs = await create(world, "room:1"), await create(world, "mail:1")

    async def listed(name: str, thread_id: str | None = None) -> set[str]:
        page = await list_keys(
            world.kms, world.session(name), thread_id=thread_id, state=None, limit=100, cursor=None
        )
        return {record.key_id for record in page.records}

    assert await listed("server") == {mine.key_id, theirs.key_id}
    assert await listed("room") == {mine.key_id}
    assert await listed("room", "room:1") == {mine.key_id}
    for name, thread_id in (("room", "mail:1"), ("stranger", None), ("stranger", "room:1")):
        with pytest.raises(errors.PermissionDenied):
            await listed(name, thread_id)
    with pytest.raises(errors.InvalidThreadId):
        await listed("server", "")


@pytest.mark.parametrize("change", list(StateChange))
async def test_state_changes_are_audited_before_and_after(world: World, change: StateChange) -> None:
    """An intent first, then the outcome; a refusal by the store is written down with its code."""
    key_id = await world.key()
    operator = world.session("operator")
    first = {
        StateChange.ENABLE: StateChange.DISABLE,
        StateChange.CANCEL_DESTRUCTION: StateChange.SCHEDULE_DESTRUCTION,
    }
    if change in first:
        await change_state(world.kms, operator, key_id, first[change], "r")
    world.trail.events.clear()
    await change_state(world.kms, operator, key_id, change, "r")
    assert world.trail.said() == [(f"key.{change}", "intent"), (f"key.{change}", "ok")]
    assert world.cache.lookup(key_id) is None
    await change_state(world.kms, operator, key_id, change, "r")  # again is fine
    world.trail.events.clear()
    record = world.store._records[key_id]
    world.store._records[key_id] = replace(record, state=KeyState.DESTROYED, wrapped=b"")
    with pytest.raises(errors.KeyDestroyed):
        await change_state(world.kms, operator, key_id, change, "r")
    assert world.trail.said() == [(f"key.{change}", "intent"), (f"key.{change}", "failed")]
    assert world.trail.events[1].detail == "key_destroyed"


async def test_a_disabled_key_stops_at_once_and_comes_back_as_it_was(world: World) -> None:
    """Our own memory does not wait for our own notice."""
    key_id = await world.key()
    operator = world.session("operator")
    await change_state(world.kms, operator, key_id, StateChange.DISABLE, "r")
    with pytest.raises(errors.KeyDisabled):
        await world.encrypt(key_id)
    await change_state(world.kms, operator, key_id, StateChange.ENABLE, "r")
    assert await world.encrypt(key_id)
    world.store._records[key_id] = replace(world.store._records[key_id], state=KeyState.DECRYPT_ONLY)
    await change_state(world.kms, operator, key_id, StateChange.DISABLE, "r")
    enabled = await change_state(world.kms, operator, key_id, StateChange.ENABLE, "r")
    assert enabled.state is KeyState.DECRYPT_ONLY


@pytest.mark.parametrize("days, waits", [(None, 30), (7, 7), (30, 30)])
async def test_a_destruction_waits(world: World, days: int | None, waits: int) -> None:
    """7 to 30 days, the configured ones where none are named."""
    key_id = await world.key()
    changed = await change_state(
        world.kms, world.session("operator"), key_id, StateChange.SCHEDULE_DESTRUCTION, "r", days
    )
    assert changed.destroy_at == 1_700_000_000 + waits * DAY
    assert changed.wrapped


@pytest.mark.parametrize("days", [0, 6, 31, -1, 10**9])
async def test_a_waiting_period_out_of_range_is_refused(world: World, days: int) -> None:
    """Before anything is written down or done."""
    key_id = await world.key()
    world.trail.events.clear()
    with pytest.raises(errors.InvalidField):
        await change_state(
            world.kms, world.session("operator"), key_id, StateChange.SCHEDULE_DESTRUCTION, "r", days
        )
    assert not world.trail.events


async def test_destroying_and_administering_are_two_permissions(world: World) -> None:
    """key:admin does not destroy, key:create changes nothing; nothing of a refusal is an intent."""
    key_id = await world.key()
    world.trail.events.clear()
    await change_state(world.kms, world.session("room"), key_id, StateChange.DISABLE, "r")
    for name, change in (("room", StateChange.SCHEDULE_DESTRUCTION), ("server", StateChange.ENABLE)):
        with pytest.raises(errors.PermissionDenied):
            await change_state(world.kms, world.session(name), key_id, change, "r")
    with pytest.raises(errors.KeyNotFound):
        await change_state(world.kms, world.session("operator"), "k_" + "A" * 28, StateChange.DISABLE, "r")
    assert world.trail.said() == [("key.disable", "intent"), ("key.disable", "ok")]


async def test_rewrap_keeps_the_key(world: World) -> None:
    """Under the active KEK the same DEK; what is under it already is left alone."""
    key_id = await world.key()
    sealed = (await world.encrypt(key_id))["ciphertext"]
    operator = world.session("operator")
    before = await rewrap(world.kms, operator, key_id, "r")
    assert before.kek_version == 1
    await activate(world)
    await world.keks.refresh()
    world.trail.events.clear()
    after = await rewrap(world.kms, operator, key_id, "r")
    assert after.kek_version == 2
    assert parse_blob(after.wrapped).kek_version == 2
    assert (after.uses, after.version, after.created_by) == (before.uses, before.version, before.created_by)
    assert world.trail.said() == [("key.rewrap", "intent"), ("key.rewrap", "ok")]
    world.cache.restart()
    assert base64.b64decode((await world.decrypt(key_id, sealed))["plaintext"]) == b"hi"


async def test_rewrap_refuses_what_does_not_unwrap(world: World) -> None:
    """A forged record is reported and left as it is; a destroyed one has nothing to wrap."""
    key_id = await world.key()
    await activate(world)
    await world.keks.refresh()
    record = world.store._records[key_id]
    forged = replace(record, wrapped=record.wrapped[:-1] + b"\0")
    world.store._records[key_id] = forged
    with pytest.raises(errors.WrappedKeyInvalid):
        await rewrap(world.kms, world.session("operator"), key_id, "r")
    assert world.store._records[key_id] == forged
    world.store._records[key_id] = replace(record, wrapped=b"", state=KeyState.DESTROYED)
    with pytest.raises(errors.KeyDestroyed):
        await rewrap(world.kms, world.session("operator"), key_id, "r")
    with pytest.raises(errors.PermissionDenied):
        await rewrap(world.kms, world.session("server"), key_id, "r")


async def test_rewrap_checks_the_new_blob_before_it_writes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that wraps wrongly destroys nothing: the old blob stays."""
    key_id = await world.key()
    await activate(world)
    await world.keks.refresh()
    record = world.store._records[key_id]
    honest = world.source.wrap

    async def wrong(version: int, deks: Any, aads: Any) -> list[bytes]:
        return await honest(version, [bytes(32) for _ in deks], aads)

    monkeypatch.setattr(world.source, "wrap", wrong)
    with pytest.raises(errors.WrappedKeyInvalid, match="the old one was kept"):
        await rewrap(world.kms, world.session("operator"), key_id, "r")
    assert world.store._records[key_id] == record


async def test_rewrap_races(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost compare-and-set is tried again; lost for ever it is retryable, and says so."""
    key_id = await world.key()
    await activate(world)
    await world.keks.refresh()
    honest, answers = world.store.rewrap, [False, False]

    async def racing(*given: Any) -> bool:
        return answers.pop() if answers else await honest(*given)

    monkeypatch.setattr(world.store, "rewrap", racing)
    assert (await rewrap(world.kms, world.session("operator"), key_id, "r")).kek_version == 2
    world.store._records[key_id] = replace(world.store._records[key_id], kek_version=1)
    answers[:] = [False] * 3
    with pytest.raises(errors.StoreUnavailable, match="changed by others"):
        await rewrap(world.kms, world.session("operator"), key_id, "r")


async def test_rewrap_under_a_stale_kek_learns_the_new_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The floor refuses the old KEK; the registry is read again."""
    key_id = await world.key()
    await activate(world)
    await world.keks.refresh()
    refreshed = []
    refresh = world.keks.refresh

    async def counted() -> None:
        refreshed.append(1)
        world.store.set_floor("room:1", 2)
        await refresh()

    monkeypatch.setattr(world.keks, "refresh", counted)
    world.store.set_floor("room:1", 3)
    assert (await rewrap(world.kms, world.session("operator"), key_id, "r")).kek_version == 2
    assert refreshed == [1]


async def test_a_refusal_is_written_down(world: World) -> None:
    """Who, which permission, where and how often: one record however many there were."""
    error = errors.PermissionDenied("key:read", "dns:server")
    for request_id in ("r9", "r10"):
        world.kms.refusals.note(error, "/v1/keys", request_id)
    await world.kms.refusals.write()
    await world.kms.refusals.write()
    (event,) = world.trail.events
    assert (event.action, event.outcome, event.identity) == ("refused", "refused", "dns:server")
    assert (event.request_id, event.detail) == ("r9", "key:read /v1/keys count=2")


async def test_refusals_inside_a_batch_are_written_down(world: World) -> None:
    """An item that is refused for want of a permission is a refusal like any other."""
    key_id = await world.key("other:1")
    body = {"items": [{"key_id": key_id, "plaintext": ""}] * 3}
    answer = await world.answer(world.hot.encrypt_batch, body, "room")
    assert [item["error"]["code"] for item in answer["results"]] == ["permission_denied"] * 3
    world.trail.events.clear()
    await world.kms.refusals.write()
    (event,) = world.trail.events
    assert (event.identity, event.detail) == ("dns:room", "key:encrypt /encrypt_batch count=3")


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


async def test_bounds_come_from_the_caller(tmp_path: Any) -> None:
    """The configured waiting period is the default."""
    world = await make_world(tmp_path, bounds=Bounds(waiting_days=9))
    key_id = await world.key()
    changed = await change_state(
        world.kms, world.session("operator"), key_id, StateChange.SCHEDULE_DESTRUCTION, "r"
    )
    assert changed.destroy_at == 1_700_000_000 + 9 * DAY

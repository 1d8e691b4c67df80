"""The life of a key: read, changed, rewrapped, and each of it written down."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import pytest

from progressdb_kms.domain import errors
from progressdb_kms.domain.envelope import parse_blob
from progressdb_kms.domain.keys import KeyState, StateChange
from progressdb_kms.usecases.context import Bounds
from progressdb_kms.usecases.lifecycle import (
    DAY,
    change_state,
    get_key,
    get_wrapped,
    list_keys,
    rewrap,
)
from tests.unit.helpers import World, activate, create, make_world


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
    flipped = record.wrapped[:-1] + bytes([record.wrapped[-1] ^ 1])
    forged = replace(record, wrapped=flipped)
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


async def test_bounds_come_from_the_caller(tmp_path: Any) -> None:
    """The configured waiting period is the default."""
    world = await make_world(tmp_path, bounds=Bounds(waiting_days=9))
    key_id = await world.key()
    changed = await change_state(
        world.kms, world.session("operator"), key_id, StateChange.SCHEDULE_DESTRUCTION, "r"
    )
    assert changed.destroy_at == 1_700_000_000 + 9 * DAY

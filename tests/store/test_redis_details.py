"""How the Redis store keeps its data and shares round trips: what operators and other releases rely on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from progressdb_kms.domain.errors import (
    InternalError,
    InvalidParameter,
    KmsError,
    RegistryLost,
    StoreUnavailable,
)
from progressdb_kms.domain.keys import DekRecord, KeyState, StateChange, locate
from progressdb_kms.store.redis import RedisStore, StoreSettings, open_store, scripts
from progressdb_kms.store.redis.link import Link
from tests.store.conftest import new_dek, new_kek
from tests.store.servers import Server

Start = Callable[..., Server]
Open = Callable[..., Any]
CHANGES = "kms:{ctl}:changes"


@pytest.fixture
async def pair(own_server: Start, opened: Open) -> tuple[Server, RedisStore]:
    """Give a Redis server and a store on it."""
    server = own_server()
    return server, await opened(server.url)


async def create(store: RedisStore, thread_id: str = "room:1") -> DekRecord:
    """Create a key."""
    (record,) = await store.keys.create([new_dek(thread_id)])
    assert isinstance(record, DekRecord)
    return record


class Counting:
    """A StoreObserver that keeps the sizes of batches."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, int]] = []
        self.failures: list[str] = []

    def round_trip(self, lane: str, commands: int, seconds: float) -> None:
        """Keep the size."""
        assert seconds > 0
        self.batches.append((lane, commands))

    def failure(self, lane: str) -> None:
        """Keep the lane."""
        self.failures.append(lane)


class TestSchema:
    """Keys and values as ``store.redis.schema`` describes them."""

    async def test_record(self, pair: tuple[Server, RedisStore]) -> None:
        """A record is a compact hash with the raw blob; what is at its default is left out."""
        server, store = pair
        record = await create(store)
        tag = locate(record.key_id)
        key = f"kms:{{{tag}}}:dek:{record.key_id}"
        raw = server.ask("HGETALL", key)
        fields = dict(zip(raw[::2], raw[1::2], strict=True))
        assert fields == {
            b"thread_id": b"room:1",
            b"wrapped": record.wrapped,
            b"kek_id": record.kek_id.encode(),
            b"kek_version": b"1",
            b"version": b"1",
            b"state": b"enabled",
            b"created_at": b"1700000000",
            b"created_by": b"dns:chat.example",
        }
        assert server.ask("OBJECT", "ENCODING", key) == b"listpack"
        assert server.ask("ZRANGE", f"kms:{{{tag}}}:thread:room:1", 0, -1) == [record.key_id.encode()]
        assert server.ask("SMEMBERS", f"kms:{{{tag}}}:kek:1") == [record.key_id.encode()]

    async def test_due_destructions(self, pair: tuple[Server, RedisStore]) -> None:
        """A scheduled destruction is in the slot's index by its time until it is cancelled."""
        server, store = pair
        record = await create(store)
        due = f"kms:{{{locate(record.key_id)}}}:due"
        await store.keys.change_state(record.key_id, StateChange.SCHEDULE_DESTRUCTION, now=1, destroy_at=777)
        assert server.ask("ZRANGE", due, 0, -1, "WITHSCORES") == [record.key_id.encode(), b"777"]
        await store.keys.change_state(record.key_id, StateChange.CANCEL_DESTRUCTION, now=2)
        assert server.ask("EXISTS", due) == 0

    async def test_what_is_acknowledged_writes(self, pair: tuple[Server, RedisStore]) -> None:
        """Replays and repeated changes write too, for WAIT and WAITAOF speak of writes only."""
        server, store = pair
        dek = new_dek()
        for call in (
            lambda: store.registry.initialise(new_kek()),
            lambda: store.registry.initialise(new_kek()),
            lambda: store.keys.create([dek]),
            lambda: store.keys.create([dek]),
            lambda: store.keys.change_state(dek.key_id, StateChange.ENABLE, now=1),
        ):
            before = server.ask("INFO", "persistence").split(b"rdb_changes_since_last_save:")[1].split()[0]
            await call()
            assert (
                server.ask("INFO", "persistence").split(b"rdb_changes_since_last_save:")[1].split()[0]
                != before
            )

    async def test_scripts_touch_one_slot(self, pair: tuple[Server, RedisStore]) -> None:
        """Every key that is written has a hash tag."""
        server, store = pair
        await store.registry.initialise(new_kek())
        record = await create(store)
        await store.keys.change_state(record.key_id, StateChange.DISABLE, now=1)
        await store.keys.rewrap(record, b"n" * 64, "kek_2", 2)
        for key in server.ask("KEYS", "*"):
            assert key.startswith((b"kms:{ctl}:", b"kms:{" + locate(record.key_id).encode() + b"}:")), key

    @pytest.mark.parametrize(
        "field, value", [("state", "of a newer release"), ("version", "x"), ("created_at", "")]
    )
    async def test_unreadable_record(self, pair: tuple[Server, RedisStore], field: str, value: str) -> None:
        """A record that this release can't read is an error that names the key."""
        server, store = pair
        record = await create(store)
        server.ask("HSET", f"kms:{{{locate(record.key_id)}}}:dek:{record.key_id}", field, value)
        with pytest.raises(StoreUnavailable, match=record.key_id):
            await store.keys.get([record.key_id])
        (replay,) = await store.keys.create([new_dek(key_id=record.key_id)])
        assert isinstance(replay, KmsError)


class TestRegistry:
    """A registry that is not what it should be."""

    async def test_keys_without_registry(self, pair: tuple[Server, RedisStore]) -> None:
        """Keys whose KEKs nobody knows are no empty store: a new registry would orphan them."""
        server, store = pair
        await create(store)
        with pytest.raises(RegistryLost):
            await store.registry.load()
        with pytest.raises(RegistryLost):
            await store.registry.initialise(new_kek())
        assert server.ask("EXISTS", "kms:{ctl}:keks") == 0

    async def test_other_programs_keys(self, pair: tuple[Server, RedisStore]) -> None:
        """Keys of others, and our own heartbeats and notices, do not make a store of keys."""
        server, store = pair
        server.ask("SET", "session:1", "x")
        server.ask("HSET", "kms:{ctl}:instances", "i", "{}")
        assert await store.registry.load() is None

    @pytest.mark.parametrize(
        "ruin, says",
        [
            (("HSET", "kms:{ctl}:schema", "version", "2"), "newer release"),
            (("HSET", "kms:{ctl}:schema", "version", "x"), "damaged"),
            (("DEL", "kms:{ctl}:schema"), "damaged"),
            (("DEL", "kms:{ctl}:keks"), "damaged"),
            (("HSET", "kms:{ctl}:keks", "1", "[]"), "damaged"),
            (("HSET", "kms:{ctl}:keks", "1", "{}"), "damaged"),
            (("HDEL", "kms:{ctl}:keks", "active"), "damaged"),
        ],
    )
    async def test_unreadable(
        self, pair: tuple[Server, RedisStore], ruin: tuple[str, ...], says: str
    ) -> None:
        """A damaged registry or one of a newer release is refused, and not replaced."""
        server, store = pair
        await store.registry.initialise(new_kek())
        server.ask(*ruin)
        for call in (store.registry.load(), store.registry.initialise(new_kek())):
            with pytest.raises(RegistryLost, match=says):
                await call

    async def test_members_of_a_newer_release(self, pair: tuple[Server, RedisStore]) -> None:
        """What a newer release added to an entry is left alone."""
        server, store = pair
        view = await store.registry.initialise(new_kek())
        entry = server.ask("HGET", "kms:{ctl}:keks", "1")
        server.ask("HSET", "kms:{ctl}:keks", "1", entry[:-1] + b',"escrow":"none"}')
        assert await store.registry.load() == view

    async def test_unreadable_heartbeats(self, pair: tuple[Server, RedisStore]) -> None:
        """A heartbeat that can't be read is left out."""
        server, store = pair
        server.ask("HSET", "kms:{ctl}:instances", "a", "{}", "b", "not json", "c", "[]")
        assert await store.heartbeats.live() == []


class TestNotices:
    """The stream of state changes."""

    async def test_change_refuses_an_old_notice(self, pair: tuple[Server, RedisStore]) -> None:
        """A change that comes over 2 s after its notice is not made, nor one before a clock's step back."""
        server, store = pair
        record = await create(store)
        tag = locate(record.key_id)
        keys = [f"kms:{{{tag}}}:dek:{record.key_id}", f"kms:{{{tag}}}:due", f"kms:{{{tag}}}:ctl"]
        now = int(time.time() * 1000)
        for began in (now - 2500, now + 60_000):
            reply = server.ask(
                "EVAL",
                scripts.CHANGE_STATE.source,
                3,
                *keys,
                record.key_id,
                began,
                2000,
                "disabled",
                "enabled",
                "",
                1,
                "",
            )
            assert reply == [b"late"]
        assert await store.keys.get([record.key_id]) == [record]

    async def test_change_is_repeated_with_a_new_notice(self, pair: tuple[Server, RedisStore]) -> None:
        """A store that stops between notice and change does not make the change late: it is noticed again."""
        server, store = pair
        record = await create(store)
        start = await store.keys.changes(None, 0)
        put = store.keys._notices.put

        async def slow(key_id: str) -> None:
            await put(key_id)
            store.keys._notices.put = put  # type: ignore[method-assign]
            await asyncio.sleep(2.1)

        store.keys._notices.put = slow  # type: ignore[method-assign, assignment]
        changed = await store.keys.change_state(record.key_id, StateChange.DISABLE, now=1)
        assert changed.state is KeyState.DISABLED
        assert (await store.keys.changes(start.cursor, 0)).key_ids == {record.key_id}
        # The first is the one that a stream begins with.
        assert server.ask("XLEN", CHANGES) == 1 + 2

    @pytest.mark.parametrize("loss", [("XTRIM", CHANGES, "MAXLEN", 0), ("DEL", CHANGES), ("FLUSHALL",)])
    async def test_lost_notices(self, pair: tuple[Server, RedisStore], loss: tuple[str | int, ...]) -> None:
        """Trimmed or deleted notices are missed, even when others have come since."""
        server, store = pair
        record = await create(store)
        start = await store.keys.changes(None, 0)
        for _ in range(2):
            await store.keys.change_state(record.key_id, StateChange.DISABLE, now=1)
        server.ask(*loss)
        assert not (await store.keys.changes(start.cursor, 0)).complete
        seen = await store.keys.changes(f"{start.cursor.split('/')[0]}/3", 0)
        assert seen.complete is (loss[0] == "XTRIM")

    async def test_old_notices_are_forgotten(self, pair: tuple[Server, RedisStore]) -> None:
        """The stream keeps what is younger than five minutes, by whole nodes of the stream."""
        server, store = pair
        record = await create(store)
        add = "for n = 1, 1000 do redis.call('XADD', KEYS[1], '1000-' .. n, 'key_id', 'k') end"
        server.ask("EVAL", add, 1, CHANGES)
        await store.keys.change_state(record.key_id, StateChange.DISABLE, now=1)
        assert server.ask("XLEN", CHANGES) < 200


class TestBatches:
    """Calls at the same moment share a round trip."""

    async def test_concurrent_creates_share_round_trips(self, own_server: Start) -> None:
        """A thousand creates at once take a few batches, none over its limit; failures are counted."""
        server = own_server()
        observer = Counting()
        store = await open_store(StoreSettings(server.url), observer=observer)
        await create(store)
        observer.batches.clear()
        await asyncio.gather(*[create(store, f"room:{n}") for n in range(1000)])
        writes = [commands for lane, commands in observer.batches if lane == "write"]
        assert len(writes) <= 3
        assert max(writes) <= 512
        server.kill()
        with pytest.raises(StoreUnavailable):
            await store.keys.get(["k_AAAAAAAAAAAAAAAAAAAAAAAAAAAA"])
        assert observer.failures
        await store.close()

    async def test_looks_at_every_slot_are_cut(self, own_server: Start) -> None:
        """What a service does now and then over all slots comes in parts, so that requests get in between."""
        observer = Counting()
        store = await open_store(StoreSettings(own_server().url), observer=observer)
        await store.registry.initialise(new_kek())
        for number in range(20):
            await create(store, f"room:{number}")
        observer.batches.clear()
        assert await store.keys.census() == {1: 20}
        assert await store.destruction.due(1) == {}
        reads = [commands for lane, commands in observer.batches if lane == "read"]
        assert sum(reads) >= 2 * 1024
        assert max(reads) <= 128
        await store.close()

    async def test_key_id_of_another_slot(self, pair: tuple[Server, RedisStore]) -> None:
        """A key id that does not belong to its thread's slot is a mistake of the caller's."""
        _, store = pair
        with pytest.raises(ValueError, match="slot"):
            await store.keys.create([new_dek("room:1", key_id="k_AAAAAAAAAAAAAAAAAAAAAAAAAAAA")])


class TestListing:
    """Listings of a whole store."""

    async def test_cursor_of_another_process(self, pair: tuple[Server, RedisStore]) -> None:
        """After a restart a cursor has no meaning: it is refused rather than to leave keys out."""
        server, store = pair
        for number in range(30):
            await create(store, f"room:{number}")
        page = await store.keys.list_keys(thread_id=None, state=None, limit=2, cursor=None)
        server.kill()
        server.start()
        await store.health.check()
        with pytest.raises(InvalidParameter, match="restarted"):
            await store.keys.list_keys(thread_id=None, state=None, limit=2, cursor=page.cursor)

    async def test_rare_state_in_a_large_store(self, pair: tuple[Server, RedisStore]) -> None:
        """One page looks at a bounded part of the store; its cursor leads on to the end."""
        _, store = pair
        await store.keys.create([new_dek(f"room:{number}") for number in range(1000)])
        rare = await create(store, "room:rare")
        await store.keys.change_state(rare.key_id, StateChange.DISABLE, now=1)
        found: list[DekRecord] = []
        cursor, pages = None, 0
        while True:
            page = await store.keys.list_keys(thread_id=None, state=KeyState.DISABLED, limit=2, cursor=cursor)
            found += page.records
            pages += 1
            cursor = page.cursor
            if cursor is None:
                break
        assert [record.key_id for record in found] == [rare.key_id]
        assert pages > 1

    async def test_foreign_names_are_left_out(self, pair: tuple[Server, RedisStore]) -> None:
        """A key that only looks like a record is not listed."""
        server, store = pair
        record = await create(store)
        server.ask("HSET", "kms:{AA}:dek:hand-made", "thread_id", "x")
        page = await store.keys.list_keys(thread_id=None, state=None, limit=10, cursor=None)
        assert page.records == (record,)


async def test_a_bug_keeps_nobody_waiting(
    pair: tuple[Server, RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever it meets is told of an internal error; what waits behind is sent."""
    _, store = pair
    record = await create(store)
    real, met = Link.run, asyncio.Event()

    async def broken(self: Link, commands: Any, seconds: float) -> Any:
        if not met.is_set():
            met.set()
            await asyncio.sleep(0)
            raise LookupError
        return await real(self, commands, seconds)

    monkeypatch.setattr(Link, "run", broken)
    first = asyncio.create_task(store.keys.get([record.key_id]))
    await met.wait()
    assert await store.keys.get([record.key_id]) == [record]
    with pytest.raises(InternalError):
        await first

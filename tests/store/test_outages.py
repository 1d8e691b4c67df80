"""A store that is away, slow, full, restarted or hostile: every call ends in time and says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from redis._parsers.base import BaseParser

from progressdb_kms.domain.errors import KmsError, SettingsInvalid, StoreUnavailable
from progressdb_kms.domain.keys import DekRecord, StateChange
from progressdb_kms.ports import Heartbeat
from progressdb_kms.store.redis import StoreSettings, open_store
from progressdb_kms.store.redis.failures import Again, translate
from progressdb_kms.store.redis.topology import Standalone
from tests.store.conftest import new_dek, new_kek
from tests.store.servers import Server, free_port
from tests.store.topologies import can_create

Start = Callable[..., Server]
Open = Callable[..., Any]
UNKNOWN = "k_AAAAAAAAAAAAAAAAAAAAAAAAAAAA"
IMPATIENT = {"connect_timeout": 0.2, "command_timeout": 0.4}
ENOUGH = 1.5
"""Seconds of a call that a server which is there answers in, also one that waits for a busy disk."""


async def created(store: Any) -> DekRecord | KmsError:
    """Create a key, within a time that no working store needs."""
    async with asyncio.timeout(30):
        (result,) = await store.keys.create([new_dek()])
    return result


async def test_away_from_the_start(own_server: Start, opened: Open) -> None:
    """Opening succeeds, every call is unavailable, and all work once the store is there."""
    server = own_server()
    server.kill()
    store = await opened(server.url, **IMPATIENT)
    assert not store.health.status.reachable
    for call in (
        store.keys.get([UNKNOWN]),
        store.keys.reserve_uses({UNKNOWN: 1}),
        store.keys.change_state(UNKNOWN, StateChange.DISABLE, now=1),
        store.keys.list_keys(thread_id=None, state=None, limit=1, cursor=None),
        store.keys.list_keys(thread_id="t", state=None, limit=1, cursor=None),
        store.keys.census(),
        store.keys.changes(None, 0),
        store.keys.changes("0-0/0", 1),
        store.registry.load(),
        store.registry.initialise(new_kek()),
        store.registry.reserve_wraps(1, 1),
        store.registry.wraps(),
        store.heartbeats.beat(Heartbeat("i", 1, 1, "r", (), 1, "")),
        store.heartbeats.live(),
        store.heartbeats.leave("i"),
    ):
        with pytest.raises(StoreUnavailable):
            await call
    assert isinstance(await created(store), StoreUnavailable)
    assert not (await store.health.check()).reachable
    server.start()
    await can_create(store)
    assert (await store.health.check()).reachable


async def test_frozen(own_server: Start, opened: Open) -> None:
    """A store that keeps connections but does not answer is unavailable; thawed, it serves again."""
    server = own_server()
    store = await opened(server.url, connect_timeout=0.2, command_timeout=ENOUGH)
    record = await created(store)
    assert isinstance(record, DekRecord)
    server.pause()
    try:
        results = await asyncio.gather(
            *[created(store) for _ in range(20)],
            store.keys.get([record.key_id]),
            store.keys.changes("0-0/0", 0.1),
            return_exceptions=True,
        )
        assert {type(result) for result in results} == {StoreUnavailable}
        assert not (await store.health.check()).reachable
    finally:
        server.resume()
    await can_create(store)
    assert await store.keys.get([record.key_id]) == [record]


async def test_restart_in_between_is_not_noticed(own_server: Start, opened: Open) -> None:
    """A write whose connection breaks is repeated within its time, safely."""
    server = own_server()
    store = await opened(server.url, command_timeout=20)
    assert isinstance(await created(store), DekRecord)
    server.pause()
    writes = [asyncio.create_task(created(store)) for _ in range(10)]
    await asyncio.sleep(0.05)
    server.kill()
    await asyncio.to_thread(server.start)
    assert {type(result) for result in await asyncio.gather(*writes)} == {DekRecord}


async def test_stale_connections_are_replaced(own_server: Start, opened: Open) -> None:
    """Reads over a connection that the server has closed meanwhile just work."""
    server = own_server()
    store = await opened(server.url)
    record = await created(store)
    assert isinstance(record, DekRecord)
    start = await store.keys.changes(None, 0)
    await store.keys.changes(start.cursor, 0.01)
    server.ask("CLIENT", "KILL", "TYPE", "normal")
    assert await store.keys.get([record.key_id]) == [record]
    assert isinstance(await created(store), DekRecord)


@pytest.mark.parametrize(
    "ruin, says",
    [
        ({"maxmemory": "1mb"}, "out of memory"),
        ({"min_replicas_to_write": "1"}, "min-replicas-to-write"),
    ],
)
async def test_refusals_of_writes(own_server: Start, opened: Open, ruin: dict[str, str], says: str) -> None:
    """A refusal of the server's own says what to do, writes nothing and ends with its cause."""
    server = own_server()
    store = await opened(server.url, command_timeout=ENOUGH)
    assert isinstance(await created(store), DekRecord)
    server.ask("SET", "ballast", b"x" * 2_000_000)
    server.configure(**ruin)
    before = server.ask("DBSIZE")
    result = await created(store)
    assert isinstance(result, StoreUnavailable)
    assert says in result.detail
    assert server.ask("DBSIZE") == before
    server.configure(**dict.fromkeys(ruin, "0"))
    assert isinstance(await created(store), DekRecord)


async def test_cause_outlives_discovery(
    own_server: Start, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time that ends while the nodes are asked where the keys are now: the server's own refusal is told."""
    server = own_server()
    store = await opened(server.url, command_timeout=ENOUGH)
    assert isinstance(await created(store), DekRecord)
    server.configure(min_replicas_to_write="1")

    async def nobody_answers(self: Standalone) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(Standalone, "_discover", nobody_answers)
    result = await created(store)
    assert isinstance(result, StoreUnavailable)
    assert "min-replicas-to-write" in result.detail


async def test_becomes_a_replica(own_server: Start, opened: Open) -> None:
    """READONLY is unavailable, for a failover is likely behind it, and passes."""
    server = own_server()
    store = await opened(server.url, command_timeout=ENOUGH)
    assert isinstance(await created(store), DekRecord)
    server.ask("REPLICAOF", "127.0.0.1", "1")
    assert isinstance(await created(store), KmsError)
    server.ask("REPLICAOF", "NO", "ONE")
    await store.health.check()
    assert isinstance(await created(store), DekRecord)


async def test_somebody_elses_value(own_server: Start, opened: Open) -> None:
    """A value of another type under one of our keys is an error that names the cause."""
    server = own_server()
    store = await opened(server.url)
    server.ask("SET", "kms:{ctl}:wraps", "not a hash")
    with pytest.raises(StoreUnavailable, match="another program"):
        await store.registry.reserve_wraps(1, 1)


@pytest.mark.parametrize(
    "login, says",
    [
        ({}, "wants a login"),
        ({"password": "wr0ng-s3cret"}, "refused the login"),
        ({"username": "nobody", "password": "wr0ng-s3cret"}, "refused the login"),
    ],
)
async def test_login_refused(own_server: Start, opened: Open, login: dict[str, str], says: str) -> None:
    """No or a wrong password is unavailable, and no password is in any message."""
    server = own_server()
    server.ask("ACL", "SETUSER", "default", "resetpass", ">r1ght-s3cret")
    store = await opened(server.url, **login)
    assert not store.health.status.reachable
    assert any(says in warning for warning in store.health.status.warnings), store.health.status
    result = await created(store)
    assert isinstance(result, StoreUnavailable)
    for text in (result.detail, str(store.health.status)):
        assert "s3cret" not in text


@pytest.mark.parametrize(
    "line, again, says",
    [
        ("MISCONF Errors writing to the AOF file", Again.NEVER, "free space"),
        ("OOM command not allowed when used memory > 'maxmemory'.", Again.NEVER, "maxmemory"),
        ("NOAUTH Authentication required.", Again.NEVER, "store.username"),
        ("NOPERM this user has no permissions to run the 'x' command", Again.NEVER, "redis-acl"),
        ("DENIED Redis is running in protected mode", Again.NEVER, "protected mode"),
        ("READONLY You can't write against a read only replica.", Again.SOON, "replica"),
        ("NOREPLICAS Not enough good replicas to write.", Again.SOON, "min-replicas-to-write"),
        ("LOADING Redis is loading the dataset in memory", Again.SOON, "reading its data"),
        ("MASTERDOWN Link with MASTER is down", Again.SOON, "lost its primary"),
        ("CLUSTERDOWN Hash slot not served", Again.SOON, "no primary"),
        ("MOVED 3999 127.0.0.1:6381", Again.SOON, "moved a slot"),
        ("TRYAGAIN Multiple keys request during rehashing of slot", Again.SOON, "moving a slot"),
        ("BUSY Redis is busy running a script.", Again.SOON, "busy"),
        ("NOSCRIPT No matching script.", Again.WITH_SOURCE, "scripts"),
        ("ASK 3999 127.0.0.1:6381", Again.ELSEWHERE, "moving a slot"),
        ("ERR unknown command 'secret-argument'", Again.NEVER, "error ERR"),
        ("STRANGE secret-argument", Again.NEVER, "error STRANGE"),
    ],
)
def test_translation(line: str, again: Again, says: str) -> None:
    """Every error line of a server becomes one of ours, which says what to do and repeats no argument."""
    failure = translate(BaseParser.parse_error(line))
    assert failure is not None
    assert (type(failure.error), failure.again) == (StoreUnavailable, again)
    assert says in failure.error.detail
    assert "secret" not in failure.error.detail


async def test_scripts_forgotten(own_server: Start, opened: Open) -> None:
    """SCRIPT FLUSH costs nothing but a repetition."""
    server = own_server()
    store = await opened(server.url)
    assert isinstance(await created(store), DekRecord)
    server.ask("SCRIPT", "FLUSH")
    results = await asyncio.gather(*[created(store) for _ in range(10)])
    assert {type(result) for result in results} == {DekRecord}


async def test_closing_ends_what_is_under_way(own_server: Start) -> None:
    """A closed store fails what waits, and what comes after."""
    server = own_server()
    store = await open_store(StoreSettings(server.url))
    server.pause()
    try:
        writes = [asyncio.create_task(created(store)) for _ in range(3)]
        await asyncio.sleep(0.02)
        await store.close()
        results = await asyncio.gather(*writes)
    finally:
        server.resume()
    assert {type(result) for result in results} == {StoreUnavailable}


async def test_a_caller_that_gives_up_harms_nobody(own_server: Start, opened: Open) -> None:
    """A cancelled call does not break the connection that others share."""
    server = own_server()
    store = await opened(server.url)
    server.pause()
    impatient = asyncio.create_task(created(store))
    patient = asyncio.create_task(created(store))
    await asyncio.sleep(0.02)
    impatient.cancel()
    server.resume()
    assert isinstance(await patient, DekRecord)
    with pytest.raises(asyncio.CancelledError):
        await impatient


async def test_over_tcp(own_server: Start, opened: Open) -> None:
    """A TCP URL works as the Unix socket does, and an empty port is unavailable."""
    server = own_server(port=free_port())
    assert isinstance(await created(await opened(server.url)), DekRecord)
    nobody = await opened(f"redis://127.0.0.1:{free_port()}", **IMPATIENT)
    assert isinstance(await created(nobody), StoreUnavailable)


@pytest.mark.parametrize(
    "url",
    [
        "http://h",
        "redis://",
        "redis://h:port",
        "redis://h1,h2",
        "redis://h/x",
        "redis://h?timeout=1",
        "unix://relative.sock",
        "redis+sentinel://h1,h2",
        "redis+cluster://h/3",
        "redis+magic://h",
    ],
)
async def test_bad_url(url: str) -> None:
    """A URL that can't be right is refused at once, without being repeated."""
    with pytest.raises(SettingsInvalid) as caught:
        await open_store(StoreSettings(url.replace("://", "://user:s3cret@")))
    assert "s3cret" not in str(caught.value)


def test_settings_hide_their_secrets() -> None:
    """Neither the URL nor a password is in the settings' repr."""
    settings = StoreSettings("redis://u:s3cret@h", password="s3cret", sentinel_password="s3cret")
    assert "s3cret" not in repr(settings)

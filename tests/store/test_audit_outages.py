"""The chained audit log over a real server that dies, restarts, loses its data, or is not let in."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from progressdb_kms.audit.chained import ChainedAuditLog, Sinks
from progressdb_kms.audit.reading import verify_store
from progressdb_kms.audit.trimming import Trimmer
from progressdb_kms.domain.audit import AuditKey, VerifyKey
from progressdb_kms.domain.errors import AuditUnavailable
from progressdb_kms.ports import AuditEvent
from progressdb_kms.store.redis import RedisStore
from tests.store.servers import Server
from tests.store.topologies import eventually
from tests.unit.audit.scene import Counts

KEY = AuditKey(b"\x01" * 32)
PUBLIC = VerifyKey.of(KEY.verify.public)
PATIENCE = 30.0


def log_on(store: RedisStore, instance: str = "i") -> ChainedAuditLog:
    """Return the audit log of a process."""
    return ChainedAuditLog(KEY, instance, store.audit, Sinks(), Counts(), "1.0")


def told(number: int, outcome: str) -> AuditEvent:
    """Return an event."""
    return AuditEvent("key.disable", outcome, "dns:a", f"r{number}", "k", "t")


async def work(log: ChainedAuditLog, first: int, acknowledged: list[int], stop: asyncio.Event) -> None:
    """Announce and tell changes, one after another."""
    number = first
    while not stop.is_set():
        number += 1
        try:
            await log.record([told(number, "intent")])
        except AuditUnavailable:
            await asyncio.sleep(0.01)
            continue
        acknowledged.append(number)
        await log.record([told(number, "ok")])


async def written(store: RedisStore) -> list[dict[str, Any]]:
    """Return all records of the stream."""
    found: list[dict[str, Any]] = []
    after = "0-0"
    while page := await store.audit.page(after, 1000):
        found += [json.loads(line) for _, line in page]
        after = page[-1][0]
    return found


async def until_recorded(log: ChainedAuditLog, number: int) -> None:
    """Return once an intent can be recorded again."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            await log.record([told(number, "intent"), told(number, "ok")])
        except AuditUnavailable:
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
        else:
            return


async def test_a_server_that_dies_loses_nothing(
    own_server: Callable[..., Server], opened: Callable[..., Any]
) -> None:
    """Killed under load, twice: all that was acknowledged is there once, the chains are whole."""
    server = own_server()
    store = await opened(server.url, command_timeout=1.0)
    logs = [log_on(store, f"i{number}") for number in range(2)]
    acknowledged: list[int] = []
    for _ in range(2):
        stop = asyncio.Event()
        before = len(acknowledged)
        tasks = [
            asyncio.create_task(work(log, before * 100 + 1_000_000 * number, acknowledged, stop))
            for number, log in enumerate([*logs, *logs], 1)
        ]
        await eventually(lambda: len(acknowledged) > before + 100)  # noqa: B023 - called before it changes
        server.kill()
        await asyncio.sleep(0.2)
        server.start()
        count = len(acknowledged)
        await eventually(lambda: len(acknowledged) > count + 20)  # noqa: B023 - likewise
        stop.set()
        await asyncio.gather(*tasks)
    for log in logs:
        await until_recorded(log, 1)
        await log.tick()
        await log.close()
    for key in (KEY.verify, PUBLIC):
        report = await verify_store(store.audit, [key])
        assert report.problems == []
        assert all(chain.closed and not chain.open_intents for chain in report.chains), report.notes
    intents = [each["request_id"] for each in await written(store) if each["outcome"] == "intent"]
    assert len(intents) == len(set(intents)) + intents.count("r1") - 1
    assert {f"r{number}" for number in acknowledged} <= set(intents)


async def test_a_store_that_was_restored_is_found_out(
    own_server: Callable[..., Server], opened: Callable[..., Any]
) -> None:
    """Its data taken back while a process lives: a new chain names what is missing."""
    server = own_server()
    store = await opened(server.url)
    log = log_on(store)
    await log.record([told(1, "intent"), told(1, "ok")])
    dump = {key: server.ask("DUMP", key) for key in server.ask("KEYS", "kms:{ctl}:audit*")}
    await log.record([told(2, "intent"), told(2, "ok")])
    for key, value in dump.items():
        server.ask("RESTORE", key, 0, value, "REPLACE")
    await until_recorded(log, 3)
    await log.close()
    report = await verify_store(store.audit, [KEY.verify])
    assert [(each.kind, each.first, each.last) for each in report.problems] == [("truncated", 4, 5)]


async def test_trimming_a_real_stream(own_server: Callable[..., Server], opened: Callable[..., Any]) -> None:
    """While records come from two processes; what stays is whole, for who has the public key alone too."""
    store = await opened(own_server().url)
    logs = [log_on(store, f"i{number}") for number in range(2)]
    trimmer = Trimmer(KEY, (), store.audit, 1000, Counts())
    for round_ in range(4):
        await asyncio.gather(
            *(log.record([told(number, "ok") for number in range(400)]) for log in logs),
            *([trimmer.run()] if round_ else []),
        )
    assert await trimmer.run() > 0
    assert (await store.audit.anchor()).length <= 1100
    for key in (KEY.verify, PUBLIC):
        assert (await verify_store(store.audit, [key])).problems == []
    for log in logs:
        await log.close()


async def test_a_user_without_the_right_commands_is_told(
    own_server: Callable[..., Server], opened: Callable[..., Any]
) -> None:
    """The error that refuses the change names the page that lists them."""
    server = own_server("valkey")
    server.ask("ACL", "SETUSER", "kms", "on", ">change-me", "~kms:*", "&*", "+@all", "-evalsha")
    store = await opened(server.url, username="kms", password="change-me")
    try:
        await log_on(store).record([told(1, "intent")])
    except AuditUnavailable as error:
        assert "docs/redis-acl.md" in error.detail  # noqa: PT017 - what the error says is what is tested
    else:
        raise AssertionError("it was recorded")

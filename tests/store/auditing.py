"""Processes that write a chained audit log to a real store, through its outages."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from progressdb_kms.audit.chained import ChainedAuditLog, Sinks
from progressdb_kms.audit.reading import verify_store
from progressdb_kms.domain.audit import AuditKey, VerifyKey
from progressdb_kms.domain.errors import AuditUnavailable
from progressdb_kms.ports import AuditEvent
from progressdb_kms.store.redis import RedisStore
from tests.store.topologies import eventually
from tests.unit.audit.scene import Counts

KEY = AuditKey(b"\x01" * 32)
PUBLIC = VerifyKey.of(KEY.verify.public)
PATIENCE = 90.0


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


async def assert_whole(store: RedisStore, logs: list[ChainedAuditLog], acknowledged: list[int]) -> None:
    """Close the logs of a store that is back; all chains verify, and what was acknowledged is there once."""
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


async def work_through(
    logs: list[ChainedAuditLog], acknowledged: list[int], outage: Callable[[], Awaitable[object]]
) -> None:
    """Announce and tell changes, two tasks a log, before an outage, in it, and until they succeed again."""
    stop = asyncio.Event()
    before = len(acknowledged)
    tasks = [
        asyncio.create_task(work(log, before * 100 + 1_000_000 * number, acknowledged, stop))
        for number, log in enumerate([*logs, *logs], 1)
    ]
    try:
        await eventually(lambda: len(acknowledged) > before + 100)
        await outage()
        count = len(acknowledged)
        await eventually(lambda: len(acknowledged) > count + 20)
    finally:
        stop.set()
        await asyncio.gather(*tasks)


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

"""Load on stores of several servers, and what is left after one of them dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from progressdb_kms.domain.keys import DekRecord
from tests.store.conftest import new_dek

PATIENCE = 90.0


def until(done: Callable[[], bool]) -> None:
    """Return once ``done``."""
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


async def eventually(done: Callable[[], bool]) -> None:
    """Return once ``done``, while other tasks go on."""
    for _ in range(int(PATIENCE / 0.01)):
        if done():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to pass")


async def can_create(store: Any, thread_id: str = "room:1") -> None:
    """Return once a key can be created."""
    for _ in range(int(PATIENCE / 0.1)):
        if isinstance((await store.keys.create([new_dek(thread_id)]))[0], DekRecord):
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the store does not come back")


async def create_through(store: Any, kill: Callable[[], object], *, tasks: int = 16) -> list[DekRecord]:
    """Create keys from some tasks, kill a server in between, stop soon after; return what was confirmed."""
    acknowledged: list[DekRecord] = []
    stop = asyncio.Event()

    async def create(task: int) -> None:
        number = 0
        while not stop.is_set():
            (result,) = await store.keys.create([new_dek(f"room:{task}:{number}")])
            number += 1
            if isinstance(result, DekRecord):
                acknowledged.append(result)

    running = [asyncio.create_task(create(task)) for task in range(tasks)]
    try:
        await eventually(lambda: len(acknowledged) >= 20 * tasks)
        kill()
        await asyncio.sleep(0.2)
    finally:
        stop.set()
        await asyncio.gather(*running)
    return acknowledged


async def missing(store: Any, acknowledged: list[DekRecord]) -> int:
    """Count the acknowledged keys that the store does not have as they were."""
    found = await store.keys.get([record.key_id for record in acknowledged])
    return sum(record != kept for record, kept in zip(acknowledged, found, strict=True))

"""What the memory store alone could get wrong."""

from __future__ import annotations

import asyncio
import time

from progressdb_kms.domain.keys import StateChange
from progressdb_kms.store.memory import MemoryStore
from tests.store.conftest import new_dek, new_kek


async def test_a_notice_put_while_a_reader_gives_up_waiting_is_not_lost() -> None:
    """The wait is over, the reader has not had its turn, and a notice comes: one of two reads tells."""
    store = MemoryStore()
    await store.initialise(new_kek(1))
    dek = new_dek("room:1")
    await store.create([dek])
    start = await store.changes(None, 0)
    reader = asyncio.create_task(store.changes(start.cursor, 0.01))
    await asyncio.sleep(0)
    time.sleep(0.02)  # noqa: ASYNC251 - so that the timer and this task are due in the same turn of the loop
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await store.change_state(dek.key_id, StateChange.DISABLE, now=0)
    first = await reader
    second = await store.changes(first.cursor, 0)
    assert dek.key_id in first.key_ids | second.key_ids

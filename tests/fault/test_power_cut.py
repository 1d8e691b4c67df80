"""No acknowledged key is lost when the store is killed or its power is cut, at any moment.

SIGKILL alone proves little, for the page cache survives it. So the power is cut too: a shim under the store
records how far each file was fsynced, and after the kill the files are cut back to there.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from progressdb_kms.domain.keys import DekRecord
from progressdb_kms.store.redis import StoreSettings, open_store
from tests.fault.power import RUNS, PoweredServer, build_shim
from tests.store.auditing import assert_whole, log_on, work_through
from tests.store.conftest import new_dek
from tests.store.servers import ALWAYS, EVERYSEC, Server
from tests.store.topologies import eventually, until

TASKS = 32
Powered = Callable[..., PoweredServer]

pytestmark = pytest.mark.fault


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the compiled shim."""
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def powered(shim: Path, tmp_path: Path) -> Iterator[Powered]:
    """Give what starts servers whose power can be cut."""
    started: list[PoweredServer] = []

    def start(kind: str, options: dict[str, str]) -> PoweredServer:
        started.append(PoweredServer(shim, kind, tmp_path / f"powered{len(started)}", options))
        return started[-1]

    yield start
    for each in started:
        each.server.kill()


async def create_until(server: Server, end: Callable[[], object], **settings: bool) -> list[DekRecord]:
    """Create keys from 32 tasks until ``end`` has ended the server; return those that were acknowledged."""
    acknowledged: list[DekRecord] = []
    store = await open_store(StoreSettings(server.url, command_timeout=1.0, **settings))  # type: ignore[arg-type]
    ended = asyncio.Event()

    async def create(task: int) -> None:
        number = 0
        while not ended.is_set():
            (result,) = await store.keys.create([new_dek(f"room:{task}:{number % 50}")])
            number += 1
            if isinstance(result, DekRecord):
                acknowledged.append(result)

    tasks = [asyncio.create_task(create(task)) for task in range(TASKS)]
    try:
        await eventually(lambda: len(acknowledged) >= TASKS)
        await asyncio.sleep(random.uniform(0.0, 0.3))
        end()
    finally:
        ended.set()
        await asyncio.gather(*tasks)
        await store.close()
    return acknowledged


async def missing(server: Server, acknowledged: list[DekRecord], **settings: bool) -> int:
    """Start the server again and count the acknowledged keys that it does not have as they were."""
    server.start()
    store = await open_store(StoreSettings(server.url, **settings))  # type: ignore[arg-type] # flags only
    lost = 0
    for first in range(0, len(acknowledged), 500):
        part = acknowledged[first : first + 500]
        found = await store.keys.get([record.key_id for record in part])
        lost += sum(record != kept for record, kept in zip(part, found, strict=True))
    await store.close()
    return lost


@pytest.mark.parametrize("run", range(RUNS))
@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_power_cut(powered: Powered, kind: str, run: int) -> None:
    """Twice in a row on one store: what was acknowledged before the cut is there after it."""
    store = powered(kind, ALWAYS)
    acknowledged: list[DekRecord] = []
    for _ in range(2):
        acknowledged += await create_until(store.server, store.cut_power)
        assert await missing(store.server, acknowledged) == 0


@pytest.mark.parametrize("run", range(RUNS))
async def test_sigkill(powered: Powered, run: int) -> None:
    """Killed and started again, the store has every acknowledged key."""
    store = powered("redis", ALWAYS)
    acknowledged = await create_until(store.server, store.crash)
    assert await missing(store.server, acknowledged) == 0


@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_the_shim_finds_a_store_that_loses_keys(powered: Powered, kind: str) -> None:
    """On a store that fsyncs once a second the same power cut loses acknowledged keys: the proof can fail.

    So it does on Valkey 8.1, though each batch was confirmed by WAITAOF: why such a store is refused.
    """
    store = powered(kind, EVERYSEC)
    lost = 0
    for _ in range(5):
        # A cut right after the second's fsync loses nothing; five such moments in a row do not happen.
        acknowledged = await create_until(store.server, store.cut_power, allow_data_loss=True)
        lost += await missing(store.server, acknowledged, allow_data_loss=True)
        if lost:
            break
    assert lost


@pytest.mark.parametrize("run", range(RUNS))
@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_power_cut_during_a_rewrite(powered: Powered, kind: str, run: int) -> None:
    """Neither does the store lose one when the power goes while it rewrites its file."""
    # A delay a key makes the rewrite last for as long as the test needs it to.
    store = powered(kind, ALWAYS)
    acknowledged = await create_until(store.server, lambda: None)
    store.server.ask("BGREWRITEAOF")  # a file's first rewrite is waited for; this is about the later ones
    until(lambda: b"aof_rewrite_in_progress:0" in store.server.ask("INFO", "persistence"))
    store.server.ask("CONFIG", "SET", "rdb-key-save-delay", "500000")
    rewriting = False

    def cut() -> None:
        nonlocal rewriting
        rewriting = b"aof_rewrite_in_progress:1" in store.server.ask("INFO", "persistence")
        store.cut_power()

    store.server.ask("BGREWRITEAOF")
    acknowledged += await create_until(store.server, cut)
    assert rewriting
    assert await missing(store.server, acknowledged) == 0


@pytest.mark.parametrize("run", range(RUNS))
@pytest.mark.parametrize("kind", ["redis", "valkey"])
async def test_the_audit_log_survives_a_power_cut(powered: Powered, kind: str, run: int) -> None:
    """Twice under two processes that write records: acknowledged ones are there, the log is whole."""
    server = powered(kind, ALWAYS)
    store = await open_store(StoreSettings(server.server.url, command_timeout=1.0))
    logs = [log_on(store, f"i{number}") for number in range(2)]
    acknowledged: list[int] = []

    async def outage() -> None:
        await asyncio.sleep(random.uniform(0.0, 0.3))
        server.cut_power()
        server.server.start()

    for _ in range(2):
        await work_through(logs, acknowledged, outage)
    # The second that is enough to notice an outage need not be enough to read the whole log.
    patient = await open_store(StoreSettings(server.server.url))
    await assert_whole(patient, logs, acknowledged)
    await patient.close()
    await store.close()

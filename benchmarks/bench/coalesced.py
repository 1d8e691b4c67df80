"""Plain calls of many tasks or threads of one client, alone and coalesced into batches."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from progressdb_kms.client import open_provider, open_sync_provider

from .cases import Case, Key, Scene, Values
from .load import MESSAGE

if TYPE_CHECKING:
    from progressdb_kms.client.opening import ConnectOptions
    from progressdb_kms.client.protocol import Encoding

Callers = tuple[str, "Encoding", int]
"""Kind of client, encoding, and how many callers."""
TASKS = 64


@dataclass(frozen=True)
class Sample:
    """One run: calls a second, the client's CPU time for a call, and the callers' median wait, in us."""

    per_second: float
    cpu_us: float
    p50_us: float


def coalesced_cases(scene: Scene) -> list[Case]:
    """Return the cases of 64 tasks on one client, alone and coalesced."""
    return [
        Case(
            Key("coalesced", f"encrypt, {encoding}", "coalesced" if together else "alone", TASKS),
            partial(_values, scene, ("async", encoding, TASKS), together),
        )
        for encoding in ("json", "msgpack")
        for together in (False, True)
    ]


def connect_options(ready: dict[str, Any], encoding: Encoding, *, coalesce: bool) -> ConnectOptions:
    """Return how a client reaches a development instance."""
    pair = ready["clients"]["server"]
    how: ConnectOptions = {"ca": ready["ca"], "cert": pair["cert"], "key": pair["key"], "deadline": 30.0}
    how |= {"encoding": encoding, "coalesce": coalesce}
    return how


def measure(url: str, how: ConnectOptions, case: Callers, seconds: float) -> Sample:
    """Run one combination once."""
    kind, _, callers = case
    waits: list[float] = []
    before = [0.0, 0.0]
    if kind == "async":
        asyncio.run(in_tasks(url, how, callers, seconds, waits, before))
    else:
        in_threads(url, how, callers, seconds, waits, before)
    wall, cpu = time.monotonic() - before[0], time.process_time() - before[1]
    return Sample(len(waits) / wall, cpu / len(waits) * 1e6, statistics.median(waits) * 1e6)


async def in_tasks(
    url: str, how: ConnectOptions, callers: int, seconds: float, waits: list[float], before: list[float]
) -> None:
    """Call from many tasks."""
    async with open_provider(url, **how) as kms:
        key_id = (await kms.create_dek_for_thread("bench:coalescing")).key_id
        await kms.encrypt_with_dek(key_id, MESSAGE)
        before[:] = time.monotonic(), time.process_time()

        async def call() -> None:
            while time.monotonic() < before[0] + seconds:
                began = time.perf_counter()
                await kms.encrypt_with_dek(key_id, MESSAGE)
                waits.append(time.perf_counter() - began)

        await asyncio.gather(*[call() for _ in range(callers)])


def in_threads(
    url: str, how: ConnectOptions, callers: int, seconds: float, waits: list[float], before: list[float]
) -> None:
    """Call from many threads."""
    with open_sync_provider(url, **how) as kms:
        key_id = kms.create_dek_for_thread("bench:coalescing").key_id
        kms.encrypt_with_dek(key_id, MESSAGE)
        before[:] = time.monotonic(), time.process_time()

        def call() -> None:
            while time.monotonic() < before[0] + seconds:
                began = time.perf_counter()
                kms.encrypt_with_dek(key_id, MESSAGE)
                waits.append(time.perf_counter() - began)

        threads = [threading.Thread(target=call) for _ in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _values(scene: Scene, case: Callers, together: bool) -> Values:  # noqa: FBT001 - bound by partial
    how = connect_options(scene.ready, case[1], coalesce=together)
    sample = measure(scene.ready["url"], how, case, scene.seconds)
    return {"per_second": sample.per_second, "cpu_us": sample.cpu_us, "p50_us": sample.p50_us}

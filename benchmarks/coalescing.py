"""Measure what coalescing gains: plain ``encrypt_with_dek`` of 256 bytes in many tasks or threads.

The service has one core to itself; the client and the store share the other. Runs with and without coalescing
take turns, so that noise of the machine meets both alike; medians of the runs are shown, with the lowest and
the highest rate, and the ratio of the rates.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.run import MESSAGE, service
from progressdb_kms.client import open_provider, open_sync_provider

if TYPE_CHECKING:
    from progressdb_kms.client.opening import ConnectOptions
    from progressdb_kms.client.protocol import Encoding

Case = tuple[str, "Encoding", int]
"""Kind of client, encoding, and how many callers."""


@dataclass(frozen=True)
class Sample:
    """One run: calls a second, the client's CPU time for a call, and the callers' median wait, in us."""

    per_second: float
    cpu_us: float
    p50_us: float


def main() -> int:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one run")
    parser.add_argument("--runs", type=int, default=5, help="runs of each combination")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 64])
    options = parser.parse_args()
    kinds: list[tuple[str, Encoding]] = [("async", "json"), ("async", "msgpack"), ("sync", "json")]
    cases: list[Case] = [(*kind, callers) for kind in kinds for callers in options.callers]
    samples: dict[tuple[Case, bool], list[Sample]] = {}
    with service() as ready:
        if (os.cpu_count() or 1) > 1:
            os.sched_setaffinity(0, {1})
        pair = ready["clients"]["server"]
        for _ in range(options.runs):
            for case in cases:
                for coalesce in (False, True):
                    how: ConnectOptions = {"ca": ready["ca"], "cert": pair["cert"], "key": pair["key"]}
                    how |= {"deadline": 30.0, "encoding": case[1], "coalesce": coalesce}
                    sample = measure(ready["url"], how, case, options.seconds)
                    samples.setdefault((case, coalesce), []).append(sample)
                    print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print_table(cases, samples)
    return 0


def measure(url: str, how: ConnectOptions, case: Case, seconds: float) -> Sample:
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


def print_table(cases: list[Case], samples: dict[tuple[Case, bool], list[Sample]]) -> None:
    """Print medians, alone and coalesced side by side."""
    print("| client | callers | alone, calls/s | coalesced, calls/s | ratio | CPU us | p50 us |")
    print("|---|---|---|---|---|---|---|")
    for case in cases:
        kind, encoding, callers = case
        alone, together = samples[case, False], samples[case, True]
        rates = [statistics.median(sample.per_second for sample in group) for group in (alone, together)]
        cpu = [statistics.median(sample.cpu_us for sample in group) for group in (alone, together)]
        p50 = [statistics.median(sample.p50_us for sample in group) for group in (alone, together)]
        print(
            f"| {kind}, {encoding} | {callers} | {rate(alone)} | {rate(together)} | {rates[1] / rates[0]:.2f}"
            f" | {cpu[0]:,.0f}, {cpu[1]:,.0f} | {p50[0]:,.0f}, {p50[1]:,.0f} |"
        )


def rate(group: list[Sample]) -> str:
    """Return the median rate, with the lowest and the highest."""
    rates = [sample.per_second for sample in group]
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


if __name__ == "__main__":
    sys.exit(main())

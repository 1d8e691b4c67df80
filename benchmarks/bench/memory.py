"""Memory: of the service when idle, of a key in Redis, and of a key in a packed backup."""

from __future__ import annotations

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import redis

from progressdb_kms.domain.errors import KmsError
from progressdb_kms.store.redis.schema import AUDIT_KEY

from .cases import Figures, Key
from .machine import resident_mib
from .servers import client, service
from .tools import output_of

BATCH = 1000
CALLERS = 4
"""Threads that create keys, so that client, service and store work at the same time."""
THREAD = "bench:memory:{:08d}"
"""Thread ids of 21 bytes, as in docs/capacity.md."""
SETTLE = 2.0
"""Seconds without a request before the service's memory is read."""


def measure_memory(figures: Figures, counts: list[int]) -> None:
    """Fill a development instance of its own up to each number of keys in turn, and measure there.

    Args:
        figures: Where the figures go, of part ``memory``.
        counts: Numbers of keys, ascending.
    """
    with service() as ready, tempfile.TemporaryDirectory() as folder:
        path = unquote(urlsplit(ready["redis_url"]).path)
        with redis.Redis(unix_socket_path=path) as store:
            empty, _ = _used(store)
            time.sleep(SETTLE)
            figures.add(Key("memory", "idle", "service", 0), {"rss_mib": resident_mib(ready["pid"])})
            before = 0
            for count in counts:
                began = time.perf_counter()
                payload, failed = _fill(ready, before, count)
                seconds = time.perf_counter() - began
                used, audit = _used(store)
                time.sleep(SETTLE)
                rss = resident_mib(ready["pid"])
                backup = _backup(ready, Path(folder) / f"{count}.kms")
                print(".", end="", file=sys.stderr, flush=True)
                figures.add(
                    Key("memory", "keys", "service", count),
                    {
                        "rss_mib": rss,
                        "redis_bytes_per_key": (used - empty) / count,
                        "redis_audit_mib": audit / 2**20,
                        "backup_bytes_per_key": backup / count,
                        "payload_bytes_per_key": payload,
                        "created_per_second": (count - before) / seconds,
                        "failed": failed,
                    },
                )
                before = count


def _fill(ready: dict[str, Any], first: int, end: int) -> tuple[float, int]:
    """Create keys, one a thread, in batches.

    Returns:
        Bytes of a key that have to be kept whatever keeps them (its id, its thread's id, the wrapped key),
        and how many could not be created.
    """
    size = made_in_all = 0
    with client(ready, "msgpack") as kms, ThreadPoolExecutor(CALLERS) as callers:

        def create(at: int) -> list[int]:
            """Return the sizes of the keys that were made."""
            names = [THREAD.format(number) for number in range(at, min(at + BATCH, end))]
            return [
                len(made.key_id) + len(name) + len(made.wrapped)
                for name, made in zip(names, kms.create_deks_for_threads(names), strict=True)
                if not isinstance(made, KmsError)
            ]

        for sizes in callers.map(create, range(first, end, BATCH)):
            size += sum(sizes)
            made_in_all += len(sizes)
    return size / max(made_in_all, 1), end - first - made_in_all


def _used(store: redis.Redis) -> tuple[int, int]:
    """Return the bytes that Redis has allocated, without its audit stream, and those of that.

    The stream holds records of calls, which are trimmed in time, and says nothing of what a key costs. Waits
    until no rewrite of the append-only file takes memory as well.
    """
    while True:
        info = store.info("persistence")
        if not (info["aof_rewrite_in_progress"] or info.get("aof_rewrite_scheduled")):
            audit = int(store.memory_usage(AUDIT_KEY, samples=0) or 0)
            return int(store.info("memory")["used_memory"]) - audit, audit
        time.sleep(0.1)


def _backup(ready: dict[str, Any], out: Path) -> int:
    """Export all keys into a packed file and return its bytes."""
    command = [sys.executable, "-m", "progressdb_kms.cli", "backup", "create"]
    command += ["--config", ready["config"], "--out", str(out)]
    output_of(command)
    size = out.stat().st_size
    out.unlink()
    return size

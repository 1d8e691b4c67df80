"""The ceiling of creates: redis-benchmark with the service's own script on the same store."""

from __future__ import annotations

import csv
from functools import partial
from urllib.parse import unquote, urlsplit

import redis

from progressdb_kms.domain.keys import KEY_ID_PREFIX
from progressdb_kms.store.redis.scripts import CREATE

from .cases import Case, Key, Scene, Values
from .machine import SERVER_CORE, cpu_seconds, two_cores
from .tools import find_store_benchmark, output_of

PLACE = "__rand_int__"
"""redis-benchmark puts 12 digits in its place, other ones in each request."""
WRAPPED_BYTES = 64
CREATED_AT = 1_700_000_000


def store_cases(scene: Scene) -> list[Case]:
    """Return the cases of the store alone, with as many connections as the service has callers.

    Raises:
        RuntimeError: The store does not fsync before it answers, so that it would be compared with less.
    """
    socket = unquote(urlsplit(scene.ready["redis_url"]).path)
    with redis.Redis(unix_socket_path=socket) as store:
        found = store.config_get("append*")
        if (found.get("appendonly"), found.get("appendfsync")) != ("yes", "always"):
            raise RuntimeError("the store has to be measured with appendonly yes and appendfsync always")
        store.script_load(CREATE.source)
    return [
        Case(Key("single", "create", "store", connections), partial(_run, scene, socket, connections))
        for connections in scene.connections
    ]


def script_call() -> list[str]:
    """Return a call of the script that creates a key, with arguments of the lengths that the service sends.

    All keys belong to one thread, as in the service's own run. They are under a prefix that the service does
    not read, in one slot.
    """
    key_id = KEY_ID_PREFIX + "AA" + "0" * 14 + PLACE
    prefix = "bench:{AA}:"
    names = [f"{prefix}dek:{key_id}", f"{prefix}thread:bench:creates", f"{prefix}kek:1", f"{prefix}ctl"]
    record = [key_id, "bench:creates", "w" * WRAPPED_BYTES, "k" * 16, "1", str(CREATED_AT), "dns:server"]
    return ["EVALSHA", CREATE.sha, str(len(names)), *names, *record]


def _run(scene: Scene, socket: str, connections: int) -> Values:
    """Run redis-benchmark once, where the service would run: on its core."""
    # It takes a number of requests, not a time, so a short run says how many fit.
    few = max(5 * connections, 100)
    rate = _benchmark(socket, connections, few)["rps"]
    pid = scene.ready["store_pid"]
    before = cpu_seconds(pid)
    count = max(few, int(rate * scene.seconds))
    row = _benchmark(socket, connections, count)
    return {
        "per_second": row["rps"],
        "cpu_us": (cpu_seconds(pid) - before) / count * 1e6,
        "p50_us": row["p50_latency_ms"] * 1e3,
        "p99_us": row["p99_latency_ms"] * 1e3,
    }


def _benchmark(socket: str, connections: int, requests: int) -> dict[str, float]:
    command = [find_store_benchmark(), "-s", socket, "-c", str(connections), "-n", str(requests)]
    command += ["-r", "1000000000000", "--csv", *script_call()]
    if two_cores():
        command = ["taskset", "-c", str(SERVER_CORE), *command]
    said = output_of(command)
    lines = said[said.index('"test"') :].splitlines()
    row = next(csv.DictReader(lines))
    return {name: float(value) for name, value in row.items() if name != "test"}

"""One worker against two: CPU-bound batches, with both cores for whoever needs them.

The other parts keep the service to one core. Here nothing is kept anywhere: two workers, the store and the
generator share what cores there are, so that on two cores the ratio can't be two. How many cores each of them
used is part of the figures.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .batches import CONNECTIONS, ENCODINGS, Plain, PlainBatch, batch_request
from .cases import Case, Key, Scene, Values
from .load import MESSAGE, Request, generator_command, read_report
from .machine import CORES, cpu_seconds
from .servers import READY_POLL, client
from .tools import output_of

if TYPE_CHECKING:
    from collections.abc import Iterator

COUNTS = (1, 2)
ITEMS = 1000


@contextmanager
def worker_services(ready: dict[str, Any]) -> Iterator[dict[int, dict[str, Any]]]:
    """Run a service with each number of workers on the store of a development instance.

    Gives by the number what the instance's ready file says, with the service's URL and its processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = {count: _start(ready, Path(folder), count) for count in COUNTS}
        try:
            yield {
                count: {**ready, "url": _url(log, process, count), "pids": _processes(process.pid)}
                for count, (process, log) in started.items()
            }
        finally:
            for process, _log in started.values():
                process.send_signal(signal.SIGTERM)
            for process, _log in started.values():
                process.wait()


def worker_cases(scene: Scene, services: dict[int, dict[str, Any]]) -> list[Case]:
    """Return the cases of one and of two workers, side by side."""
    with client(scene.ready) as kms:
        key_id = kms.create_dek_for_thread("bench:workers").key_id
    batch = PlainBatch([Plain(key_id, MESSAGE)] * ITEMS)
    return [
        Case(
            Key("workers", f"encrypt, {encoding}", f"{count} worker{'s' * (count > 1)}", ITEMS),
            partial(
                fire_at_all,
                replace(scene, ready=ready),
                batch_request(replace(scene, ready=ready), "encrypt", encoding, batch),
            ),
        )
        for encoding in ENCODINGS
        for count, ready in services.items()
    ]


def fire_at_all(scene: Scene, request: Request) -> Values:
    """Run the generator once, on whatever core is free, ahead of the workers where that is allowed.

    Returns:
        What ``fire`` returns, by items and with the CPU time of all workers, and how many cores they and the
        generator used.
    """
    command = generator_command(scene, request, CONNECTIONS, scene.seconds, core=None)
    if os.geteuid() == 0:
        command = ["nice", "-n", "-5", *command]
    pids = scene.ready["pids"]
    before, generator, began = sum(map(cpu_seconds, pids)), _children_seconds(), time.perf_counter()
    kept = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    try:
        said = output_of(command)
    finally:
        os.sched_setaffinity(0, kept)
    spent, elapsed = sum(map(cpu_seconds, pids)) - before, time.perf_counter() - began
    values = dict(read_report(json.loads(said)["result"], spent))
    values["per_second"] *= ITEMS
    values["cpu_us"] /= ITEMS
    values["service_cores"] = spent / elapsed
    values["generator_cores"] = (_children_seconds() - generator) / elapsed
    return values


def _start(ready: dict[str, Any], folder: Path, workers: int) -> tuple[subprocess.Popen[bytes], Path]:
    config = Path(ready["config"])
    document = yaml.safe_load(config.read_text())
    document |= {
        "workers": workers,
        "listen": {"host": "127.0.0.1", "port": 0},
        "admin": {"host": "127.0.0.1", "port": 0},
        "log": {"format": "json"},
        "drain": {"delay": 0, "timeout": 5},
    }
    document["store"]["url"] = ready["redis_url"]
    # Beside the other, since its paths are relative to it.
    path = config.with_name(f"workers-{workers}.yaml")
    path.write_text(yaml.safe_dump(document))
    log = folder / f"{workers}.log"
    command = [sys.executable, "-m", "progressdb_kms.cli", "serve", "--config", str(path)]
    # This process keeps to one core, and its children would.
    command = ["taskset", "-c", ",".join(map(str, CORES)), *command]
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=output), log


def _url(log: Path, process: subprocess.Popen[bytes], workers: int) -> str:
    """Wait until all workers serve, and return where."""
    while True:
        records = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        serving = [record["tcp"] for record in records if record["event"] == "serving"]
        if len(serving) == workers:
            return f"https://localhost:{serving[0][1]}"
        if process.poll() is not None:
            sys.exit(log.read_text())
        time.sleep(READY_POLL)


def _processes(pid: int) -> list[int]:
    """Return the processes that do the work: the workers, or the only one."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found] or [pid]


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

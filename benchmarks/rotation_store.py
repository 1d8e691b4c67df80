"""Measure a rotation of the KEK on a real Redis with AOF ``always``: keys a second of each step, and memory.

Redis has one core to itself and the job the other. The keys are put in by a script, without AOF, which is
switched on before the rotation begins. The job is a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Any

import redis
import uvloop

from progressdb_kms.domain.envelope import pack_blob, wrap_aad
from progressdb_kms.domain.keyring import KekInfo, KekState, kek_id_of
from progressdb_kms.domain.keys import new_key_id, slot_tag
from progressdb_kms.kek.file import FileKekSource
from progressdb_kms.store.redis import StoreSettings, open_store
from progressdb_kms.usecases.keks import KekBook
from progressdb_kms.usecases.rotation import Conduct, Parts, Rotator

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from progressdb_kms.domain.rotation import Rotation

LENGTH = Struct(">I").pack
THREADS_AT_ONCE = 250_000
FILL = """#!lua
local at = 1
while at <= #ARGV[1] do
  local id, thread, blob
  id, thread, blob, at = struct.unpack('>I4c0I4c0I4c0', ARGV[1], at)
  redis.call('HSET', ARGV[2] .. 'dek:' .. id, 'thread_id', thread, 'wrapped', blob, 'kek_id', ARGV[3],
    'kek_version', 1, 'version', 1, 'state', 'enabled', 'created_at', 1700000000, 'created_by', 'dns:chat')
  redis.call('ZADD', ARGV[2] .. 'thread:' .. thread, 1, id)
  redis.call('SADD', KEYS[1], id)
end
"""


class Quiet:
    """An Observer and a Progress that remembers when each step began."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float, float]] = []

    def step(self, rotation: Rotation, total: int) -> None:
        """Remember the time, and the CPU time of this process."""
        del total
        self.steps.append((str(rotation.step), time.perf_counter(), time.process_time()))

    def slot(self, counts: Mapping[str, int]) -> None:
        """Say nothing."""

    def waiting(self, missing: Sequence[str], gone: Sequence[str]) -> None:
        """Say nothing."""

    def warning(self, text: str) -> None:
        """Say nothing."""

    def uses_warning(self, kind: str) -> None:
        """Say nothing."""


class Stager:
    """Brings versions into the KEK file."""

    def __init__(self, path: Path, source: FileKekSource) -> None:
        self.path = path
        self.source = source

    async def stage(self, version: int) -> None:
        """Add a version."""
        if version not in self.source.versions():
            with self.path.open("a") as file:
                file.write(f"  {version}: {secrets.token_hex(32)}\n")
            self.source.reload({})

    async def escrow(self, version: int) -> int:
        """Say that it is escrowed."""
        return version


def main() -> None:
    """Measure for each number of keys, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--server", default="redis-server", help="redis-server or valkey-server to start")
    parser.add_argument("--page", type=int, default=Conduct().page, help="records in one script call")
    parser.add_argument("--profile", default="", help="write a profile of the job to this file")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        socket, kek_file = options.job
        print(json.dumps(uvloop.run(rotate(socket, kek_file, options.page, options.profile))))
        return
    print("| keys | snapshot keys/s | rewrap keys/s | verify keys/s | job RSS at most, MiB | outcome |")
    print("|---|---|---|---|---|---|")
    for keys in options.keys:
        result = measure(keys, options)
        rates = " | ".join(
            f"{keys / result[step]['seconds']:,.0f}" for step in ("snapshot", "rewrap", "verify")
        )
        print(f"| {keys:,} | {rates} | {result['rss']:.0f} | {result['outcome']} |", flush=True)
        for step in ("activate", "snapshot", "rewrap", "verify"):
            part = result[step]
            print(
                f"{step}: {part['seconds']:.2f} s, of which the job computed {part['cpu']:.2f} s and Redis"
                f" {part['redis']:.2f} s",
                file=sys.stderr,
            )


def measure(keys: int, options: argparse.Namespace) -> dict[str, Any]:
    """Fill a server with keys and rotate."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        socket = folder / "store.sock"
        server = subprocess.Popen(
            [options.server, "--port", "0", "--unixsocket", str(socket), "--dir", name, "--save", "",
             "--appendfsync", "always", "--logfile", str(folder / "log")],
        )  # fmt: skip
        os.sched_setaffinity(server.pid, {0})
        try:
            client = connect(socket)
            kek_file = folder / "kek.yaml"
            kek_file.write_text(f"versions:\n  1: {secrets.token_hex(32)}\n")
            kek_file.chmod(0o600)
            asyncio.run(fill(socket, FileKekSource(kek_file), keys))
            client.config_set("appendonly", "yes")
            while client.info("persistence")["aof_rewrite_in_progress"]:
                time.sleep(0.1)
            command = [
                sys.executable,
                __file__,
                "--job",
                str(socket),
                str(kek_file),
                "--page",
                str(options.page),
            ]
            command += ["--profile", options.profile]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            return dict(json.loads(done.stdout))
        finally:
            server.kill()
            server.wait()


def connect(socket: Path) -> redis.Redis:
    """Return a client, when the server answers."""
    client = redis.Redis(unix_socket_path=str(socket))
    while True:
        try:
            client.ping()
        except redis.RedisError:
            time.sleep(0.02)
        else:
            return client


async def fill(socket: Path, source: FileKekSource, keys: int) -> None:
    """Put in keys that really unwrap, one thread each."""
    value = await source.check_value(1)
    kek_id = kek_id_of(value)
    store = await open_store(StoreSettings(f"unix://{socket}", allow_data_loss=True))
    await store.registry.initialise(KekInfo(1, kek_id, "file", "1", value, KekState.ACTIVE, 1))
    await store.close()
    client = connect(socket)
    put = client.register_script(FILL)
    for first in range(0, keys, THREADS_AT_ONCE):
        names = []
        for number in range(first, min(first + THREADS_AT_ONCE, keys)):
            thread = f"room:{number}"
            names.append((new_key_id(thread, secrets.token_bytes(17)), thread))
        bodies = await source.wrap(
            1, [secrets.token_bytes(32) for _ in names], [wrap_aad(*name) for name in names]
        )
        slots: defaultdict[str, list[bytes]] = defaultdict(list)
        for (key_id, thread), body in zip(names, bodies, strict=True):
            for part in (key_id.encode(), thread.encode(), pack_blob(1, body)):
                slots[slot_tag(thread)] += [LENGTH(len(part)), part]
        for tag, parts in slots.items():
            prefix = f"kms:{{{tag}}}:"
            put(keys=[f"{prefix}kek:1"], args=[b"".join(parts), prefix, kek_id])


async def rotate(socket: str, kek_file: str, page: int, profile: str) -> dict[str, Any]:
    """Rotate once; return seconds of each step, the most memory, and how it ended."""
    os.sched_setaffinity(0, {1 % (os.cpu_count() or 1)})
    store = await open_store(StoreSettings(f"unix://{socket}"))
    source = FileKekSource(Path(kek_file))
    quiet = Quiet()
    keks = KekBook(source=source, registry=store.registry, observer=quiet)  # type: ignore[arg-type] # all it calls
    await keks.start(1)
    spent: list[float] = []
    client = redis.Redis(unix_socket_path=socket)

    def reached(name: str) -> None:
        if name.endswith((":opened", ":saved")):
            usage = client.info("cpu")
            spent.append(usage["used_cpu_user"] + usage["used_cpu_sys"])

    parts = Parts(
        ledger=store.rotation_ledger,
        slots=store.rotation_slots,
        registry=store.registry,
        heartbeats=store.heartbeats,
        stager=Stager(Path(kek_file), source),
        keks=keks,
        progress=quiet,
        now=time.time,
        census=store.keys.census,
        reached=reached,
    )
    rotator = Rotator(parts, Conduct(page=page), "benchmark")
    if profile:
        with cProfile.Profile() as profiler:
            rotation = await rotator.run()
        profiler.dump_stats(profile)
    else:
        rotation = await rotator.run()
    end = ("end", time.perf_counter(), time.process_time())
    result: dict[str, Any] = {}
    for number, ((step, at, cpu), (_, until, cpu_until)) in enumerate(
        zip(quiet.steps, [*quiet.steps[1:], end], strict=True)
    ):
        redis_cpu = spent[2 * number] - spent[2 * number - 1] if number else 0.0
        result[step] = {"seconds": until - at, "cpu": cpu_until - cpu, "redis": redis_cpu}
    result["rss"] = most_memory()
    result["outcome"] = rotation.outcome if rotation else "none"
    await store.close()
    return result


def most_memory() -> float:
    """Return the most MiB that this process had resident; ru_maxrss would be inherited from the starter."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    main()

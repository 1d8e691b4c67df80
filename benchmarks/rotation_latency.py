"""Measure what a rotation of the KEK does to live requests: latency of encrypts before, during and after.

A service over mTLS with its load generator has one core, the store and the rotation job the other, as where
pods of the service and of the job run on different nodes. The generator is open-loop: it calls at a fixed
rate whatever the answers take, and counts a request's time from when it was due, so that a stall of the
service is seen by all the requests that it delayed. Each call is for a key drawn at random from ``--used``;
with ``--cached`` above that each is in memory after a while, with a small one nearly every call reads the
store that the job is busy with.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import yaml
from bench.machine import pin  # type: ignore[import-not-found] # the folder beside this file

from progressdb_kms.client import open_sync_provider

MESSAGE = b"m" * 256
BATCH = 5_000
CONNECTIONS = 16
HEAD = (
    b"POST /encrypt HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n"
)
Sample = tuple[float, float]
"""When a request was due, by ``time.time``, and its latency in seconds."""


async def generate(ready: dict[str, Any], key_ids: list[str], rate: float, samples: list[Sample]) -> None:
    """Call at a fixed rate until cancelled, the connections in turn."""
    client = ready["clients"]["server"]
    context = ssl.create_default_context(cafile=ready["ca"])
    context.load_cert_chain(client["cert"], client["key"])
    port = int(ready["url"].rpartition(":")[2])
    plaintext = base64.b64encode(MESSAGE).decode()
    began = time.time()

    async def one(number: int) -> None:
        reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
        while True:
            due = began + number / rate
            number += CONNECTIONS
            await asyncio.sleep(max(0, due - time.time()))
            key_id = random.choice(key_ids)
            body = json.dumps({"key_id": key_id, "plaintext": plaintext})
            writer.write(HEAD % len(body) + body.encode())
            head = await reader.readuntil(b"\r\n\r\n")
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
            await reader.readexactly(int(fields[b"content-length"]))
            samples.append((due, time.time() - due))
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode())
            if fields.get(b"connection") == b"close":
                writer.close()
                reader, writer = await asyncio.open_connection("localhost", port, ssl=context)

    await asyncio.gather(*(one(number) for number in range(CONNECTIONS)))


def percentile(latencies: list[float], share: float) -> float:
    """Return a percentile in milliseconds."""
    return sorted(latencies)[min(int(len(latencies) * share), len(latencies) - 1)] * 1000


async def rotate(config: Path, *arguments: str) -> dict[str, tuple[float, float]]:
    """Run the job on the second core; return when each step began and ended, by ``time.time``."""
    command = [
        "taskset",
        "-c",
        "1",
        sys.executable,
        "-m",
        "progressdb_kms.cli",
        "rotate",
        "--config",
        str(config),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    began: list[tuple[str, float]] = []
    async for line in cast("asyncio.StreamReader", process.stdout):
        record = json.loads(line)
        if record.get("event") == "step":
            began.append((record["step"], time.time()))
    if await process.wait():
        sys.exit(f"the rotation ended with {process.returncode}")
    ends = [at for _, at in began[1:]] + [time.time()]
    return {step: (at, end) for (step, at), end in zip(began, ends, strict=True)}


async def measure(ready: dict[str, Any], key_ids: list[str], options: argparse.Namespace) -> None:
    """Generate before, during and after a rotation, and print a row for each."""
    samples: list[Sample] = []
    load = asyncio.create_task(generate(ready, key_ids, options.rate, samples))
    await asyncio.sleep(options.warm)
    idle_from = time.time()
    await asyncio.sleep(options.idle)
    idle = (idle_from, time.time())
    steps = await rotate(Path(ready["config"]), *options.job)
    after_from = time.time()
    await asyncio.sleep(options.idle)
    load.cancel()
    (ended,) = await asyncio.gather(load, return_exceptions=True)
    if not isinstance(ended, asyncio.CancelledError):
        sys.exit(f"the load ended: {ended!r}")
    spans = {"idle before": idle, **steps, "idle after": (after_from, time.time())}
    print("| | seconds | requests | p50 ms | p99 ms | p99 / idle p99 |\n|---|---|---|---|---|---|")
    base = 0.0
    for name, (start, end) in spans.items():
        inside = [latency for due, latency in samples if start <= due < end]
        if not inside:
            continue
        p99 = percentile(inside, 0.99)
        base = base or p99
        print(
            f"| {name} | {end - start:.1f} | {len(inside):,} | {percentile(inside, 0.5):.2f} | {p99:.2f}"
            f" | {p99 / base:.2f} |"
        )


def start(directory: Path, cached: int) -> subprocess.Popen[bytes]:
    """Start a development instance whose cache holds ``cached`` keys."""
    arguments = [sys.executable, "-m", "progressdb_kms.cli", "dev", "--dir", str(directory / "dev")]
    arguments += ["--port", "0", "--admin-port", "0", "--ready-file", str(directory / "ready")]
    process = run(arguments, directory)
    process.send_signal(signal.SIGTERM)  # it has written its configuration
    process.wait()
    config = directory / "dev" / "config.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "cache": {"max_keys": cached}}))
    return run(arguments, directory)


def run(arguments: list[str], directory: Path) -> subprocess.Popen[bytes]:
    """Start the instance and wait until it is ready."""
    (directory / "ready").unlink(missing_ok=True)
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log)
    while not (directory / "ready").exists():
        if process.poll() is not None:
            sys.exit((directory / "log").read_text())
        time.sleep(0.05)
    return process


def main() -> int:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=200_000)
    parser.add_argument("--used", type=int, default=2_000, help="keys that the requests are for")
    parser.add_argument(
        "--cached", type=int, default=100_000, help="keys that the service may hold in memory"
    )
    parser.add_argument("--rate", type=float, default=200, help="requests a second")
    parser.add_argument("--warm", type=float, default=20, help="seconds before anything is measured")
    parser.add_argument("--idle", type=float, default=30, help="seconds before and after the rotation")
    parser.add_argument("--job", nargs=argparse.REMAINDER, default=[], help="further arguments of the job")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        process = start(Path(directory), options.cached)
        try:
            ready = json.loads((Path(directory) / "ready").read_text())
            operator = ready["clients"]["operator"]
            with open_sync_provider(
                ready["url"], ca=ready["ca"], cert=operator["cert"], key=operator["key"], deadline=60
            ) as provider:
                key_ids: list[str] = []
                while len(key_ids) < options.keys:
                    threads = [f"bench:{len(key_ids) + at}" for at in range(BATCH)]
                    key_ids += [dek.key_id for dek in provider.create_deks_for_threads(threads)]
            pin(ready["pid"], 0)
            pin(ready["store_pid"], 1)
            os.sched_setaffinity(0, {0})
            asyncio.run(measure(ready, random.sample(key_ids, options.used), options))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())

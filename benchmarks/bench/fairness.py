"""What a normal client notices while another one sends batches of 10,000.

The normal client encrypts at a fixed rate whatever the answers take, and counts a request's time from when it
was due: so a stall of the service shows in every request that had to wait for it, not in one.
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import statistics
import subprocess
import time
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from .batches import Plain, PlainBatch, batch_request
from .cases import Case, Key, Scene, Values
from .load import MESSAGE, Request, generator_command, read_report
from .machine import cpu_seconds
from .servers import client

RATE = 100
CONNECTIONS = 4
BATCH_ITEMS = 10_000
SETTLE = 0.5
"""Seconds that the batches run before the normal client begins, and after it ends."""
Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def fairness_cases(scene: Scene) -> list[Case]:
    """Return the cases: the client alone, and beside batches in JSON and in msgpack of another identity."""
    with client(scene.ready) as kms:
        key_id = kms.create_dek_for_thread("bench:fairness").key_id
    batch = PlainBatch([Plain(key_id, MESSAGE)] * BATCH_ITEMS)
    cases = [Case(Key("fairness", "encrypt", "alone", RATE), partial(_alone, scene, key_id))]
    for encoding in ("json", "msgpack"):
        request = batch_request(scene, "encrypt", encoding, batch, who="operator")
        cases.append(
            Case(
                Key("fairness", "encrypt", f"beside {encoding} batches", RATE),
                partial(_beside, scene, key_id, request),
            )
        )
    return cases


def _alone(scene: Scene, key_id: str) -> Values:
    return asyncio.run(encrypt_when_due(scene, key_id, scene.seconds))


def _beside(scene: Scene, key_id: str, request: Request) -> Values:
    command = generator_command(scene, request, 1, scene.seconds + 2 * SETTLE)
    before = cpu_seconds(request.pid)
    # The normal client comes first on the core that both share: what it notices is to be the service's doing.
    attacker = subprocess.Popen(["nice", "-n", "19", *command], stdout=subprocess.PIPE, text=True)
    time.sleep(SETTLE)
    values = dict(asyncio.run(encrypt_when_due(scene, key_id, scene.seconds)))
    said, _ = attacker.communicate()
    other = read_report(json.loads(said)["result"], cpu_seconds(request.pid) - before)
    values["batches_per_second"] = other["per_second"]
    values["failed"] += other["failed"]
    return values


async def encrypt_when_due(scene: Scene, key_id: str, seconds: float) -> Values:
    """Encrypt at the fixed rate, the connections in turn.

    Returns:
        Median and 99th percentile from when a request was due, in microseconds, and how many failed.
    """
    url = urlsplit(scene.ready["url"])
    body = json.dumps({"key_id": key_id, "plaintext": base64.b64encode(MESSAGE).decode()}).encode()
    head = f"POST /encrypt HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    context = _context(scene.ready)
    lines = [
        await asyncio.open_connection(url.hostname, url.port, ssl=context, server_hostname=url.hostname)
        for _ in range(CONNECTIONS)
    ]
    locks = [asyncio.Lock() for _ in lines]
    times: list[float] = []
    failed = 0

    async def one(number: int, due: float) -> None:
        nonlocal failed
        async with locks[number % CONNECTIONS]:
            failed += not await _ask(lines[number % CONNECTIONS], request)
        times.append(time.perf_counter() - due)

    for number in range(CONNECTIONS):
        await one(number, time.perf_counter())
    times.clear()
    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for number in range(max(int(seconds * RATE), 2)):
            due = began + number / RATE
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.create_task(one(number, due))
    for _, writer in lines:
        writer.close()
    return {
        "p50_us": statistics.median(times) * 1e6,
        "p99_us": statistics.quantiles(times, n=100, method="inclusive")[98] * 1e6,
        "failed": failed,
    }


async def _ask(line: Line, request: bytes) -> bool:
    """Send a request and return whether the answer is 200."""
    reader, writer = line
    try:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
    except (OSError, asyncio.IncompleteReadError):
        return False
    return head.startswith(b"HTTP/1.1 200")


def _context(ready: dict[str, Any]) -> ssl.SSLContext:
    pair = ready["clients"]["server"]
    context = ssl.create_default_context(cafile=ready["ca"])
    context.load_cert_chain(pair["cert"], pair["key"])
    return context

"""What an encryption costs the service's own code, step by step, in microseconds.

usage: PYTHONPATH=. .venv/bin/python benchmarks/hotpath.py

One process, no network: a whole request of 256 bytes in JSON is given to the fast door of a connection whose
transport only takes what is written. Each step is timed by itself as well, CPU time, the lowest of many
rounds; a step's call from here costs some 0.05 us, which is in its figure. What the kernel, TLS and the event
loop take comes on top: the difference to ``cpu_us`` of ``make bench``.
"""

# ruff: noqa: SLF001 - its steps are not meant to be called one by one

from __future__ import annotations

import asyncio
import base64
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from progressdb_kms.api.answering import Api, new_request_id
from progressdb_kms.api.door import ApiDoor
from progressdb_kms.domain.envelope import NONCE_BYTES, seal
from progressdb_kms.observability.metrics import Metrics
from progressdb_kms.settings import Limits
from progressdb_kms.transport.connection import Connection
from progressdb_kms.transport.door import Door
from progressdb_kms.transport.ordinary import parse_head
from progressdb_kms.transport.turns import Turns
from progressdb_kms.usecases.context import boottime
from progressdb_kms.usecases.encryption import ENCRYPT, Hot
from progressdb_kms.usecases.messages import JSON, Encrypted, encode
from tests.unit.helpers import make_world

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 60
CALLS = 2000


class Sink:
    """A transport that takes everything."""

    def write(self, data: bytes) -> None:
        """Take it."""

    def is_closing(self) -> bool:
        """Say no."""
        return False


def microseconds(call: Callable[[], object], before: Callable[[], object]) -> float:
    """Return the CPU time of a call, the lowest of ``ROUNDS`` means of ``CALLS`` calls."""
    lowest = float("inf")
    for _ in range(ROUNDS):
        before()
        began = time.process_time()
        for _ in range(CALLS):
            call()
        lowest = min(lowest, (time.process_time() - began) / CALLS * 1e6)
    return lowest


async def main() -> None:
    """Measure, and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        world = await make_world(Path(folder))
        key_id = await world.key("room:1")
    metrics, loop = Metrics(), asyncio.get_running_loop()
    kms = replace(world.kms, random=os.urandom, observer=metrics)
    cache: Any = kms.cache
    cache._clock = boottime
    session, hot = world.session(), Hot(kms)
    limits = Limits()
    api = Api(kms, world.loader, limits, metrics.request, world.store.rotation_ledger, world.store.audit)
    app = ApiDoor(api, hot, metrics.request_at_door, debug=False)
    connection = Connection("tls", "", None, limits=limits, max_age=3600, now=loop.time)
    unused: Any = None
    sink: Any = Sink()
    door = Door(
        app=app,
        session=session,
        connection=connection,
        transport=sink,
        limits=limits,
        hand_on=unused,
        start=unused,
        write=unused,
        blocked=lambda: False,
        soon=Turns().wait,
    )
    body = json.dumps({"key_id": key_id, "plaintext": base64.b64encode(b"m" * 256).decode()}).encode()
    head = (
        b"POST /encrypt HTTP/1.1\r\nHost: localhost:8443\r\nContent-Type: application/json\r\n"
        b"Accept: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    parsed = parse_head(head)
    ready = app.ready(parsed) if parsed else None
    key = cache._keys[key_id]
    if ready is None:
        raise SystemExit("the request is not one for the door")

    def fresh() -> None:
        cache.read(boottime())
        for cached in cache._keys.values():
            cached.loaded_at, cached.uses_left = boottime(), 1 << 30

    item, nonce = ENCRYPT.read(JSON, body), os.urandom(NONCE_BYTES)
    sealed = Encrypted(seal(key.cipher, nonce, item.plaintext, None), "1")
    fresh()
    answer: Any = ready.answer(session, body)
    request = head + body
    steps: list[tuple[str, Callable[[], object]]] = [
        ("**the whole request**", lambda: door.received(request)),
        ("a head that is not the last one's: parse it, find the route", lambda: app.ready(parse_head(head))),
        ("answer it, all but the writing", lambda: ready.answer(session, body)),
        ("- limits of the caller", lambda: session.limited),
        ("- a request id", new_request_id),
        ("- use case", lambda: hot.encrypt(session, JSON, JSON, body, {})),
        ("  - certificate still valid, policy still the same", session.grants),
        ("  - body: JSON, base64, no field twice", lambda: ENCRYPT.read(JSON, body)),
        ("  - the key, and how fresh what is known of it is", lambda: hot._lookup(key_id)),
        ("  - 12 random bytes", lambda: os.urandom(NONCE_BYTES)),
        ("  - AES-256-GCM of 256 bytes", lambda: seal(key.cipher, nonce, item.plaintext, None)),
        ("  - count the use", lambda: metrics.dek_uses("encrypt", 1)),
        ("  - answer: base64, JSON", lambda: encode(JSON, sealed)),
        ("- count the request", lambda: metrics.request_at_door("/encrypt", 200, "ok", "dns", 0.00001)),
        ("write it: status, date, bookkeeping of the connection", lambda: door._send(answer)),
    ]
    print("| step | us |\n|---|---|")
    for name, call in steps:
        print(f"| {name.replace('  -', '&nbsp;&nbsp;-')} | {microseconds(call, fresh):.2f} |", flush=True)


if __name__ == "__main__":
    asyncio.run(main())

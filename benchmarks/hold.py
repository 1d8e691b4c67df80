"""How long the service's event loop is held at a time: by batches, and by each attack of ``attacks.py``.

The service runs with a watch in its loop: a callback that is due in every pass of the loop and looks at the
thread's CPU time. What lies between two of them is one pass, thus the most that everybody else has to wait
for whoever is being served; it counts CPU time, so that other work on the machine does not show. The watch
keeps the loop from sleeping: this says how long a pass is, ``abuse.py`` what a client notices of it.

    PYTHONPATH=. .venv/bin/python benchmarks/hold.py [--repeat 5] [--batches] [--attacks]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from abuse import make_target
from attacks import ATTACKS, Target
from bench.servers import service

from progressdb_kms.cli.__main__ import main as cli

LONG = 0.005
"""Seconds that nobody is to hold the loop for."""
WATCHED = "watched"


class Watch:
    """Measures the passes of the running loop; SIGUSR1 writes what was seen to a file and begins anew."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._loop = asyncio.get_running_loop()
        self._last = time.thread_time()
        self._longest: list[float] = []
        self._over = 0
        self._loop.add_signal_handler(signal.SIGUSR1, self._write)
        self._look()

    def _look(self) -> None:
        now = time.thread_time()
        took = now - self._last
        if took > LONG / 10:
            self._longest.append(took)
        self._last = now
        self._loop.call_soon(self._look)

    def _write(self) -> None:
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps(sorted(self._longest)))
        fresh.replace(self._file)
        self._longest.clear()
        self._last = time.thread_time()


def serve_watched(file: Path, arguments: list[str]) -> int:
    """Run the command line with a watch in its event loop."""
    run = uvloop.run

    def watched(main: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401 - what the command returns
        async def both() -> Any:  # noqa: ANN401 - likewise
            watch = Watch(file)
            try:
                return await main
            finally:
                del watch

        return run(both())

    uvloop.run = watched  # type: ignore[assignment]  # for this process's only loop
    sys.argv[1:] = arguments
    return cli()


@dataclass(frozen=True)
class Row:
    """What one kind of load did: milliseconds of the longest pass, passes over ``LONG`` for each attempt."""

    name: str
    longest: float
    median: float
    over: float
    outcome: str


class Probe:
    """A watched service."""

    def __init__(self, ready: dict[str, Any], file: Path) -> None:
        self._pid = ready["pid"]
        self._file = file

    def passes(self) -> list[float]:
        """Return the longer passes since the last call, in seconds, shortest first."""
        self._file.unlink(missing_ok=True)
        os.kill(self._pid, signal.SIGUSR1)
        for _ in range(500):
            if self._file.exists():
                return [float(one) for one in json.loads(self._file.read_text())]
            time.sleep(0.01)
        raise TimeoutError("the service does not say how long it was held")

    def measure(self, name: str, repeat: int, attempt: Callable[[collections.Counter[str]], None]) -> Row:
        """Make attempts, one after the other."""
        longest = []
        over = 0
        outcomes: collections.Counter[str] = collections.Counter()
        attempt(outcomes)  # what is done only once
        outcomes.clear()
        self.passes()
        for _ in range(repeat):
            attempt(outcomes)
            seen = self.passes() or [0.0]
            longest.append(seen[-1])
            over += sum(one > LONG for one in seen)
        said = ", ".join(f"{what} {count}" for what, count in outcomes.most_common(2))
        return Row(name, max(longest) * 1e3, statistics.median(longest) * 1e3, over / repeat, said)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5, help="attempts for each row")
    parser.add_argument("--batches", action="store_true", help="only these")
    parser.add_argument("--attacks", action="store_true", help="only these")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PART", help="rows whose name has one of these in it"
    )
    options = parser.parse_args()
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"hold-{os.getpid()}.json"  # noqa: S108 - our own name
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    with service([str(Path(__file__).resolve()), WATCHED, str(file)]) as ready:
        os.sched_setaffinity(0, {(os.cpu_count() or 1) - 1})
        probe = Probe(ready, file)
        target = make_target(ready)
        rows = []
        wanted = batches(target) if options.batches or not options.attacks else {}
        if options.attacks or not options.batches:
            wanted |= attacks(target)
        for name, attempt in wanted.items():
            if not options.only or any(part in name for part in options.only):
                rows.append(probe.measure(name, options.repeat, attempt))
                print(".", end="", file=sys.stderr, flush=True)
    file.unlink(missing_ok=True)
    print(file=sys.stderr)
    print("| load | longest pass, ms | median of the longest, ms | passes over 5 ms, each | outcome |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.name} | {row.longest:.2f} | {row.median:.2f} | {row.over:.1f} | {row.outcome} |")


Attempt = Callable[[collections.Counter[str]], None]


def attacks(target: Target) -> dict[str, Attempt]:
    """Return a second of each attack that needs no limits."""
    return {
        attack.title: lambda outcomes, attack=attack: asyncio.run(attack.run(target, 1.0, outcomes))  # type: ignore[misc]  # a default binds it
        for attack in ATTACKS
        if not attack.limits
    }


def batches(target: Target) -> dict[str, Attempt]:
    """Return batches of all shapes: many items, much in few, escaped, wrong, and made to be dear."""
    mib16 = 16 * 2**20
    shapes: dict[str, tuple[str, bytes]] = {}
    for size, count in (
        (0, 1_000),
        (256, 1_000),
        (16, 10_000),
        (256, 10_000),
        (1_100, 10_000),
        (2**20 - 2**10, 11),
    ):
        data = os.urandom(size)
        items = [{"key_id": target.key_id, "plaintext": data}] * count
        for kind in (msgspec.json, msgspec.msgpack):
            name = kind.__name__.rpartition(".")[2]
            shapes[f"{count:,} of {size:,} bytes, {name}"] = (
                f"application/{name}",
                kind.encode({"items": items}),
            )
    text = base64.b64encode(b"m" * 150).decode()
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in text)
    item = f'{{"key_id":"{target.key_id}","plaintext":"{escaped}"}}'
    shapes["10,000 escaped, json"] = (
        "application/json",
        f'{{"items":[{",".join([item] * 10_000)}]}}'.encode(),
    )
    spaced = json.dumps({"items": [{"key_id": target.key_id, "plaintext": text}] * 10_000}, indent=4)
    shapes["10,000 indented, json"] = ("application/json", spaced.encode())
    shapes["10,000 wrong, json"] = (
        "application/json",
        json.dumps({"items": [{"key": "x" * 1_000}] * 10_000}).encode(),
    )
    shapes["10,000 unknown keys, json"] = (
        "application/json",
        json.dumps({"items": [{"key_id": f"k_{n:028d}", "plaintext": text} for n in range(10_000)]}).encode(),
    )
    hostile = {
        "8,000,000 zeros": b'{"items":[%s0]}' % (b"0," * (mib16 // 2 - 10)),
        "8,000,000 zeros and a mistake": b'{"items":[%s}]}' % (b"0," * (mib16 // 2 - 10)),
        "the name escaped": b'{"\\u0069tems":[%s0]}' % (b"0," * (mib16 // 2 - 20)),
        "items twice": b'{"items":[],"items":[%s0]}' % (b"0," * (mib16 // 2 - 20)),
        "spaces": b'{"items":[0,%s0]}' % (b" " * (mib16 - 20)),
        "spaces before": b'%s{"items":[%s0]}' % (b" " * (mib16 // 2), b"0," * (mib16 // 4 - 20)),
        "strings with }, in them": b'{"items":[%s0]}' % ((b'{"key_id":"%s"},' % (b"}," * 2**15)) * 255),
        "items of brackets": b'{"items":[%s0]}' % ((b"[%s0]," % (b"[]," * 300)) * 9_000),
        "one item of zeros": b'{"items":[[%s0]]}' % (b"0," * (mib16 // 2 - 10)),
        "one item of brackets": b'{"items":[[%s0]]}' % (b"[]," * (mib16 // 3 - 10)),
        "one item of escapes": b'{"items":[{"key_id":"%s"}]}' % (b"\\n" * (mib16 // 2 - 20)),
        "one plaintext of 12 MiB": b'{"items":[{"key_id":"k","plaintext":"%s"}]}' % (b"A" * (mib16 - 100)),
    }
    for name, body in hostile.items():
        shapes[f"16 MiB: {name}, json"] = ("application/json", body)
    head = b"\x81\xa5items"
    long = mib16 - 100
    hostile = {
        "zeros": head + b"\xdd" + long.to_bytes(4, "big") + bytes(long),
        "items twice": b"\x82\xa5items\x90\xa5items\xdd" + long.to_bytes(4, "big") + bytes(long),
        "one item of zeros": head + b"\x91\xdd" + long.to_bytes(4, "big") + bytes(long),
    }
    for name, body in hostile.items():
        shapes[f"16 MiB: {name}, msgpack"] = ("application/msgpack", body)
    found = {name: _post(target, kind, body) for name, (kind, body) in shapes.items()}
    kind, body = shapes["10,000 of 1,100 bytes, json"]
    found["10,000 of 1,100 bytes, json, not by the door"] = _post(target, kind, body, "TE: trailers")
    creates = json.dumps({"items": [{"thread_id": "bench:creates"}] * 1_000}).encode()
    found["1,000 creates, json"] = _post(target, "application/json", creates, path="/create_dek_batch")
    return found


def _post(target: Target, kind: str, body: bytes, *lines: str, path: str = "/encrypt_batch") -> Attempt:
    request = target.post(path, body, *lines).replace(b"application/json", kind.encode(), 1)

    def attempt(outcomes: collections.Counter[str]) -> None:
        outcomes[asyncio.run(_status(target, request))] += 1

    return attempt


async def _status(target: Target, request: bytes) -> str:
    reader, writer = await target.tls("server")
    try:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
        return head.split(b" ", 2)[1].decode()
    finally:
        writer.transport.abort()


if __name__ == "__main__":
    if sys.argv[1:2] == [WATCHED]:
        sys.exit(serve_watched(Path(sys.argv[2]), sys.argv[3:]))
    main()

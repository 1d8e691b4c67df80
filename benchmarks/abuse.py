"""What a well-behaved client notices while somebody abuses the service.

The service has the first core to itself; its store, the client and the attacker share the second. The
client sends encryptions at a fixed rate over mutual TLS whether or not the last was answered, and times each
from when it was due, so that a service that stalls can't hide it. Each attack runs between two quiet spells
of the same length, in several rounds; the table has medians of the rounds, and ratios are to the quiet spells
around. The CPU time of an attempt is what the service spent beyond the quiet spells, by attempts made: it
hardly depends on what else the machine does, as the times do.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import json
import multiprocessing
import os
import ssl
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from attacks import ATTACKS, Attack, Target
from bench.machine import pin
from bench.servers import service

from progressdb_kms.client import open_sync_provider

RATE = 100
CONNECTIONS = 4
SETTLE = 0.5
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Spell:
    """What the client saw in one spell, in milliseconds, and how busy the service's core was, in per cent."""

    p50: float
    p99: float
    failed: int
    busy: float


@dataclass(frozen=True)
class Row:
    """One round of one attack."""

    attack: str
    quiet: Spell
    beside: Spell
    made: float
    outcomes: dict[str, int]


def main() -> None:
    """Run every attack in every round and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5, help="length of one spell")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of: {', '.join(a.name for a in ATTACKS)}")
    options = parser.parse_args()
    chosen = [attack for attack in ATTACKS if not options.only or attack.name in options.only]
    if not chosen:
        parser.error("--only names no attack that there is")
    rows = []
    with service() as ready:
        os.sched_setaffinity(0, {(os.cpu_count() or 1) - 1})
        target = make_target(ready)
        for _ in range(options.rounds):
            before = _spell(ready, target, options.seconds)
            for attack in chosen:
                with _limits(ready, attack):
                    beside, made, outcomes = _attacked(ready, target, attack, options.seconds)
                after = _spell(ready, target, options.seconds)
                quiet = Spell(
                    *(statistics.mean(pair) for pair in zip(_values(before), _values(after), strict=True))
                )
                rows.append(Row(attack.name, quiet, beside, made, outcomes))
                before = after
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / "abuse.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    _print(rows, chosen)


def _values(spell: Spell) -> tuple[float, float, int, float]:
    return spell.p50, spell.p99, spell.failed, spell.busy


def make_target(ready: dict[str, Any]) -> Target:
    """Return the service as the attacks know it, with a key."""
    url = urlsplit(ready["url"])
    clients = ready["clients"]
    certificates = {
        name: (clients[name]["cert"], clients[name]["key"]) for name in ("server", "stranger", "operator")
    }
    cert, key = certificates["server"]
    with open_sync_provider(ready["url"], ca=ready["ca"], cert=cert, key=key) as kms:
        key_id = kms.create_dek_for_thread("bench:abuse").key_id
    return Target(url.hostname or "", url.port or 0, ready["ca"], certificates, key_id)


@contextlib.contextmanager
def _limits(ready: dict[str, Any], attack: Attack) -> Any:  # noqa: ANN401 - a generator of nothing
    """Give the attacker's identity a limit while an attack lasts that asks for it."""
    policy = Path(ready["ca"]).parents[1] / "policy.yaml"
    if not attack.limits:
        yield
        return
    before = policy.read_text()
    document = yaml.safe_load(before)
    try:
        document["limits"] = [{"identities": [attack.identity], **attack.limits}]
        _replace(policy, json.dumps(document))
        yield
    finally:
        _replace(policy, before)


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.touch(path.stat().st_mode & 0o777)
    fresh.write_text(text)
    fresh.replace(path)
    time.sleep(3)  # the service looks for changes every second or two


def _attacked(
    ready: dict[str, Any], target: Target, attack: Attack, seconds: float
) -> tuple[Spell, float, dict[str, int]]:
    queue: multiprocessing.SimpleQueue[dict[str, int]] = multiprocessing.SimpleQueue()
    process = multiprocessing.Process(target=_assail, args=(attack, target, seconds + 2 * SETTLE, queue))
    process.start()
    time.sleep(SETTLE)
    spell = _spell(ready, target, seconds)
    outcomes = queue.get()
    process.join()
    made = outcomes.pop("made", 0) / (seconds + 2 * SETTLE)
    return spell, made, outcomes


def _assail(
    attack: Attack, target: Target, seconds: float, queue: multiprocessing.SimpleQueue[dict[str, int]]
) -> None:
    os.nice(10)  # on the shared core the client comes first: what it notices is the service's doing
    outcomes: collections.Counter[str] = collections.Counter()
    asyncio.run(attack.run(target, seconds, outcomes))
    queue.put(dict(outcomes))


def _spell(ready: dict[str, Any], target: Target, seconds: float) -> Spell:
    pin(ready["pid"], 0)
    before = _cpu(ready["pid"])
    began = time.perf_counter()
    times, failed = asyncio.run(_behave(target, seconds))
    busy = (_cpu(ready["pid"]) - before) / (time.perf_counter() - began) * 100
    times.sort()
    return Spell(times[len(times) // 2] * 1e3, times[int(len(times) * 0.99)] * 1e3, failed, busy)


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _behave(target: Target, seconds: float) -> tuple[list[float], int]:
    """Encrypt at the fixed rate; return how long each took from when it was due, and how many failed."""
    body = json.dumps({"key_id": target.key_id, "plaintext": base64.b64encode(b"m" * 256).decode()}).encode()
    request = target.post("/encrypt", body)
    lines = [await target.tls("server") for _ in range(CONNECTIONS)]
    locks = [asyncio.Lock() for _ in lines]
    times: list[float] = []
    failures: list[BaseException | int] = []

    async def one(number: int, due: float) -> None:
        try:
            async with locks[number % CONNECTIONS]:
                reader, writer = lines[number % CONNECTIONS]
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError, ssl.SSLError) as error:
            failures.append(error)
        else:
            if not head.startswith(b"HTTP/1.1 200"):
                failures.append(1)
        times.append(time.perf_counter() - due)

    for warm in range(CONNECTIONS):
        await one(warm, time.perf_counter())
    times.clear()
    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for number in range(int(seconds * RATE)):
            due = began + number / RATE
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.create_task(one(number, due))
    for _, writer in lines:
        writer.close()
    return times, len(failures)


def _print(rows: list[Row], chosen: list[Attack]) -> None:
    print(
        "| attack | made, 1/s | outcome | core busy, % | CPU each, ms | p50, ms (x) | p99, ms (x) | failed |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for attack in chosen:
        of = [row for row in rows if row.attack == attack.name]
        outcomes: collections.Counter[str] = collections.Counter()
        for row in of:
            outcomes.update(row.outcomes)
        total = sum(outcomes.values()) or 1
        said = (
            ", ".join(f"{what} {count / total:.0%}" for what, count in outcomes.most_common(3)) or "held open"
        )
        p50, p99, made, busy = (
            statistics.median(values)
            for values in (
                [row.beside.p50 for row in of],
                [row.beside.p99 for row in of],
                [row.made for row in of],
                [row.beside.busy for row in of],
            )
        )
        times50 = statistics.median(row.beside.p50 / row.quiet.p50 for row in of)
        times99 = statistics.median(row.beside.p99 / row.quiet.p99 for row in of)
        cpu = statistics.median((row.beside.busy - row.quiet.busy) * 10 / max(row.made, 1e-9) for row in of)
        failed = sum(row.beside.failed for row in of)
        print(
            f"| {attack.title} | {made:,.0f} | {said} | {busy:.0f} | {cpu:.2f} | {p50:.2f} ({times50:.1f}) "
            f"| {p99:.2f} ({times99:.1f}) | {failed} |"
        )
    print(
        f"\nquiet: p50 {statistics.median(row.quiet.p50 for row in rows):.2f} ms, "
        f"p99 {statistics.median(row.quiet.p99 for row in rows):.2f} ms, "
        f"core {statistics.median(row.quiet.busy for row in rows):.0f} % busy; "
        f"failed {sum(row.quiet.failed for row in rows):.0f}"
    )


if __name__ == "__main__":
    main()

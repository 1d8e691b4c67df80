"""Measure what encryption costs the example's chat server, one request at a time.

Two chat servers, one with encryption on and one with it off, each with a database of its own, get the same
posts in turns over one kept connection each, so that noise of the machine and of its disk meets both alike.
Then both list 100 messages in turns, and the KMS's own count of requests says what a listing cost it. CPU
time is that of the chat server's process; for the call alone, of this one.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.bench.machine import cpu_seconds
from benchmarks.bench.servers import client, service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[1]
TEXT = "x" * 256
PAGE = 100


class Server:
    """One chat server, and a kept connection to it."""

    def __init__(self, port: int, pid: int) -> None:
        self.pid = pid
        self._connection = http.client.HTTPConnection("127.0.0.1", port)

    def call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """Make a request; the answer must be a success."""
        self._connection.request(method, path, None if body is None else json.dumps(body))
        response = self._connection.getresponse()
        answer: dict[str, Any] = json.loads(response.read())
        if response.status not in {200, 201}:
            sys.exit(f"{method} {path}: {response.status} {answer}")
        return answer

    def post(self) -> None:
        """Post a message."""
        self.call("POST", "/threads/bench/messages", {"text": TEXT})

    def list(self) -> None:
        """List 100 messages."""
        if len(self.call("GET", f"/threads/bench/messages?limit={PAGE}")["messages"]) != PAGE:
            sys.exit("not 100 messages")


@contextmanager
def chat(folder: Path, port: int, environment: dict[str, str]) -> Iterator[Server]:
    """Run a chat server."""
    log = folder / f"chat-{port}.log"
    given = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "service"), str(ROOT)]),
        "CHAT_BIND": f"127.0.0.1:{port}",
        "CHAT_DATABASE": str(folder / f"chat-{port}.db"),
        **environment,
    }
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "examples.chat_server"], env=given, stdout=out, stderr=out
        )
    try:
        while True:
            try:
                Server(port, process.pid).call("GET", "/healthz")
                break
            except OSError:
                if process.poll() is not None:
                    sys.exit(log.read_text())
                time.sleep(0.1)
        yield Server(port, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def requests(admin_url: str) -> dict[str, float]:
    """Return how many requests the KMS has answered, by route."""
    with urllib.request.urlopen(f"{admin_url}/metrics") as page:  # noqa: S310 - a URL of our own
        families = text_string_to_metric_families(page.read().decode())
        found: dict[str, float] = {}
        for sample in (sample for family in families for sample in family.samples):
            if sample.name == "kms_requests_total":
                found[sample.labels["route"]] = found.get(sample.labels["route"], 0) + sample.value
    return found


@dataclass
class Action:
    """What is measured: what to do, the process whose CPU time counts, and what it took."""

    name: str
    run: Callable[[], object]
    pid: int
    milliseconds: list[float] = field(default_factory=list)
    cpu: float = 0.0

    def once(self) -> None:
        """Do it, and note what it took."""
        cpu, began = cpu_seconds(self.pid), time.perf_counter()
        self.run()
        self.milliseconds.append((time.perf_counter() - began) * 1000)
        self.cpu += cpu_seconds(self.pid) - cpu

    def show(self) -> float:
        """Print a row, forget the figures, and return the median."""
        cuts, median = statistics.quantiles(self.milliseconds, n=100), statistics.median(self.milliseconds)
        cpu = self.cpu * 1000 / len(self.milliseconds)
        print(f"| {self.name} | {cuts[9]:.2f} | {median:.2f} | {cuts[89]:.2f} | {cuts[98]:.2f} | {cpu:.2f} |")
        self.milliseconds, self.cpu = [], 0.0
        return median


def in_turns(actions: list[Action], rounds: int) -> list[float]:
    """Do each action once a round; print what they took, and return the medians in milliseconds."""
    for _ in range(rounds):
        for action in actions:
            action.once()
    return [action.show() for action in actions]


def main() -> int:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1000, help="posts to each server, in each of the runs")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", help="for the chat servers' databases; in memory, the disk blurs nothing")
    options = parser.parse_args()
    with ExitStack() as stack:
        ready = stack.enter_context(service())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        files = ready["clients"]["chat"]
        leading = {
            "PROGRESSDB_KMS_ENDPOINT": ready["url"],
            "PROGRESSDB_KMS_CA": ready["ca"],
            "PROGRESSDB_KMS_CERT": files["cert"],
            "PROGRESSDB_KMS_KEY": files["key"],
        }
        on = stack.enter_context(chat(folder, 18431, {**leading, "CHAT_ENCRYPTION": "on"}))
        off = stack.enter_context(chat(folder, 18432, {"CHAT_ENCRYPTION": "off"}))
        kms = stack.enter_context(client(ready))
        key_id = kms.create_dek_for_thread("bench").key_id
        posts = [
            Action("post, encrypted", on.post, on.pid),
            Action("post, plain", off.post, off.pid),
            Action(
                "the KMS call alone",
                lambda: kms.encrypt_with_dek(key_id, TEXT.encode(), b"bench"),
                os.getpid(),
            ),
        ]
        print("| request | p10 ms | p50 ms | p90 ms | p99 ms | CPU ms |\n|---|---|---|---|---|---|")
        added = []
        for run in range(options.runs + 1):
            load = os.getloadavg()[0]
            encrypted, plain, _ = in_turns(posts, options.rounds if run else PAGE)
            print(
                f"| **added by encryption** (load average {load:.1f}) | **{encrypted - plain:.2f}** | | | |"
            )
            added.append(encrypted - plain)
        before = requests(ready["admin_url"])
        rounds = options.rounds // 2
        in_turns(
            [Action("list 100, encrypted", on.list, on.pid), Action("list 100, plain", off.list, off.pid)],
            rounds,
        )
        after = requests(ready["admin_url"])
        made = {route: (count - before.get(route, 0)) / rounds for route, count in after.items()}
        print(f"\nThe first block is warm-up; median of the others {statistics.median(added[1:]):.2f} ms.")
        print(f"KMS requests for one listing: { {route: count for route, count in made.items() if count} }")
    return 0


if __name__ == "__main__":
    sys.exit(main())

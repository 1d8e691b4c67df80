"""How long after an acknowledged disable does the other instance still use the key?

Two services on one Redis, each a process of its own. A disables; clients of B encrypt without a pause and with
the key in B's memory. Late is the moment at which the last use that succeeded was invoked, counted from the
answer to the disable; a use that was invoked before it is not late.

    PYTHONPATH=. .venv/bin/python benchmarks/staleness.py [--disables 200]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.contract.wire_client import Client
from tests.fault.store.clock import HOUR, Clock
from tests.fault.store.proxy import Proxy, Way
from tests.integration.world import PROMPT_STORE, Instance, World, eventually, launch_all
from tests.store.servers import ALWAYS, Server, free_port

WORKERS = 8
CHANGES = "kms:{ctl}:changes"


class Scene:
    """Two services; B has a clock of its own and reaches the store through a proxy."""

    def __init__(self, max_stale: float = 0) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kms-stale-")
        self.clock = Clock(Path(self._folder.name))
        self.world = World()
        self.world.store = Server("redis", self.world.root / "tcp", ALWAYS, free_port()).start()
        self.proxy = Proxy(self.world.store.port)
        cache = {"max_stale": max_stale}
        self.a = self.world.instance("a", store=PROMPT_STORE)
        url = f"redis://127.0.0.1:{self.proxy.port}"
        self.b = self.world.instance("b", cache=cache, store={**PROMPT_STORE, "url": url})
        self.clock.give_to(self.b)
        launch_all([self.a, self.b])

    def close(self) -> None:
        """End all."""
        self.proxy.close()
        self.world.close()
        self._folder.cleanup()


def succeeds(client: Client, key_id: str) -> bool:
    """Use a key; refusals, 503 and broken connections are no use."""
    return client.post("/encrypt", {"key_id": key_id, "plaintext": ""}).status == 200


def ready_key(operator: Client, b: Instance, client: Client) -> str:
    """Make a key that B holds in memory."""
    key_id = str(operator.create("room:1")["key_id"])

    def cached() -> bool:
        return all(succeeds(client, key_id) for _ in range(3))

    eventually(cached, "the key can be used")
    return key_id


def one(operator: Client, client: Client, key_id: str, after: Callable[[], object]) -> float:
    """Disable a key and return how late its last use was invoked.

    Args:
        operator: Client of A.
        client: Client of B.
        key_id: The key.
        after: What befalls as soon as the disable is acknowledged.
    """
    acknowledged = [float("inf")]
    last = [0.0]
    ended = threading.Event()

    def use() -> None:
        while not ended.is_set():
            began = time.monotonic()
            if succeeds(client, key_id):
                last[0] = began
            elif time.monotonic() > acknowledged[0] + 1.5:
                return

    thread = threading.Thread(target=use)
    thread.start()
    operator.post(f"/v1/keys/{key_id}/disable").ok()
    acknowledged[0] = time.monotonic()
    after()
    thread.join(20)
    ended.set()
    thread.join()
    return max(0.0, last[0] - acknowledged[0])


def measure(scene: Scene, disables: int, after: Callable[[], object]) -> list[float]:
    """Disable so many keys, eight at a time."""

    def work(_number: int) -> list[float]:
        operator, client = scene.a.client("operator"), scene.b.client("server")
        return [
            one(operator, client, ready_key(operator, scene.b, client), after)
            for _ in range(-(-disables // WORKERS))
        ]

    with ThreadPoolExecutor(WORKERS) as pool:
        return [late for part in pool.map(work, range(WORKERS)) for late in part]


def measure_held(scene: Scene, disables: int, hold: Callable[[], object], go_on: Callable[[], object]) -> list[float]:
    """Disable keys while B is held up for 5 s, fifty at a time; what waits for B by then counts as well."""
    late: list[float] = []
    operator = scene.a.client("operator")
    for _ in range(-(-disables // 50)):
        with ThreadPoolExecutor(50) as pool:
            clients = [scene.b.client("server") for _ in range(50)]
            first = scene.b.client("server")
            keys = [ready_key(operator, scene.b, first) for _ in range(50)]
            for client, key_id in zip(clients, keys, strict=True):
                succeeds(client, key_id)
            hold()
            acknowledged = []
            for key_id in keys:
                operator.post(f"/v1/keys/{key_id}/disable").ok()
                acknowledged.append(time.monotonic())

            def use(number: int) -> float:
                last = 0.0
                end = time.monotonic() + 8
                while (began := time.monotonic()) < end:
                    if succeeds(clients[number], keys[number]):
                        last = began
                return max(0.0, last - acknowledged[number])

            threading.Timer(5.0, go_on).start()
            late += pool.map(use, range(50))
            time.sleep(1)
    return late


def outage(scene: Scene, times: int) -> list[float]:
    """Kill the store and return for how long B went on from its memory."""
    found = []
    for _ in range(times):
        operator, client = scene.a.client("operator"), scene.b.client("server")
        key_id = ready_key(operator, scene.b, client)
        scene.b.warm(key_id)
        scene.world.store.kill()
        killed = last = time.monotonic()
        # The first moments may need a call that fails before the store counts as away.
        while time.monotonic() < max(last, killed + 2) + 2:
            if succeeds(client, key_id):
                last = time.monotonic()
        found.append(last - killed)
        scene.world.store.start()
        eventually(lambda: succeeds(client, key_id), "the store is back")
        time.sleep(3)
    return found


def show(name: str, late: list[float]) -> None:
    """Print a row of the table."""
    ordered = sorted(late)
    p99 = ordered[int(len(ordered) * 0.99)]
    over = sum(each > 1.0 for each in late)
    print(
        f"| {name} | {len(late)} | {statistics.median(late):.3f} | {p99:.3f} | {ordered[-1]:.3f} | {over} |",
        flush=True,
    )


def main() -> None:
    """Measure all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disables", type=int, default=200)
    count = parser.parse_args().disables
    print("| what happens to B | disables | median s | p99 s | longest s | over 1 s |\n|---|---|---|---|---|---|")
    scene = Scene()
    store = scene.world.store
    try:
        show("nothing", measure(scene, count, lambda: None))
        show("notices trimmed away at once", measure(scene, count, lambda: store.ask("XTRIM", CHANGES, "MAXLEN", 0)))
        show("notices deleted with their stream", measure(scene, count, lambda: store.ask("DEL", CHANGES)))
        for seconds in (HOUR, -HOUR):
            scene.clock.jump(seconds)
            show(f"clock jumps {seconds:+} s", measure(scene, count // 2, lambda: None))
            scene.clock.jump(0)
        show("stopped for 5 s", measure_held(scene, count, scene.b.pause, scene.b.resume))
        freeze = lambda: scene.proxy.freeze(Way.REPLIES)  # noqa: E731 - a name for the line below
        show("gets no reply of the store for 5 s", measure_held(scene, count, freeze, scene.proxy.forward))
    finally:
        scene.close()
    for seconds in (1.5, 5.0):
        scene = Scene(max_stale=seconds)
        try:
            found = outage(scene, 10)
        finally:
            scene.close()
        print(f"max_stale {seconds}: used for {min(found):.2f} to {max(found):.2f} s after the store was killed")


if __name__ == "__main__":
    main()

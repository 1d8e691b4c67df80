"""How long after an acknowledged disable does the other instance still use the key?

Two services on one Redis, each a process of its own. A disables; clients of B encrypt without a pause,
with the key in B's memory. Late is the moment at which the last use that succeeded was invoked, counted from
the answer to the disable; a use that was invoked before it is not late.

    PYTHONPATH=. .venv/bin/python benchmarks/staleness.py [--disables 200]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path

from tests.contract.wire_client import Client
from tests.fault.store.clock import HOUR, Clock
from tests.fault.store.proxy import Proxy, Way
from tests.integration.world import PROMPT_STORE, World, eventually, launch_all
from tests.store.servers import ALWAYS, Server, free_port

WORKERS = 8
AT_ONCE = 50
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
    return client.post("/encrypt", {"key_id": key_id, "plaintext": ""}).status == HTTPStatus.OK


def ready_key(operator: Client, client: Client) -> str:
    """Make a key that B holds in memory."""
    key_id = str(operator.create("room:1")["key_id"])

    def cached() -> bool:
        return all(succeeds(client, key_id) for _ in range(3))

    eventually(cached, "the key can be used")
    return key_id


def one(operator: Client, client: Client, key_id: str) -> float:
    """Disable a key and return how late its last use was invoked.

    Args:
        operator: Client of A.
        client: Client of B.
        key_id: The key.
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
    thread.join(20)
    ended.set()
    thread.join()
    return max(0.0, last[0] - acknowledged[0])


def measure(scene: Scene, disables: int) -> list[float]:
    """Disable so many keys, eight at a time."""

    def work(_number: int) -> list[float]:
        operator, client = scene.a.client("operator"), scene.b.client("server")
        return [one(operator, client, ready_key(operator, client)) for _ in range(-(-disables // WORKERS))]

    with ThreadPoolExecutor(WORKERS) as pool:
        return [late for part in pool.map(work, range(WORKERS)) for late in part]


def measure_held(
    scene: Scene, disables: int, hold: Callable[[], object], go_on: Callable[[], object], seconds: float
) -> list[float]:
    """Disable keys, fifty at a time, while B is held up for some seconds; what waits for B then counts."""
    return list(
        itertools.chain.from_iterable(
            _held(scene, hold, go_on, seconds) for _ in range(-(-disables // AT_ONCE))
        )
    )


def _held(
    scene: Scene, hold: Callable[[], object], go_on: Callable[[], object], seconds: float
) -> list[float]:
    operator, first = scene.a.client("operator"), scene.b.client("server")
    clients = [scene.b.client("server") for _ in range(AT_ONCE)]
    keys = [ready_key(operator, first) for _ in range(AT_ONCE)]
    for client, key_id in zip(clients, keys, strict=True):
        succeeds(client, key_id)
    acknowledged = []

    def use(number: int) -> float:
        last = 0.0
        end = time.monotonic() + seconds + 3
        while (began := time.monotonic()) < end:
            if succeeds(clients[number], keys[number]):
                last = began
        return max(0.0, last - acknowledged[number])

    hold()
    timer = threading.Timer(seconds, go_on)
    for key_id in keys:
        operator.post(f"/v1/keys/{key_id}/disable").ok()
        acknowledged.append(time.monotonic())
    timer.start()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        late = list(pool.map(use, range(AT_ONCE)))
    timer.join()
    for client in (operator, first, *clients):
        client.close()
    return late


def outage(scene: Scene) -> float:
    """Kill the store and return for how long B went on from its memory."""
    operator, client = scene.a.client("operator"), scene.b.client("server")
    key_id = ready_key(operator, client)
    ciphertext = client.encrypt(key_id, b"message")
    scene.b.warm(key_id)
    scene.world.store.kill()
    killed = last = time.monotonic()
    # Decryptions: encryptions have to be counted in the store after a while. In the first moments a call has
    # to fail before the store counts as away.
    while time.monotonic() < max(last, killed + 2) + 2:
        if client.try_decrypt(key_id, ciphertext).status == HTTPStatus.OK:
            last = time.monotonic()
        time.sleep(0.01)
    scene.world.store.start()
    eventually(lambda: succeeds(client, key_id), "the store is back")
    time.sleep(3)
    return last - killed


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
    print("| what happens to B | disables | median s | p99 s | longest s | over 1 s |")
    print("|---|---|---|---|---|---|")
    scene = Scene()
    store, proxy = scene.world.store, scene.proxy

    def trim() -> None:
        store.ask("XTRIM", CHANGES, "MAXLEN", 0)
        proxy.forward()

    def delete() -> None:
        store.ask("DEL", CHANGES)
        proxy.forward()

    def freeze() -> None:
        proxy.freeze(*Way)

    try:
        show("nothing", measure(scene, count))
        show("notices trimmed before B can read them", measure_held(scene, count, freeze, trim, 0.3))
        show("notices deleted, with their stream", measure_held(scene, count, freeze, delete, 0.3))
        for seconds in (HOUR, -HOUR):
            scene.clock.jump(seconds)
            show(f"clock jumps {seconds:+} s", measure(scene, count))
            scene.clock.jump(0)
        show("stopped for 5 s", measure_held(scene, count, scene.b.pause, scene.b.resume, 5))
        show("cut off the store for 5 s", measure_held(scene, count, freeze, proxy.forward, 5))
    finally:
        scene.close()
    for max_stale in (1.5, 5.0):
        scene = Scene(max_stale)
        try:
            found = [outage(scene) for _ in range(10)]
        finally:
            scene.close()
        print(
            f"max_stale {max_stale}: used for {min(found):.2f} to {max(found):.2f} s after the store's death"
        )


if __name__ == "__main__":
    main()

"""A disabled key is refused by the other instance, also where it lost the notice or its clock has jumped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.contract.wire_client import assert_problem
from tests.fault.store.clock import HOUR, Clock
from tests.fault.store.proxy import Proxy, Way
from tests.integration.world import Instance, World, launch_all
from tests.store.servers import ALWAYS, Server, free_port

CHANGES = "kms:{ctl}:changes"


@pytest.fixture(scope="module")
def world(new_world: Callable[..., World]) -> World:
    """Make a world whose store has a port."""
    made = new_world()
    made.store = Server("redis", made.root / "tcp", ALWAYS, free_port()).start()
    return made


@pytest.fixture(scope="module")
def proxy(world: World) -> Iterator[Proxy]:
    """Give the way from B to the store."""
    made = Proxy(world.store.port)
    yield made
    made.forward()
    for instance in world.instances:
        instance.stop()
    made.close()


@pytest.fixture(scope="module")
def clock(world: World) -> Clock:
    """Give the wall clock of B."""
    return Clock(world.root)


@pytest.fixture(scope="module")
def pair(world: World, proxy: Proxy, clock: Clock) -> list[Instance]:
    """Run A, and B behind the proxy and with the clock."""
    b = world.instance("b", store={"url": f"redis://127.0.0.1:{proxy.port}"}, cache={"max_stale": 0})
    clock.give_to(b)
    made = [world.instance("a"), b]
    launch_all(made)
    return made


@pytest.mark.parametrize(
    "lose", [["XTRIM", CHANGES, "MAXLEN", "0"], ["DEL", CHANGES]], ids=["trim", "delete"]
)
def test_notices_that_were_lost(pair: list[Instance], world: World, proxy: Proxy, lose: list[str]) -> None:
    """B could not read the notice before it was gone: it sees that some are missing, and forgets all keys.

    So it does where they were lost before, and nothing has been noticed since.
    """
    a, b = pair
    operator = a.client("operator")
    key_id = operator.create("room:1")["key_id"]
    world.store.ask(*lose)
    # What it serves from memory a second later, it serves after a reading that began after the loss.
    time.sleep(1.0)
    client = b.warm(key_id)
    proxy.freeze(*Way)
    try:
        operator.post(f"/v1/keys/{key_id}/disable").ok()
        world.store.ask(*lose)
    finally:
        proxy.forward()
    time.sleep(1.0)
    assert_problem(client.post("/encrypt", {"key_id": key_id, "plaintext": ""}), 409, "key_disabled")


@pytest.mark.parametrize("seconds", [HOUR, -HOUR])
def test_a_clock_that_jumps(pair: list[Instance], clock: Clock, seconds: int) -> None:
    """B's clock jumps an hour while it holds the key: it refuses a second later, and serves other keys."""
    a, b = pair
    operator = a.client("operator")
    key_id, other = (operator.create("room:1")["key_id"] for _ in range(2))
    client = b.warm(key_id)
    clock.jump(seconds)
    try:
        operator.post(f"/v1/keys/{key_id}/disable").ok()
        time.sleep(1.0)
        assert_problem(client.post("/encrypt", {"key_id": key_id, "plaintext": ""}), 409, "key_disabled")
        client.encrypt(other, b"message")
        operator.post(f"/v1/keys/{key_id}/enable").ok()
        time.sleep(1.0)
        client.encrypt(key_id, b"message")
    finally:
        clock.jump(0)

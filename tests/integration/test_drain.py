"""SIGTERM under load: no request fails, and the service ends with exit code 0."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

import pytest

from tests.contract.wire_client import Answer, Client, b64
from tests.integration.world import Instance, World, eventually, launch_all


@pytest.fixture(scope="module")
def world(new_world: Callable[..., World]) -> World:
    """Run two services."""
    made = new_world()
    made.store.start()
    # Long enough for the balancer, which shares the machine's cores with everybody, to notice in time.
    launch_all([made.instance(name, drain={"delay": 4, "timeout": 10}) for name in ("a", "b")])
    return made


class Balancer(threading.Thread):
    """Knows which service takes new connections, as a cluster does: by asking `/readyz` now and then.

    Until it notices, callers go on connecting to the service that drains.
    """

    def __init__(self, first: Instance, second: Instance) -> None:
        super().__init__()
        self.instances = first, second
        self.target = first

    def run(self) -> None:
        """Ask until the first service is unready."""
        first, second = self.instances
        while first.probe("/readyz") == 200:
            time.sleep(0.5)
        self.target = second


class Caller(threading.Thread):
    """Calls over one keep-alive connection; opens another only after an answer that closed the last one."""

    def __init__(self, balancer: Balancer, key_id: str, stop: threading.Event) -> None:
        super().__init__()
        self.balancer, self.key_id, self.stop = balancer, key_id, stop
        self.connections = 0
        self.answers: list[Answer] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Call until told to stop or until a call fails."""
        try:
            while not self.stop.is_set():
                self._one_connection(self.balancer.target.client("server"))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test shows it
            self.failure = error

    def _one_connection(self, client: Client) -> None:
        self.connections += 1
        body = b'{"key_id": "%s", "plaintext": "%s"}' % (self.key_id.encode(), b64(b"message").encode())
        while not self.stop.is_set():
            # Never sent again: a request that fails is a failure.
            answer = client._once("POST", "/encrypt", body, {"Content-Type": "application/json"})
            self.answers.append(answer)
            if answer.headers.get("connection", "").lower() == "close":
                return


def test_no_request_fails_while_a_service_drains(world: World) -> None:
    """Eight callers with keep-alive connections move from one service to the other and lose nothing."""
    first, second = world.instances
    key_id = first.client("server").create("t:1")["key_id"]
    balancer, stop = Balancer(first, second), threading.Event()
    callers = [Caller(balancer, key_id, stop) for _ in range(8)]
    balancer.start()
    for caller in callers:
        caller.start()
    try:
        eventually(lambda: all(len(caller.answers) > 20 for caller in callers))
        assert first.process
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(30) == 0
        seen = [len(caller.answers) for caller in callers]
        eventually(
            lambda: all(
                caller.failure or len(caller.answers) > count + 5
                for caller, count in zip(callers, seen, strict=True)
            )
        )
    finally:
        stop.set()
        for thread in (balancer, *callers):
            thread.join()
    assert first.exit_code() == 0
    assert [caller.failure for caller in callers] == [None] * len(callers)
    assert {answer.status for caller in callers for answer in caller.answers} == {200}
    assert all(caller.connections > 1 for caller in callers)
    first.start()

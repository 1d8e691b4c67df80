"""Several workers in one service: they share the work, end together, and one that dies costs nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.wire_client import Client, b64
from tests.integration.world import Instance, World, eventually

WORKERS = 2


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def connections_of(pid: int) -> int:
    """Return how many established TCP connections of the API a process holds."""
    inodes = {
        os.readlink(link)[8:-1]
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if os.readlink(link).startswith("socket:[")
    }
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(line[9] in inodes and line[3] == "01" for line in lines)


@pytest.fixture(scope="module")
def world(new_world: Callable[..., World]) -> World:
    """Run one service with two workers."""
    made = new_world()
    made.store.start()
    made.instance("a", workers=WORKERS, drain={"delay": 0.5, "timeout": 10}).start()
    return made


@pytest.fixture(autouse=True)
def _whole(service: Instance) -> None:
    """Wait until both workers serve, whatever the test before has done to one."""
    service.until("kms_workers", lambda count: count == WORKERS)


def opened(service: Instance, count: int) -> list[Client]:
    """Open connections, one after the other."""
    clients = [service.client("server") for _ in range(count)]
    for client in clients:
        client.get("/healthz").ok()
    return clients


def api_connections(service: Instance) -> list[int]:
    """Return how many connections each worker has beyond those to the store."""
    port = f":{service.port:04X}"
    found = []
    for pid in children(service.pid):
        inodes = set()
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(link)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        found.append(
            sum(line[9] in inodes and line[3] == "01" and line[1].endswith(port) for line in lines)
        )
    return sorted(found)


def test_connections_are_spread_evenly(service: Instance) -> None:
    """Of sixteen connections each of two workers has eight; a key made by one is used by the other."""
    eventually(lambda: api_connections(service) == [0, 0])
    clients = opened(service, 16)
    assert api_connections(service) == [8, 8]
    key_id = clients[0].create("t:1")["key_id"]
    sealed = [client.encrypt(key_id, b"hello") for client in clients]
    for client, ciphertext in zip(reversed(clients), sealed, strict=True):
        assert client.decrypt(key_id, ciphertext) == b"hello"
    for client in clients:
        client.close()

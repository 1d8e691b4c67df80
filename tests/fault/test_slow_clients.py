"""Ten thousand clients that say nothing, or half of something, beside one that works."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.dev_service import DevService, start_dev

pytestmark = pytest.mark.fault

CLIENTS = 10_000


@pytest.fixture
def service(tmp_path: Path) -> Iterator[DevService]:
    """A service with the limits that it ships with."""
    started = start_dev(tmp_path / "dev", tmp_path / "log")
    yield started
    started.stop()


def test_ten_thousand_silent_clients(service: DevService) -> None:
    """They come faster than they are timed out; one with a certificate gets its answers all the while.

    None of them has a certificate: each costs a handshake that the oldest unfinished makes room for.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard > CLIENTS + 100, "allow more open files to run this test: ulimit -n"
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    good = service.client("server")
    key_id = good.create("slow:1")["key_id"]
    held: list[socket.socket] = []
    try:
        for number in range(CLIENTS):
            sock = socket.create_connection((service.host, service.port), timeout=5)
            if number % 2:
                sock.sendall(b"\x16\x03\x01")  # the beginning of a ClientHello
            held.append(sock)
            if number % 500 == 0:
                assert good.encrypt(key_id, b"old connection")
                fresh = service.client("server")
                assert fresh.encrypt(key_id, b"new connection")
                fresh.close()
    finally:
        for sock in held:
            sock.close()
    assert good.encrypt(key_id, b"afterwards")
    good.close()

"""No acknowledged key is lost when service and store are killed at a random moment."""

from __future__ import annotations

import http.client
import os
import random
import secrets
import signal
import threading
import time
from collections.abc import Callable

import pytest

from tests.contract.wire_client import b64, unb64
from tests.integration.world import Instance, World, eventually

CLIENTS = 32
RUNS = int(os.environ.get("FAULT_RUNS", "3"))


@pytest.fixture(scope="module")
def world(new_world: Callable[..., World]) -> World:
    """Run one service."""
    made = new_world()
    made.store.start()
    made.instance("a").start()
    return made


class Writer(threading.Thread):
    """Makes keys and encrypts until the service is gone; remembers what was acknowledged."""

    def __init__(self, service: Instance, ready: threading.Barrier) -> None:
        super().__init__()
        self.client = service.client("server")
        self.ready = ready
        self.keys: dict[str, bytes] = {}
        self.messages: list[tuple[str, bytes, bytes]] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Work."""
        try:
            self.client.get("/healthz").ok()
            self.client.connect_no_more()
            self.ready.wait()
            while True:
                key_id = self.client.create(f"thread-{secrets.token_hex(4)}")["key_id"]
                self.keys[key_id] = b""
                message = secrets.token_bytes(16)
                self.messages.append((key_id, message, self.client.encrypt(key_id, message)))
        except (OSError, http.client.HTTPException):
            return  # killed, as was to be
        except AssertionError as error:
            self.failure = error  # a 503 where the store was gone first is fine, anything else is not
        finally:
            self.client.close()

    def check(self) -> None:
        """Fail if the service ever answered with an error that the kill does not explain."""
        if self.failure is not None:
            assert "503" in str(self.failure), self.failure


@pytest.mark.fault
@pytest.mark.parametrize("run", range(RUNS))
def test_every_acknowledged_key_and_message_survives_a_kill_of_everything(world: World, run: int) -> None:
    """32 clients make keys over mTLS; service and store are killed; all that was answered is there after."""
    (service,) = world.instances
    ready = threading.Barrier(CLIENTS + 1)
    writers = [Writer(service, ready) for _ in range(CLIENTS)]
    for writer in writers:
        writer.start()
    ready.wait()
    eventually(lambda: any(writer.messages for writer in writers))
    time.sleep(random.uniform(0, 1))
    victims = [service.pid, world.store.pid]
    random.shuffle(victims)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    for writer in writers:
        writer.join()
        writer.check()
    service.exit_code()
    world.store.kill()
    world.store.start()
    service.start()
    client = service.client("server")
    messages = [message for writer in writers for message in writer.messages]
    keys = [key_id for writer in writers for key_id in writer.keys]
    assert messages
    items = [{"key_id": key_id, "ciphertext": b64(sealed)} for key_id, _, sealed in messages]
    results = client.batch("/decrypt_batch", items)
    assert [unb64(result["plaintext"]) for result in results] == [plain for _, plain, _ in messages]
    sealed = client.batch("/encrypt_batch", [{"key_id": key, "plaintext": ""} for key in keys])
    assert [key for key, result in zip(keys, sealed, strict=True) if "error" in result] == []

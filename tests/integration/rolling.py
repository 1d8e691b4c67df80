"""Steady traffic under which client CAs roll and certificates are revoked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

from tests.contract.wire_client import JSON, Client, b64
from tests.integration.world import Instance, eventually
from tests.transport.pki import Ca

RATE = 500
"""Requests a second, over all threads."""
THREADS = 4


class Traffic:
    """Sends encrypts at a steady rate, each thread over one connection at a time."""

    def __init__(self, make: Callable[[], Client], key_id: str) -> None:
        self.failed: list[str] = []
        self.answered = 0
        self._make = make
        self._body = json.dumps({"key_id": key_id, "plaintext": b64(b"message")}).encode()
        self._ends = threading.Event()
        self._renew = [threading.Event() for _ in range(THREADS)]
        self._threads = [threading.Thread(target=self._send, args=(renew,)) for renew in self._renew]
        for thread in self._threads:
            thread.start()

    def renew(self) -> None:
        """Let each thread go on over a new connection, as ``make`` makes it now; return when all do."""
        for renew in self._renew:
            renew.set()
        eventually(lambda: not any(renew.is_set() for renew in self._renew), "new connections")

    def stop(self) -> None:
        """End it."""
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def _send(self, renew: threading.Event) -> None:
        client = self._make()
        due = time.monotonic()
        while not self._ends.is_set():
            try:
                # Not Client.post, which would send again what a closed connection has swallowed.
                answer = client._once("POST", "/encrypt", self._body, {"Content-Type": JSON})
                if answer.status != 200:
                    self.failed.append(f"{answer.status} {answer.body[:200]!r}")
                self.answered += 1
            except OSError as error:
                self.failed.append(repr(error))
                client.close()
            if renew.is_set():
                client.close()
                client = self._make()
                client.get("/healthz").ok()
                renew.clear()
            due += THREADS / RATE
            time.sleep(max(0.0, due - time.monotonic()))


def gets_in(service: Instance, ca: Ca | None = None, name: str = "server") -> bool:
    """Tell whether a new connection is served."""
    client = service.client(name, ca)
    try:
        return client.get("/healthz").status == 200
    except OSError:  # a refusal shows as an alert or as a reset
        return False
    finally:
        client.close()

"""Many calls of one provider at the same moment, in tasks or in threads, while a stand-in holds requests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from progressdb_kms.client import Encrypted
from progressdb_kms.client.coalescing import KINDS, OUT_AT_ONCE
from tests.client.harness import Facade
from tests.client.standin import Handler, StandIn

CREATE = "/create_dek_for_thread"
LIMIT = 90.0
"""Seconds that only a failure uses up."""


async def eventually(condition: Callable[..., bool], *args: Any) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + LIMIT
    while not condition(*args):
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.002)


class Gate:
    """A fault that holds requests until it is opened, and then lets them be answered."""

    def __init__(self) -> None:
        self.held = 0
        self._open = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, handler: Handler) -> bool:
        """Hold a request."""
        with self._lock:
            self.held += 1
        while not handler.standin.stopping.is_set():
            if self._open.wait(0.05):
                return True
        return False

    def open(self) -> None:
        """Let go what is held, and hold nothing more."""
        self._open.set()


class Crew:
    """Starts calls of a provider that coalesces.

    Args:
        kms: The provider.
        standin: What it speaks to.
        threads: At most so many at a time, for a sync provider.
    """

    def __init__(self, kms: Facade, standin: StandIn, threads: int = 80) -> None:
        self.kms = kms
        self.standin = standin
        self._threads = ThreadPoolExecutor(threads)

    def start(self, name: str, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Begin a call in a task, or in a thread."""
        method = getattr(self.kms.provider, name)
        if asyncio.iscoroutinefunction(method):
            return asyncio.create_task(method(*args, **kwargs))
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._threads, partial(method, *args, **kwargs))

    def gathered(self, path: str = "/encrypt") -> int:
        """Return how many calls of a kind wait for a request to come back."""
        return len(self.lane(path)._gathered)

    def lane(self, path: str = "/encrypt") -> Any:
        """Return the place of a kind."""
        return self.kms.provider._sender._lanes[KINDS[path]]  # type: ignore[union-attr] # of both kinds

    async def occupy(self, name: str, *args: Any) -> tuple[Gate, list[asyncio.Future[Any]]]:
        """Make lone calls until further ones gather; they are held by the gate, which is returned."""
        gate = Gate()
        held = []
        for number in range(OUT_AT_ONCE):
            self.standin.faults.append(gate)
            held.append(self.start(name, *args))
            await eventually(lambda count: gate.held == count, number + 1)
        return gate, held

    async def gather(
        self, calls: list[tuple[Any, ...]], path: str = "/encrypt", **options: Any
    ) -> list[asyncio.Future[Any]]:
        """Start calls one after the other, and wait until all have gathered."""
        began = []
        for number, call in enumerate(calls):
            began.append(self.start(*call, **options))
            await eventually(lambda count: self.gathered(path) == count, number + 1)
        return began

    async def together(
        self, calls: list[tuple[Any, ...]], path: str = "/encrypt", **options: Any
    ) -> list[Any]:
        """Return results and errors of calls that travel as one batch."""
        gate, held = await self.occupy(*calls[0])
        began = await self.gather(calls, path, **options)
        gate.open()
        await results(held)
        return await results(began)

    async def close(self) -> None:
        """End the threads; the calls must have ended."""
        await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)


async def results(calls: list[Any]) -> list[Any]:
    """Return results and errors."""
    everything: Awaitable[list[Any]] = asyncio.gather(*calls, return_exceptions=True)
    return await asyncio.wait_for(everything, LIMIT)


def encrypts(key_id: str, count: int) -> list[tuple[Any, ...]]:
    """Return calls that encrypt different texts."""
    return [("encrypt_with_dek", key_id, b"m%d" % number, b"aad") for number in range(count)]


def opened(standin: StandIn, key_id: str, sealed: list[Any]) -> list[Any]:
    """Return what ciphertexts hold, errors as they are."""
    return [
        standin.decrypt(key_id, item.ciphertext, b"aad")["plaintext"] if isinstance(item, Encrypted) else item
        for item in sealed
    ]


def paths(standin: StandIn) -> list[str]:
    """Return the paths of the requests that came."""
    return [request.path for request in standin.seen]

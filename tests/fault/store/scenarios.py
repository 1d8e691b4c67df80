"""Stores and what befalls them: each scenario breaks its store, mends it, and knows when it takes writes."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import redis

from tests.fault.power import USUAL, PoweredServer
from tests.fault.store.clock import HOUR, Clock
from tests.fault.store.proxy import Proxy, Way
from tests.integration.world import LIMIT, Instance
from tests.store.servers import ALWAYS, EVERYSEC, Server, free_port

PROBE = "probe:{%s}"


def takes_writes(server: Server, tag: str = "AA") -> bool:
    """Say whether a server takes a write, durably and with the replicas that it asks for."""
    try:
        return bool(server.ask("SET", PROBE % tag, "1") == b"OK")
    except (redis.RedisError, OSError):
        return False


class Scenario:
    """One store and its faults.

    Args:
        folder: Where its files are; short, for Unix sockets are in it.
        shim: The shim under stores that have one.

    Attributes:
        settings: The service's settings of this store.
        hold: Seconds that a fault lasts, at least and at most.
        local: A fault here leaves the store itself alone: there is nothing that recovers.
    """

    settings: ClassVar[dict[str, object]] = {}
    hold: ClassVar[tuple[float, float]] = (0.3, 4.0)
    local: ClassVar[bool] = False

    def __init__(self, folder: Path, shim: Path) -> None:
        self.folder = folder
        self.shim = shim
        self.faults = itertools.cycle(self.kinds())
        self.mend_last: Callable[[], object] = lambda: None

    @property
    def url(self) -> str:
        """The store's URL."""
        raise NotImplementedError

    def kinds(self) -> list[Callable[[], Callable[[], object]]]:
        """Return its faults: each breaks something, and returns what mends it."""
        raise NotImplementedError

    def prepare(self, service: Instance) -> None:
        """Do what a service needs before it is started."""

    def break_it(self) -> None:
        """Let the next fault happen."""
        self.mend_last = next(self.faults)()

    def mend(self) -> float:
        """Undo it; return when the store took writes again, seen to 5 ms."""
        self.mend_last()
        end = time.monotonic() + LIMIT
        while not self.writable():
            assert time.monotonic() < end, "the store takes no writes"
            time.sleep(0.005)
        return time.monotonic()

    def settled(self) -> bool:
        """Say whether all its servers are in their places again, so that the next fault can come."""
        return True

    def writable(self) -> bool:
        """Say whether the store takes writes."""
        raise NotImplementedError

    def concerns(self, key_id: str) -> bool:  # noqa: ARG002 - the whole of a store of one server
        """Say whether the last fault concerned the part of the store that has this key."""
        return True

    def close(self) -> None:
        """End all processes."""
        raise NotImplementedError


class Alone(Scenario):
    """One server."""

    port = False
    server: Server

    def __init__(self, folder: Path, shim: Path) -> None:
        super().__init__(folder, shim)
        self.server = self.make()

    def make(self) -> Server:
        """Start the server."""
        return Server("redis", self.folder / "store", ALWAYS, free_port() if self.port else 0).start()

    @property
    def url(self) -> str:
        """The store's URL."""
        return self.server.url

    def writable(self) -> bool:
        """Say whether the store takes writes."""
        return takes_writes(self.server)

    def close(self) -> None:
        """End all processes."""
        self.server.kill()


class Killed(Alone):
    """SIGKILL and a restart."""

    def kinds(self) -> list[Callable[[], Callable[[], object]]]:
        """Return its faults."""
        return [self._kill]

    def _kill(self) -> Callable[[], object]:
        self.server.kill()
        return self.server.start


class Frozen(Alone):
    """SIGSTOP, and SIGCONT."""

    def kinds(self) -> list[Callable[[], Callable[[], object]]]:
        """Return its faults."""
        return [self._pause]

    def _pause(self) -> Callable[[], object]:
        self.server.pause()
        return self.server.resume


class OutOfMemory(Alone):
    """``maxmemory`` is reached; the policy is noeviction, for the service takes no other."""

    def kinds(self) -> list[Callable[[], Callable[[], object]]]:
        """Return its faults."""
        return [self._fill]

    def _fill(self) -> Callable[[], object]:
        self.server.configure(maxmemory="1")
        return lambda: self.server.configure(maxmemory="0")


class Proxied(Alone):
    """A proxy holds back requests, replies or both, or breaks off within replies."""

    port = True

    def make(self) -> Server:
        """Start the server, and the proxy before it."""
        server = super().make()
        self.proxy = Proxy(server.port)
        return server

    @property
    def url(self) -> str:
        """The proxy's URL."""
        return f"redis://127.0.0.1:{self.proxy.port}"

    def kinds(self) -> list[Callable[[], Callable[[], object]]]:
        """Return its faults."""
        return [
            lambda: self._freeze(Way.REPLIES),
            self._cut,
            lambda: self._freeze(Way.REQUESTS),
            lambda: self._freeze(*Way),
        ]

    def _freeze(self, *ways: Way) -> Callable[[], object]:
        self.proxy.freeze(*ways)
        return self.proxy.forward

    def _cut(self) -> Callable[[], object]:
        self.proxy.cut()
        return self.proxy.forward

    def close(self) -> None:
        """End all."""
        self.proxy.close()
        super().close()


class Powered(Alone):
    """The power is cut: what was not fsynced is gone."""

    options: ClassVar[dict[str, str]] = ALWAYS

    def make(self) -> Server:
        """Start the server under the shim."""
        self.powered = PoweredServer(self.shim, "redis", self.folder / "p", self.options)
        return self.powered.server

    def kinds(self) -> list[Callable[[], Callable[[], object]]]:
        """Return its faults."""
        return [self._cut]

    def _cut(self) -> Callable[[], object]:
        self.powered.cut_power()
        return self.server.start


class Careless(Powered):
    """Likewise, on a store that fsyncs once a second: it does lose what was acknowledged."""

    settings: ClassVar[dict[str, object]] = {"allow_data_loss": True}
    options: ClassVar[dict[str, str]] = EVERYSEC


class TornTail(Powered):
    """The file ends within a record that was never acknowledged: Redis loads what is before it."""

    def kinds(self) -> list[Callable[[], Callable[[], object]]]:
        """Return its faults."""
        return [self._tear]

    def _tear(self) -> Callable[[], object]:
        self.powered.crash()
        (path,) = (self.server.folder / "appendonlydir").glob("*.incr.aof")
        durable = self.powered.durable(path)
        end = random.randint(durable, path.stat().st_size)
        os.truncate(path, end)
        # What was fsynced ends with a whole record.
        if end == durable:
            with path.open("ab") as file:
                file.write(b"*3\r\n$3\r\nSET\r\n$8\r\nkms:torn\r\n$64\r\n" + b"x" * random.randrange(64))
        return self.server.start


class SlowDisk(Powered):
    """Each fsync takes 0.05 to 1.5 s longer."""

    def kinds(self) -> list[Callable[[], Callable[[], object]]]:
        """Return its faults."""
        return [self._slow]

    def _slow(self) -> Callable[[], object]:
        self.powered.slow_down(random.choice([50, 200, 500, 1500]))
        return lambda: self.powered.slow_down(USUAL)


class ClockJumps(Alone):
    """The service's wall clock jumps an hour forward or back, and returns. Monotonic time goes on."""

    local = True

    def make(self) -> Server:
        """Start the server, and make the clock."""
        self.folder.mkdir(exist_ok=True)
        self._clock = Clock(self.folder)
        return super().make()

    def prepare(self, service: Instance) -> None:
        """Give the service the clock."""
        self._clock.give_to(service)

    def kinds(self) -> list[Callable[[], Callable[[], object]]]:
        """Return its faults."""
        return [lambda: self._jump(HOUR), lambda: self._jump(-HOUR)]

    def _jump(self, seconds: int) -> Callable[[], object]:
        self._clock.jump(seconds)
        return lambda: self._clock.jump(0)

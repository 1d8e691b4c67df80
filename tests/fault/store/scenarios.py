"""Stores and what befalls them: each scenario breaks its store, mends it, and knows when it takes writes."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import redis

from progressdb_kms.domain.keys import locate
from progressdb_kms.store.redis.topology import SLOTS
from tests.fault.power import PoweredServer
from tests.fault.store.clock import HOUR, Clock
from tests.fault.store.proxy import Proxy, Way
from tests.integration.world import LIMIT, Instance, eventually
from tests.store import test_cluster, test_sentinel
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
        return lambda: self.powered.slow_down(0)


class FullDisk(Alone):
    """The disk of the append-only file is full: Redis exits, and is started again. Needs root."""

    def make(self) -> Server:
        """Start the server on a small disk."""
        self._mounted = self.folder / "store"
        self._mounted.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(self._mounted)], check=True)
        return super().make()

    def kinds(self) -> list[Callable[[], Callable[[], object]]]:
        """Return its faults."""
        return [self._fill]

    def _fill(self) -> Callable[[], object]:
        ballast = self._mounted / "ballast"
        # Redis takes of the same room meanwhile: the end is where nothing more fits.
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(65_536))

        def mend() -> None:
            assert self.server.process
            eventually(lambda: self.server.process and self.server.process.poll() is not None, "Redis exits")
            ballast.unlink()
            self.server.start()

        return mend

    def close(self) -> None:
        """End all."""
        super().close()
        subprocess.run(["umount", "--lazy", str(self._mounted)], check=True)


class NetworkCut(Alone):
    """The store is in a network of its own, whose link goes down or whose packets are dropped. Needs root."""

    port = True

    def make(self) -> Server:
        """Start the server behind a pair of virtual interfaces."""
        number = os.getpid() % 65_000
        self._space, self._here, self._there = f"kms-{number}", f"kmsa{number}", f"kmsb{number}"
        net = f"10.{200 + number % 50}.{number // 256}"
        self._address = f"{net}.2"
        _ip("netns", "add", self._space)
        _ip("link", "add", self._here, "type", "veth", "peer", "name", self._there, "netns", self._space)
        _ip("addr", "add", f"{net}.1/24", "dev", self._here)
        _ip("link", "set", self._here, "up")
        _ip("-n", self._space, "addr", "add", f"{net}.2/24", "dev", self._there)
        _ip("-n", self._space, "link", "set", self._there, "up")
        return Server(
            "redis",
            self.folder / "store",
            {**ALWAYS, "bind": self._address, "protected-mode": "no"},
            free_port(),
            prefix=("ip", "netns", "exec", self._space),
        ).start()

    @property
    def url(self) -> str:
        """The store's URL."""
        return f"redis://{self._address}:{self.server.port}"

    def kinds(self) -> list[Callable[[], Callable[[], object]]]:
        """Return its faults."""
        return [self._drop, self._unplug]

    def _drop(self) -> Callable[[], object]:
        rule = ["ip", "netns", "exec", self._space, "iptables"]
        subprocess.run([*rule, "-A", "INPUT", "-j", "DROP"], check=True)
        return lambda: subprocess.run([*rule, "-F", "INPUT"], check=True)

    def _unplug(self) -> Callable[[], object]:
        _ip("-n", self._space, "link", "set", self._there, "down")
        return lambda: _ip("-n", self._space, "link", "set", self._there, "up")

    def close(self) -> None:
        """End all."""
        super().close()
        _ip("netns", "del", self._space)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


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


class Sentinels(Scenario):
    """A primary, a replica and three Sentinels: the primary is killed, frozen, or told to change places."""

    settings: ClassVar[dict[str, object]] = {"min_replicas": 1}

    def __init__(self, folder: Path, shim: Path) -> None:
        super().__init__(folder, shim)
        folder.mkdir(exist_ok=True)
        self._group = test_sentinel.Group(folder)
        self._primary, self._replica = self._group.primary, self._group.replica

    @property
    def url(self) -> str:
        """The store's URL."""
        return self._group.url

    def kinds(self) -> list[Callable[[], Callable[[], object]]]:
        """Return its faults."""
        return [self._kill, self._pause, self._change]

    def _kill(self) -> Callable[[], object]:
        self._primary.kill()
        return lambda: self._take_over(self._restart)

    def _restart(self) -> None:
        follow = f"127.0.0.1 {self._replica.port}"
        self._primary.options = {**test_sentinel.REPLICATED, "replicaof": follow}
        self._primary.start()

    def _pause(self) -> Callable[[], object]:
        self._primary.pause()
        return lambda: self._take_over(self._primary.resume)

    def _change(self) -> Callable[[], object]:
        eventually(self._agreed, "Sentinel agrees to a failover")
        return lambda: self._take_over(lambda: None)

    def _agreed(self) -> bool:
        try:
            return bool(self._group.sentinels[0].ask("SENTINEL", "FAILOVER", "kms") == b"OK")
        except redis.RedisError:
            return False  # one is under way, or the replica is not in step yet

    def _take_over(self, revive: Callable[[], object]) -> None:
        eventually(lambda: role(self._replica) == b"master", "the replica is promoted")
        revive()
        self._primary, self._replica = self._replica, self._primary

    def writable(self) -> bool:
        """Say whether the store takes writes."""
        return takes_writes(self._primary)

    def settled(self) -> bool:
        """Say whether the old primary follows the new one."""
        return bool(role(self._replica) == b"slave")

    def close(self) -> None:
        """End all."""
        for server in (self._primary, self._replica):
            if server.process:
                server.resume()
        self._group.kill()


class Cluster(Scenario):
    """Six nodes: a primary is killed or frozen, and its replica takes over."""

    settings: ClassVar[dict[str, object]] = {"min_replicas": 1}

    def __init__(self, folder: Path, shim: Path) -> None:
        super().__init__(folder, shim)
        self._group = test_cluster.Group(folder)
        self._pairs = [[self._group.nodes[n], self._group.nodes[n + 3]] for n in range(3)]
        self._victims = itertools.cycle(range(3))
        self._hit = 0

    @property
    def url(self) -> str:
        """The store's URL."""
        return self._group.url

    def kinds(self) -> list[Callable[[], Callable[[], object]]]:
        """Return its faults."""
        return [self._kill, self._pause]

    def _kill(self) -> Callable[[], object]:
        primary = self._choose()
        primary.kill()
        return lambda: self._take_over(primary.start)

    def _pause(self) -> Callable[[], object]:
        primary = self._choose()
        primary.pause()
        return lambda: self._take_over(primary.resume)

    def _choose(self) -> Server:
        self._hit = next(self._victims)
        return self._pairs[self._hit][0]

    def _take_over(self, revive: Callable[[], object]) -> None:
        pair = self._pairs[self._hit]
        eventually(lambda: role(pair[1]) == b"master", "the replica is promoted")
        revive()
        pair.reverse()

    def writable(self) -> bool:
        """Say whether the shard that was hit takes writes."""
        tag = next(tag for tag, slot in SLOTS.items() if self._owns(slot))
        return takes_writes(self._pairs[self._hit][0], tag)

    def settled(self) -> bool:
        """Say whether the old primary follows the new one."""
        return bool(role(self._pairs[self._hit][1]) == b"slave")

    def concerns(self, key_id: str) -> bool:
        """Say whether the key is in the shard that was hit."""
        return self._owns(SLOTS[locate(key_id)])

    def _owns(self, slot: int) -> bool:
        first, last = test_cluster.RANGES[self._hit]
        return first <= slot <= last

    def close(self) -> None:
        """End all."""
        for node in self._group.nodes:
            if node.process:
                node.resume()
        self._group.kill()


def role(server: Server) -> Any:
    """Return ``master``, ``slave``, or nothing where it does not answer."""
    try:
        return server.ask("ROLE")[0]
    except (redis.RedisError, OSError):
        return b""


SCENARIOS: dict[str, type[Scenario]] = {
    "killed": Killed,
    "frozen": Frozen,
    "proxy": Proxied,
    "torn-tail": TornTail,
    "power-cut": Powered,
    "slow-disk": SlowDisk,
    "out-of-memory": OutOfMemory,
    "clock-jumps": ClockJumps,
    "sentinel": Sentinels,
    "cluster": Cluster,
    "full-disk": FullDisk,
    "network-cut": NetworkCut,
}
NEED_ROOT = {"full-disk", "network-cut"}
SHORT = ["killed", "frozen", "proxy", "torn-tail", "out-of-memory", "clock-jumps"]
"""The short form's: a few seconds each, and none needs more than the tests' own rights."""

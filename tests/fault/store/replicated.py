"""Stores with replicas, whose primaries are lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import redis

from progressdb_kms.domain.keys import locate
from progressdb_kms.store.redis.topology import SLOTS
from tests.fault.store.scenarios import Scenario, takes_writes
from tests.integration.world import eventually
from tests.store import test_cluster, test_sentinel
from tests.store.servers import Server


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

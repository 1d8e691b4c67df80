"""The primary that Sentinels name: found, lost, found again, with nothing acknowledged missing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.domain.keys import DekRecord
from tests.store.auditing import assert_whole, log_on, work_through
from tests.store.conftest import new_dek
from tests.store.servers import ALWAYS, Server, free_port
from tests.store.topologies import can_create, create_through, missing, until

pytestmark = pytest.mark.slow

REPLICATED = {**ALWAYS, "min-replicas-to-write": "1", "repl-diskless-sync-delay": "0"}
SENTINEL = """\
sentinel monitor kms 127.0.0.1 {port} 2
sentinel down-after-milliseconds kms 500
sentinel failover-timeout kms 2000
"""


class Group:
    """A primary, a replica and three Sentinels."""

    def __init__(self, folder: Path) -> None:
        self.primary = Server("redis", folder / "a", REPLICATED, free_port()).start()
        follow = {**REPLICATED, "replicaof": f"127.0.0.1 {self.primary.port}"}
        self.replica = Server("redis", folder / "b", follow, free_port()).start()
        until(lambda: b"state=online" in self.primary.ask("INFO", "replication"))
        self.sentinels = []
        for number in range(3):
            home = folder / f"s{number}"
            home.mkdir()
            config = home / "sentinel.conf"
            config.write_text(SENTINEL.format(port=self.primary.port))
            self.sentinels.append(
                Server("redis", home, {}, free_port(), arguments=(str(config), "--sentinel"))
            )
            self.sentinels[-1].start()
        for sentinel in self.sentinels:
            until(partial(self._sees_all, sentinel))

    @staticmethod
    def _sees_all(sentinel: Server) -> bool:
        reply = sentinel.ask("SENTINEL", "MASTER", "kms")
        facts = dict(zip(reply[::2], reply[1::2], strict=True))
        return (facts[b"num-other-sentinels"], facts[b"num-slaves"], facts[b"flags"]) == (
            b"2",
            b"1",
            b"master",
        )

    @property
    def url(self) -> str:
        """The store's URL."""
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/kms"

    def replica_leads(self) -> bool:
        """Say whether the replica has become the primary."""
        try:
            return bool(self.replica.ask("ROLE")[0] == b"master")
        except redis.exceptions.ConnectionError:  # Sentinel cuts every connection of whom it promotes
            return False

    def kill(self) -> None:
        """Stop all."""
        for server in (*self.sentinels, self.replica, self.primary):
            server.kill()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    """Give a running group."""
    group = Group(tmp_path)
    yield group
    group.kill()


async def test_failover(group: Group, opened: Callable[..., Any]) -> None:
    """The primary dies under load: writes go on with its successor, and no acknowledged key is missing."""
    store = await opened(group.url, min_replicas=1)
    assert store.health.status.problems == ()
    assert store.health.status.facts["mode"] == "sentinel"
    acknowledged = await create_through(store, group.primary.kill)
    # Alone, the successor refuses writes until a replica is back: so min-replicas-to-write asks.
    group.primary.options = {**REPLICATED, "replicaof": f"127.0.0.1 {group.replica.port}"}
    await asyncio.to_thread(group.primary.start)
    await can_create(store)
    assert (await store.health.check()).problems == ()
    assert await missing(store, acknowledged) == 0


async def test_the_audit_log_survives_a_failover(group: Group, opened: Callable[..., Any]) -> None:
    """The primary dies under two processes: all acknowledged records are there, the log is whole."""
    store = await opened(group.url, min_replicas=1)
    logs = [log_on(store, f"i{number}") for number in range(2)]
    acknowledged: list[int] = []

    async def outage() -> None:
        group.primary.kill()
        await asyncio.to_thread(until, group.replica_leads)
        group.primary.options = {**REPLICATED, "replicaof": f"127.0.0.1 {group.replica.port}"}
        await asyncio.to_thread(group.primary.start)

    await work_through(logs, acknowledged, outage)
    await assert_whole(store, logs, acknowledged)


async def test_dead_sentinels(group: Group, opened: Callable[..., Any]) -> None:
    """One Sentinel that is down or frozen does not keep the store from being found; none at all does."""
    group.sentinels[0].kill()
    store = await opened(group.url, min_replicas=1, command_timeout=5.0)
    assert isinstance((await store.keys.create([new_dek()]))[0], DekRecord)
    for sentinel in group.sentinels[1:]:
        sentinel.kill()
    alone = await opened(group.url, min_replicas=1, command_timeout=1.5)
    (result,) = await alone.keys.create([new_dek()])
    assert isinstance(result, StoreUnavailable)
    assert "no Sentinel" in result.detail


async def test_frozen_primary(group: Group, opened: Callable[..., Any]) -> None:
    """A primary that freezes is left for its successor, though its connections stay open."""
    store = await opened(group.url, min_replicas=1, command_timeout=2)
    record = (await store.keys.create([new_dek()]))[0]
    assert isinstance(record, DekRecord)
    group.primary.pause()
    try:
        async with asyncio.timeout(90):
            while True:
                with contextlib.suppress(StoreUnavailable):
                    if await store.keys.get([record.key_id]) == [record]:
                        break
    finally:
        group.primary.resume()
    assert group.replica.ask("ROLE")[0] == b"master"


async def test_settings_without_replicas(group: Group, opened: Callable[..., Any]) -> None:
    """Where a replica can be promoted, one must confirm each write, or nothing is written."""
    store = await opened(group.url)
    assert any("store.min_replicas" in problem for problem in store.health.status.problems)

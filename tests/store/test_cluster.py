"""A Redis Cluster of three primaries with a replica each."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.audit.reading import verify_store
from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.domain.keys import DekRecord, KeyState, StateChange, locate, slot_tag
from progressdb_kms.ports import Imported
from progressdb_kms.store.redis.topology import SLOTS
from tests.store.auditing import KEY, log_on, told
from tests.store.conftest import new_dek, new_kek
from tests.store.servers import ALWAYS, Server, free_port
from tests.store.topologies import can_create, create_through, missing, until

pytestmark = pytest.mark.slow

OPTIONS = {
    **ALWAYS,
    "cluster-enabled": "yes",
    # A node that only waits for its disk or for a core is not to lose its place.
    "cluster-node-timeout": "3000",
    "cluster-replica-validity-factor": "0",
    "min-replicas-to-write": "1",
    "repl-diskless-sync-delay": "0",
}
RANGES = ((0, 5460), (5461, 10922), (10923, 16383))


class Group:
    """Six nodes: the first three are primaries of a third of the slots each, the others their replicas."""

    def __init__(self, folder: Path) -> None:
        # The bus has a port that is known to be free, instead of one 10,000 above the node's.
        buses = [free_port() for _ in range(6)]
        self.nodes = [
            Server("redis", folder / f"n{n}", {**OPTIONS, "cluster-port": str(bus)}, free_port()).start()
            for n, bus in enumerate(buses)
        ]
        for epoch, node in enumerate(self.nodes, 1):
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", epoch)
        for node in self.nodes[1:]:
            node.ask("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port, buses[0])
        for node, (first, last) in zip(self.nodes, RANGES, strict=False):
            node.ask("CLUSTER", "ADDSLOTSRANGE", first, last)
        until(lambda: all(b"cluster_known_nodes:6" in node.ask("CLUSTER", "INFO") for node in self.nodes))
        self.ids = [node.ask("CLUSTER", "MYID") for node in self.nodes]
        for replica, primary in zip(self.nodes[3:], self.ids, strict=False):
            until(partial(self._follow, replica, primary))
        for node in self.nodes:
            until(partial(self._ready, node))

    @staticmethod
    def _follow(replica: Server, primary: bytes) -> bool:
        try:
            return replica.ask("CLUSTER", "REPLICATE", primary) == b"OK"
        except Exception as error:  # noqa: BLE001 - not known yet: gossip takes its time
            assert "Unknown node" in str(error)  # noqa: PT017 - anything else is a mistake here
            return False

    @staticmethod
    def _ready(node: Server) -> bool:
        if b"cluster_state:ok" not in node.ask("CLUSTER", "INFO"):
            return False
        if node.ask("ROLE")[0] == b"master":
            return b"state=online" in node.ask("INFO", "replication")
        return all(len(entry) == 4 for entry in node.ask("CLUSTER", "SLOTS"))

    @property
    def url(self) -> str:
        """The store's URL: two of the nodes are enough to find all."""
        return f"redis+cluster://127.0.0.1:{self.nodes[0].port},127.0.0.1:{self.nodes[4].port}"

    def kill(self) -> None:
        """Stop all."""
        for node in self.nodes:
            node.kill()


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    """Give a running Cluster for the tests of this file, the last of which ruins it."""
    group = Group(tmp_path_factory.mktemp("cluster"))
    yield group
    group.kill()


async def test_everything_over_three_nodes(group: Group, opened: Callable[..., Any]) -> None:
    """All methods work though keys, registry and notices live on different nodes."""
    store = await opened(group.url, min_replicas=1)
    assert (store.health.status.problems, store.health.status.facts["primaries"]) == ((), "3")
    view = await store.registry.initialise(new_kek())
    assert await store.registry.load() == view
    records = await store.keys.create([new_dek(f"room:{number}") for number in range(90)])
    assert all(isinstance(record, DekRecord) for record in records)
    assert await missing(store, records) == 0
    assert all(node.ask("DBSIZE") > 5 for node in group.nodes[:3])
    start = await store.keys.changes(None, 0)
    await asyncio.gather(
        *[store.keys.change_state(record.key_id, StateChange.DISABLE, now=1) for record in records[:9]]
    )
    assert (await store.keys.changes(start.cursor, 1)).key_ids == {record.key_id for record in records[:9]}
    assert await store.keys.rewrap(records[20], b"n" * 64, "kek_1", 1)
    assert await store.keys.census() == {1: 90}
    listed: list[str] = []
    cursor = None
    for _ in itertools.count():
        page = await store.keys.list_keys(thread_id=None, state=None, limit=20, cursor=cursor)
        listed += [record.key_id for record in page.records]
        cursor = page.cursor
        if cursor is None:
            break
    assert set(listed) == {record.key_id for record in records}
    log = log_on(store)
    await log.record([told(1, "intent"), told(1, "ok")])
    await log.close()
    assert (await verify_store(store.audit, [KEY.verify])).problems == []


async def test_keys_of_the_older_service(group: Group, opened: Callable[..., Any]) -> None:
    """They live on other nodes than their threads, and are found, listed, superseded and imported anyway."""
    store = await opened(group.url, min_replicas=1)
    deks = [new_dek(f"older:{n % 20}", key_id=f"k_{10**18 + n}") for n in range(60)]
    records = await store.keys.create(deks)
    assert await store.keys.create(deks) == records
    assert await missing(store, records) == 0
    assert await store.backups.import_records(records) == [Imported.PRESENT] * 60
    for n in range(20):
        made = await store.keys.rotate(new_dek(f"older:{n}"))
        page = await store.keys.list_keys(thread_id=f"older:{n}", state=None, limit=9, cursor=None)
        assert [record.key_id for record in page.records] == [*(d.key_id for d in deks[n::20]), made.key_id]
        states = [record.state for record in page.records]
        assert states == [KeyState.DECRYPT_ONLY] * 3 + [KeyState.ENABLED]


async def test_slot_on_the_move(group: Group, opened: Callable[..., Any]) -> None:
    """While a slot is moved its keys are found where they are by then; new ones wait for the end of the move.

    A Cluster runs no script on keys of such a slot that are not all there yet, as a new key's are not.
    """
    store = await opened(group.url, min_replicas=1, command_timeout=3)
    (old,) = await store.keys.create([new_dek("moving")])
    slot = SLOTS[slot_tag("moving")]
    owner = next(n for n, (first, last) in enumerate(RANGES) if first <= slot <= last)
    source, target = group.nodes[owner], group.nodes[(owner + 1) % 3]
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", group.ids[owner])
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", group.ids[(owner + 1) % 3])
    for key in source.ask("CLUSTER", "GETKEYSINSLOT", slot, 100):
        source.ask("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
    assert await store.keys.get([old.key_id]) == [old]
    given_up = new_dek("moving")
    (during,) = await store.keys.create([given_up])
    assert isinstance(during, StoreUnavailable)
    assert "moving a slot" in during.detail
    for node in (target, source):
        node.ask("CLUSTER", "SETSLOT", slot, "NODE", group.ids[(owner + 1) % 3])
    (after,) = await store.keys.create([new_dek("moving")])
    assert isinstance(after, DekRecord)
    # The one in between may have been made after all, by a node that was slow; then it has the number.
    (made,) = await store.keys.get([given_up.key_id])
    assert after.version == old.version + (1 if made is None else 2)
    assert await store.keys.get([old.key_id]) == [old]


async def test_failover(group: Group, opened: Callable[..., Any]) -> None:
    """A primary dies under load: its replica takes over, and no acknowledged key is missing."""
    store = await opened(group.url, min_replicas=1)
    acknowledged = await create_through(store, group.nodes[1].kill)
    # Alone, the successor refuses writes until a replica is back: so min-replicas-to-write asks.
    until(lambda: group.nodes[4].ask("ROLE")[0] == b"master")
    await asyncio.to_thread(group.nodes[1].start)
    dead = next(tag for tag, slot in SLOTS.items() if RANGES[1][0] <= slot <= RANGES[1][1])
    thread_id = next(name for n in range(100_000) if slot_tag(name := f"room:{n}") == dead)
    await can_create(store, thread_id)
    assert any(RANGES[1][0] <= SLOTS[locate(record.key_id)] <= RANGES[1][1] for record in acknowledged)
    assert await missing(store, acknowledged) == 0

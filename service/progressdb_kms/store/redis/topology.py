"""Which server holds what: one server, the primary that Sentinels name, or the primaries of a Cluster.

Discovery is our own few commands over our own connections. The driver's clients for Sentinel and Cluster
retry and re-route by themselves, which hides the one thing that durability needs to know: on which connection
a write went, so that its confirmation can be asked on the same one.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from redis.crc import key_slot
from redis.exceptions import RedisError

from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.domain.keys import ALL_TAGS
from progressdb_kms.store.redis.address import Address, Endpoint, Mode
from progressdb_kms.store.redis.lane import StoreObserver
from progressdb_kms.store.redis.link import Command, Link, Reply
from progressdb_kms.store.redis.node import Node
from progressdb_kms.store.redis.schema import CONTROL
from progressdb_kms.store.settings import StoreSettings

SLOTS: Final = {tag: key_slot(tag.encode()) for tag in (*ALL_TAGS, CONTROL)}
"""The Cluster's slot of each tag."""


class Topology(ABC):
    """Finds nodes. Everything it knows can be out of date: whoever gets a wrong answer invalidates it."""

    def __init__(self, address: Address, settings: StoreSettings, observer: StoreObserver) -> None:
        self._address = address
        self._settings = settings
        self._observer = observer
        self._known = False
        self.closed = False
        self._discovery: asyncio.Task[StoreUnavailable | None] | None = None
        self._nodes: dict[Endpoint, Node] = {}

    @abstractmethod
    def find(self, tag: str) -> Node | None:
        """Return the primary of a tag's slot as known."""

    @abstractmethod
    def primaries(self) -> list[Node]:
        """Return the primaries as known, always in the same order."""

    @abstractmethod
    async def _discover(self) -> StoreUnavailable | None:
        """Find out anew; return why not, None when done."""

    def invalidate(self) -> None:
        """Find out anew before the next use."""
        self._known = False

    async def ready(self, *, anew: bool = False) -> None:
        """Return once the topology is known; callers at the same moment share one discovery.

        Raises:
            StoreUnavailable: Nobody who could tell answers.
        """
        if self.closed:
            raise StoreUnavailable("the store has been closed")
        if anew:
            self._known = False
        if self._known:
            return
        if self._discovery is None:
            self._discovery = asyncio.create_task(self._discover())
        task = self._discovery
        error = await asyncio.shield(task)
        if self._discovery is task:
            self._discovery = None
            self._known = error is None
        if error is not None:
            raise StoreUnavailable(error.detail)

    def at(self, endpoint: Endpoint) -> Node:
        """Return the node at an address, which may be new."""
        if endpoint not in self._nodes:
            self._nodes[endpoint] = Node(endpoint, self._address, self._settings, self._observer)
        return self._nodes[endpoint]

    async def close(self) -> None:
        """Close all nodes, for good."""
        self.closed = True
        if self._discovery is not None:
            self._discovery.cancel()
            await asyncio.wait([self._discovery])
        await self._keep(())

    async def _keep(self, endpoints: Iterable[Endpoint]) -> None:
        gone = self._nodes.keys() - set(endpoints)
        await asyncio.gather(*[self._nodes.pop(endpoint).close() for endpoint in gone])

    async def _ask(
        self,
        endpoints: Sequence[Endpoint],
        commands: Sequence[Command],
        rank: Callable[[list[Reply]], int | None],
    ) -> tuple[Endpoint, list[Reply]] | None:
        """Ask all at once and return the highest-ranking answer of the first majority.

        A majority, because one that was cut off answers too, with what was true before; and not all, because
        one that is down answers never.
        """
        answers: list[tuple[int, Endpoint, list[Reply]]] = []
        pending = {asyncio.create_task(self._put(endpoint, commands)) for endpoint in endpoints}
        try:
            while pending and len(answers) <= len(endpoints) // 2:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for endpoint, replies in (task.result() for task in done):
                    if replies is not None and (ranked := rank(replies)) is not None:
                        answers.append((ranked, endpoint, replies))
        finally:
            for task in pending:
                task.cancel()
        best = max(answers, key=lambda answer: answer[0], default=None)
        return best[1:] if best else None

    async def _put(
        self, endpoint: Endpoint, commands: Sequence[Command]
    ) -> tuple[Endpoint, list[Reply] | None]:
        sentinel = self._address.mode is Mode.SENTINEL
        try:
            link = await Link.open(endpoint, self._address, self._settings, sentinel=sentinel)
            try:
                return endpoint, await link.run(commands, self._settings.connect_timeout)
            finally:
                await link.close()
        except (RedisError, OSError, TimeoutError, StoreUnavailable):
            return endpoint, None


class Standalone(Topology):
    """One server, always the same."""

    def find(self, tag: str) -> Node:  # noqa: ARG002 - one for all
        """Return the server."""
        return self.at(self._address.endpoints[0])

    def primaries(self) -> list[Node]:
        """Return the server."""
        return [self.find("")]

    async def _discover(self) -> None:
        return None


class Sentinel(Topology):
    """The primary that the Sentinels name."""

    _primary: Node | None = None

    def find(self, tag: str) -> Node | None:  # noqa: ARG002 - one for all
        """Return the primary."""
        return self._primary

    def primaries(self) -> list[Node]:
        """Return the primary."""
        return [self._primary] if self._primary else []

    async def _discover(self) -> StoreUnavailable | None:
        command: Command = ("SENTINEL", "MASTER", self._address.service)
        answer = await self._ask(self._address.endpoints, [command], _sentinel_epoch)
        if answer is None:
            return StoreUnavailable(f"no Sentinel names a primary for the service {self._address.service}")
        facts = _pairs(answer[1][0])
        endpoint = Endpoint(facts["ip"], int(facts["port"]))
        self._primary = self.at(endpoint)
        await self._keep([endpoint])
        return None


class Cluster(Topology):
    """The primaries of a Redis Cluster, by slot."""

    def __init__(self, address: Address, settings: StoreSettings, observer: StoreObserver) -> None:
        super().__init__(address, settings, observer)
        self._ranges: list[tuple[int, int, Endpoint]] = []
        self._found: dict[str, Endpoint] = {}

    def find(self, tag: str) -> Node | None:
        """Return the primary of a tag's slot as known, None where the Cluster has none."""
        endpoint = self._found.get(tag)
        return None if endpoint is None else self.at(endpoint)

    def primaries(self) -> list[Node]:
        """Return the primaries by their lowest slot."""
        return [self.at(endpoint) for endpoint in dict.fromkeys(range_[2] for range_ in sorted(self._ranges))]

    async def _discover(self) -> StoreUnavailable | None:
        endpoints = list(
            dict.fromkeys([*(endpoint for _, _, endpoint in self._ranges), *self._address.endpoints])
        )
        answer = await self._ask(endpoints, [("CLUSTER", "INFO"), ("CLUSTER", "SLOTS")], _cluster_epoch)
        if answer is None:
            return StoreUnavailable("no node of the store's Cluster answers")
        asked, (_, slots) = answer
        self._ranges = []
        for first, last, primary, *_ in slots:
            # A node that does not know its own address says so by an empty one: it is the one we asked.
            host = (primary[0] or b"").decode() or asked.host
            self._ranges.append((first, last, Endpoint(host, primary[1])))
        self._found = {
            tag: endpoint
            for tag, slot in SLOTS.items()
            for first, last, endpoint in self._ranges
            if first <= slot <= last
        }
        await self._keep(endpoint for _, _, endpoint in self._ranges)
        return None


def make_topology(address: Address, settings: StoreSettings, observer: StoreObserver) -> Topology:
    """Return the topology that the URL asks for."""
    kinds: dict[Mode, type[Standalone | Sentinel | Cluster]] = {
        Mode.STANDALONE: Standalone,
        Mode.SENTINEL: Sentinel,
        Mode.CLUSTER: Cluster,
    }
    return kinds[address.mode](address, settings, observer)


def _pairs(reply: Reply) -> dict[str, str]:
    texts = [bytes(item).decode(errors="replace") for item in reply]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def _sentinel_epoch(replies: list[Reply]) -> int | None:
    if not isinstance(replies[0], list):
        return None
    return int(_pairs(replies[0]).get("config-epoch", "0"))


def _cluster_epoch(replies: list[Reply]) -> int | None:
    info, slots = replies
    if not isinstance(info, bytes) or not isinstance(slots, list) or not slots:
        return None
    facts = dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)
    return int(facts.get("cluster_current_epoch", "0"))

"""One server: a lane for reads, a lane for writes, and what is known of its durability."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from redis.exceptions import RedisError

from progressdb_kms.domain.errors import StoreNotDurable, StoreUnavailable
from progressdb_kms.store.redis.address import Address, Endpoint, Mode
from progressdb_kms.store.redis.durability import CONFIG_NAMES, FSYNC_PERIOD, Finding, NodeFacts, assess
from progressdb_kms.store.redis.failures import Again, Failure, lost, translate
from progressdb_kms.store.redis.lane import Confirmation, Lane, StoreObserver
from progressdb_kms.store.redis.link import Command, Link, Reply
from progressdb_kms.store.settings import StoreSettings

_QUESTIONS: Final[tuple[Command, ...]] = (("INFO",), ("CONFIG", "GET", *CONFIG_NAMES))
_FSYNC_PATIENCE: Final = 1.8 * FSYNC_PERIOD
_ASK_AGAIN_AFTER: Final = 1.0


class Node:
    """A server and the connections to it.

    Writes go over one connection, because WAIT and WAITAOF speak only of what their own connection wrote;
    reads over another, so that they never wait for an fsync; what blocks by intent over further ones.
    """

    def __init__(
        self, endpoint: Endpoint, address: Address, settings: StoreSettings, observer: StoreObserver
    ) -> None:
        self.endpoint = endpoint
        self._address = address
        self._settings = settings
        self._promotable = address.mode is not Mode.STANDALONE
        self._finding: Finding | None = None
        self._aof_run = ""
        self._aof_begun = False
        self._asked_at = 0.0
        self._asked_on: Link | None = None
        self._idle: list[Link] = []
        self._closed = False
        timeout = settings.command_timeout
        self.reads = Lane("read", endpoint, self._open, timeout=timeout, observer=observer)
        self.writes = Lane(
            "write", endpoint, self._open, timeout=timeout, observer=observer, confirm=self._confirm
        )

    @property
    def finding(self) -> Finding | None:
        """The last judgement of its durability."""
        return self._finding

    async def read(self, commands: Sequence[Command]) -> list[Reply | Failure]:
        """Run commands of this very server, again if the connection had died unnoticed."""
        for _ in range(2):
            replies = await self.reads.submit(commands)
            if not any(isinstance(reply, Failure) and reply.again is Again.SOON for reply in replies):
                break
        return replies

    async def examine(self) -> Finding | Failure:
        """Ask the server now and remember the judgement."""
        info, config = await self.read(_QUESTIONS)
        try:
            return self._judge(info, config)
        except StoreUnavailable as error:
            return Failure(error, Again.SOON)

    async def block(self, command: Command, seconds: float) -> Reply | Failure:
        """Run a command that may block for ``seconds`` at most, on a connection of its own."""
        link = None
        try:
            link = self._idle.pop() if self._idle else await self._open()
            (reply,) = await link.run([command], seconds)
        except StoreUnavailable as error:
            return Failure(error)
        except (RedisError, OSError, TimeoutError) as error:
            return lost(error, self.endpoint)
        if self._closed:
            await link.close()
        else:
            self._idle.append(link)
        return translate(reply) or reply

    async def close(self) -> None:
        """Close all connections; what is under way fails."""
        self._closed = True
        await asyncio.gather(self.reads.close(), self.writes.close(), *(link.close() for link in self._idle))

    async def _open(self) -> Link:
        return await Link.open(self.endpoint, self._address, self._settings)

    async def _confirm(self, link: Link) -> Confirmation | None:
        """Refuse writes that could be lost, and return what makes these ones durable."""
        finding = self._finding
        now = asyncio.get_running_loop().time()
        # A new connection may lead to another process with other settings: ask before the first write on it.
        unknown = finding is None or link is not self._asked_on
        if unknown or (self._unfit(finding) and now - self._asked_at > _ASK_AGAIN_AFTER):
            replies = await link.run(_QUESTIONS, self._settings.command_timeout)
            info, config = [translate(reply) or reply for reply in replies]
            finding = self._judge(info, config)
            self._asked_on = link
        if finding is not None and self._unfit(finding):
            raise StoreNotDurable(finding.problems[0])
        return self._confirmation(finding)

    def _unfit(self, finding: Finding | None) -> bool:
        return finding is not None and bool(finding.problems) and not self._settings.allow_data_loss

    def _judge(self, info: Reply | Failure, config: Reply | Failure) -> Finding:
        for reply in (info, config):
            if isinstance(reply, Failure) and not reply.refused:
                raise reply.error
        facts = NodeFacts(parse_info(info), _parse_config(config))
        if self._promotable and not facts.primary:
            raise StoreUnavailable("the store's node is a replica now; a failover is under way")
        self._watch_aof(facts)
        self._finding = assess(facts, self._settings, promotable=self._promotable, aof_begun=self._aof_begun)
        self._asked_at = asyncio.get_running_loop().time()
        return self._finding

    def _watch_aof(self, facts: NodeFacts) -> None:
        """Remember that the append-only file was off: after it is switched on it is not whole at once.

        A first rewrite that is under way when a server process is first seen may be that very one.
        """
        unseen = facts.run_id != self._aof_run
        if facts.appendonly != "yes" or (unseen and facts.aof_first and not facts.aof_complete):
            self._aof_begun = True
        elif facts.aof_complete:
            self._aof_begun = False
        self._aof_run = facts.run_id

    def _confirmation(self, finding: Finding | None) -> Confirmation | None:
        replicas = self._settings.min_replicas
        wait = self._settings.wait_timeout
        if finding is not None and finding.confirms:
            if finding.slow:
                wait = max(wait, _FSYNC_PATIENCE)
            wait = min(wait, 0.9 * self._settings.command_timeout)
            return Confirmation(("WAITAOF", 1, replicas, int(wait * 1000)), (1, replicas))
        if replicas:
            return Confirmation(("WAIT", replicas, int(wait * 1000)), (replicas,))
        return None


def parse_info(reply: Reply) -> dict[str, str]:
    """Return what INFO said, by name; nothing where it is refused."""
    if not isinstance(reply, bytes):
        return {}
    lines = (
        line.partition(":")
        for line in reply.decode(errors="replace").splitlines()
        if not line.startswith("#")
    )
    return {name: value for name, colon, value in lines if colon}


def _parse_config(reply: Reply) -> dict[str, str] | None:
    if not isinstance(reply, list):
        return None
    texts = [bytes(item).decode(errors="replace") for item in reply]
    return dict(zip(texts[::2], texts[1::2], strict=True))

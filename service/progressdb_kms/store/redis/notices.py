"""Notices of state changes: a stream that every instance reads, so that no memory outlives a change."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from progressdb_kms.domain.errors import KmsError, StoreUnavailable
from progressdb_kms.ports import Changes
from progressdb_kms.store.redis import scripts
from progressdb_kms.store.redis.failures import Failure
from progressdb_kms.store.redis.link import Reply
from progressdb_kms.store.redis.router import Router, checked, script_call
from progressdb_kms.store.redis.schema import CHANGES_KEY, CONTROL
from progressdb_kms.store.settings import StoreSettings

KEPT_MS: Final = 300_000
"""How long a notice is kept: whoever has not read for longer starts with an empty memory."""
_AT_ONCE: Final = 5000
_NO_KEY: Final = ""
NOTICE_MAX_AGE_MS: Final = 2000
"""Longest time between a notice and its change: instances keep a noticed key out of memory for 5 s."""


class Notices:
    """Writes and reads the stream.

    A cursor is the id of the last notice and the number of notices ever: the number tells whether any was
    lost unread, be it to trimming, to a failover or to somebody's FLUSHALL.
    """

    def __init__(self, router: Router, settings: StoreSettings) -> None:
        self._router = router
        self._settings = settings

    async def put(self, *key_ids: str) -> None:
        """Say that keys' states are about to change; many take hardly longer than one."""
        calls = [script_call(CONTROL, scripts.NOTICE, (CHANGES_KEY,), key_id, KEPT_MS) for key_id in key_ids]
        for reply in await self._router.write(calls):
            checked(reply)

    async def read(self, cursor: str | None, wait: float) -> Changes:
        """Read what came after ``cursor``; see ``KeyStore.changes``."""
        if cursor is None:
            last, total, *_ = await self._range("", 0)
            if total == 0:
                # Before keys are cached there has to be a stream, or its loss with the first notices in it
                # would look like none ever. On a store that takes no writes nothing is cached.
                with suppress(KmsError):
                    await self.put(_NO_KEY)
                last, total, *_ = await self._range("", 0)
            return Changes(_cursor(last, total), frozenset())
        seen, _, count = cursor.partition("/")
        if wait > 0:
            await self._wait(seen, wait)
        last, total, *key_ids = await self._range(seen, _AT_ONCE)
        whole = total > 0 and total - int(count) == len(key_ids)
        return Changes(_cursor(last, total), frozenset(key_id.decode() for key_id in key_ids), complete=whole)

    async def _range(self, last: str, limit: int) -> Reply:
        return await self._router.read_one(
            script_call(CONTROL, scripts.READ_NOTICES, (CHANGES_KEY,), last, limit)
        )

    async def _wait(self, last: str, wait: float) -> None:
        """Return when there is a notice after ``last``, or the time is over."""
        await self._router.topology.ready()
        node = self._router.topology.find(CONTROL)
        if node is None:
            raise StoreUnavailable("no node of the store holds the control slot")
        # BLOCK 0 would mean for ever.
        milliseconds = max(int(wait * 1000), 1)
        reply = await node.block(
            ("XREAD", "COUNT", 1, "BLOCK", milliseconds, "STREAMS", CHANGES_KEY, last),
            wait + self._settings.command_timeout,
        )
        if isinstance(reply, Failure):
            self._router.topology.invalidate()
        checked(reply)


def _cursor(last: bytes, total: int) -> str:
    return f"{last.decode()}/{total}"

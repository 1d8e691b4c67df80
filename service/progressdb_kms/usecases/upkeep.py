"""What a running instance does by itself: follows the change notices, checks registry and store, beats."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog

from progressdb_kms.domain.errors import KmsError, StoreUnavailable
from progressdb_kms.ports import Heartbeat
from progressdb_kms.usecases.destruction import sweep
from progressdb_kms.usecases.loading import TICK

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from progressdb_kms.ports import Heartbeats, StoreHealth
    from progressdb_kms.usecases.context import Kms
    from progressdb_kms.usecases.loading import Loader
    from progressdb_kms.usecases.vault import Vault

log = structlog.get_logger(__name__)

NOTICE_WAIT: Final = 0.3
"""Seconds that a read of the notices waits for one: well below the second for which a read vouches."""
GAP: Final = 60.0
"""Seconds without a whole read after which notices may have been trimmed unread (they are kept for 300)."""
REGISTRY_EVERY: Final = 1.0
HEARTBEAT_EVERY: Final = 2.0
STORE_EVERY: Final = 3.0
USES_EVERY: Final = 1.0
DESTRUCTION_EVERY: Final = 60.0
REFUSALS_EVERY: Final = 1.0
CALLS_EVERY: Final = 0.5
PAUSE_AFTER_BUG: Final = 1.0


class Upkeep:
    """The background work of one instance.

    Args:
        kms: The service.
        loader: Told when the store is away.
        health: Asked for the store's fitness.
        heartbeats: Where this instance says that it lives.
        release: The package's version.
        instance: Random name of this process.
        vault: What destroys keys when their waiting period is over.
    """

    def __init__(
        self,
        *,
        kms: Kms,
        loader: Loader,
        health: StoreHealth,
        heartbeats: Heartbeats,
        release: str,
        instance: str,
        vault: Vault,
    ) -> None:
        self._kms = kms
        self._loader = loader
        self._health = health
        self._heartbeats = heartbeats
        self._release = release
        self._started_at = kms.now()
        self._tasks: list[asyncio.Task[None]] = []
        self._instance = instance
        self._vault = vault

    def start(self) -> None:
        """Begin; needs a running event loop."""
        self._tasks = [
            asyncio.create_task(self._for_ever("notices", self._follow_notices)),
            asyncio.create_task(self._every("tick", TICK, self._tick)),
            asyncio.create_task(self._every("registry", REGISTRY_EVERY, self._kms.keks.refresh)),
            asyncio.create_task(self._every("heartbeat", HEARTBEAT_EVERY, self._beat)),
            asyncio.create_task(self._every("store", STORE_EVERY, self._check_store)),
            asyncio.create_task(self._every("uses", USES_EVERY, self.report_uses)),
            asyncio.create_task(self._every("refusals", REFUSALS_EVERY, self._kms.refusals.write)),
            asyncio.create_task(self._every("calls", CALLS_EVERY, self._kms.calls.write)),
            asyncio.create_task(self._every("destruction", DESTRUCTION_EVERY, self._destroy_due)),
        ]

    async def stop(self) -> None:
        """End in order: uses reported, heartbeat withdrawn, as far as the store answers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._kms.cache.restart()
        try:
            await self._kms.refusals.write(all_of_it=True)
            await self._kms.calls.write(all_of_it=True)
            await self.report_uses()
            await self._heartbeats.leave(self._instance)
        except KmsError as error:
            log.info("farewell_failed", detail=error.detail)

    async def _every(self, name: str, seconds: float, action: Callable[[], Awaitable[object]]) -> None:
        last = ""

        async def once() -> None:
            nonlocal last
            try:
                await action()
                last = ""
            except KmsError as error:
                if error.detail != last:  # once, not once a second for an hour
                    log.warning("upkeep_failed", task=name, detail=error.detail)
                last = error.detail
            await asyncio.sleep(seconds)

        await self._for_ever(name, once)

    async def _for_ever(self, name: str, action: Callable[[], Awaitable[object]]) -> None:
        while True:
            try:
                await action()
            except Exception:  # a bug must not end what keeps this instance honest: say so, and go on
                log.exception("upkeep_broken", task=name)
                await asyncio.sleep(PAUSE_AFTER_BUG)

    async def _follow_notices(self) -> None:
        cache, clock, store = self._kms.cache, self._kms.clock, self._kms.store
        cursor: str | None = None
        last_whole = float("-inf")
        while True:
            began = clock()
            try:
                if cursor is None or began - last_whole > GAP:
                    cursor = (await store.changes(None, 0)).cursor
                    cache.restart()
                    last_whole = began
                    self._loader.store_answered()
                    continue
                changes = await store.changes(cursor, NOTICE_WAIT)
            except StoreUnavailable as error:
                known = self._loader.store_away
                self._loader.store_failed(began)
                if self._loader.store_away and not known:
                    log.warning(
                        "store_away", detail=error.detail, action="cached keys serve for cache.max_stale"
                    )
                await asyncio.sleep(NOTICE_WAIT)
                continue
            if self._loader.store_away:
                log.info("store_back")
            self._loader.store_answered()
            if not changes.complete:
                cursor = None
                continue
            cursor = changes.cursor
            cache.forget(changes.key_ids)
            cache.read(began)
            last_whole = began

    async def _tick(self) -> None:
        self._loader.tick()

    async def _beat(self) -> None:
        kms = self._kms
        await self._heartbeats.beat(
            Heartbeat(
                instance=self._instance,
                at=kms.now(),
                started_at=self._started_at,
                release=self._release,
                kek_versions=kms.keks.usable,
                active=kms.keks.active,
                policy_generation=kms.policies.generation,
                revision=kms.keks.view.revision,
            )
        )

    async def _check_store(self) -> None:
        before = self._health.status.problems
        status = await self._health.check()
        if status.reachable and status.problems != before:
            for problem in status.problems:
                log.error("store_not_durable", detail=problem)

    async def _destroy_due(self) -> None:
        swept = await sweep(self._vault)
        if swept is not None and swept.destroyed:
            log.info("keys_destroyed", count=len(swept.destroyed), files_rewritten=swept.rewritten)

    async def report_uses(self) -> None:
        """Write down the uses of keys that have left the cache."""
        owed = self._kms.cache.take_owed()
        if not owed:
            return
        try:
            await self._kms.store.reserve_uses(owed)
        except KmsError:
            self._kms.cache.owe(owed)
            raise

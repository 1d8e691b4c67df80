"""Rotation of a thread's DEK in Redis: the new one is stored, and the older ones only decrypt then."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.domain.keys import slot_tag
from progressdb_kms.store.redis import scripts
from progressdb_kms.store.redis.notices import NOTICE_MAX_AGE_MS
from progressdb_kms.store.redis.router import Call, script_call
from progressdb_kms.store.redis.schema import census_key, control_key, record_key, thread_key

if TYPE_CHECKING:
    from progressdb_kms.domain.keys import NewDek
    from progressdb_kms.store.redis.link import Reply
    from progressdb_kms.store.redis.notices import Notices
    from progressdb_kms.store.redis.router import Router
    from progressdb_kms.store.settings import StoreSettings

_AT_ONCE: Final = 256
"""Keys that are superseded in one call, so that it holds the store for some milliseconds at most."""
_LOOKED_AT: Final = 2_000


class ThreadRotation:
    """Rotates threads.

    All enabled keys are superseded together with the storing of the new one, where they are few. Of more the
    oldest go first, in parts: the latest stays enabled until the new one is there, and whoever dies in
    between leaves a thread that can be rotated again.
    """

    def __init__(self, router: Router, settings: StoreSettings, notices: Notices) -> None:
        self._router = router
        self._settings = settings
        self._notices = notices

    async def rotate(self, dek: NewDek) -> Reply:
        """Return the reply of ``rotate_dek.lua``, which is not 'late'.

        The notices' age is measured on the clock of the slot's node, from before the notices.

        Raises:
            StoreUnavailable, StoreNotDurable: Not now; repeating it goes on.
        """
        tag = slot_tag(dek.thread_id)
        loop, patience = asyncio.get_running_loop(), 2 * self._settings.command_timeout
        try:
            async with asyncio.timeout(patience) as limit:
                while True:
                    enabled = await self._enabled(tag, dek.thread_id)
                    if len(enabled) > _AT_ONCE:
                        done = await self._supersede(tag, dek, enabled[:_AT_ONCE])
                        if done == b"ok":
                            limit.reschedule(loop.time() + patience)  # what is done need not be done again
                        if done != b"settled":
                            continue
                        enabled = []  # none of them changes
                    reply = await self._store(tag, dek, enabled)
                    if reply[0] != b"late":
                        return reply
        except TimeoutError:
            raise StoreUnavailable("the store did not rotate the thread's key in time") from None

    async def _enabled(self, tag: str, thread_id: str) -> list[str]:
        """Return the thread's enabled keys, the oldest first; where they are many, not all."""
        found: list[str] = []
        at = 0
        while at >= 0 and len(found) <= _AT_ONCE:
            call = script_call(
                tag,
                scripts.THREAD_ENABLED,
                (thread_key(tag, thread_id),),
                at,
                _LOOKED_AT,
                record_key(tag, ""),
            )
            at, *key_ids = await self._router.read_one(call)
            found += [key_id.decode() for key_id in key_ids]
        return found

    async def _supersede(self, tag: str, dek: NewDek, key_ids: list[str]) -> Reply:
        """Supersede some keys; return the reply of ``supersede.lua``."""
        noticed_at = await self._notice(tag, key_ids)
        call = script_call(
            tag,
            scripts.SUPERSEDE,
            (record_key(tag, dek.key_id), control_key(tag)),
            dek.kek_version,
            noticed_at,
            NOTICE_MAX_AGE_MS,
            record_key(tag, ""),
            dek.created_at,
            *key_ids,
        )
        return await self._router.write_one(call)

    async def _store(self, tag: str, dek: NewDek, enabled: list[str]) -> Reply:
        noticed_at = await self._notice(tag, enabled)
        call = script_call(
            tag,
            scripts.ROTATE_DEK,
            (
                record_key(tag, dek.key_id),
                thread_key(tag, dek.thread_id),
                census_key(tag, dek.kek_version),
                control_key(tag),
            ),
            dek.key_id,
            dek.thread_id,
            dek.wrapped,
            dek.kek_id,
            dek.kek_version,
            dek.created_at,
            dek.created_by,
            noticed_at,
            NOTICE_MAX_AGE_MS,
            record_key(tag, ""),
            ",".join(enabled),
        )
        return await self._router.write_one(call)

    async def _notice(self, tag: str, key_ids: list[str]) -> int:
        """Put notices, and return the node's time before them in milliseconds."""
        seconds, microseconds = await self._router.read_one(Call(tag, ("TIME",)))
        await self._notices.put(*key_ids)
        return int(seconds) * 1000 + int(microseconds) // 1000

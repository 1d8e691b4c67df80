"""Heartbeats of instances in Redis: the port ``Heartbeats``."""

from __future__ import annotations

from typing import Final

from progressdb_kms.ports import Heartbeat
from progressdb_kms.store.redis.router import Call, Router
from progressdb_kms.store.redis.schema import CONTROL, INSTANCES_KEY, decode_heartbeat, encode_heartbeat

_FORGET_AFTER: Final = 86_400.0
_SWEEP_EVERY: Final = 3600.0


class RedisHeartbeats:
    """Implements ``Heartbeats``. A beat need not survive a power cut: the next one comes soon."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._swept_at = float("-inf")

    async def beat(self, heartbeat: Heartbeat) -> None:
        """Publish this heartbeat; once an hour, forget who was silent for a day, and what is no heartbeat."""
        await self._router.read_one(
            Call(CONTROL, ("HSET", INSTANCES_KEY, heartbeat.instance, encode_heartbeat(heartbeat)))
        )
        if heartbeat.at - self._swept_at < _SWEEP_EVERY:
            return
        gone = [
            name
            for name, known in await self._by_name()
            if known is None or known.at < heartbeat.at - _FORGET_AFTER
        ]
        if gone:
            await self._router.read_one(Call(CONTROL, ("HDEL", INSTANCES_KEY, *gone)))
        self._swept_at = heartbeat.at

    async def leave(self, instance: str) -> None:
        """Forget this instance."""
        await self._router.read_one(Call(CONTROL, ("HDEL", INSTANCES_KEY, instance)))

    async def live(self) -> list[Heartbeat]:
        """Return the last heartbeat of each known instance; one that can't be read is left out."""
        entries = await self._router.read_one(Call(CONTROL, ("HVALS", INSTANCES_KEY)))
        return [beat for beat in map(_read, entries) if beat is not None]

    async def _by_name(self) -> list[tuple[bytes, Heartbeat | None]]:
        """Return the entries by name, None for one that can't be read."""
        reply = await self._router.read_one(Call(CONTROL, ("HGETALL", INSTANCES_KEY)))
        return [(name, _read(entry)) for name, entry in zip(reply[::2], reply[1::2], strict=True)]


def _read(entry: bytes) -> Heartbeat | None:
    try:
        return decode_heartbeat(entry)
    except (ValueError, KeyError, TypeError):
        return None

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
        """Publish this instance's heartbeat; once an hour, forget instances silent for a day."""
        await self._router.read_one(
            Call(CONTROL, ("HSET", INSTANCES_KEY, heartbeat.instance, encode_heartbeat(heartbeat)))
        )
        if heartbeat.at - self._swept_at < _SWEEP_EVERY:
            return
        silent = [known.instance for known in await self.live() if known.at < heartbeat.at - _FORGET_AFTER]
        if silent:
            await self._router.read_one(Call(CONTROL, ("HDEL", INSTANCES_KEY, *silent)))
        self._swept_at = heartbeat.at

    async def leave(self, instance: str) -> None:
        """Forget this instance."""
        await self._router.read_one(Call(CONTROL, ("HDEL", INSTANCES_KEY, instance)))

    async def live(self) -> list[Heartbeat]:
        """Return the last heartbeat of each known instance; one that can't be read is left out."""
        beats = []
        for entry in await self._router.read_one(Call(CONTROL, ("HVALS", INSTANCES_KEY))):
            try:
                beats.append(decode_heartbeat(entry))
            except (ValueError, KeyError, TypeError):
                continue
        return beats

"""Destruction of keys in Redis: the port ``DestructionStore``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Final

from progressdb_kms.domain.backup import Destruction
from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.domain.keys import ALL_TAGS, locate
from progressdb_kms.ports import Destroyed, Resealed
from progressdb_kms.store.redis import scripts
from progressdb_kms.store.redis.address import Endpoint
from progressdb_kms.store.redis.failures import Failure
from progressdb_kms.store.redis.link import Reply
from progressdb_kms.store.redis.node import Node, parse_info
from progressdb_kms.store.redis.notices import NOTICE_MAX_AGE_MS, Notices
from progressdb_kms.store.redis.router import Call, Router, checked, script_call
from progressdb_kms.store.redis.schema import (
    CONTROL,
    DESTRUCTION_KEY,
    bucket_prefix,
    census_prefix,
    control_key,
    decode_destruction,
    destroyed_key,
    due_key,
    encode_destruction,
    encode_manifest,
    quarantine_key,
    record_key,
)
from progressdb_kms.store.settings import StoreSettings

_DUE_AT_ONCE: Final = 100
_REWRITE_SECONDS: Final = 120.0
"""Longest wait for a node to rewrite its file; a longer one is found finished by a later sweep."""
_FIRST_POLL: Final = 0.02
_LONGEST_POLL: Final = 1.0
_RESULTS: Final = {b"ok": Destroyed.DONE, b"not due": Destroyed.NOT_DUE, b"changed": Destroyed.CHANGED}


class RedisDestruction:
    """Implements ``DestructionStore``."""

    def __init__(self, router: Router, settings: StoreSettings) -> None:
        self._router = router
        self._settings = settings
        self._notices = Notices(router, settings)

    async def lease(self, owner: str, seconds: float) -> bool:
        """Take or prolong the right to carry out destructions; False where another has it."""
        call = script_call(CONTROL, scripts.DESTRUCTION_LEASE, (DESTRUCTION_KEY,), owner, int(seconds * 1000))
        return bool(await self._router.write_one(call))

    async def due(self, now: int) -> Mapping[str, Sequence[str]]:
        """Return the keys that are due at ``now``, by slot tag, at most 100 a slot."""
        calls = [
            Call(tag, ("ZRANGE", due_key(tag), "-inf", now, "BYSCORE", "LIMIT", 0, _DUE_AT_ONCE))
            for tag in ALL_TAGS
        ]
        replies = await self._router.read_in_parts(calls)
        found = {tag: checked(reply) for tag, reply in zip(ALL_TAGS, replies, strict=True)}
        return {tag: [key_id.decode() for key_id in key_ids] for tag, key_ids in found.items() if key_ids}

    async def destroy(
        self, destruction: Destruction, snapshots: Sequence[Resealed] = (), *, merged: bool = False
    ) -> Destroyed:
        """Remove a key's blob from its record and from every snapshot; see ``DestructionStore.destroy``."""
        key_id = destruction.key_id
        tag = locate(key_id)
        seals = [
            part
            for each in snapshots
            for part in (each.rotation_id, encode_manifest(each.before), encode_manifest(each.after))
        ]
        try:
            async with asyncio.timeout(2 * self._settings.command_timeout):
                while True:
                    seconds, microseconds = await self._router.read_one(Call(tag, ("TIME",)))
                    await self._notices.put(key_id)
                    reply = await self._router.write_one(
                        script_call(
                            tag,
                            scripts.DESTROY,
                            (record_key(tag, key_id), due_key(tag), control_key(tag), destroyed_key(tag)),
                            key_id,
                            int(seconds) * 1000 + int(microseconds) // 1000,
                            NOTICE_MAX_AGE_MS,
                            destruction.destroyed_at,
                            encode_destruction(destruction),
                            int(merged),
                            census_prefix(tag),
                            bucket_prefix(tag, "")[:-1],
                            quarantine_key(tag, ""),
                            *seals,
                        )
                    )
                    if reply != b"late":
                        return _RESULTS[reply]
        except TimeoutError:
            raise StoreUnavailable("the store did not destroy the key in time") from None

    async def destructions(self, key_ids: Sequence[str]) -> list[Destruction | None]:
        """Return what was written down of destroyed keys, in order."""
        tags = [locate(key_id) for key_id in key_ids]
        replies = await self._router.read(
            [
                Call(tag, ("HGET", destroyed_key(tag), key_id))
                for tag, key_id in zip(tags, key_ids, strict=True)
            ]
        )
        entries = [checked(reply) for reply in replies]
        return [None if entry is None else decode_destruction(entry) for entry in entries]

    async def owe_rewrite(self) -> None:
        """Note, before keys are destroyed, that append-only files will have to be rewritten."""
        await self._router.write_one(Call(CONTROL, ("HINCRBY", DESTRUCTION_KEY, "owed", 1)))

    async def rewrite_owed(self) -> bool:
        """Say whether keys were destroyed whose blobs may still stand in an append-only file."""
        owed, settled = await self._owed()
        return owed > settled

    async def rewrite_files(self) -> list[str]:
        """Have every node rewrite its append-only file; see ``DestructionStore.rewrite_files``."""
        owed, _ = await self._owed()
        topology = self._router.topology
        await topology.ready(anew=True)
        nodes = topology.primaries()
        for primary in list(nodes):
            (reply,) = await primary.read([("INFO", "replication")])
            nodes += [topology.at(endpoint) for endpoint in _replicas(reply)]
        found = await asyncio.gather(*map(_rewrite, nodes))
        reasons = [f"{node.endpoint}: {reason}" for node, reason in zip(nodes, found, strict=True) if reason]
        if not reasons:
            await self._router.write_one(Call(CONTROL, ("HSET", DESTRUCTION_KEY, "settled", owed)))
        return reasons

    async def _owed(self) -> tuple[int, int]:
        owed, settled = await self._router.read_one(
            Call(CONTROL, ("HMGET", DESTRUCTION_KEY, "owed", "settled"))
        )
        return int(owed or 0), int(settled or 0)


def _replicas(reply: Reply | Failure) -> list[Endpoint]:
    """Return the replicas that a primary names in INFO; none where that is refused."""
    found = []
    for name, value in parse_info(reply).items():
        if name.startswith("slave") and name[5:].isdigit():
            facts = dict(part.split("=", 1) for part in value.split(",") if "=" in part)
            if facts.get("ip") and facts.get("port", "").isdigit():
                found.append(Endpoint(facts["ip"], int(facts["port"])))
    return found


async def _rewrite(node: Node) -> str:
    """Rewrite a node's append-only file; return why not, or an empty string."""
    deadline = time.monotonic() + _REWRITE_SECONDS
    # One that is under way began before the keys were destroyed: it would keep them.
    facts = await _settled(node, deadline)
    if isinstance(facts, str):
        return facts
    if facts.get("aof_enabled") == "0":
        return ""
    (reply,) = await node.read([("BGREWRITEAOF",)])
    if isinstance(reply, Failure):
        return (
            "BGREWRITEAOF is forbidden here: rewrite the file by the provider's own means"
            if reply.refused
            else reply.error.detail
        )
    facts = await _settled(node, deadline)
    if isinstance(facts, str):
        return facts
    if facts.get("aof_last_bgrewrite_status", "ok") != "ok":
        return "the rewrite of the append-only file failed: see the server's log"
    return ""


async def _settled(node: Node, deadline: float) -> dict[str, str] | str:
    """Wait until no rewrite is under way; return what INFO says then, or why it can't be said."""
    pause = _FIRST_POLL
    while True:
        (reply,) = await node.read([("INFO", "persistence")])
        if isinstance(reply, Failure):
            return "INFO is forbidden here" if reply.refused else reply.error.detail
        facts = parse_info(reply)
        busy = {facts.get("aof_rewrite_in_progress"), facts.get("aof_rewrite_scheduled")} & {"1"}
        if not busy:
            return facts
        if time.monotonic() > deadline:
            return "a rewrite of the append-only file is still running"
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_POLL)

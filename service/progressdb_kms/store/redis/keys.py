"""DEK records in Redis: the port ``KeyStore``."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence

from progressdb_kms.domain.errors import (
    InternalError,
    KeyDestroyed,
    KeyNotFound,
    KmsError,
    StaleKek,
    StoreUnavailable,
)
from progressdb_kms.domain.keys import (
    ALL_TAGS,
    TRANSITIONS,
    DekRecord,
    KeyState,
    NewDek,
    StateChange,
    is_older,
    locate,
    slot_tag,
)
from progressdb_kms.ports import Changes, KeyPage
from progressdb_kms.store.redis import scripts
from progressdb_kms.store.redis.failures import Failure
from progressdb_kms.store.redis.link import Reply
from progressdb_kms.store.redis.listing import list_all, list_thread
from progressdb_kms.store.redis.notices import NOTICE_MAX_AGE_MS, Notices
from progressdb_kms.store.redis.older import create_older, supersede_older
from progressdb_kms.store.redis.router import Call, Router, checked, script_call
from progressdb_kms.store.redis.schema import (
    CONTROL,
    FIELDS,
    KEKS_KEY,
    WRAPS_KEY,
    census_key,
    control_key,
    decode_fields,
    decode_record,
    due_key,
    record_key,
    thread_key,
)
from progressdb_kms.store.redis.thread_rotation import ThreadRotation
from progressdb_kms.store.settings import StoreSettings
from progressdb_kms.store.states import invalid_transition, settled_states


class RedisKeys:
    """Implements ``KeyStore``."""

    def __init__(self, router: Router, settings: StoreSettings) -> None:
        self._router = router
        self._settings = settings
        self._notices = Notices(router, settings)
        self._rotation = ThreadRotation(router, settings, self._notices)

    async def create(self, deks: Sequence[NewDek]) -> list[DekRecord | KmsError]:
        """Store new DEKs; see ``KeyStore.create``. No error is raised: each item has its own."""
        older = [dek for dek in deks if is_older(dek.key_id)]
        ours = [dek for dek in deks if not is_older(dek.key_id)] if older else deks
        replies = await self._router.write([_create_call(dek) for dek in ours])
        if older:
            moved = await create_older(self._router, older)
            sources = iter(replies), iter(moved)
            replies = [next(sources[is_older(dek.key_id)]) for dek in deks]
        return [_created(dek, reply) for dek, reply in zip(deks, replies, strict=True)]

    async def rotate(self, dek: NewDek) -> DekRecord:
        """Store a thread's new DEK and supersede its others; see ``KeyStore.rotate``."""
        result = _created(dek, await self._rotation.rotate(dek))
        if isinstance(result, KmsError):
            raise result
        await supersede_older(self._router, self._settings, self._notices, result)
        return result

    async def get(self, key_ids: Sequence[str]) -> list[DekRecord | None]:
        """Return the records, in order; None where there is none."""
        tags = [_tag(key_id) for key_id in key_ids]
        calls = [
            Call(tag, ("HMGET", record_key(tag, key_id), *FIELDS))
            for tag, key_id in zip(tags, key_ids, strict=True)
            if tag
        ]
        replies = iter(await self._router.read(calls))
        return [
            decode_record(key_id, checked(next(replies))) if tag else None
            for tag, key_id in zip(tags, key_ids, strict=True)
        ]

    async def change_state(
        self, key_id: str, change: StateChange, *, now: int, destroy_at: int | None = None
    ) -> DekRecord:
        """Change a key's state; see ``KeyStore.change_state``.

        The notice's age is measured on the clock of the node that holds the record, from before the notice:
        so it does not matter that a Cluster's nodes have clocks of their own.
        """
        tag = locate(key_id)
        transition = TRANSITIONS[change]
        try:
            async with asyncio.timeout(2 * self._settings.command_timeout):
                while True:
                    seconds, microseconds = await self._router.read_one(Call(tag, ("TIME",)))
                    await self._notices.put(key_id)
                    reply = await self._router.write_one(
                        script_call(
                            tag,
                            scripts.CHANGE_STATE,
                            (record_key(tag, key_id), due_key(tag), control_key(tag)),
                            key_id,
                            int(seconds) * 1000 + int(microseconds) // 1000,
                            NOTICE_MAX_AGE_MS,
                            "resume" if change is StateChange.ENABLE else transition.to,
                            ",".join(sorted(transition.sources)),
                            ",".join(sorted(settled_states(change))),
                            now,
                            "" if destroy_at is None else destroy_at,
                            *FIELDS,
                        )
                    )
                    if reply[0] != b"late":
                        return _changed(key_id, change, reply)
        except TimeoutError:
            raise StoreUnavailable("the store did not change the key's state in time") from None

    async def rewrap(self, record: DekRecord, wrapped: bytes, kek_id: str, kek_version: int) -> bool:
        """Replace the blob if it still is ``record.wrapped``; see ``KeyStore.rewrap``."""
        tag = locate(record.key_id)
        keys = (
            record_key(tag, record.key_id),
            census_key(tag, record.kek_version),
            census_key(tag, kek_version),
            control_key(tag),
        )
        reply = await self._router.write_one(
            script_call(
                tag, scripts.REWRAP, keys, record.key_id, record.wrapped, wrapped, kek_id, kek_version
            )
        )
        match reply[0]:
            case b"ok":
                return True
            case b"other":
                return False
            case b"stale":
                raise StaleKek
            case b"destroyed":
                raise KeyDestroyed
            case _:
                raise KeyNotFound

    async def reserve_uses(self, uses: Mapping[str, int]) -> dict[str, int]:
        """Add to the encryption counts of keys, and return the new totals of those that exist.

        A retry inside may count a block twice: too many is safe, too few is not.
        """
        known = [(tag, key_id) for key_id in uses if (tag := _tag(key_id))]
        calls = [
            script_call(tag, scripts.RESERVE_USES, (record_key(tag, key_id),), uses[key_id])
            for tag, key_id in known
        ]
        replies = [checked(reply) for reply in await self._router.write(calls)]
        return {key_id: total for (_, key_id), total in zip(known, replies, strict=True) if total is not None}

    async def list_keys(
        self, *, thread_id: str | None, state: KeyState | None, limit: int, cursor: str | None
    ) -> KeyPage:
        """Return a page of records; see ``KeyStore.list_keys``."""
        if thread_id is None:
            return await list_all(self._router, state, limit, cursor)
        return await list_thread(self._router, thread_id, state, limit, cursor)

    async def census(self) -> dict[int, int]:
        """Return the number of live wrapped DEKs by KEK version."""
        named = [
            checked(reply)
            for reply in await self._router.read(
                [
                    Call(CONTROL, ("HKEYS", KEKS_KEY)),
                    Call(CONTROL, ("HKEYS", WRAPS_KEY)),
                ]
            )
        ]
        versions = sorted({int(name) for names in named for name in names if name.isdigit()})
        counts: Counter[int] = Counter()
        for version in versions:
            replies = await self._router.read_in_parts(
                [Call(tag, ("SCARD", census_key(tag, version))) for tag in ALL_TAGS]
            )
            counts[version] = sum(checked(reply) for reply in replies)
        return {version: count for version, count in counts.items() if count}

    async def changes(self, cursor: str | None, wait: float) -> Changes:
        """Read the notices after ``cursor``; see ``KeyStore.changes``."""
        return await self._notices.read(cursor, wait)


def _tag(key_id: str) -> str:
    try:
        return locate(key_id)
    except KeyNotFound:
        return ""


def _create_call(dek: NewDek) -> Call:
    tag = slot_tag(dek.thread_id)
    if locate(dek.key_id) != tag:
        raise ValueError("a key id lives in the slot of its thread")
    keys = (
        record_key(tag, dek.key_id),
        thread_key(tag, dek.thread_id),
        census_key(tag, dek.kek_version),
        control_key(tag),
    )
    return script_call(
        tag,
        scripts.CREATE,
        keys,
        dek.key_id,
        dek.thread_id,
        dek.wrapped,
        dek.kek_id,
        dek.kek_version,
        dek.created_at,
        dek.created_by,
    )


def _created(dek: NewDek, reply: Reply | Failure) -> DekRecord | KmsError:
    if isinstance(reply, Failure):
        return reply.error
    match reply[0]:
        case b"created":
            return DekRecord(
                key_id=dek.key_id,
                thread_id=dek.thread_id,
                wrapped=dek.wrapped,
                kek_id=dek.kek_id,
                kek_version=dek.kek_version,
                version=reply[1],
                state=KeyState.ENABLED,
                created_at=dek.created_at,
                created_by=dek.created_by,
            )
        case b"found":
            try:
                record = decode_fields(dek.key_id, reply[1])
            except StoreUnavailable as error:
                return error
            return record or StoreUnavailable("the store lost a record while it read it")
        case b"stale":
            return StaleKek()
        case _:
            return InternalError("this key id belongs to another thread")


def _changed(key_id: str, change: StateChange, reply: Reply) -> DekRecord:
    if reply[0] == b"refused":
        state = KeyState(reply[1].decode())
        raise KeyDestroyed if state is KeyState.DESTROYED else invalid_transition(state, change)
    record = decode_record(key_id, reply[1]) if reply[0] == b"ok" else None
    if record is None:
        raise KeyNotFound
    return record

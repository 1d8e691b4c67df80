"""Keys under ids of the older service, ``k_<number>``: they live in another slot than their thread.

A record, its census and its destruction lie in the slot that the id gives, and change together there, as
those of every key. The thread's index alone lies in the thread's slot, and is written before the record: so
there may be an entry whose record is not there yet, which nobody takes for a key, but never a record that a
listing of its thread leaves out. See ``docs/adr/0020-keys-of-the-older-service.md``.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.domain.keys import is_older, locate, slot_tag
from progressdb_kms.store.redis import scripts
from progressdb_kms.store.redis.failures import Failure
from progressdb_kms.store.redis.notices import NOTICE_MAX_AGE_MS
from progressdb_kms.store.redis.router import Call, checked, script_call
from progressdb_kms.store.redis.schema import census_key, control_key, record_key, thread_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from progressdb_kms.domain.keys import DekRecord, NewDek
    from progressdb_kms.store.redis.link import Reply
    from progressdb_kms.store.redis.notices import Notices
    from progressdb_kms.store.redis.router import Router
    from progressdb_kms.store.settings import StoreSettings

_LOOKED_AT: Final = 2_000
_AT_ONCE: Final = 256


async def create_older(router: Router, deks: Sequence[NewDek]) -> list[Reply | Failure]:
    """Store DEKs under older ids, unless they are taken; return replies of ``create_older.lua``, in order."""
    replies = await index_older(router, [(dek.key_id, dek.thread_id, None) for dek in deks])
    calls = {
        number: _create_call(dek, version)
        for number, (dek, version) in enumerate(zip(deks, replies, strict=True))
        if not isinstance(version, Failure)
    }
    for number, reply in zip(calls, await router.write(list(calls.values())), strict=True):
        replies[number] = reply
    return replies


async def index_older(router: Router, keys: Sequence[tuple[str, str, int | None]]) -> list[Reply | Failure]:
    """Put keys into their threads' indexes, and return the version of each, in order.

    A key whose record is another thread's is left out, and gets version 0: what is written next for it finds
    that out, and a thread's index must not name a key that is not the thread's.

    Args:
        router: The store.
        keys: Of each its id, its thread and its version; None for the thread's next.
    """
    results = await router.read(
        [
            Call(tag := locate(key_id), ("HMGET", record_key(tag, key_id), "thread_id", "version"))
            for key_id, _, _ in keys
        ]
    )
    calls: dict[int, Call] = {}
    for number, ((key_id, thread_id, version), known) in enumerate(zip(keys, results, strict=True)):
        if isinstance(known, Failure):
            continue
        if known[0] not in {None, thread_id.encode()}:
            results[number] = 0
            continue
        tag = slot_tag(thread_id)
        wanted = known[1] or version or ""
        names = (thread_key(tag, thread_id), control_key(tag))
        calls[number] = script_call(tag, scripts.INDEX_OLDER, names, key_id, wanted)
    for number, reply in zip(calls, await router.write(list(calls.values())), strict=True):
        results[number] = reply
    return results


async def supersede_older(
    router: Router, settings: StoreSettings, notices: Notices, record: DekRecord
) -> None:
    """Let the thread's keys under older ids only decrypt, those before ``record``, which is its next DEK.

    After the next DEK is there, so that the thread always has one that encrypts; whoever dies in between has
    not been answered, and asks again. As ``KeyStore.rotate``, which has no way back, doing it again is fine.

    Raises:
        StoreUnavailable, StoreNotDurable: Not now; repeating it goes on.
    """
    tag, first = slot_tag(record.thread_id), 0
    while True:
        index, before = thread_key(tag, record.thread_id), f"({record.version}"
        page = ("ZRANGE", index, "-inf", before, "BYSCORE", "LIMIT", first, _LOOKED_AT)
        key_ids = await router.read_one(Call(tag, page))
        older = [key_id for each in key_ids if is_older(key_id := each.decode())]
        for at in range(0, len(older), _AT_ONCE):
            await _supersede(router, settings, notices, record, older[at : at + _AT_ONCE])
        if len(key_ids) < _LOOKED_AT:
            return
        first += len(key_ids)


async def _supersede(
    router: Router, settings: StoreSettings, notices: Notices, record: DekRecord, key_ids: list[str]
) -> None:
    """Supersede some keys. A notice's age is measured on the clock of the node that holds its record."""
    try:
        async with asyncio.timeout(2 * settings.command_timeout):
            while key_ids:
                tags = [locate(key_id) for key_id in key_ids]
                asked = await router.read([Call(tag, ("TIME",)) for tag in tags])
                times = [checked(reply) for reply in asked]
                await notices.put(*key_ids)
                calls = [
                    script_call(
                        tag,
                        scripts.SUPERSEDE_OLDER,
                        (record_key(tag, key_id), control_key(tag)),
                        record.thread_id,
                        int(seconds) * 1000 + int(microseconds) // 1000,
                        NOTICE_MAX_AGE_MS,
                        record.created_at,
                    )
                    for tag, key_id, (seconds, microseconds) in zip(tags, key_ids, times, strict=True)
                ]
                replies = [checked(reply) for reply in await router.write(calls)]
                key_ids = [key_id for key_id, reply in zip(key_ids, replies, strict=True) if reply == b"late"]
    except TimeoutError:
        raise StoreUnavailable("the store did not rotate the thread's key in time") from None


def _create_call(dek: NewDek, version: int) -> Call:
    tag = locate(dek.key_id)
    return script_call(
        tag,
        scripts.CREATE_OLDER,
        (record_key(tag, dek.key_id), census_key(tag, dek.kek_version), control_key(tag)),
        dek.key_id,
        dek.thread_id,
        dek.wrapped,
        dek.kek_id,
        dek.kek_version,
        dek.created_at,
        dek.created_by,
        version,
    )

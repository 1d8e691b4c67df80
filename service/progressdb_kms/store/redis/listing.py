"""Listings of keys, page by page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from progressdb_kms.domain.errors import InvalidParameter, KeyNotFound
from progressdb_kms.domain.keys import DekRecord, KeyState, locate, slot_tag
from progressdb_kms.ports import KeyPage
from progressdb_kms.store.cursors import decode_cursor, encode_cursor
from progressdb_kms.store.redis.link import Command
from progressdb_kms.store.redis.node import Node, parse_info
from progressdb_kms.store.redis.router import Call, Router, checked
from progressdb_kms.store.redis.schema import (
    FIELDS,
    RECORD_PATTERN,
    decode_record,
    key_id_of,
    record_key,
    thread_key,
)

_STEPS: Final = 20
"""Most steps for one page: a filter that matches little must not make one request walk the whole store."""


async def list_thread(
    router: Router, thread_id: str, state: KeyState | None, limit: int, cursor: str | None
) -> KeyPage:
    """Return a page of a thread's keys by version.

    Raises:
        InvalidParameter: The cursor is not one of this listing's.
        StoreUnavailable: The store does not answer.
    """
    tag = slot_tag(thread_id)
    after = int(decode_cursor(cursor, thread_id, state, (int,))[0]) if cursor else 0
    records: list[DekRecord] = []
    for _ in range(_STEPS):
        wanted = limit - len(records)
        key_ids = await router.read_one(
            Call(
                tag,
                ("ZRANGE", thread_key(tag, thread_id), f"({after}", "+inf", "BYSCORE", "LIMIT", 0, wanted),
            )
        )
        found = await _records(router, [key_id.decode() for key_id in key_ids])
        # An older key's entry is written ahead of its record, which can then turn out to be another thread's.
        found = [record for record in found if record.thread_id == thread_id]
        records += [record for record in found if state in (None, record.state)]
        if len(key_ids) < wanted:
            return KeyPage(tuple(records), None)
        after = max((record.version for record in found), default=after + len(key_ids))
        if len(records) >= limit:
            break
    return KeyPage(tuple(records), encode_cursor(thread_id, state, [after]))


async def list_all(router: Router, state: KeyState | None, limit: int, cursor: str | None) -> KeyPage:
    """Return a page of all keys, in no order, node by node.

    A place in the listing is a SCAN cursor of one server process and the last key taken of that step; SCAN
    never leaves out a key that was there all the time, and neither does taking its steps in parts.

    Raises:
        InvalidParameter: The cursor is not one of this listing's, or its server was restarted or replaced.
        StoreUnavailable: The store does not answer.
    """
    await router.topology.ready()
    nodes = router.topology.primaries()
    number, scan, after, run_id = (0, 0, "", "")
    if cursor:
        number, scan, after, run_id = decode_cursor(cursor, None, state, (int, int, str, str))  # type: ignore[assignment]
    records: list[DekRecord] = []
    for _ in range(_STEPS):
        if number >= len(nodes):
            return KeyPage(tuple(records), None)
        process, following, key_ids = await scan_step(nodes[number], scan, limit)
        if run_id and run_id != process:
            # A SCAN cursor means something only to the process that gave it.
            raise InvalidParameter(
                "the store was restarted or replaced since this cursor was made; start the listing again"
            )
        run_id = process
        found = await _records(router, [key_id for key_id in key_ids if key_id > after])
        found = [record for record in found if state in (None, record.state)]
        wanted = limit - len(records)
        records += found[:wanted]
        if len(found) > wanted:
            after = records[-1].key_id
            break
        scan, after = following, ""
        if scan == 0:
            number, run_id = number + 1, ""
        if len(records) >= limit:
            break
    if number >= len(nodes):
        return KeyPage(tuple(records), None)
    return KeyPage(tuple(records), encode_cursor(None, state, [number, scan, after, run_id]))


async def any_record(router: Router) -> bool:
    """Say whether the store holds any DEK record.

    Raises:
        StoreUnavailable: The store does not answer.
    """
    await router.topology.ready()
    for node in router.topology.primaries():
        scan = 0
        while True:
            _, scan, key_ids = await scan_step(node, scan, 1000)
            if key_ids:
                return True
            if scan == 0:
                break
    return False


async def scan_step(node: Node, scan: int, count: int) -> tuple[str, int, list[str]]:
    """Make one step; return the name of the process that made it, the next step, and the key_ids found."""
    commands: tuple[Command, ...] = (
        ("INFO", "server"),
        ("SCAN", scan, "MATCH", RECORD_PATTERN, "COUNT", count),
    )
    info, step = await node.read(commands)
    following, keys = checked(step)
    return parse_info(info).get("run_id", "")[:12], int(following), sorted({key_id_of(key) for key in keys})


async def _records(router: Router, key_ids: Sequence[str]) -> list[DekRecord]:
    calls = []
    for key_id in key_ids:
        try:
            tag = locate(key_id)
        except KeyNotFound:
            continue
        calls.append(Call(tag, ("HMGET", record_key(tag, key_id), *FIELDS)))
    records = []
    for call, reply in zip(calls, await router.read(calls), strict=True):
        key_id = str(call.args[1]).rpartition(":")[2]
        if (record := decode_record(key_id, checked(reply))) is not None:
            records.append(record)
    return records

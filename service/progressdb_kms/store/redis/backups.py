"""All that a service needs, read from Redis and put back: the port ``BackupStore``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from progressdb_kms.domain.backup import ExportNote
from progressdb_kms.domain.errors import Fenced, KeyNotFound, StoreUnavailable
from progressdb_kms.domain.keyring import KekState
from progressdb_kms.domain.keys import ALL_TAGS, DekRecord, KeyState, is_older, locate
from progressdb_kms.ports import Damaged, Extras, Imported, Manifest, RegistryView
from progressdb_kms.ports.rotation import Lock
from progressdb_kms.store.redis import scripts
from progressdb_kms.store.redis.link import Argument, Reply
from progressdb_kms.store.redis.listing import any_record, scan_step
from progressdb_kms.store.redis.older import index_older
from progressdb_kms.store.redis.router import Call, Router, checked, script_call
from progressdb_kms.store.redis.schema import (
    CONTROL,
    ESCROW_KEY,
    EXPORTS_KEY,
    FIELDS,
    IMPORT_KEY,
    KEKS_KEY,
    LOCK_KEY,
    SCHEMA_KEY,
    SCHEMA_VERSION,
    WRAPS_KEY,
    bucket_prefix,
    census_key,
    control_key,
    decode_manifest,
    decode_note,
    decode_record,
    due_key,
    encode_kek,
    encode_note,
    manifest_field,
    quarantine_key,
    record_key,
    rotation_of,
    thread_key,
)

_STEP: Final = 1000
"""Keys that one step of a scan looks at."""
_BUCKETS_AT_ONCE: Final = 64
_DEFAULTS: Final[dict[str, object]] = {
    "changed_at": 0,
    "destroy_at": None,
    "resume_state": KeyState.ENABLED,
    "uses": 0,
    "wrapped": b"",
}
"""Values of fields that a record does not store."""


class RedisBackups:
    """Implements ``BackupStore``."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def records(self) -> AsyncIterator[list[DekRecord | Damaged]]:
        """Yield every record of every primary; see ``BackupStore.records``."""
        await self._router.topology.ready()
        for node in self._router.topology.primaries():
            scan = 0
            before = ""
            while True:
                process, scan, key_ids = await scan_step(node, scan, _STEP)
                if before and process != before:
                    # A SCAN cursor means something only to the process that gave it.
                    raise StoreUnavailable(
                        "a server of the store was restarted or replaced while it was read; start again"
                    )
                before = process
                found = [record for record in await self.read(key_ids) if record is not None]
                if found:
                    yield found
                if scan == 0:
                    break

    async def read(self, key_ids: Sequence[str]) -> list[DekRecord | Damaged | None]:
        """Return records, in order; None where there is none."""
        places = [(_tag(key_id), key_id) for key_id in key_ids]
        calls = [Call(tag, ("HMGET", record_key(tag, key_id), *FIELDS)) for tag, key_id in places if tag]
        replies = iter(await self._router.read(calls))
        return [_decoded(key_id, checked(next(replies))) if tag else None for tag, key_id in places]

    async def empty(self) -> bool:
        """Say whether the store holds neither registry nor records."""
        if await self._router.read_one(Call(CONTROL, ("EXISTS", SCHEMA_KEY, KEKS_KEY))):
            return False
        return not await any_record(self._router)

    async def extras(self) -> Extras:
        """Return what belongs to the registry besides its KEKs."""
        wraps, escrow = [
            checked(reply)
            for reply in await self._router.read(
                [Call(CONTROL, ("HGETALL", WRAPS_KEY)), Call(CONTROL, ("HGETALL", ESCROW_KEY))]
            )
        ]
        return Extras(
            {int(version): int(count) for version, count in _pairs(wraps)},
            {version.decode(): entry for version, entry in _pairs(escrow)},
        )

    async def begin_import(self, sha256: str) -> bool:
        """Mark the store as being filled from a file; see ``BackupStore.begin_import``."""
        records = await any_record(self._router)
        call = script_call(
            CONTROL, scripts.IMPORT_BEGIN, (IMPORT_KEY, SCHEMA_KEY, KEKS_KEY), sha256, int(records)
        )
        return bool(await self._router.write_one(call))

    async def import_records(self, records: Sequence[DekRecord]) -> list[Imported]:
        """Add records with their indexes where they are missing; never replace one."""
        older = [(each.key_id, each.thread_id, each.version) for each in records if is_older(each.key_id)]
        if older:
            for reply in await index_older(self._router, older):
                checked(reply)
        replies = await self._router.write([_import_call(record) for record in records])
        return [Imported(checked(reply).decode()) for reply in replies]

    async def raise_floors(self, version: int) -> None:
        """Raise the least KEK version that may be written in every slot."""
        calls = [script_call(tag, scripts.RAISE_FLOOR, (control_key(tag),), version) for tag in ALL_TAGS]
        for reply in await self._router.write(calls):
            checked(reply)

    async def finish_import(self, view: RegistryView, extras: Extras, lock: Lock) -> None:
        """Write the registry and take away the mark of the import; see ``BackupStore.finish_import``."""
        known = await self._router.read_one(Call(CONTROL, ("EXISTS", SCHEMA_KEY)))
        keks: list[Argument] = []
        for kek in view.keks.values():
            active = kek.state is KekState.ACTIVE
            state = KekState.DECRYPT_ONLY if known and active else kek.state
            keks += [kek.version, encode_kek(replace(kek, state=state))]
        wraps: list[Argument] = [part for pair in extras.wraps.items() for part in pair]
        escrow: list[Argument] = [part for pair in extras.escrow.items() for part in pair]
        finished = await self._router.write_one(
            script_call(
                CONTROL,
                scripts.IMPORT_FINISH,
                (IMPORT_KEY, SCHEMA_KEY, KEKS_KEY, WRAPS_KEY, ESCROW_KEY, LOCK_KEY),
                SCHEMA_VERSION,
                view.store_id,
                min(kek.created_at for kek in view.keks.values()),
                view.active,
                str(lock.token),
                len(keks) // 2,
                *keks,
                len(wraps) // 2,
                *wraps,
                len(escrow) // 2,
                *escrow,
            )
        )
        if finished == b"fenced":
            raise Fenced("another command has taken the lock of rotations: run the import again")

    async def floors(self) -> Mapping[str, int]:
        """Return the least KEK version that may be written by slot tag, 0 where none was set."""
        calls = [Call(tag, ("HGET", control_key(tag), "floor")) for tag in ALL_TAGS]
        replies = await self._router.read(calls)
        return {tag: int(checked(reply) or 0) for tag, reply in zip(ALL_TAGS, replies, strict=True)}

    async def snapshots(self) -> Mapping[str, Mapping[str, Manifest]]:
        """Return the manifests of all snapshots in the store: by rotation id, then by slot tag."""
        replies = await self._router.read([Call(tag, ("HGETALL", control_key(tag))) for tag in ALL_TAGS])
        found: dict[str, dict[str, Manifest]] = {}
        for tag, reply in zip(ALL_TAGS, replies, strict=True):
            for field, value in _pairs(checked(reply)):
                if rotation_id := rotation_of(field):
                    found.setdefault(rotation_id, {})[tag] = decode_manifest(tag, value)
        return found

    async def manifests(self, tag: str) -> Mapping[str, Manifest]:
        """Return the manifests of one slot's snapshots, by rotation id."""
        reply = await self._router.read_one(Call(tag, ("HGETALL", control_key(tag))))
        return {
            rotation_id: decode_manifest(tag, value)
            for field, value in _pairs(reply)
            if (rotation_id := rotation_of(field))
        }

    async def purge(self, tag: str, rotation_id: str) -> None:
        """Remove a slot's part of a snapshot and of its quarantine, in bounded steps."""
        bucket = 0
        while True:
            bucket = await self._router.write_one(
                script_call(
                    tag,
                    scripts.PURGE,
                    (control_key(tag), quarantine_key(tag, rotation_id)),
                    manifest_field(rotation_id),
                    bucket_prefix(tag, rotation_id),
                    bucket,
                    _BUCKETS_AT_ONCE,
                )
            )
            if bucket == 0:
                return

    async def release(self, tag: str, rotation_id: str, key_ids: Sequence[str]) -> None:
        """Take records out of a rotation's quarantine: they have been restored."""
        await self._router.write_one(Call(tag, ("HDEL", quarantine_key(tag, rotation_id), *key_ids)))

    async def note_export(self, note: ExportNote) -> None:
        """Remember an export, by its id."""
        await self._router.write_one(Call(CONTROL, ("HSET", EXPORTS_KEY, note.export_id, encode_note(note))))

    async def exports(self) -> list[ExportNote]:
        """Return what is remembered of exports, oldest first."""
        entries = await self._router.read_one(Call(CONTROL, ("HVALS", EXPORTS_KEY)))
        return sorted(map(decode_note, entries), key=lambda note: (note.began_at, note.export_id))


def _import_call(record: DekRecord) -> Call:
    tag = locate(record.key_id)
    pairs: list[Argument] = []
    for name in FIELDS:
        value = getattr(record, name)
        if name not in _DEFAULTS or value != _DEFAULTS[name]:
            pairs += [name, value if isinstance(value, bytes | int) else str(value)]
    return script_call(
        tag,
        scripts.IMPORT_RECORD,
        (
            record_key(tag, record.key_id),
            thread_key(tag, record.thread_id),
            census_key(tag, record.kek_version),
            control_key(tag),
            due_key(tag),
        ),
        record.key_id,
        record.thread_id,
        "" if is_older(record.key_id) else record.version,
        str(record.state),
        "" if record.destroy_at is None else record.destroy_at,
        *pairs,
    )


def _decoded(key_id: str, reply: Reply) -> DekRecord | Damaged | None:
    if all(value is None for value in reply):
        return None
    try:
        return decode_record(key_id, reply) or Damaged(key_id, "it has no thread_id")
    except StoreUnavailable as error:
        return Damaged(key_id, error.detail)


def _tag(key_id: str) -> str:
    try:
        return locate(key_id)
    except KeyNotFound:
        return ""


def _pairs(reply: Reply) -> list[tuple[bytes, bytes]]:
    return list(zip(reply[::2], reply[1::2], strict=True))

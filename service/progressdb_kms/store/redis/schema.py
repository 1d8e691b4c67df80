"""Names of keys and forms of values in the store.

::

    kms:{tag}:dek:<key_id>          hash    one DEK record; fields at their default are left out
    kms:{tag}:thread:<thread_id>    zset    key_ids by version
    kms:{tag}:kek:<kek_version>     set     key_ids wrapped under it: the census
    kms:{tag}:ctl                   hash    floor: least KEK version that may be written;
                                            fence: highest token seen;
                                            b:<rotation_id>: manifest of a snapshot: buckets, count, digest
    kms:{tag}:backup:<rotation_id>:<bucket>  hash  snapshot: blobs by key_id
    kms:{tag}:quarantine:<rotation_id>       hash  records that could not be dealt with, by key_id, as JSON
    kms:{tag}:due                   zset    keys waiting for destruction, by time
    kms:{tag}:destroyed             hash    what was written down of destroyed keys, by key_id, as JSON
    kms:{ctl}:schema                hash    version, store_id, created_at
    kms:{ctl}:keks                  hash    active, rev, and by version what is known of a KEK, as JSON
    kms:{ctl}:wraps                 hash    wraps reserved, by KEK version
    kms:{ctl}:instances             hash    last heartbeat of each instance, as JSON
    kms:{ctl}:changes               stream  notices of state changes
    kms:{ctl}:rotations             zset    rotation_ids by start
    kms:{ctl}:rotation              string  rotation_id of the unfinished one
    kms:{ctl}:rotation:<id>         hash    record: the rotation as JSON; n:<name>: counts; opened:<step>: 1
    kms:{ctl}:lock                  hash    owner, token, since and until in ms by the server's clock
    kms:{ctl}:fence                 string  the last token given
    kms:{ctl}:work:<id>:<step>      zset    slots not done, by the end of their lease in ms; 0 is unclaimed
    kms:{ctl}:claims:<id>:<step>    hash    token and worker, by slot
    kms:{ctl}:escrow                hash    KEKs sealed to recovery keys, by version
    kms:{ctl}:exports               hash    what is remembered of exports, by id, as JSON
    kms:{ctl}:import                string  SHA-256 of the file that the store is being filled from
    kms:{ctl}:destruction           hash    owner and until of the right to destroy; rewrite_owed
    kms:{ctl}:audit                 stream  audit records, one line of JSON each in the field ``r``
    kms:{ctl}:audit:heads           hash    how far each audit chain has come: a signed document by chain
    kms:{ctl}:audit:floors          hash    up to where each has been trimmed, likewise
    kms:{ctl}:audit:roster          string  all chains: a signed document

``{tag}`` is a hash tag of Redis Cluster: keys that share it share a slot, and one script may change them.
A key under an id of the older service lies in a slot of its own and in its thread's index (``redis.older``).
The record's blob is kept raw: a hash stays compact only while each value is at most 64 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, Final

from progressdb_kms.domain.backup import Destruction, ExportKind, ExportNote, HeldBy
from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.domain.keyring import KekInfo, KekState
from progressdb_kms.domain.keys import DekRecord, KeyState
from progressdb_kms.domain.rotation import Rotation, Step
from progressdb_kms.ports import Heartbeat, Manifest, Quarantined

SCHEMA_VERSION: Final = 1
_MOST: Final = 2**53
"""The largest whole number that each reader of JSON takes for the same (RFC 8259 section 6)."""
CONTROL: Final = "ctl"
SCHEMA_KEY: Final = "kms:{ctl}:schema"
KEKS_KEY: Final = "kms:{ctl}:keks"
WRAPS_KEY: Final = "kms:{ctl}:wraps"
INSTANCES_KEY: Final = "kms:{ctl}:instances"
CHANGES_KEY: Final = "kms:{ctl}:changes"
ROTATIONS_KEY: Final = "kms:{ctl}:rotations"
CURRENT_KEY: Final = "kms:{ctl}:rotation"
LOCK_KEY: Final = "kms:{ctl}:lock"
FENCE_KEY: Final = "kms:{ctl}:fence"
ESCROW_KEY: Final = "kms:{ctl}:escrow"
EXPORTS_KEY: Final = "kms:{ctl}:exports"
IMPORT_KEY: Final = "kms:{ctl}:import"
DESTRUCTION_KEY: Final = "kms:{ctl}:destruction"
AUDIT_KEY: Final = "kms:{ctl}:audit"
AUDIT_HEADS_KEY: Final = "kms:{ctl}:audit:heads"
AUDIT_FLOORS_KEY: Final = "kms:{ctl}:audit:floors"
AUDIT_ROSTER_KEY: Final = "kms:{ctl}:audit:roster"
RECORD_PATTERN: Final = "kms:{*}:dek:*"

FIELDS: Final = (
    "thread_id",
    "wrapped",
    "kek_id",
    "kek_version",
    "version",
    "state",
    "created_at",
    "created_by",
    "changed_at",
    "destroy_at",
    "resume_state",
    "uses",
)
"""A record's fields, in the order in which scripts and HMGET return their values."""


def record_key(tag: str, key_id: str) -> str:
    """Return the key of a DEK record."""
    return f"kms:{{{tag}}}:dek:{key_id}"


def thread_key(tag: str, thread_id: str) -> str:
    """Return the key of a thread's index."""
    return f"kms:{{{tag}}}:thread:{thread_id}"


def census_key(tag: str, kek_version: int) -> str:
    """Return the key of the set of a slot's key_ids under a KEK version."""
    return f"{census_prefix(tag)}{kek_version}"


def census_prefix(tag: str) -> str:
    """Return what the keys of a slot's censuses begin with; the KEK version follows."""
    return f"kms:{{{tag}}}:kek:"


def control_key(tag: str) -> str:
    """Return the key of a slot's control hash."""
    return f"kms:{{{tag}}}:ctl"


def due_key(tag: str) -> str:
    """Return the key of a slot's pending destructions."""
    return f"kms:{{{tag}}}:due"


def rotation_key(rotation_id: str) -> str:
    """Return the key of a rotation."""
    return f"{CURRENT_KEY}:{rotation_id}"


def work_key(rotation_id: str, step: Step) -> str:
    """Return the key of a step's slots that are not done."""
    return f"kms:{{ctl}}:work:{rotation_id}:{step}"


def claims_key(rotation_id: str, step: Step) -> str:
    """Return the key of a step's claims."""
    return f"kms:{{ctl}}:claims:{rotation_id}:{step}"


def manifest_field(rotation_id: str) -> str:
    """Return the field of a slot's control hash that holds the manifest of a snapshot."""
    return f"b:{rotation_id}"


def rotation_of(field: bytes) -> str:
    """Return the rotation whose manifest a field of a slot's control hash holds, empty for other fields."""
    return field[2:].decode(errors="replace") if field.startswith(b"b:") else ""


def bucket_prefix(tag: str, rotation_id: str) -> str:
    """Return what the keys of a snapshot's buckets begin with; the bucket's number follows."""
    return f"kms:{{{tag}}}:backup:{rotation_id}:"


def quarantine_key(tag: str, rotation_id: str) -> str:
    """Return the key of what a rotation could not deal with in a slot."""
    return f"kms:{{{tag}}}:quarantine:{rotation_id}"


def destroyed_key(tag: str) -> str:
    """Return the key of what was written down of a slot's destroyed keys."""
    return f"kms:{{{tag}}}:destroyed"


def key_id_of(key: bytes) -> str:
    """Return the key_id in the key of a DEK record."""
    return key.rpartition(b":")[2].decode(errors="replace")


def decode_fields(key_id: str, pairs: Sequence[bytes]) -> DekRecord | None:
    """Return the record that fields and their values in turns (as of HGETALL) make; as ``decode_record``."""
    found = dict(zip(pairs[::2], pairs[1::2], strict=True))
    return decode_record(key_id, [found.get(name.encode()) for name in FIELDS])


def decode_record(key_id: str, values: Sequence[bytes | None]) -> DekRecord | None:
    """Return the record that the values of ``FIELDS`` make, None where there is none.

    Raises:
        StoreUnavailable: The record is damaged, or of a newer release.
    """
    if values[0] is None:
        return None
    thread_id, wrapped, kek_id, kek_version, version, state, created_at, created_by, *rest = values
    changed_at, destroy_at, resume_state, uses = rest
    try:
        return DekRecord(
            key_id=key_id,
            thread_id=_text(thread_id),
            wrapped=wrapped or b"",
            kek_id=_text(kek_id),
            kek_version=_number(kek_version),
            version=_number(version),
            state=KeyState(_text(state)),
            created_at=_number(created_at),
            created_by=_text(created_by),
            changed_at=int(changed_at or 0),
            destroy_at=int(destroy_at) if destroy_at else None,
            resume_state=KeyState(_text(resume_state)) if resume_state else KeyState.ENABLED,
            uses=int(uses or 0),
        )
    except ValueError:
        raise StoreUnavailable(
            f"the record of {key_id} can't be read: damaged, or of a newer release"
        ) from None


def _text(value: bytes | None) -> str:
    return (value or b"").decode()


def _number(value: bytes | None) -> int:
    return int(value or b"")


def encode_kek(kek: KekInfo, before: bytes = b"{}") -> str:
    """Return the registry's entry of a KEK version.

    Args:
        kek: What is known of it.
        before: The present entry, whose members that a newer release added are kept.
    """
    return json.dumps({**_parsed(before), **asdict(kek)}, separators=(",", ":"))


def decode_kek(entry: bytes) -> KekInfo:
    """Return the KEK in a registry entry; members that a newer release added are left out.

    Raises:
        ValueError, KeyError, TypeError: It is none.
    """
    members = _known(KekInfo, _parsed(entry))
    members["state"] = KekState(members["state"])
    return KekInfo(**members)


def encode_heartbeat(heartbeat: Heartbeat) -> str:
    """Return a heartbeat as it is stored."""
    return json.dumps(asdict(heartbeat), separators=(",", ":"))


def decode_heartbeat(entry: bytes) -> Heartbeat:
    """Return a stored heartbeat; members that a newer release added are left out.

    Raises:
        ValueError, KeyError, TypeError: It is none.
    """
    members = _known(Heartbeat, _parsed(entry))
    members["kek_versions"] = tuple(members["kek_versions"])
    beat = Heartbeat(**members)
    # Whoever can write one heartbeat must not be able to break the reading of all.
    texts = (beat.instance, beat.release, beat.policy_generation)
    numbers = (beat.at, beat.started_at, beat.active, beat.revision, *beat.kek_versions)
    if not (all(isinstance(text, str) for text in texts) and all(map(_is_number, numbers))):
        raise TypeError("a member of the heartbeat is not of its type")
    return beat


def _is_number(value: object) -> bool:
    # Not NaN either, which compares with nothing; and a whole number can be too large for a float.
    return type(value) in {int, float} and abs(value) <= _MOST  # type: ignore[arg-type]  # it is one by then


def encode_rotation(rotation: Rotation) -> str:
    """Return a rotation as it is stored; its counts are stored beside it."""
    members = asdict(rotation)
    del members["counts"]
    return json.dumps(members, separators=(",", ":"))


def decode_rotation(entry: bytes, counts: dict[str, int]) -> Rotation:
    """Return a stored rotation; members that a newer release added are left out.

    Raises:
        StoreUnavailable: It is damaged, or of a newer release.
    """
    try:
        members = _known(Rotation, _parsed(entry))
        members["step"] = Step(members["step"])
        return _checked_rotation(Rotation(**{**members, "counts": counts}))
    except (ValueError, KeyError, TypeError):
        raise StoreUnavailable(
            "the record of a rotation can't be read: damaged, or of a newer release"
        ) from None


def _checked_rotation(rotation: Rotation) -> Rotation:
    numbers = [rotation.source_version, rotation.target_version, rotation.started_at, rotation.step_at]
    if rotation.finished_at is not None:
        numbers.append(rotation.finished_at)
    if not all(map(_is_number, numbers)):
        raise TypeError("a member of the rotation is not of its type")
    return rotation


def encode_manifest(manifest: Manifest) -> str:
    """Return a manifest as it is stored."""
    return f"{manifest.buckets} {manifest.count} {manifest.digest}".rstrip()


def decode_manifest(tag: str, entry: bytes) -> Manifest:
    """Return the manifest ``<buckets> <count> <digest>``, of which the last may be missing.

    Raises:
        StoreUnavailable: It is damaged, or of a newer release.
    """
    buckets, _, rest = entry.decode(errors="replace").partition(" ")
    count, _, digest = rest.partition(" ")
    try:
        return Manifest(tag, int(buckets), int(count), digest)
    except ValueError:
        raise StoreUnavailable(
            f"the manifest of a snapshot of slot {tag} can't be read: damaged, or of a newer release"
        ) from None


def encode_quarantined(record: Quarantined) -> str:
    """Return what is stored of a record that could not be dealt with."""
    return json.dumps({"reason": record.reason, "kek_version": record.kek_version}, separators=(",", ":"))


def decode_quarantined(key_id: bytes, entry: bytes) -> Quarantined:
    """Return a record that could not be dealt with.

    Raises:
        StoreUnavailable: The entry is damaged, or of a newer release.
    """
    try:
        members = _parsed(entry)
        return Quarantined(key_id.decode(errors="replace"), members["reason"], members["kek_version"])
    except (ValueError, KeyError, TypeError):
        raise StoreUnavailable(
            "an entry of the quarantine can't be read: damaged, or of a newer release"
        ) from None


def encode_note(note: ExportNote) -> str:
    """Return what is stored of an export."""
    return json.dumps(asdict(note), separators=(",", ":"))


def decode_note(entry: bytes) -> ExportNote:
    """Return what is remembered of an export; members that a newer release added are left out.

    Raises:
        StoreUnavailable: It is damaged, or of a newer release.
    """
    try:
        members = _known(ExportNote, _parsed(entry))
        members["kind"] = ExportKind(members["kind"])
        members["kek_versions"] = tuple(members["kek_versions"])
        return ExportNote(**members)
    except (ValueError, KeyError, TypeError):
        raise StoreUnavailable(
            "the note of an export can't be read: damaged, or of a newer release"
        ) from None


def encode_destruction(destruction: Destruction) -> str:
    """Return what is written down of a destroyed key."""
    return json.dumps(asdict(destruction), separators=(",", ":"))


def decode_destruction(entry: bytes) -> Destruction:
    """Return what was written down of a destroyed key; members that a newer release added are left out.

    Raises:
        StoreUnavailable: It is damaged, or of a newer release.
    """
    try:
        members = _known(Destruction, _parsed(entry))
        members["held_by"] = tuple(HeldBy(**_known(HeldBy, held)) for held in members["held_by"])
        return Destruction(**members)
    except (ValueError, KeyError, TypeError):
        raise StoreUnavailable(
            "the record of a destruction can't be read: damaged, or of a newer release"
        ) from None


def _parsed(entry: bytes) -> Any:  # noqa: ANN401 - whatever JSON can say
    """Return what a JSON entry says.

    Raises:
        ValueError: It is no JSON, or nested too deeply to be ours.
    """
    try:
        return json.loads(entry)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _known(kind: type[Any], members: object) -> dict[str, Any]:
    if not isinstance(members, dict):
        raise TypeError("not an object")
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in members.items() if name in names}

"""Names of keys and forms of values in the store.

::

    kms:{tag}:dek:<key_id>          hash    one DEK record; fields at their default are left out
    kms:{tag}:thread:<thread_id>    zset    key_ids by version
    kms:{tag}:kek:<kek_version>     set     key_ids wrapped under it: the census
    kms:{tag}:ctl                   hash    floor: least KEK version that may be written
    kms:{tag}:due                   zset    keys waiting for destruction, by time
    kms:{ctl}:schema                hash    version, store_id, created_at
    kms:{ctl}:keks                  hash    active, rev, and by version what is known of a KEK, as JSON
    kms:{ctl}:wraps                 hash    wraps reserved, by KEK version
    kms:{ctl}:instances             hash    last heartbeat of each instance, as JSON
    kms:{ctl}:changes               stream  notices of state changes

``{tag}`` is a hash tag of Redis Cluster: keys that share it share a slot, and one script may change them.
The record's blob is kept raw: a hash stays compact only while each value is at most 64 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, Final

from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.domain.keyring import KekInfo, KekState
from progressdb_kms.domain.keys import DekRecord, KeyState
from progressdb_kms.ports import Heartbeat

SCHEMA_VERSION: Final = 1
CONTROL: Final = "ctl"
SCHEMA_KEY: Final = "kms:{ctl}:schema"
KEKS_KEY: Final = "kms:{ctl}:keks"
WRAPS_KEY: Final = "kms:{ctl}:wraps"
INSTANCES_KEY: Final = "kms:{ctl}:instances"
CHANGES_KEY: Final = "kms:{ctl}:changes"
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
    return f"kms:{{{tag}}}:kek:{kek_version}"


def control_key(tag: str) -> str:
    """Return the key of a slot's control hash."""
    return f"kms:{{{tag}}}:ctl"


def due_key(tag: str) -> str:
    """Return the key of a slot's pending destructions."""
    return f"kms:{{{tag}}}:due"


def key_id_of(key: bytes) -> str:
    """Return the key_id in the key of a DEK record."""
    return key.rpartition(b":")[2].decode(errors="replace")


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


def encode_kek(kek: KekInfo) -> str:
    """Return the registry's entry of a KEK version."""
    return json.dumps(asdict(kek), separators=(",", ":"))


def decode_kek(entry: bytes) -> KekInfo:
    """Return the KEK in a registry entry; members that a newer release added are left out.

    Raises:
        ValueError, KeyError, TypeError: It is none.
    """
    members = _known(KekInfo, json.loads(entry))
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
    members = _known(Heartbeat, json.loads(entry))
    members["kek_versions"] = tuple(members["kek_versions"])
    return Heartbeat(**members)


def _known(kind: type[Any], members: object) -> dict[str, Any]:
    if not isinstance(members, dict):
        raise TypeError("not an object")
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in members.items() if name in names}

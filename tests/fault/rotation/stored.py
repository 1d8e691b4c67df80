"""The whole store as it is, and what must hold of it together with what the clients saw.

Reads the store's keys itself, and unwraps with the KEKs itself: what is checked is not asked to vouch.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import redis
import yaml
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.domain.envelope import wrap_aad
from progressdb_kms.domain.keys import ALL_TAGS
from tests.fault.rotation.history import CHANGES, History, Kind, Operation, Outcome, Violation

_PAGE = 1_000
_HEADER = 4
_NONCE = 12
_SNAPSHOTS = "snapshots verify"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One rotation's copies of one slot.

    Attributes:
        manifest: ``buckets count digest`` as it is stored.
        buckets: Blobs by key id, by bucket.
    """

    manifest: str
    buckets: tuple[Mapping[str, bytes], ...] = field(repr=False)


@dataclass(slots=True)
class Stored:
    """What the store holds.

    Attributes:
        records: Fields by key id.
        census: Key ids by slot and KEK version.
        floors: By slot.
        snapshots: By rotation and slot.
        rotations: Their records.
        active: The active KEK version.
        quarantined: Keys of the store that hold quarantined records.
        keks: By version.
    """

    records: dict[str, dict[str, bytes]] = field(repr=False)
    census: dict[tuple[str, int], set[str]]
    floors: dict[str, int]
    snapshots: dict[tuple[str, str], Snapshot]
    rotations: list[dict[str, Any]]
    active: int
    quarantined: list[str]
    keks: dict[int, AESGCM] = field(repr=False)

    def open(self, blob: bytes, key_id: str, thread_id: str) -> AESGCM | None:
        """Return the cipher of the DEK in a blob; None where it does not unwrap."""
        dek = self.unwrap(blob, key_id, thread_id)
        return None if dek is None else AESGCM(dek)

    def unwrap(self, blob: bytes, key_id: str, thread_id: str) -> bytes | None:
        """Return the DEK in a blob; None where it does not unwrap."""
        kek = self.keks.get(int.from_bytes(blob[1:_HEADER], "big"))
        if kek is None:
            return None
        body = blob[_HEADER:]
        try:
            return kek.decrypt(body[:_NONCE], body[_NONCE:], wrap_aad(key_id, thread_id))
        except InvalidTag:
            return None


def read_store(client: redis.Redis, kek_text: str) -> Stored:
    """Read all of it.

    Args:
        client: Connected to the store, replies as bytes.
        kek_text: The KEK file.
    """
    names = sorted(client.scan_iter(count=_PAGE))
    document = yaml.safe_load(kek_text)
    texts = document.get("versions") or {1: document["master_key_hex"]}
    stored = Stored({}, {}, {}, {}, [], 0, [], {int(v): AESGCM(bytes.fromhex(k)) for v, k in texts.items()})
    kinds: dict[str, list[bytes]] = defaultdict(list)
    for name in names:
        kinds[name.decode().split(":")[2]].append(name)
    for name, value in _fetch(client, "HGETALL", kinds["dek"]):
        stored.records[name.rpartition(":")[2]] = _texts(value)
    for name, value in _fetch(client, "SMEMBERS", kinds["kek"]):
        stored.census[_tag(name), int(name.rpartition(":")[2])] = {key_id.decode() for key_id in value}
    buckets: dict[str, Mapping[str, bytes]] = {}
    for name, value in _fetch(client, "HGETALL", kinds["backup"]):
        buckets[name] = _texts(value)
    for name, value in _fetch(client, "HGETALL", [f"kms:{{{tag}}}:ctl".encode() for tag in ALL_TAGS]):
        control, tag = _texts(value), _tag(name)
        stored.floors[tag] = int(control.get("floor", b"0"))
        for entry, manifest in control.items():
            if entry.startswith("b:"):
                rotation_id = entry[2:]
                stored.snapshots[rotation_id, tag] = Snapshot(
                    manifest.decode(),
                    tuple(
                        buckets.pop(f"kms:{{{tag}}}:backup:{rotation_id}:{number}", {})
                        for number in range(int(manifest.split()[0]))
                    ),
                )
    for name, bucket in buckets.items():  # copies that no manifest names
        stored.snapshots[name, _tag(name)] = Snapshot("", (bucket,))
    stored.quarantined = [name.decode() for name in kinds["quarantine"]]
    ask: Callable[..., Any] = client.execute_command
    for rotation_id in ask("ZRANGE", "kms:{ctl}:rotations", 0, -1):
        name = f"kms:{{ctl}}:rotation:{rotation_id.decode()}"
        stored.rotations.append(json.loads(ask("HGET", name, "record")))
    stored.active = int(ask("HGET", "kms:{ctl}:keks", "active"))
    return stored


def _fetch(client: redis.Redis, command: str, names: list[bytes]) -> Iterator[tuple[str, Any]]:
    for first in range(0, len(names), _PAGE):
        part = names[first : first + _PAGE]
        pipeline = client.pipeline(transaction=False)
        for name in part:
            pipeline.execute_command(command, name)
        for name, value in zip(part, pipeline.execute(), strict=True):
            yield name.decode(), value


def _texts(value: Mapping[bytes, bytes]) -> dict[str, bytes]:
    return {name.decode(): each for name, each in value.items()}


def _tag(name: str) -> str:
    return name[name.index("{") + 1 : name.index("}")]


def check_store(history: History, stored: Stored) -> list[Violation]:
    """Return what is broken in a store that rests, seen beside what the clients saw."""
    deks = {
        key_id: stored.open(record["wrapped"], key_id, record["thread_id"].decode())
        for key_id, record in stored.records.items()
        if record.get("wrapped")
    }
    found = list(_keys(history, stored, deks))
    found += _ciphertexts(history, stored, deks)
    found += _states(history, stored)
    found += _destroyed(history, stored)
    found += _census(stored)
    found += _rotations(stored)
    found += _snapshots(stored)
    return found


def _keys(history: History, stored: Stored, deks: Mapping[str, AESGCM | None]) -> Iterator[Violation]:
    for key_id, answer in history.acknowledged().items():
        record = stored.records.get(key_id)
        if record is None:
            yield Violation("acknowledged keys exist", f"{key_id} of {answer.thread_id} is gone")
            continue
        kept = (record["thread_id"].decode(), int(record["version"]))
        if kept != (answer.thread_id, answer.version):
            yield Violation(
                "acknowledged keys exist",
                f"{key_id} was {answer.thread_id} version {answer.version}, and is {kept}",
            )
        if record["state"] != b"destroyed" and deks.get(key_id) is None:
            yield Violation("acknowledged keys exist", f"the blob of {key_id} does not unwrap")


def _ciphertexts(history: History, stored: Stored, deks: Mapping[str, AESGCM | None]) -> Iterator[Violation]:
    for each in history.sealed():
        record = stored.records.get(each.key_id)
        if record is not None and record["state"] == b"destroyed":
            continue  # whether it may be is checked elsewhere
        dek = deks.get(each.key_id)
        try:
            message = dek.decrypt(each.ciphertext[:_NONCE], each.ciphertext[_NONCE:], None) if dek else None
        except InvalidTag:
            message = None
        if message != each.message:
            yield Violation("ciphertexts decrypt", f"a ciphertext of {each.key_id} is lost")


_AFTER = {
    Kind.DISABLE: {b"disabled"},
    Kind.CANCEL: {b"disabled"},
    Kind.ENABLE: {b"enabled", b"decrypt_only"},
    Kind.SCHEDULE: {b"pending_destruction", b"destroyed"},
}


def _states(history: History, stored: Stored) -> Iterator[Violation]:
    last: dict[str, Operation] = {}
    for each in history.operations:
        if each.kind in CHANGES and each.outcome is not Outcome.REFUSED:
            last[each.key_id] = each
    for key_id, change in last.items():
        record = stored.records.get(key_id)
        if change.outcome is Outcome.OK and record is not None and record["state"] not in _AFTER[change.kind]:
            yield Violation(
                "acknowledged states stay",
                f"{key_id} is {record['state'].decode()} after an acknowledged {change.kind}",
            )


def _destroyed(history: History, stored: Stored) -> Iterator[Violation]:
    scheduled = {each.key_id for each in history.operations if each.kind is Kind.SCHEDULE}
    gone = {key_id for key_id, record in stored.records.items() if record["state"] == b"destroyed"}
    for key_id in gone:
        if key_id not in scheduled:
            yield Violation("destroyed is destroyed", f"nobody scheduled the destruction of {key_id}")
        if "wrapped" in stored.records[key_id]:
            yield Violation("destroyed is destroyed", f"{key_id} is destroyed and has a blob")
    for (rotation_id, _), snapshot in stored.snapshots.items():
        for bucket in snapshot.buckets:
            for key_id in gone & bucket.keys():
                yield Violation("destroyed is destroyed", f"{rotation_id} holds a copy of destroyed {key_id}")


def _census(stored: Stored) -> Iterator[Violation]:
    records: dict[tuple[str, int], set[str]] = defaultdict(set)
    for key_id, record in stored.records.items():
        tag = key_id[2:4]
        if record["state"] == b"destroyed":
            continue
        version = int(record["kek_version"])
        records[tag, version].add(key_id)
        blob = record.get("wrapped", b"")
        if int.from_bytes(blob[1:_HEADER], "big") != version:
            yield Violation(
                "records and census agree", f"{key_id} says KEK version {version}, its blob another"
            )
        if version < stored.floors[tag]:
            yield Violation(
                "no record below the floor",
                f"{key_id} is under KEK version {version}, and the floor of {tag} is {stored.floors[tag]}",
            )
    for tag, version in sorted(records.keys() | stored.census.keys()):
        have, named = records[tag, version], stored.census.get((tag, version), set())
        if have != named:
            yield Violation(
                "records and census agree",
                f"slot {tag} version {version}: {len(have - named)} records are not in the census,"
                f" {len(named - have)} in it have no record",
            )
        if version != stored.active:
            yield Violation(
                "census of old versions is zero",
                f"slot {tag}: {max(len(have), len(named))} keys under version {version}",
            )


def _rotations(stored: Stored) -> Iterator[Violation]:
    for rotation in stored.rotations:
        if rotation["outcome"] != "clean":
            yield Violation(
                "rotations end clean",
                f"{rotation['rotation_id']} is at {rotation['step']}: {rotation['outcome']!r}",
            )
    for name in stored.quarantined:
        yield Violation("rotations end clean", f"there is a {name}")


def _snapshots(stored: Stored) -> Iterator[Violation]:
    for (rotation_id, tag), snapshot in sorted(stored.snapshots.items()):
        entries = sum(len(bucket) for bucket in snapshot.buckets)
        digest = hashlib.sha256(b"".join(map(_digest, snapshot.buckets))).hexdigest()
        if snapshot.manifest.split()[1:] != [str(entries), digest]:
            yield Violation(
                _SNAPSHOTS,
                f"slot {tag} of {rotation_id} holds {entries} copies and says {snapshot.manifest[:20]!r}",
            )
    copies: dict[str, dict[str, bytes]] = defaultdict(dict)
    for (rotation_id, _), snapshot in stored.snapshots.items():
        for bucket in snapshot.buckets:
            copies[rotation_id] |= bucket
    for rotation_id, held in copies.items():
        for key_id in held.keys() - stored.records.keys():
            yield Violation(_SNAPSHOTS, f"{rotation_id} holds {key_id}, which has no record")
    for key_id, record in stored.records.items():
        if record["state"] != b"destroyed":
            yield from _copies_of(stored, copies, key_id)


def _copies_of(stored: Stored, copies: Mapping[str, Mapping[str, bytes]], key_id: str) -> Iterator[Violation]:
    record = stored.records[key_id]
    thread_id = record["thread_id"].decode()
    dek = stored.unwrap(record.get("wrapped", b""), key_id, thread_id)
    for rotation in stored.rotations:
        rotation_id = rotation["rotation_id"]
        copy = copies[rotation_id].get(key_id)
        if copy is not None and (dek is None or stored.unwrap(copy, key_id, thread_id) != dek):
            yield Violation(_SNAPSHOTS, f"the copy of {key_id} in {rotation_id} is another DEK")
        # Whole seconds, so strictly less; a record made while the rotation runs may be under its target.
        if copy is None and int(record["created_at"]) < rotation["started_at"]:
            yield Violation(_SNAPSHOTS, f"{rotation_id} lacks a copy of {key_id}")


def _digest(bucket: Mapping[str, bytes]) -> bytes:
    parts = []
    for name, blob in sorted(bucket.items()):
        parts += [len(name).to_bytes(4, "big"), name.encode(), len(blob).to_bytes(4, "big"), blob]
    return hashlib.sha256(b"".join(parts)).digest()

"""Keys of the older service: its export, line by line, and what its master key opens. Pure.

An export is lines of JSON, one object each (``docs/moving-in.md``)::

    {"key_id": "k_1712345678901234567", "dek": "...", "dekmeta": "...", "thread_id": "room:1"}
    {"keys": 1}

``dek`` and ``dekmeta`` are, in base64, what the older service stored under ``dek:<id>`` and
``dekmeta:<id>``; ``dekmeta`` and ``thread_id`` may be missing. The last line says how many keys there are, so
that a file that was cut short is found out. ``dek`` is the wrapped key itself, or a JSON object whose member
``wrapped`` is it in base64.

A wrapped key is ``nonce(12) | ciphertext(32) | tag(16)``: AES-256-GCM (SP 800-38D) under the master key,
without AAD. Nothing binds it to its id: only whoever opens a message with it finds out that it is another's.
"""

from __future__ import annotations

import binascii
import json
from base64 import b64decode
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.domain.envelope import BODY_BYTES, unwrap
from progressdb_kms.domain.errors import BackupInvalid, InvalidThreadId, WrappedKeyInvalid
from progressdb_kms.domain.keys import check_thread_id, is_older

MAX_LINE_BYTES: Final = 2**16
"""Far above what a key takes: a damaged file must not make a reader wait for the end of a line."""
_MEMBERS: Final = frozenset({"key_id", "dek", "dekmeta", "thread_id"})
_LATEST: Final = 253_402_300_799
"""The last second of the year 9999."""
_UNITS: Final = ((10**17, 10**9), (10**14, 10**6), (10**11, 10**3), (0, 1))
"""From which size on a time is in nano-, micro-, milliseconds or seconds, and how many make a second."""


@dataclass(frozen=True, slots=True)
class OlderKey:
    """A key as the older service had it.

    Attributes:
        key_id: Its id, ``k_<number>``.
        thread_id: Its thread, empty where nothing tells.
        wrapped: The DEK under the master key.
        created_at: Unix seconds, 0 where nothing tells.
    """

    key_id: str
    thread_id: str
    wrapped: bytes = field(repr=False)
    created_at: int = 0


@dataclass(frozen=True, slots=True)
class End:
    """The last line: how many keys the lines before it hold."""

    keys: int


class MasterKey:
    """The older service's master key; shows nothing of itself.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def unwrap(self, wrapped: bytes) -> bytes:
        """Return the raw DEK.

        Raises:
            WrappedKeyInvalid: It is damaged, or under another master key.
        """
        try:
            return unwrap(self._cipher, wrapped, b"")
        except WrappedKeyInvalid:
            raise WrappedKeyInvalid(
                "it does not open under this master key: it is damaged, or was wrapped under another"
            ) from None


def parse_line(line: bytes) -> OlderKey | End:
    """Return what a line of an export holds.

    Raises:
        BackupInvalid: The line is damaged. The message says where and repeats nothing of it but an id.
    """
    found = _object(line, "the line")
    if found.keys() == {"keys"}:
        if type(found["keys"]) is not int or found["keys"] < 0:
            raise BackupInvalid("the line that ends the export has no number of keys")
        return End(found["keys"])
    if not found.keys() <= _MEMBERS or not {"key_id", "dek"} <= found.keys():
        raise BackupInvalid("the line has other members than key_id, dek, dekmeta and thread_id")
    key_id = found["key_id"]
    if not isinstance(key_id, str) or not is_older(key_id):
        raise BackupInvalid("key_id is not of the form k_<number>")
    value = _bytes(found["dek"], "dek")
    stored: dict[str, Any] = {}
    if len(value) != BODY_BYTES:
        # An object with a wrapped key in base64 is longer, so that no wrapped key can be taken for one.
        stored = _object(value, "dek")
        value = _bytes(stored.get("wrapped"), "wrapped in dek")
        if len(value) != BODY_BYTES:
            raise BackupInvalid(f"the wrapped key has {len(value)} bytes instead of {BODY_BYTES}")
    meta = _object(_bytes(found["dekmeta"], "dekmeta"), "dekmeta") if found.get("dekmeta") else {}
    if any(each.get("key_id", key_id) != key_id for each in (stored, meta)):
        raise BackupInvalid("what was stored names another key_id")
    times = [*(_seconds(each.get("created_at")) for each in (meta, stored)), _made(key_id)]
    return OlderKey(key_id, _thread(found, stored, meta), value, next(filter(None, times), 0))


def _thread(*places: dict[str, Any]) -> str:
    """Return the one thread that is named, an empty string where none is."""
    named = [thread_id for place in places if (thread_id := place.get("thread_id")) not in (None, "")]
    if not named:
        return ""
    if any(thread_id != named[0] for thread_id in named):
        raise BackupInvalid("the export names two threads for the key")
    if not isinstance(named[0], str):
        raise BackupInvalid("thread_id is not a string")
    try:
        return check_thread_id(named[0])
    except InvalidThreadId as error:
        raise BackupInvalid(error.detail) from None


def _object(data: bytes, name: str) -> dict[str, Any]:
    # The parser's errors quote what they read, so they are neither shown nor chained.
    try:
        found = json.loads(data.decode(), object_pairs_hook=_members)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BackupInvalid(f"{name} is not a JSON object, or is cut short, or has a member twice")
    return found


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError
    return members


def _bytes(value: object, name: str) -> bytes:
    try:
        if isinstance(value, str):
            return b64decode(value, validate=True)
    except (ValueError, binascii.Error):
        pass
    raise BackupInvalid(f"{name} is not base64")


def _seconds(value: object) -> int:
    """Return a time in Unix seconds, 0 where it can't be read: that must not cost the key."""
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            return 0
        value = int(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp())
    if type(value) is not int or value <= 0:
        return 0
    seconds = value // next(parts for least, parts in _UNITS if value >= least)
    return seconds if seconds <= _LATEST else 0


def _made(key_id: str) -> int:
    """Return when an id was made: the older service numbered keys by the clock, in nanoseconds."""
    number = int(key_id.removeprefix("k_"))
    return _seconds(number) if number >= _UNITS[0][0] else 0

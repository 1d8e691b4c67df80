"""Data keys: their ids, the slot an id lives in, their states, the record of one."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from progressdb_kms.domain.errors import (
    InvalidHeader,
    InvalidThreadId,
    KeyDecryptOnly,
    KeyDestroyed,
    KeyDisabled,
    KeyNotFound,
    KeyPendingDestruction,
    KmsError,
)

DEK_BYTES: Final = 32
KEY_ID_PREFIX: Final = "k_"
TAG_CHARS: Final = 2
UNIQUE_CHARS: Final = 26
KEY_ID_CHARS: Final = len(KEY_ID_PREFIX) + TAG_CHARS + UNIQUE_CHARS
UNIQUE_BYTES: Final = 17
"""Random bytes that ``new_key_id`` wants: 26 base32 characters carry 130 bits."""
THREAD_ID_MAX_BYTES: Final = 256
IDEMPOTENCY_KEY_MAX_CHARS: Final = 255

_BASE32: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_KEY_ID: Final = re.compile(rf"k_[A-Z2-7]{{{TAG_CHARS + UNIQUE_CHARS}}}")
# At most 22 characters, where an id of ours has 30: no string is of both forms.
_OLDER_ID: Final = re.compile(r"k_[0-9]{1,20}")
_IDEMPOTENCY_KEY: Final = re.compile(rf"[!-~]{{1,{IDEMPOTENCY_KEY_MAX_CHARS}}}")
_ID_LABEL: Final = b"progressdb-kms/key-id/v1"

ALL_TAGS: Final = tuple(a + b for a in _BASE32 for b in _BASE32)
"""The 1,024 slot tags in order."""


class KeyState(StrEnum):
    """States of a DEK (SP 800-57 part 1, section 7, in the words of this service)."""

    ENABLED = "enabled"
    DECRYPT_ONLY = "decrypt_only"
    DISABLED = "disabled"
    PENDING_DESTRUCTION = "pending_destruction"
    DESTROYED = "destroyed"


MAY_ENCRYPT: Final = frozenset({KeyState.ENABLED})
MAY_DECRYPT: Final = frozenset({KeyState.ENABLED, KeyState.DECRYPT_ONLY})

_REFUSALS: Final[dict[KeyState, type[KmsError]]] = {
    KeyState.DECRYPT_ONLY: KeyDecryptOnly,
    KeyState.DISABLED: KeyDisabled,
    KeyState.PENDING_DESTRUCTION: KeyPendingDestruction,
    KeyState.DESTROYED: KeyDestroyed,
}


def refusal(state: KeyState) -> KmsError:
    """Return the error that says why a key in ``state`` can't be used as asked."""
    return _REFUSALS[state]()


class StateChange(StrEnum):
    """What an operator can ask of a key's state."""

    DISABLE = "disable"
    ENABLE = "enable"
    SCHEDULE_DESTRUCTION = "schedule-destruction"
    CANCEL_DESTRUCTION = "cancel-destruction"


@dataclass(frozen=True, slots=True)
class Transition:
    """One row of the state machine: from which states, to which. ``to`` itself is always allowed (repeat)."""

    sources: frozenset[KeyState]
    to: KeyState


TRANSITIONS: Final[dict[StateChange, Transition]] = {
    StateChange.DISABLE: Transition(frozenset({KeyState.ENABLED, KeyState.DECRYPT_ONLY}), KeyState.DISABLED),
    # A key that was decrypt_only before it was disabled goes back there, never to enabled: the store
    # remembers (`DekRecord.resume_state`), else disable + enable would revive a superseded key.
    StateChange.ENABLE: Transition(frozenset({KeyState.DISABLED}), KeyState.ENABLED),
    StateChange.SCHEDULE_DESTRUCTION: Transition(
        frozenset({KeyState.ENABLED, KeyState.DECRYPT_ONLY, KeyState.DISABLED}), KeyState.PENDING_DESTRUCTION
    ),
    # A cancelled destruction ends in disabled: whoever cancels has time to look before traffic returns.
    StateChange.CANCEL_DESTRUCTION: Transition(frozenset({KeyState.PENDING_DESTRUCTION}), KeyState.DISABLED),
}


@dataclass(frozen=True, slots=True)
class DekRecord:
    """What the store keeps of a DEK.

    Attributes:
        key_id: The handle that callers use.
        thread_id: The conversation that the key belongs to.
        wrapped: The wrapped DEK (see ``domain.envelope``), empty once destroyed.
        kek_id: Name of the KEK that wraps it.
        kek_version: Registry-wide version of that KEK.
        version: Number of this DEK within its thread, from 1.
        state: Present state.
        created_at: Unix seconds.
        created_by: Identity that made it, or ``migration``.
        changed_at: Unix seconds of the last state change.
        destroy_at: Unix seconds when a pending destruction falls due.
        resume_state: State that ``enable`` leads to, while disabled or pending.
        uses: Encryptions reserved so far, over all instances.
    """

    key_id: str
    thread_id: str
    wrapped: bytes = field(repr=False)
    kek_id: str
    kek_version: int
    version: int
    state: KeyState
    created_at: int
    created_by: str
    changed_at: int = 0
    destroy_at: int | None = None
    resume_state: KeyState = KeyState.ENABLED
    uses: int = 0


@dataclass(frozen=True, slots=True)
class NewDek:
    """A DEK about to be stored; its version in the thread is the store's to assign."""

    key_id: str
    thread_id: str
    wrapped: bytes = field(repr=False)
    kek_id: str
    kek_version: int
    created_at: int
    created_by: str


def check_thread_id(thread_id: str) -> str:
    """Return ``thread_id`` if it is 1 to 256 bytes of UTF-8 without control characters.

    Raises:
        InvalidThreadId: It is not. The value itself is not in the message.
    """
    try:
        size = len(thread_id.encode())
    except UnicodeEncodeError:
        raise InvalidThreadId("thread_id is not valid UTF-8") from None
    if not 1 <= size <= THREAD_ID_MAX_BYTES:
        raise InvalidThreadId(
            f"thread_id must be 1 to {THREAD_ID_MAX_BYTES} bytes of UTF-8, this one has {size}"
        )
    if not thread_id.isprintable() and any(unicodedata.category(c) in {"Cc", "Cs"} for c in thread_id):
        raise InvalidThreadId("thread_id must not hold control characters")
    return thread_id


def check_idempotency_key(value: str) -> str:
    """Return ``value`` if it is 1 to 255 visible ASCII characters.

    Raises:
        InvalidHeader: It is not.
    """
    if not _IDEMPOTENCY_KEY.fullmatch(value):
        raise InvalidHeader(
            f"Idempotency-Key must be 1 to {IDEMPOTENCY_KEY_MAX_CHARS} visible ASCII characters"
        )
    return value


def slot_tag(thread_id: str) -> str:
    """Return the slot tag of a thread: the first 10 bits of SHA-256(thread_id) in base32 (RFC 4648)."""
    digest = hashlib.sha256(thread_id.encode()).digest()
    return ALL_TAGS[digest[0] << 2 | digest[1] >> 6]


def new_key_id(thread_id: str, random: bytes) -> str:
    """Return a key id for a new DEK of ``thread_id``.

    Args:
        thread_id: A checked thread id.
        random: ``UNIQUE_BYTES`` bytes from a cryptographic generator.
    """
    if len(random) != UNIQUE_BYTES:
        raise ValueError(f"a key id takes {UNIQUE_BYTES} random bytes")
    return f"{KEY_ID_PREFIX}{slot_tag(thread_id)}{_unique(random)}"


def derive_key_id(identity: str, idempotency_key: str, thread_id: str) -> str:
    """Return the key id that a create with this Idempotency-Key has, today and at any later retry.

    Length prefixes keep the three parts apart, so that no choice of one can imitate another's.
    """
    digest = hashlib.sha256(_ID_LABEL)
    for part in (identity, idempotency_key, thread_id):
        raw = part.encode()
        digest.update(len(raw).to_bytes(4, "big") + raw)
    return f"{KEY_ID_PREFIX}{slot_tag(thread_id)}{_unique(digest.digest())}"


def locate(key_id: str) -> str:
    """Return the slot tag of ``key_id``: the one place that knows how an id finds its slot.

    An id of this service names its thread's slot. One of the older service names none, so that it lives where
    a thread of its own name would.

    Raises:
        KeyNotFound: The id is of no form that either service ever made, so no key can have it.
    """
    if _KEY_ID.fullmatch(key_id):
        return key_id[len(KEY_ID_PREFIX) : len(KEY_ID_PREFIX) + TAG_CHARS]
    if is_older(key_id):
        return slot_tag(key_id)
    raise KeyNotFound


def is_older(key_id: str) -> bool:
    """Say whether an id is of the older service's form, ``k_<number>`` of 1 to 20 digits.

    Such a key does not live in its thread's slot, but by chance.
    """
    return _OLDER_ID.fullmatch(key_id) is not None


def may_belong(key_id: str, thread_id: str) -> bool:
    """Say whether a key of this id can be the thread's: an id of ours tells, an older one fits any thread.

    Raises:
        KeyNotFound: As ``locate``.
    """
    return is_older(key_id) or locate(key_id) == slot_tag(thread_id)


def _unique(raw: bytes) -> str:
    # Base32 (RFC 4648) in half the library's time, by two characters: the tags are all pairs of them.
    bits = int.from_bytes(raw) >> (8 * len(raw) - 5 * UNIQUE_CHARS)
    return "".join([ALL_TAGS[bits >> shift & 1023] for shift in range(5 * UNIQUE_CHARS - 10, -1, -10)])

"""How a snapshot of one slot is packed into buckets; ``rotation_*.lua`` and the memory store do the same.

A bucket is a hash of few entries, which Redis keeps packed: 103 bytes a key against 347 for a key of its own.
"""

from __future__ import annotations

from typing import Final

_ENTRIES: Final = 48
"""Entries that a bucket has on average. Ten deviations more are within the 128 of Redis's packed form."""
_DIGITS: Final = 4


def bucket_count(records: int) -> int:
    """Return the number of buckets for a snapshot of ``records``.

    It shares no factor with 36, the base of ``bucket_of``: the digits 0, 1, 8 and 9 never occur in a key id,
    and with such a factor whole buckets would stay empty.
    """
    buckets = max(-(-records // _ENTRIES), 1)
    while buckets % 2 == 0 or buckets % 3 == 0:
        buckets += 1
    return buckets


def bucket_of(key_id: str, buckets: int) -> int:
    """Return the bucket of a key: the last characters of its id as a number in base 36, modulo the buckets.

    An id's last characters are random, those of an older id the last digits of a clock; and Lua reads such a
    number by one call as well.
    """
    tail = key_id[-_DIGITS:]
    return (int(tail, 36) if tail.isascii() and tail.isalnum() else 0) % buckets

"""Opaque cursors of listings.

A cursor is base64url of a JSON list: format, what is listed, place. What is listed is a digest of the
filters, so that a cursor goes on with no other listing than its own. A cursor is not a secret and not a
grant: one made by hand can only start a listing at another place of the same filters.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import Final

from progressdb_kms.domain.errors import InvalidParameter
from progressdb_kms.domain.keys import KeyState

_FORMAT: Final = 1
_MAX_CHARS: Final = 512
_DIGEST_CHARS: Final = 16


def encode_cursor(thread_id: str | None, state: KeyState | None, place: list[int | str]) -> str:
    """Return the cursor that goes on at ``place`` of the listing with these filters."""
    document = json.dumps([_FORMAT, _listing(thread_id, state), place], separators=(",", ":"))
    return base64.urlsafe_b64encode(document.encode()).decode().rstrip("=")


def decode_cursor(
    cursor: str, thread_id: str | None, state: KeyState | None, kinds: tuple[type[int | str], ...]
) -> list[int | str]:
    """Return the place in ``cursor``: a list of values of ``kinds``, integers being 0 or more.

    Raises:
        InvalidParameter: It is not a cursor of the listing with these filters.
    """
    bad = InvalidParameter("the cursor does not belong to this listing; start it again without one")
    if len(cursor) > _MAX_CHARS or not cursor.isascii():
        raise bad
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        document = json.loads(raw)
    except (binascii.Error, ValueError, RecursionError):
        raise bad from None
    if not isinstance(document, list) or document[:2] != [_FORMAT, _listing(thread_id, state)]:
        raise bad
    place = document[2] if len(document) == 3 else None  # noqa: PLR2004 - the three parts named above
    if not isinstance(place, list) or tuple(type(value) for value in place) != kinds:
        raise bad
    if any(isinstance(value, int) and not 0 <= value < 2**64 for value in place):
        raise bad
    return place


def _listing(thread_id: str | None, state: KeyState | None) -> str:
    filters = json.dumps([thread_id, state])
    return hashlib.sha256(filters.encode()).hexdigest()[:_DIGEST_CHARS]

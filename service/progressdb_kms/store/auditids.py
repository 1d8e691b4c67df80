"""Ids of records in the audit stream: ``<Unix milliseconds>-<number>``, as Redis makes them."""

from __future__ import annotations

import re
from typing import Final

from progressdb_kms.domain.errors import InvalidParameter

_ID: Final = re.compile(r"([0-9]{1,19})-([0-9]{1,19})")


def check_id(text: str) -> tuple[int, int]:
    """Return the parts of an id.

    Raises:
        InvalidParameter: It is none.
    """
    found = _ID.fullmatch(text)
    if found is None:
        raise InvalidParameter("the cursor is not one of the audit log's")
    return int(found[1]), int(found[2])

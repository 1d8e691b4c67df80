"""Names of exports where a job keeps them, and which of them are more than it is to keep."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

_FORM: Final = re.compile(r"progressdb-kms-[0-9]{8}T[0-9]{6}Z-x_[0-9a-f]{16}\.export")
_LEFTOVER: Final = re.compile(rf"\.{_FORM.pattern}\.[0-9a-f]{{16}}")
PREFIX: Final = "progressdb-kms-"
SUFFIX: Final = ".export"


def export_name(at: float, export_id: str) -> str:
    """Return a name that sorts by time and that no other export has.

    Args:
        at: Unix seconds.
        export_id: The export's own name.
    """
    return f"{PREFIX}{datetime.fromtimestamp(at, UTC):%Y%m%dT%H%M%SZ}-{export_id}{SUFFIX}"


def is_export(name: str) -> bool:
    """Say whether ``export_name`` made this name; whatever else lies beside exports is not ours."""
    return _FORM.fullmatch(name) is not None


def is_leftover(name: str) -> bool:
    """Say whether this is the name of an export that a killed run had begun to write."""
    return _LEFTOVER.fullmatch(name) is not None


def surplus(names: Iterable[str], new: str, keep: int) -> list[str]:
    """Return the names to remove, the oldest first, so that ``keep`` exports remain.

    Args:
        names: All names where the new export is.
        new: The export that has just been made and verified. It remains whatever its date is: were a clock
            wrong, the only one that is known to be good would go.
        keep: At least 1.
    """
    others = sorted(name for name in set(names) if is_export(name) and name != new)
    return others[: max(len(others) - (keep - 1), 0)]

"""Backups: what is known of exports, and what remains of a destroyed key. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

SHORTEST_WAIT_DAYS: Final = 7
"""Least waiting period of a destruction. Whatever was destroyed since an export that is younger was waiting
for it in the export already, so that an import of it destroys it again when its time comes."""
DAY: Final = 86_400


class ExportKind(StrEnum):
    """What an export holds."""

    LIVE = "live"
    ROTATION = "rotation"


@dataclass(frozen=True, slots=True)
class ExportNote:
    """What the store remembers of an export.

    Attributes:
        export_id: ``x_`` and random characters.
        kind: Live records, or a rotation's snapshot.
        began_at: Unix seconds.
        finished_at: Unix seconds; None while it is written, and for ever if it was interrupted.
        rotation_id: Whose snapshot, for that kind.
        records: Records with a wrapped key.
        tombstones: Records of destroyed keys.
        sha256: Of the file, in hex.
        kek_versions: The versions that its wrapped keys need.
    """

    export_id: str
    kind: ExportKind
    began_at: int
    finished_at: int | None = None
    rotation_id: str = ""
    records: int = 0
    tombstones: int = 0
    sha256: str = ""
    kek_versions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class HeldBy:
    """An export that still holds a destroyed key, until the KEK that it needs is retired and erased."""

    export_id: str
    date: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Destruction:
    """What was written down when a key was destroyed.

    Attributes:
        key_id: The key.
        destroyed_at: Unix seconds.
        held_by: Exports that hold it still.
    """

    key_id: str
    destroyed_at: int
    held_by: tuple[HeldBy, ...] = field(default=())


def holding(notes: Iterable[ExportNote], created_at: int) -> tuple[HeldBy, ...]:
    """Return the exports that can hold a key made at ``created_at`` and live until now.

    One that was interrupted counts: its file may be somewhere, with whatever it got.
    """
    return tuple(
        HeldBy(note.export_id, note.finished_at or note.began_at, note.sha256)
        for note in notes
        if note.finished_at is None or note.finished_at >= created_at
    )


def may_resurrect(exported_at: float, now: float) -> bool:
    """Say whether an export is so old that keys may have been destroyed since that it holds as living."""
    return now - exported_at >= SHORTEST_WAIT_DAYS * DAY

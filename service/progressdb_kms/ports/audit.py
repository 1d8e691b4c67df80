"""Port of the chained audit log: where records and their anchor are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from progressdb_kms.domain.audit import Record


@dataclass(frozen=True, slots=True)
class AuditBatch:
    """Records of one chain that go to the store together.

    Attributes:
        chain: Whose.
        confirmed: Number and MAC of the last record that is known to be stored; 0 and zeros for none.
        records: What comes after it, in order.
        head: The signed head that stands for the last of them.
        stream: Whether the records themselves are kept, or only the head.
        roster: The roster that was read and the one that takes its place, where this opens the chain.
    """

    chain: str
    confirmed: tuple[int, str]
    records: Sequence[Record]
    head: bytes
    stream: bool
    roster: tuple[bytes, bytes] | None = None


class Committed(Enum):
    """What became of a batch."""

    DONE = "ok"
    CONFLICT = "conflict"
    """The store knows another history of this chain: it was restored, rolled back or tampered with."""
    ROSTER_CHANGED = "roster"


@dataclass(frozen=True, slots=True)
class Anchor:
    """What the store vouches for, read at one moment; all documents as they are stored, unchecked.

    Attributes:
        roster: All chains; empty for none.
        heads: How far each has come, by chain.
        floors: Up to where each has been trimmed, by chain.
        length: Records in the stream.
        last_id: Id of the last record ever, in the stream.
    """

    roster: bytes = b""
    heads: Mapping[str, bytes] = field(default_factory=dict)
    floors: Mapping[str, bytes] = field(default_factory=dict)
    length: int = 0
    last_id: str = "0-0"


@dataclass(frozen=True, slots=True)
class Trim:
    """A trimming of the stream.

    Attributes:
        roster: The roster that was read, and the one that takes its place.
        floors: New signed floors, by chain.
        dropped: Chains to forget: closed, trimmed, and named by no record that remains.
        first_kept: Id of the first record that stays; empty to trim nothing from the stream.
    """

    roster: tuple[bytes, bytes]
    floors: Mapping[str, bytes]
    dropped: Sequence[str]
    first_kept: str


class AuditStore(Protocol):
    """Keeps chains. Raises StoreUnavailable and StoreNotDurable as ``KeyStore`` does."""

    async def commit(self, batch: AuditBatch) -> Committed:
        """Keep records and move the chain's head, in one durable step.

        Safe to repeat, also with more records behind, where it is not known what became of an earlier try:
        what is stored already is left out.
        """

    async def anchor(self) -> Anchor:
        """Return heads, floors and roster as they are at one moment."""

    async def page(self, after: str, limit: int) -> list[tuple[str, bytes]]:
        """Return up to ``limit`` records after an id, in order, each with its id; ``0-0`` is the beginning.

        Raises:
            InvalidParameter: ``after`` is no id.
        """

    async def tail(self, before: str | None, limit: int) -> list[tuple[str, bytes]]:
        """Return up to ``limit`` records before an id, the latest first, each with its id; None is the end.

        Raises:
            InvalidParameter: ``before`` is no id.
        """

    async def trim(self, trim: Trim) -> bool:
        """Trim, in one durable step; False, and nothing is done, where the roster is another by now."""


class AuditObserver(Protocol):
    """What the audit log tells the metrics. Cheap and never failing."""

    def audit_committed(self, records: int, seconds: float) -> None:
        """Count records that are durable, and the time that it took."""

    def audit_failed(self, sink: str) -> None:
        """Count a failure to write: ``store``, ``file`` or ``stdout``."""

    def audit_lost(self, sink: str, records: int) -> None:
        """Count records that were given up: there was no room to keep them until they could be written."""

    def audit_trim_refused(self) -> None:
        """Count a trimming that was refused since what would go does not hold: an alert."""

    def audit_conflict(self) -> None:
        """Count a chain that was given up because the store knows another history of it: an alert."""

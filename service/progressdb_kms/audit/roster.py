"""The roster of all chains, as whoever opens a chain finds it and leaves it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog

from progressdb_kms.domain.audit import AuditKey, Roster, VerifyKey, parse_document

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from progressdb_kms.ports.audit import Anchor

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Opening:
    """What a chain's opening does to the roster.

    Attributes:
        roster: The new roster, signed.
        generation: Its generation.
        said: What the opening record says of the chains before: how far those have come of which no opening
            has said it yet, and whose roster it was.
    """

    roster: bytes
    generation: int
    said: Mapping[str, object]


def roster_with(key: AuditKey, known: Sequence[VerifyKey], anchor: Anchor, chain: str) -> Opening:
    """Return the roster with one more chain.

    A roster that does not hold is not taken for none: what heads there are is carried over, and the opening
    record says so.
    """
    said: dict[str, object] = {}
    try:
        roster = Roster.read(anchor.roster)
        sound = all(
            parse_document(anchor.roster).signed_by(each)
            for each in (key.verify, *known)
            if roster.key_id == each.key_id
        )
    except ValueError:
        roster, sound = Roster(), False
    if not sound:
        log.error("audit_roster_damaged", action="run audit verify")
        roster, said = replace(roster, key_id=""), {"roster_damaged": True}
    if roster.key_id:
        said["roster_key"] = roster.key_id
    reached = reached_by(anchor)
    fresh = {name: seq for name, seq in reached.items() if seq > roster.chains.get(name, 0)}
    following = replace(
        roster,
        generation=roster.generation + 1,
        chains={**roster.chains, **fresh, chain: 0},
        key_id=key.key_id,
    )
    return Opening(following.write(key), following.generation, {"chains": fresh, **said})


def reached_by(anchor: Anchor) -> dict[str, int]:
    """Return how far each chain says that it has come; heads that can't be read are left out."""
    reached = {}
    for name, text in anchor.heads.items():
        try:
            reached[name] = int(parse_document(text).members["seq"])
        except (ValueError, KeyError, TypeError):
            # Not the exception: it says no more.
            log.warning("audit_head_damaged", chain=name, action="run audit verify")
    return reached

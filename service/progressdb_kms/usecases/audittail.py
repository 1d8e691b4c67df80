"""The end of the audit log, verified as far as a few records can be; and what it still says of one key.

Bounded in all: so many records are read, and of the anchor only the heads of the chains that they are of are
checked. What only the whole log can tell is left to ``audit verify``: whether anything before was removed,
and whether a whole chain is missing.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.audit import RECORD_START, Parsed, parse_document, parse_record
from progressdb_kms.domain.auditverify import AuditVerifier
from progressdb_kms.domain.policy import Permission

if TYPE_CHECKING:
    from collections.abc import Sequence

    from progressdb_kms.domain.audit import VerifyKey
    from progressdb_kms.ports.audit import AuditStore
    from progressdb_kms.usecases.session import Session

TAIL: Final = 100
"""Records that are verified, and shown, at a time."""
SCAN: Final = 2000
"""Records that are looked through for one key at a time."""
FOUND: Final = 50
"""Records of one key at a time."""
_PAGE: Final = 100
_SLICE: Final = 16
"""Records after which others have their turn: a signed one takes some 0.1 ms."""
_LONGEST: Final = 2**20
"""Bytes of a record. Most have a few hundred; an opening names other chains. What is longer is damaged."""
_SOURCE: Final = "record"


class Proof(StrEnum):
    """What is known of one record."""

    HOLDS = "holds"
    SIGNED = "signed"
    """With the public key alone: it is in place, and a signature behind it vouches for it."""
    UNPROVEN = "unproven"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Entry:
    """A record of the stream.

    Attributes:
        entry_id: Its id in the stream.
        record: What it says; None where it can't be read, or stands in no chain.
        proof: What is known of it.
    """

    entry_id: str
    record: Parsed | None
    proof: Proof


@dataclass(frozen=True, slots=True)
class Tail:
    """Consecutive records, the latest first.

    Attributes:
        entries: The records.
        older: Id before which the next ones are; None where there are none.
        problems: What does not hold, in words.
        keyed: Whether there was a key to verify with.
        at_end: Whether these are the last records of the log, so that its end was compared with the anchor.
        kept: How many records the stream holds.
    """

    entries: Sequence[Entry]
    older: str | None
    problems: Sequence[str]
    keyed: bool
    at_end: bool
    kept: int


@dataclass(frozen=True, slots=True)
class History:
    """What a part of the stream says of a key, the latest first.

    Attributes:
        entries: The records that name it.
        looked_at: How many records were looked through.
        older: Id before which to go on; None where nothing older is kept.
    """

    entries: Sequence[Entry]
    looked_at: int
    older: str | None


async def audit_tail(
    store: AuditStore, session: Session, keys: Sequence[VerifyKey], before: str | None = None
) -> Tail:
    """Return the last records before an id, or of all, verified among themselves and against the anchor.

    Args:
        store: Where they are.
        session: Who asks; needs ``audit:read`` for all threads.
        keys: What records may be made with.
        before: Id of a record; None for the end of the log.

    Raises:
        PermissionDenied: The caller may not.
        InvalidParameter: ``before`` is no id.
        StoreUnavailable: Not now.
    """
    session.grants().require(Permission.AUDIT)
    # The anchor first: what is written in between is then behind its heads, and never missing.
    anchor = await store.anchor()
    page = await store.tail(before, TAIL)
    page.reverse()
    verifier = AuditVerifier(keys, partial=True)
    records = [_parse(line) for _, line in page]
    chains = {record.chain for record in records if record is not None}
    heads = {chain: text for chain, text in anchor.heads.items() if chain in chains}
    if keys:
        await _feed(verifier, heads, [line for _, line in page])
    report = verifier.finish()
    problems = [
        f"{one.kind}: {one.detail}" + (f" (chain {one.chain})" if one.chain else "")
        for one in report.problems
    ]
    if before is None and keys:
        last = {chain.chain: chain.last for chain in report.chains}
        problems += _cut_off(heads, last)
    broken = {
        number
        for one in report.problems
        for number, record in enumerate(records)
        if (one.where == f"{_SOURCE}:{number + 1}" and one.kind != "removed")
        or (record is not None and record.chain == one.chain and one.first <= record.seq <= one.last)
    }
    signed = {chain.chain: chain.signed_to for chain in report.chains}
    entries = [
        Entry(entry_id, record, _proof(record, keys, signed, broken=number in broken))
        for number, ((entry_id, _), record) in enumerate(zip(page, records, strict=True))
    ]
    older = page[0][0] if len(page) == TAIL else None
    return Tail(entries[::-1], older, problems, bool(keys), before is None, anchor.length)


async def _feed(verifier: AuditVerifier, heads: dict[str, bytes], lines: Sequence[bytes]) -> None:
    for number, text in enumerate(heads.values(), 1):
        verifier.anchor(text)
        if number % _SLICE == 0:
            await asyncio.sleep(0)
    for number, line in enumerate(lines, 1):
        if len(line) > _LONGEST or not line.startswith(RECORD_START):
            # Nothing else belongs into the stream, and the verifier would pass it over.
            line = RECORD_START  # noqa: PLW2901 - a line that is damaged stands for it
        verifier.feed(line, _SOURCE, number)
        if number % _SLICE == 0:
            await asyncio.sleep(0)


def _cut_off(heads: dict[str, bytes], last: dict[str, int]) -> list[str]:
    """Say which chains end before their heads; the verifier, told of a part, takes that for another part."""
    found = []
    for chain, text in heads.items():
        try:
            head = int(parse_document(text).members["seq"])
        except (ValueError, KeyError, TypeError):
            continue  # the verifier has told of it
        if last.get(chain, 0) < head:
            found.append(f"truncated: by the anchor the chain goes on to record {head} (chain {chain})")
    return found


def _proof(
    record: Parsed | None, keys: Sequence[VerifyKey], signed: dict[str, int], *, broken: bool
) -> Proof:
    if broken:
        return Proof.BROKEN
    if record is None or not keys:
        return Proof.UNPROVEN
    if _mac_holds(record, keys):
        return Proof.HOLDS
    return Proof.SIGNED if record.seq <= signed.get(record.chain, 0) else Proof.UNPROVEN


async def key_history(
    store: AuditStore,
    session: Session,
    keys: Sequence[VerifyKey],
    key_id: str,
    before: str | None = None,
) -> History:
    """Return the records that name a key among the last ones before an id, or of all.

    Args:
        store: Where they are.
        session: Who asks; needs ``audit:read`` for all threads.
        keys: What records may be made with.
        key_id: Which key.
        before: Id of a record; None for the end of the log.

    Raises:
        PermissionDenied: The caller may not.
        InvalidParameter: ``before`` is no id.
        StoreUnavailable: Not now.
    """
    session.grants().require(Permission.AUDIT)
    name = key_id.encode()
    entries: list[Entry] = []
    looked_at = 0
    while looked_at < SCAN:
        page = await store.tail(before, _PAGE)
        for entry_id, line in page:
            looked_at += 1
            before = entry_id
            record = _parse(line) if name in line else None
            if record is not None and record.fields.get("key_id") == key_id:
                proof = Proof.HOLDS if _mac_holds(record, keys) else Proof.UNPROVEN
                if proof is Proof.UNPROVEN and keys and all(key.mac_key for key in keys):
                    proof = Proof.BROKEN
                entries.append(Entry(entry_id, record, proof))
                if len(entries) == FOUND:
                    return History(entries, looked_at, before)
        if len(page) < _PAGE:
            return History(entries, looked_at, None)
    return History(entries, looked_at, before)


def _mac_holds(record: Parsed, keys: Sequence[VerifyKey]) -> bool:
    return any(key.mac_key and key.mac_holds(record.body, record.mac) for key in keys)


def _parse(line: bytes) -> Parsed | None:
    if len(line) > _LONGEST or not line.startswith(RECORD_START):
        return None
    try:
        return parse_record(line)
    except (ValueError, TypeError):
        return None

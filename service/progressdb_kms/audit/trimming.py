"""Trims the stream of audit records: only behind signed floors, and only what has been verified."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import structlog

from progressdb_kms.domain.audit import AuditKey, Roster, VerifyKey, parse_document, sign_document
from progressdb_kms.domain.auditreport import Tip
from progressdb_kms.domain.auditverify import AuditVerifier
from progressdb_kms.ports.audit import Trim

if TYPE_CHECKING:
    from progressdb_kms.ports.audit import Anchor, AuditObserver, AuditStore

log = structlog.get_logger(__name__)

PAGE: Final = 50
"""Records verified between two turns of others: some 3 ms."""
MOST_AT_ONCE: Final = 20_000
"""Records behind one signature, so that a trim that fails has little to do again."""
BREATH: Final = 0.003
"""Seconds for others after each page: trimming takes half of a core at most, and keeps up with creates."""
ABANDONED: Final = 7 * 86_400.0
"""Seconds of silence after which a chain that was never closed counts as ended."""
KEPT_WITHOUT_STREAM: Final = 90 * 86_400.0
"""Seconds for which the head of an ended chain is kept where no stream is."""


class Trimmer:
    """Trims, when there is more than should be kept.

    Several instances may try at once: the roster is replaced by compare-and-set, so that one of them does it.

    Args:
        key: Signs floors and roster.
        known: What verifies the records that go: this key and those before it.
        store: Where the stream is.
        keep: Records to keep, about.
        observer: Told when it is refused.
        now: Gives Unix seconds.
    """

    def __init__(
        self,
        key: AuditKey,
        known: Sequence[VerifyKey],
        store: AuditStore,
        keep: int,
        observer: AuditObserver,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._key = key
        self._known = (key.verify, *known)
        self._store = store
        self._keep = keep
        self._observer = observer
        self._now = now

    async def run(self) -> int:
        """Trim what is more than should be kept, and return the number of records that went.

        Raises:
            StoreUnavailable, StoreNotDurable: Not now; what was trimmed stays so.
        """
        total = 0
        while True:
            gone = await self._trim_once()
            total += gone
            # Records may come faster than one trim at each call could follow, and would fill the store.
            if gone < MOST_AT_ONCE:
                return total

    async def _trim_once(self) -> int:
        anchor = await self._store.anchor()
        excess = anchor.length - self._keep
        if excess <= self._keep // 10:
            return 0
        verifier = AuditVerifier(self._known)
        for text in (*anchor.floors.values(), *anchor.heads.values(), anchor.roster):
            if text:
                verifier.anchor(text)
        gone, after, seen = 0, "0-0", set[str]()
        excess = min(excess, MOST_AT_ONCE)
        while gone < excess:
            page = await self._store.page(after, min(PAGE, excess - gone))
            if not page:
                break
            for entry_id, line in page:
                verifier.feed(line, "the stream", gone)
                seen.add(_chain_of(line))
                gone, after = gone + 1, entry_id
            await asyncio.sleep(BREATH)  # verifying takes time: others get their turn
        tips = {chain: verifier.tip(chain) for chain in seen}
        following = await self._store.page(after, 1)
        if not verifier.holds() or None in tips.values() or not following:
            self._observer.audit_trim_refused()
            problem = (
                verifier.report.problems[0].detail if verifier.report.problems else "other entries in it"
            )
            log.error(
                "audit_trim_refused", detail=problem, action="run audit verify; nothing is trimmed until then"
            )
            return 0
        known = {chain: tip for chain, tip in tips.items() if tip is not None}
        trim = self._trim(anchor, known, following[0][0])
        if not await self._store.trim(trim):
            return 0
        log.info("audit_trimmed", records=gone, forgotten=len(trim.dropped))
        return gone

    def _trim(self, anchor: Anchor, tips: Mapping[str, Tip], first_kept: str) -> Trim:
        floors: dict[str, bytes] = {}
        for chain, tip in tips.items():
            members = {"chain": chain, "seq": tip.seq, "mac": tip.mac, "link": tip.link, "closed": tip.closed}
            members |= {"chain_key": tip.key_id, "before": anchor.last_id}
            floors[chain] = sign_document(self._key, "floor", members)
        roster = Roster.read(anchor.roster)
        # What has been verified needs no later opening to vouch for it: so no record after ``before`` names a
        # chain that has ended and is trimmed whole, and it can be forgotten once ``before`` is trimmed.
        vouched = {
            chain: max(roster.chains[chain], tip.seq) for chain, tip in tips.items() if chain in roster.chains
        }
        roster = replace(roster, chains={**roster.chains, **vouched})
        dropped = [
            chain
            for chain in roster.chains
            if chain not in tips and self._forgotten(anchor, chain, first_kept)
        ]
        return Trim(self._next(anchor, roster, dropped, trimmed=True), floors, dropped, first_kept)

    def _next(
        self, anchor: Anchor, roster: Roster, dropped: list[str], *, trimmed: bool
    ) -> tuple[bytes, bytes]:
        chains = {chain: seq for chain, seq in roster.chains.items() if chain not in dropped}
        following = replace(
            roster, generation=roster.generation + 1, trims=roster.trims + trimmed, chains=chains
        )
        return anchor.roster, following.write(self._key)

    def _forgotten(self, anchor: Anchor, chain: str, first_kept: str) -> bool:
        """Say whether a chain has ended, was trimmed whole before, and is named by no record that stays."""
        try:
            head, floor = parse_document(anchor.heads[chain]), parse_document(anchor.floors[chain])
            ended = head.members["closed"] or self._now() - head.members["at"] > ABANDONED
            whole = floor.members["seq"] >= head.members["seq"]
            return bool(ended and whole and _place(str(floor.members["before"])) < _place(first_kept))
        except (KeyError, ValueError, TypeError):
            return False

    async def forget_old(self) -> int:
        """Where no stream is kept: forget heads of chains that ended long ago; return how many.

        Raises:
            StoreUnavailable, StoreNotDurable: Not now.
        """
        anchor = await self._store.anchor()
        old = [chain for chain, text in anchor.heads.items() if self._is_old(text)]
        if not old or anchor.length:
            return 0
        roster = Roster.read(anchor.roster)
        done = await self._store.trim(Trim(self._next(anchor, roster, old, trimmed=False), {}, old, ""))
        return len(old) if done else 0

    def _is_old(self, text: bytes) -> bool:
        try:
            return bool(self._now() - parse_document(text).members["at"] > KEPT_WITHOUT_STREAM)
        except (KeyError, ValueError, TypeError):
            return False


def _chain_of(line: bytes) -> str:
    """Return the chain that a line names; the verifier has judged it before."""
    start = line.rfind(b'"chain":"') + 9
    return line[start : line.find(b'"', start)].decode(errors="replace")


def _place(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)

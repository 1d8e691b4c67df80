"""Verifies audit logs: finds what was removed, changed, reordered, duplicated or cut off, and says where.

Streaming: one line after another, of any number of chains, in memory that does not grow with the log. With
the MAC key each record is proven by itself. With the public key alone the records between two signed ones are
proven
together: a change is found, and located between them. Chains name each other (an opening record says how far
earlier ones had come), and the anchor in the store says how far each has come: so what is missing at an end,
or a chain that is missing whole, is found too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from progressdb_kms.domain.audit import (
    CLOSE,
    DOCUMENT_START,
    NOTHING,
    OPEN,
    RECORD_START,
    Document,
    Parsed,
    Roster,
    VerifyKey,
    next_link,
    parse_document,
    parse_record,
)
from progressdb_kms.domain.auditreport import AuditReport, ChainReport, Problem, Tip

_MOST_INTENTS: Final = 10_000


class _State:
    """Where a chain is expected to go on."""

    __slots__ = (
        "clean",
        "gaps",
        "generation",
        "intents",
        "key",
        "link",
        "mac",
        "next",
        "report",
        "signed",
        "tip",
    )

    def __init__(self, chain: str, key: VerifyKey | None, tip: Tip | None) -> None:
        self.report = ChainReport(chain)
        self.key = key
        self.tip = tip
        self.next = 1
        self.mac: str | None = NOTHING
        self.link: str | None = NOTHING
        self.signed = 0
        self.generation = 0
        self.clean = True
        self.gaps: list[tuple[int, int, str]] = []
        self.intents: dict[tuple[object, ...], int] = {}


class AuditVerifier:
    """Takes lines one by one; ``finish`` tells what was found.

    Args:
        keys: What records may be signed with. With MAC keys each record is checked by itself.
        partial: The lines are not all there is: chains may begin in the middle, or not be there at all.
    """

    def __init__(self, keys: Iterable[VerifyKey], *, partial: bool = False) -> None:
        self._keys = {key.key_id: key for key in keys}
        self._partial = partial
        self._chains: dict[str, _State] = {}
        self._heads: dict[str, Tip] = {}
        self._floors: dict[str, Tip] = {}
        self._roster: Roster | None = None
        self._witnessed: dict[str, tuple[int, str]] = {}
        self._generation = 0
        self._where = ("", 0)
        self.report = AuditReport()

    def anchor(self, text: bytes, where: str = "the store's anchor") -> None:
        """Take a signed document: a head, a floor or the roster. Before the records that it speaks of."""
        try:
            document = parse_document(text)
            self._anchored(document, where)
        except (ValueError, KeyError, TypeError):
            self._problem("anchor", "", 0, 0, f"{where}: a document of the anchor is damaged")

    def feed(self, line: bytes, source: str = "", number: int = 0) -> None:
        """Take the next line, without its newline.

        Args:
            line: The line. What is no audit record is counted and left alone.
            source: Name of the file or stream, for messages.
            number: Number of the line.
        """
        self._where = (source, number)
        if not line.startswith(RECORD_START):
            if line.startswith(DOCUMENT_START):
                self.anchor(line, self._place())
            elif line:
                self.report.ignored += 1
            return
        try:
            parsed = parse_record(line)
        except (ValueError, TypeError):
            self._problem("unreadable", "", 0, 0, "a line can't be read: damaged, or torn by a crash")
            return
        if parsed is None:
            self.report.unchained += 1
            return
        self._record(parsed)

    def tip(self, chain: str) -> Tip | None:
        """Return how far a chain has been followed, None where its link is not known there."""
        state = self._chains.get(chain)
        if state is None or state.mac is None or state.link is None or state.key is None:
            return None
        return Tip(state.next - 1, state.mac, state.link, state.report.closed, state.key.key_id)

    def holds(self) -> bool:
        """Say whether all that was fed so far is in order, and what it says of other chains is borne out."""
        if self.report.problem_count or self.report.ignored or self.report.unchained:
            return False
        if any(state.gaps or state.key is None for state in self._chains.values()):
            return False
        return all(
            any(chain in tips and tips[chain].seq >= seq for tips in (self._heads, self._floors))
            for chain, (seq, _) in self._witnessed.items()
        )

    def finish(self, *, later: bytes = b"") -> AuditReport:
        """Judge the ends and return the report; where a roster was given, what it does not know is suspect.

        Args:
            later: The roster as it was after the last record was read, where records went on meanwhile.
        """
        self._where = ("", 0)
        for chain, state in self._chains.items():
            self._finish_chain(chain, state)
        if not self._partial:
            self._find_missing()
        if self._roster is not None:
            self._check_roster(self._roster, later)
        self.report.chains = [state.report for state in self._chains.values()]
        if self.report.unchained:
            self.report.note(
                f"{self.report.unchained} audit records stand in no chain: nothing vouches for them"
            )
        return self.report

    def _anchored(self, document: Document, where: str) -> None:
        if document.key_id not in self._keys:
            self._problem("unknown_key", "", 0, 0, f"{where}: signed with key {document.key_id}, not given")
            return
        if not document.signed_by(self._keys[document.key_id]):
            self._problem("anchor", "", 0, 0, f"{where}: the signature of a {document.kind} does not hold")
            return
        if document.kind == "roster":
            self._roster = Roster.read(
                document.body + b',"signature":"' + document.signature.encode() + b'"}'
            )
            return
        members = document.members
        tip = Tip(
            int(members["seq"]),
            str(members["mac"]),
            str(members["link"]),
            bool(members.get("closed", False)),
            str(members.get("chain_key", document.key_id)),
        )
        kept = {"head": self._heads, "floor": self._floors}.get(document.kind)
        if kept is not None:
            kept[str(members["chain"])] = tip

    def _record(self, record: Parsed) -> None:
        report = self.report
        report.records += 1
        state = self._chains.get(record.chain) or self._begin(record)
        if state is None or state.key is None:
            return
        key, seq = state.key, record.seq
        if key.mac_key and not key.mac_holds(record.body, record.mac):
            self._problem("changed", record.chain, seq, seq, f"record {seq} is not what was written")
            if seq == state.next:
                self._advance(state, record, known=False)
            return
        if seq < state.next:
            self._out_of_place(state, record)
            return
        if seq > state.next:
            state.gaps.append((state.next, seq - 1, self._place()))
            state.link, state.clean = None, False
        elif state.mac is not None and record.prev != state.mac:
            kind, first = ("forked", seq) if key.mac_key else ("changed", max(seq - 1, 1))
            self._problem(kind, record.chain, first, seq, f"record {seq} does not follow record {seq - 1}")
            state.clean = False
        if state.report.closed:
            self._problem("after_close", record.chain, seq, seq, "the chain goes on after it was closed")
        if record.is_control:
            self._control(state, record)
        self._advance(state, record, known=True)
        self._pair(state, record)

    def _begin(self, record: Parsed) -> _State | None:
        """Return the state of a chain of which this is the first record seen."""
        chain, seq = record.chain, record.seq
        floor, head = self._floors.get(chain), self._heads.get(chain)
        key_id = record.fields.get("key") if record.is_control else None
        if not isinstance(key_id, str):
            key_id = floor.key_id if floor else head.key_id if head else None
        key = self._keys.get(key_id) if key_id else self._try_keys(record)
        state = _State(chain, key, head)
        if key is None:
            self._problem("unknown_key", chain, seq, seq, f"made with key {key_id or 'unknown'}, not given")
            self._chains[chain] = state
            return state
        if seq > 1 and key.mac_key and not key.mac_holds(record.body, record.mac):
            # It says a chain's name, and that it is of it is not proven.
            self._problem(
                "changed", chain, seq, seq, "a record of a chain that was not seen begin does not hold"
            )
            return None
        if floor is not None and seq > floor.seq:
            state.next, state.mac, state.link, state.signed = floor.seq + 1, floor.mac, floor.link, floor.seq
        elif seq > 1:
            if self._partial:
                self.report.note(f"chain {chain} begins with record {seq}: what is before it was not given")
            else:
                state.gaps.append((1, seq - 1, self._place()))
            state.next, state.mac, state.link, state.clean = seq, None, None, False
        state.report.first = seq
        self._chains[chain] = state
        return state

    def _try_keys(self, record: Parsed) -> VerifyKey | None:
        for key in self._keys.values():
            if key.mac_key and key.mac_holds(record.body, record.mac):
                return key
        return next(iter(self._keys.values())) if len(self._keys) == 1 else None

    def _out_of_place(self, state: _State, record: Parsed) -> None:
        seq, chain = record.seq, record.chain
        for number, (first, last, where) in enumerate(state.gaps):
            if first <= seq <= last:
                rest = [(first, seq - 1, where), (seq + 1, last, where)]
                state.gaps[number : number + 1] = [gap for gap in rest if gap[0] <= gap[1]]
                self._problem(
                    "reordered", chain, seq, seq, f"record {seq} stands behind record {state.next - 1}"
                )
                return
        self._problem("duplicated", chain, seq, seq, f"record {seq} is there again")

    def _control(self, state: _State, record: Parsed) -> None:
        chain, seq, key = record.chain, record.seq, state.key
        if key is None or not record.signature_holds(key) or record.fields.get("key") != key.key_id:
            self._problem("changed", chain, seq, seq, f"the signature of record {seq} does not hold")
            state.clean = False
            return
        stated = str(record.fields.get("link"))
        if state.link is not None and stated != state.link and state.clean:
            first = state.signed + 1
            self._problem(
                "changed",
                chain,
                first,
                seq - 1,
                f"records {first} to {seq - 1} are not those that were signed",
            )
        state.link, state.clean, state.signed = stated, True, seq
        generation = record.fields.get("roster")
        if isinstance(generation, int):
            state.generation = state.generation or generation
            self._generation = max(self._generation, generation)
        if record.action == CLOSE:
            state.report.closed = True
        elif record.action == OPEN:
            state.report.instance = str(record.fields.get("instance", ""))
            self._opening(record)

    def _opening(self, record: Parsed) -> None:
        """Take what an opening says of other chains."""
        fields, chain = record.fields, record.chain
        if fields.get("roster_damaged"):
            self._problem("anchor", chain, 1, 1, "when the chain was opened, the roster did not hold")
        if (key_id := fields.get("roster_key")) is not None and key_id not in self._keys:
            self._problem(
                "unknown_key", chain, 1, 1, f"it found a roster signed with key {key_id}, not given"
            )
        witnessed = dict(fields["chains"]) if isinstance(fields.get("chains"), dict) else {}
        if isinstance(after := fields.get("after"), dict):
            # The chain that the same process gave up, since the store had lost a part of it.
            witnessed[after.get("chain")] = after.get("seq")
        for other, last in witnessed.items():
            if isinstance(last, int) and last > self._witnessed.get(other, (0, ""))[0]:
                self._witnessed[other] = (last, chain)

    def _advance(self, state: _State, record: Parsed, *, known: bool) -> None:
        report = state.report
        report.records += 1
        report.last = record.seq
        state.next = record.seq + 1
        if not known:
            state.mac, state.link, state.clean = None, None, False
            return
        state.mac = record.mac
        if state.link is not None:
            state.link = next_link(state.link, record.line)
        tip = state.tip
        if tip is not None and record.seq == tip.seq:
            linked = state.link is None or not state.clean or state.link == tip.link
            if tip.mac != record.mac or not linked:
                self._problem(
                    "forked" if tip.mac != record.mac else "changed",
                    record.chain,
                    state.signed + 1 if tip.mac == record.mac else record.seq,
                    record.seq,
                    f"the anchor knows another record {record.seq}, or another way to it",
                )
            elif state.link is not None and state.clean:
                state.signed = record.seq

    @staticmethod
    def _pair(state: _State, record: Parsed) -> None:
        outcome = record.fields.get("outcome")
        names = tuple(record.fields.get(name) for name in ("audit", "request_id", "key_id", "identity"))
        if outcome == "intent":
            if len(state.intents) < _MOST_INTENTS:
                state.intents[names] = record.seq
        elif state.intents:
            state.intents.pop(names, None)

    def _finish_chain(self, chain: str, state: _State) -> None:
        report, last = state.report, state.next - 1
        for first, end, where in state.gaps:
            self._problem("removed", chain, first, end, f"records {first} to {end} are missing", where)
        if state.key is None:
            return
        report.signed_to, report.open_intents = state.signed, len(state.intents)
        expected = state.tip.seq if state.tip else 0
        witnessed, witness = self._witnessed.get(chain, (0, ""))
        if last < max(expected, witnessed):
            end = max(expected, witnessed)
            by = "the anchor" if expected >= witnessed else f"the opening of chain {witness}"
            if self._partial:
                self.report.note(
                    f"chain {chain} ends with record {last}, and by {by} goes on to record {end}"
                )
            else:
                self._problem("truncated", chain, last + 1, end, f"by {by} it goes on to record {end}")
        elif not report.closed and state.tip is None and not witnessed:
            if self._roster is not None and state.generation <= self._roster.generation:
                self._problem("anchor", chain, last, last, "not closed, and the anchor does not know it")
            else:
                self.report.note(
                    f"chain {chain} is not closed: only the anchor can say that record {last} is its last"
                )
        if not state.key.mac_key and state.signed < last:
            self.report.note(
                f"chain {chain}: no signature vouches yet for records {state.signed + 1} to {last}"
            )
        if state.intents:
            numbers = ", ".join(str(seq) for seq in sorted(state.intents.values())[:10])
            self.report.note(
                f"chain {chain}: {len(state.intents)} changes have no outcome: records {numbers}"
            )

    def _find_missing(self) -> None:
        named = {chain: (seq, f"the opening of chain {by}") for chain, (seq, by) in self._witnessed.items()}
        for chain, tip in self._heads.items():
            if tip.seq >= named.get(chain, (0, ""))[0]:
                named[chain] = (tip.seq, "the anchor")
        for chain, (last, by) in named.items():
            floor = self._floors.get(chain)
            if chain in self._chains or (floor is not None and floor.seq >= last):
                continue
            first = floor.seq + 1 if floor else 1
            if last == 1:
                # An opening is anchored before it is written anywhere else: a crash in between leaves this.
                self.report.note(f"chain {chain} was opened and nothing more, and its opening is not here")
                continue
            self._problem("missing_chain", chain, first, last, f"by {by} there are records {first} to {last}")

    def _check_roster(self, roster: Roster, later: bytes) -> None:
        generation = roster.generation
        if later:
            document = parse_document(later)
            if document.signed_by(self._keys.get(document.key_id)):
                generation = max(generation, Roster.read(later).generation)
        if generation < self._generation:
            detail = f"the roster is of generation {generation}, put back: records know {self._generation}"
            self._problem("anchor", "", 0, 0, detail)
        for chain in roster.chains.keys() - self._heads.keys():
            self._problem("anchor", chain, 0, 0, "the roster lists the chain and its head is missing")
        for chain in self._heads.keys() - roster.chains.keys():
            self._problem(
                "anchor", chain, 0, 0, "there is a head of the chain, and the roster does not list it"
            )

    def _problem(
        self, kind: str, chain: str, first: int, last: int, detail: str, where: str | None = None
    ) -> None:
        place = self._place() if where is None else where
        self.report.problem(Problem(kind, chain, first, last, place, detail))

    def _place(self) -> str:
        source, number = self._where
        return f"{source}:{number}" if number else source

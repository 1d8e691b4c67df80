"""The verifier: whatever is done to an audit log is found, and where; a sound one is left in peace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.domain.audit import (
    AuditKey,
    Parsed,
    Roster,
    VerifyKey,
    parse_document,
    parse_record,
    sign_document,
)
from progressdb_kms.domain.auditverify import AuditVerifier
from tests.unit.domain.audit_scene import KEY, MAC, OTHER_KEY, PUBLIC, Log, found, verified, whole

BOTH = pytest.mark.parametrize("keys", [MAC, PUBLIC], ids=["mac", "public"])
LINES = whole().lines


def without(lines: list[bytes], *numbers: int) -> list[bytes]:
    """Return the lines but those of these records."""
    return [line for number, line in enumerate(lines, 1) if number not in numbers]


@BOTH
def test_a_whole_log_is_intact(keys: tuple[VerifyKey, ...]) -> None:
    """Nothing is found, and a signature vouches for all of it."""
    report = verified(LINES, keys)
    assert (found(report), report.notes) == ([], [])
    (chain,) = report.chains
    assert (chain.first, chain.last, chain.records, chain.closed) == (1, 13, 13, True)
    assert (report.records, chain.signed_to) == (13, 13)


@BOTH
@pytest.mark.parametrize("number", range(1, 14))
def test_a_removed_record_is_found(keys: tuple[VerifyKey, ...], number: int) -> None:
    """Wherever it stood; of the last one only the anchor can tell."""
    log = whole()
    report = verified(without(log.lines, number), keys, [log.head(closed=True)])
    expected = ("truncated" if number == 13 else "removed", number, number)
    assert expected in found(report)
    assert {kind for kind, _, _ in found(report)} == {expected[0]}


@BOTH
@given(data=st.data())
def test_any_changed_byte_is_found(keys: tuple[VerifyKey, ...], data: st.DataObject) -> None:
    """And located: at the record, or between the signed records around it."""
    log = whole()
    number = data.draw(st.integers(1, 13))
    line = bytearray(log.lines[number - 1])
    place = data.draw(st.integers(0, len(line) - 1))
    line[place] ^= data.draw(st.integers(1, 127))
    lines = [*log.lines[: number - 1], bytes(line), *log.lines[number:]]
    report = verified(lines, keys, [log.head(closed=True)])
    assert not report.intact
    assert any(
        problem.first <= number <= problem.last or problem.where == f"f:{number}"
        for problem in report.problems
        if problem.kind in {"changed", "unreadable", "removed", "forked", "truncated", "unknown_key"}
    ), report.problems


@given(data=st.data())
def test_a_change_without_the_key_is_found_by_the_public_key(data: st.DataObject) -> None:
    """Also if all MACs are made to look right: the signed link tells, between which records."""
    log = whole()
    number = data.draw(st.sampled_from([2, 3, 4, 5, 6, 8, 9, 10, 11, 12]))
    forged = log.lines[number - 1].replace(b'"outcome":"ok"', b'"outcome":"no"')
    lines = [*log.lines[: number - 1], forged, *log.lines[number:]]
    assert found(verified(lines, PUBLIC)) == [("changed", 2, 6) if number < 7 else ("changed", 8, 12)]
    assert found(verified(lines, MAC)) == [("changed", number, number)]


@BOTH
@given(order=st.permutations(range(2, 13)))
def test_reordered_records_are_found(keys: tuple[VerifyKey, ...], order: list[int]) -> None:
    """Any other order of the records between opening and closing."""
    lines = [LINES[0], *(LINES[number - 1] for number in order), LINES[12]]
    report = verified(lines, keys)
    if order == list(range(2, 13)):
        assert report.intact
        return
    assert {kind for kind, _, _ in found(report)} == {"reordered"}
    assert all(2 <= first <= 12 for _, first, _ in found(report))


@BOTH
@given(number=st.integers(1, 13), place=st.integers(0, 13))
def test_a_duplicate_is_found(keys: tuple[VerifyKey, ...], number: int, place: int) -> None:
    """Wherever it is put."""
    lines = [*LINES[:place], LINES[number - 1], *LINES[place:]]
    report = verified(lines, keys)
    if place < number - 1:  # the copy comes first: the record itself is the one out of place
        assert not report.intact
        assert any(first == number for _, first, _ in found(report))
    else:
        assert found(report) == [("duplicated", number, number)]
        assert report.problems[0].where == f"f:{max(place + 1, number + 1)}"


@BOTH
@given(last=st.integers(1, 12), anchored=st.integers(1, 13))
def test_a_truncation_is_found_by_the_anchor(keys: tuple[VerifyKey, ...], last: int, anchored: int) -> None:
    """If the log ends before the anchored head; a log that is ahead of it is fine."""
    log = whole()
    report = verified(log.lines[:last], keys, [log.head(anchored)])
    assert found(report) == ([("truncated", last + 1, anchored)] if last < anchored else [])


def test_without_an_anchor_an_open_end_is_said() -> None:
    """It is no problem, and not passed over either."""
    report = verified(LINES[:9])
    assert report.intact
    assert "not closed" in report.notes[0]


def test_a_tail_that_no_signature_covers_is_said() -> None:
    """With the public key alone, up to where the log is vouched for; the anchored head covers it."""
    log = Log().open().say(4)
    assert "no signature vouches yet for records 2 to 5" in verified(log.lines, PUBLIC).notes[1]
    report = verified(log.lines, PUBLIC, [log.head()])
    assert (report.notes, report.chains[0].signed_to) == ([], 5)
    forged = [*log.lines[:2], log.lines[2].replace(b"create", b"delete"), *log.lines[3:]]
    assert found(verified(forged, PUBLIC, [log.head()])) == [("changed", 2, 5)]


@BOTH
def test_several_chains_may_be_mixed(keys: tuple[VerifyKey, ...]) -> None:
    """Instances write into one stream, and each chain is judged by itself."""
    one, two = whole(name="c1"), whole(name="c2")
    mixed = [line for pair in zip(one.lines, two.lines, strict=True) for line in pair]
    assert verified(mixed, keys).intact
    report = verified(without(mixed, 8), keys)
    assert [(problem.chain, problem.first) for problem in report.problems] == [("c2", 4)]


@BOTH
def test_a_chain_that_is_gone_whole_is_found(keys: tuple[VerifyKey, ...]) -> None:
    """By the opening of a later chain, closed or not, and by the anchor."""
    one = whole()
    two = Log("c2").open(2, chains={"c1": 13}).say(3).close()
    assert verified([*one.lines, *two.lines], keys).intact
    assert found(verified(two.lines, keys)) == [("missing_chain", 1, 13)]
    assert found(verified(two.lines, keys, [one.head(closed=True)])) == [("missing_chain", 1, 13)]
    assert found(verified(one.lines[:9] + two.lines, keys)) == [("truncated", 10, 13)]
    report = verified(two.lines, keys, partial=True)
    assert report.intact


def test_going_on_after_the_end_is_found() -> None:
    """A closed chain has no further records, whoever signs them."""
    log = whole().say(1)
    assert found(verified(log.lines)) == [("after_close", 14, 14)]


@BOTH
def test_records_of_another_key_are_not_taken(keys: tuple[VerifyKey, ...]) -> None:
    """A chain that somebody made with a key of their own, under any name, is reported."""
    report = verified([*LINES, *Log("evil", OTHER_KEY).open().say(2).lines], keys)
    assert found(report) == [("unknown_key", 1, 1)]
    forger = Log("evil", OTHER_KEY).open().say(2)
    lines = [line.replace(OTHER_KEY.key_id.encode(), KEY.key_id.encode()) for line in forger.lines]
    assert not verified([*LINES, *lines], keys).intact


def test_two_histories_of_a_chain_are_found() -> None:
    """Whoever has the key and writes another history contradicts the anchored head."""
    log, other = Log().open().say(5), Log().open().say(3).say(2, "key.destroy")
    assert log.lines[:4] == other.lines[:4]
    assert found(verified(other.lines, MAC, [log.head()])) == [("forked", 6, 6)]
    mixed = [*log.lines[:4], *other.lines[4:]]
    assert verified(mixed, MAC).intact
    assert found(verified([*log.lines[:5], other.lines[5]], MAC)) == [("forked", 6, 6)]


@BOTH
def test_a_trimmed_log_begins_at_its_floor(keys: tuple[VerifyKey, ...]) -> None:
    """With the signed floor it is whole; a record more or less is found."""
    log = whole()

    def floor(last: int) -> bytes:
        record = log.records[last - 1]
        members = {"chain": "c1", "seq": last, "mac": record.mac, "link": record.link, "closed": False}
        return sign_document(KEY, "floor", members)

    report = verified(log.lines[4:], keys, [floor(4)])
    assert (found(report), report.chains[0].signed_to) == ([], 13)
    assert found(verified(log.lines[5:], keys, [floor(4)])) == [("removed", 5, 5)]
    assert found(verified(log.lines[4:], keys)) == [("removed", 1, 4)]
    assert verified(log.lines[4:], keys, partial=True).intact
    # A checkpoint vouches for itself.
    assert found(verified(log.lines[6:], keys, [floor(6)])) == []


def test_changes_without_an_outcome_are_said() -> None:
    """A process that ended in between leaves an intent."""
    log = Log().open()
    for outcome, number in (("intent", 1), ("ok", 1), ("intent", 2), ("failed", 2), ("intent", 3)):
        fields = {"audit": "key.disable", "outcome": outcome, "request_id": f"r{number}", "key_id": "k"}
        log.records.append(log.chain.append(fields))
    report = verified(log.close().lines)
    assert report.intact
    assert report.chains[0].open_intents == 1
    assert "records 6" in report.notes[0]


def test_what_is_no_audit_record_is_left_alone() -> None:
    """A job prints other lines too; unchained records are counted, and nothing vouches for them."""
    lines = [b'{"event":"result"}', *LINES, b'{"audit":"key.create","at":1}', b""]
    report = verified(lines)
    assert (report.intact, report.ignored, report.unchained) == (True, 1, 1)
    assert "stand in no chain" in report.notes[0]


@pytest.mark.parametrize(
    "line",
    [
        b'{"audit":"x","chain":"c","seq":1,"prev":"0","mac":"zz"}',
        b'{"audit":"x","chain":"c","seq":"1"}',
        b'{"audit":"x","chain":',
        b'{"audit":"x","chain":"c","seq":true,"prev":"","mac":"' + b"0" * 64 + b'"}',
        b'{"audit":"\xff"}',
        b'{"audit":' + b"[" * 2000,
        b'{"audit":' + b"[" * 100_000,
    ],
)
def test_a_torn_line_is_found(line: bytes) -> None:
    """It is reported with its place, and nothing else is."""
    report = verified([*LINES, line])
    assert found(report) == [("unreadable", 0, 0)]
    assert report.problems[0].where == "f:14"


class TestAnchor:
    """The signed documents of the store."""

    def roster(self, generation: int = 3, **chains: int) -> bytes:
        """Return a roster."""
        return Roster(generation, 0, chains).write(KEY)

    @BOTH
    def test_one_that_fits_is_fine(self, keys: tuple[VerifyKey, ...]) -> None:
        """Roster, heads and records agree."""
        log = whole()
        assert verified(log.lines, keys, [self.roster(c1=0), log.head(closed=True)]).intact

    @BOTH
    def test_a_changed_document_is_found(self, keys: tuple[VerifyKey, ...]) -> None:
        """A head that is set back, or a roster that lists less, has no signature."""
        log = whole()
        set_back = log.head().replace(b'"seq":13', b'"seq":12')
        assert found(verified(log.lines, keys, [set_back])) == [("anchor", 0, 0)]
        shorter = self.roster(c1=0, c2=0).replace(b',"c2":0', b"")
        assert found(verified(log.lines, keys, [shorter, log.head()])) == [("anchor", 0, 0)]
        assert found(verified(log.lines, keys, [b"{"])) == [("anchor", 0, 0)]

    def test_a_document_of_another_key_is_found(self) -> None:
        """Nobody can bring an anchor of their own."""
        foreign = Log("c1", OTHER_KEY).open().head()
        assert found(verified(LINES, MAC, [foreign])) == [("unknown_key", 0, 0)]

    @BOTH
    def test_a_head_that_is_gone_is_found(self, keys: tuple[VerifyKey, ...]) -> None:
        """The roster lists it."""
        report = verified(LINES, keys, [self.roster(c1=0)])
        assert [(problem.kind, problem.chain) for problem in report.problems] == [("anchor", "c1")]

    @BOTH
    def test_a_chain_that_is_gone_with_its_head_is_found(self, keys: tuple[VerifyKey, ...]) -> None:
        """The roster still lists it; and one that is not listed is found too."""
        log = whole()
        report = verified(log.lines, keys, [self.roster(c1=0, c2=0), log.head()])
        assert [(problem.kind, problem.chain) for problem in report.problems] == [("anchor", "c2")]
        report = verified(log.lines, keys, [self.roster(), log.head()])
        assert [(problem.kind, problem.chain) for problem in report.problems] == [("anchor", "c1")]

    @BOTH
    def test_a_roster_that_was_put_back_is_found(self, keys: tuple[VerifyKey, ...]) -> None:
        """Records say of which generation they know."""
        log = Log().open(7).close()
        report = verified(log.lines, keys, [self.roster(6, c1=0), log.head()])
        assert found(report) == [("anchor", 0, 0)]

    def test_a_roster_that_has_gone_on_meanwhile_is_fine(self) -> None:
        """Records are read after the anchor: a chain that was opened since is not suspicious."""
        log = Log().open(7).say(2)
        verifier = AuditVerifier(MAC)
        verifier.anchor(self.roster(6))
        for number, line in enumerate(log.lines, 1):
            verifier.feed(line, "f", number)
        assert verifier.finish(later=self.roster(7, c1=0)).intact

    def test_an_open_chain_that_it_does_not_know_is_found(self) -> None:
        """Its head and its place in the roster were removed, to cut off its end."""
        report = verified(Log().open(2).say(3).lines, MAC, [self.roster(5)])
        assert found(report) == [("anchor", 4, 4)]

    def test_a_damaged_roster_at_an_opening_is_found(self) -> None:
        """Whoever opens a chain says what they found."""
        report = verified(Log().open(roster_damaged=True).close().lines)
        assert found(report) == [("anchor", 1, 1)]
        report = verified(Log().open(roster_key="ak_0").close().lines)
        assert found(report) == [("unknown_key", 1, 1)]

    def test_a_chain_that_was_given_up_is_held_to_its_end(self) -> None:
        """A process that saw the store lose a part of its chain begins another, which says where it was."""
        one = Log().open().say(8)
        two = Log("c2").open(2, after={"chain": "c1", "seq": 9, "mac": ""}).close()
        assert verified([*one.lines, *two.lines]).intact
        assert found(verified([*one.lines[:5], *two.lines])) == [("truncated", 6, 9)]


def test_holds_says_whether_a_beginning_is_in_order() -> None:
    """Before anything is trimmed: no hole, no stranger, and no chain named that is not known."""

    def holds(lines: list[bytes], *anchor: bytes) -> bool:
        verifier = AuditVerifier(MAC)
        for text in anchor:
            verifier.anchor(text)
        for line in lines:
            verifier.feed(line)
        return verifier.holds()

    log = whole()
    assert holds(log.lines[:8])
    assert not holds(without(log.lines, 3)[:8])
    assert not holds([*log.lines[:2], b"stray"])
    later = Log("c2").open(chains={"c1": 13})
    assert not holds(later.lines)
    assert not holds(later.lines, log.head(9))
    assert holds(later.lines, log.head())


def test_problems_are_counted_beyond_those_that_are_kept() -> None:
    """A log that is all wrong costs no memory without bound."""
    line = LINES[3]
    report = verified([*LINES, *[line] * 1500])
    assert (report.problem_count, len(report.problems)) == (1500, 1000)


def test_a_key_is_32_bytes_and_shows_nothing() -> None:
    """Neither the secret nor the MAC key is in a text form."""
    with pytest.raises(ValueError, match="32 bytes"):
        AuditKey(b"short")
    assert KEY.verify.mac_key.hex() not in repr(KEY.verify) + repr(KEY)
    assert repr(KEY.verify.mac_key) not in repr(KEY.verify)


def test_forms_are_fixed() -> None:
    """What a released version wrote is read for ever."""
    log = Log().open().say(1)
    assert log.lines[1] == (
        b'{"audit":"key.create","at":1.5,"outcome":"ok","request_id":"r1","chain":"c1","seq":2,"prev":"'
        + log.records[0].mac.encode()
        + b'","mac":"'
        + log.records[1].mac.encode()
        + b'"}'
    )
    assert KEY.key_id == "ak_b4083df9c26b0721"
    assert log.records[1].mac == "c3b920b3cd4ef680734eeadd6070f2f622b6f7366a5212d1e622d819fb7beae3"
    assert log.records[1].link == "d29e19ed642ed56b1695d19c2ea7d21d79e51bb1757b6c37c2c8331d73610576"
    parsed = parse_record(log.lines[1])
    assert isinstance(parsed, Parsed)
    assert (parsed.action, parsed.seq, parsed.chain) == ("key.create", 2, "c1")
    assert Roster.read(Roster(2, 1, {"c": 3}).write(KEY)) == Roster(2, 1, {"c": 3}, KEY.key_id)
    assert parse_document(log.head()).members["seq"] == 2


@pytest.mark.parametrize("text", [b"[]", b"{}", b'{"kind":"head"}', b"", b'{"kind":1,"key":"k"}'])
def test_what_is_no_document_is_refused(text: bytes) -> None:
    """With an error, whatever it is."""
    with pytest.raises(ValueError, match=r".*"):
        parse_document(text)

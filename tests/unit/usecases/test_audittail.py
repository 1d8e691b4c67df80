"""The end of the audit log: what a few records prove, and what is found out about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest

from progressdb_kms.domain.audit import NOTHING, AuditKey, Chain, Record, VerifyKey
from progressdb_kms.domain.errors import InvalidParameter, PermissionDenied
from progressdb_kms.domain.identity import Identity, IdentityKind
from progressdb_kms.domain.policy import parse_policy
from progressdb_kms.ports.audit import AuditBatch, Committed
from progressdb_kms.store.memory_audit import MemoryAudit
from progressdb_kms.usecases.audittail import FOUND, SCAN, TAIL, Proof, Tail, audit_tail, key_history
from progressdb_kms.usecases.session import PolicyBook, Session
from tests.unit.helpers import RULES, Clock

KEY = AuditKey(b"\x01" * 32)
OTHER = AuditKey(b"\x02" * 32)
KEYS = (KEY.verify,)
PUBLIC = (VerifyKey.of(KEY.verify.public),)
KEY_ID = "k_" + "A" * 28


def caller(name: str = "operator") -> Session:
    """Return the session of ``dns:<name>``."""
    return Session(Identity(IdentityKind.DNS, name), PolicyBook(parse_policy(RULES)), Clock())


class Log:
    """Chains in a memory store."""

    def __init__(self) -> None:
        self.store = MemoryAudit()
        self.chains: dict[str, Chain] = {}

    async def write(
        self, count: int, chain: str = "c1", key: AuditKey = KEY, **fields: object
    ) -> list[Record]:
        """Write records and move the chain's head."""
        made = self.chains.setdefault(chain, Chain(key, chain))
        confirmed = (made.last.seq, made.last.mac) if made.last.seq else (0, NOTHING)
        records = [made.append({"audit": "key.create", "at": 1.0, **fields}) for _ in range(count)]
        batch = AuditBatch(chain, confirmed, records, made.head(records[-1], 1.0), stream=True)
        assert await self.store.commit(batch) is Committed.DONE
        return records

    async def sign(self, chain: str = "c1") -> None:
        """Write a signed checkpoint."""
        made = self.chains[chain]
        confirmed = (made.last.seq, made.last.mac)
        record = made.control({"audit": "audit.checkpoint", "at": 1.0})
        batch = AuditBatch(chain, confirmed, [record], made.head(record, 1.0), stream=True)
        assert await self.store.commit(batch) is Committed.DONE

    def places(self) -> list[tuple[int, int]]:
        """Return the ids of all records, the oldest first."""
        return list(self.store.stream)

    async def tail(self, keys: Sequence[VerifyKey] = KEYS, before: str | None = None) -> Tail:
        """Return the tail."""
        return await audit_tail(self.store, caller(), keys, before)


@pytest.fixture
def log() -> Log:
    """An empty log."""
    return Log()


def proofs(tail: Tail) -> set[Proof]:
    """Return all that is known of any record."""
    return {entry.proof for entry in tail.entries}


async def test_only_auditors_may_read_it(log: Log) -> None:
    """Without audit:read nothing is read, neither tail nor history."""
    for name in ("server", "room", "nobody"):
        with pytest.raises(PermissionDenied):
            await audit_tail(log.store, caller(name), KEYS)
        with pytest.raises(PermissionDenied):
            await key_history(log.store, caller(name), KEYS, KEY_ID)


async def test_an_empty_log_has_no_problem(log: Log) -> None:
    """No records, nothing wrong."""
    tail = await log.tail()
    assert (tail.entries, tail.problems, tail.older, tail.kept) == ([], [], None, 0)


async def test_whole_log_holds(log: Log) -> None:
    """Records of several chains, one of them opened before the part that is shown: each holds."""
    await log.write(TAIL)
    await log.write(20, "c2")
    await log.write(5)
    tail = await log.tail()
    assert (len(tail.entries), tail.problems, proofs(tail)) == (TAIL, [], {Proof.HOLDS})
    assert [entry.record.seq for entry in tail.entries if entry.record][:6] == [105, 104, 103, 102, 101, 20]
    assert tail.at_end
    older = await log.tail(before=tail.older)
    assert (len(older.entries), older.older, older.problems, older.at_end) == (25, None, [], False)
    assert {entry.entry_id for entry in tail.entries}.isdisjoint({entry.entry_id for entry in older.entries})


async def test_a_changed_record_is_named(log: Log) -> None:
    """It alone is broken, the others hold."""
    await log.write(9, identity="dns:a")
    place = log.places()[4]
    log.store.stream[place] = log.store.stream[place].replace(b"dns:a", b"dns:b")
    tail = await log.tail()
    broken = [entry for entry in tail.entries if entry.proof is Proof.BROKEN]
    assert [entry.record.seq for entry in broken if entry.record] == [5]
    assert any(problem.startswith("changed") for problem in tail.problems)


@pytest.mark.parametrize("seqs", [[4], [4, 5, 6]])
async def test_a_removed_record_is_missed(log: Log, seqs: list[int]) -> None:
    """Records between those shown can't go unnoticed."""
    await log.write(9)
    for _ in seqs:
        del log.store.stream[log.places()[3]]
    assert any(problem.startswith("removed") for problem in (await log.tail()).problems), seqs


async def test_an_end_that_was_cut_off_is_missed(log: Log) -> None:
    """The signed head in the store says how far the chain goes."""
    await log.write(9)
    del log.store.stream[log.places()[-1]]
    tail = await log.tail()
    assert any(problem.startswith("truncated") for problem in tail.problems)
    # An older part ends before its chains' heads, and nothing is wrong with that.
    assert (await log.tail(before="{}-{}".format(*log.places()[-2]))).problems == []


@pytest.mark.parametrize("how", [lambda all_: all_[::-1], lambda all_: [all_[0], *all_]])
async def test_order_counts(log: Log, how: Callable[[list[bytes]], list[bytes]]) -> None:
    """Records in another order, or there twice, are found."""
    await log.write(3)
    log.store.stream = {(1, number): line for number, line in enumerate(how([*log.store.stream.values()]))}
    assert (await log.tail()).problems


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"audit":',
        b'{"audit":"x","chain":"c1","seq":10}',
        b'{"audit":' + b"[" * 100_000,
        b'{"audit":"' + b"x" * 2**20 + b'"}',
        b'{"kind":"head"}',
    ],
)
async def test_what_is_no_record_is_told(log: Log, line: bytes) -> None:
    """Whatever somebody puts into the stream is broken, and ends nothing."""
    await log.write(3)
    log.store.stream[2**50, 0] = line
    tail = await log.tail()
    assert [entry.proof for entry in tail.entries] == [Proof.BROKEN, *[Proof.HOLDS] * 3]
    assert any(problem.startswith("unreadable") for problem in tail.problems)


async def test_a_record_outside_all_chains_is_not_proven(log: Log) -> None:
    """It says nothing that anybody vouches for."""
    await log.write(3)
    log.store.stream[2**50, 0] = b'{"audit":"key.destroy","at":1}'
    assert [entry.proof for entry in (await log.tail()).entries][:2] == [Proof.UNPROVEN, Proof.HOLDS]


async def test_a_forged_chain_is_told(log: Log) -> None:
    """Made with a key that is not ours, with a head and all: nothing of it holds."""
    await log.write(3)
    await log.write(2, "forged", OTHER)
    tail = await log.tail()
    assert [entry.proof for entry in tail.entries[:2]] == [Proof.BROKEN] * 2
    assert {Proof.HOLDS} == {entry.proof for entry in tail.entries[2:]}
    assert tail.problems


async def test_a_damaged_head_is_told(log: Log) -> None:
    """A head that is no document, or is not signed, is a problem and not an error."""
    for head in (b"", b"nonsense", json.dumps({"kind": "head", "seq": 9}).encode()):
        await log.write(1)
        log.store.heads["c1"], kept = head, log.store.heads["c1"]
        assert any("anchor" in problem for problem in (await log.tail()).problems), head
        log.store.heads["c1"] = kept


async def test_without_a_key_nothing_is_claimed(log: Log) -> None:
    """No record is said to hold."""
    await log.write(3)
    tail = await log.tail(())
    assert (tail.keyed, proofs(tail), tail.problems) == (False, {Proof.UNPROVEN}, [])


async def test_the_public_key_proves_what_is_signed(log: Log) -> None:
    """Records before a signed one are vouched for; those after the head are not said to hold."""
    await log.write(3)
    await log.sign()
    tail = await log.tail(PUBLIC)
    assert (proofs(tail), tail.problems) == ({Proof.SIGNED}, [])


async def test_history_is_of_one_key(log: Log) -> None:
    """Records that name the key, the latest first; not those of another key that mention it."""
    await log.write(2, key_id=KEY_ID)
    await log.write(1, key_id="k_" + "B" * 28, detail=KEY_ID)
    await log.write(1, key_id=KEY_ID)
    found = await key_history(log.store, caller(), KEYS, KEY_ID)
    assert [entry.record.seq for entry in found.entries if entry.record] == [4, 2, 1]
    assert (found.looked_at, found.older) == (4, None)
    assert {entry.proof for entry in found.entries} == {Proof.HOLDS}
    place = log.places()[0]
    log.store.stream[place] = log.store.stream[place].replace(b'"at":1.0', b'"at":2.0')
    found = await key_history(log.store, caller(), KEYS, KEY_ID)
    assert found.entries[-1].proof is Proof.BROKEN
    for keys in ((), PUBLIC):
        found = await key_history(log.store, caller(), keys, KEY_ID)
        assert {entry.proof for entry in found.entries} == {Proof.UNPROVEN}


async def test_history_is_bounded(log: Log) -> None:
    """So many records are looked through at a time, so many found, and the next look goes on behind them."""
    await log.write(1, key_id=KEY_ID)
    await log.write(SCAN + 10)
    found = await key_history(log.store, caller(), KEYS, KEY_ID)
    assert (found.entries, found.looked_at) == ([], SCAN)
    found = await key_history(log.store, caller(), KEYS, KEY_ID, found.older)
    assert (len(found.entries), found.looked_at, found.older) == (1, 11, None)
    await log.write(FOUND + 5, key_id=KEY_ID)
    found = await key_history(log.store, caller(), KEYS, KEY_ID)
    assert (len(found.entries), found.looked_at) == (FOUND, FOUND)
    assert found.older is not None
    with pytest.raises(InvalidParameter):
        await key_history(log.store, caller(), KEYS, KEY_ID, "x")

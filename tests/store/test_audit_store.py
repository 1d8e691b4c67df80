"""Audit chains over every store."""

from __future__ import annotations

from dataclasses import replace

import pytest

from progressdb_kms.domain.audit import NOTHING, AuditKey, Chain, Record, Roster
from progressdb_kms.domain.errors import InvalidParameter
from progressdb_kms.ports.audit import AuditBatch, AuditStore, Committed, Trim
from tests.store.conftest import Harness, RedisHarness

KEY = AuditKey(b"\x01" * 32)
ROSTER = Roster(1, 0, {"c1": 0}).write(KEY)


class Writer:
    """A chain and what is known of it."""

    def __init__(self, store: AuditStore, name: str = "c1") -> None:
        self.store = store
        self.chain = Chain(KEY, name)

    def records(self, count: int) -> list[Record]:
        """Make records."""
        return [self.chain.append({"audit": "x"}) for _ in range(count)]

    def batch(self, records: list[Record], confirmed: tuple[int, str] = (0, NOTHING)) -> AuditBatch:
        """Return a batch of records."""
        head = self.chain.head(records[-1], 1.0)
        return AuditBatch(self.chain.name, confirmed, records, head, stream=True)

    async def stored(self) -> list[bytes]:
        """Return all lines in the stream."""
        return [line for _, line in await self.store.page("0-0", 1000)]


@pytest.fixture
def writer(harness: Harness) -> Writer:
    """A chain on an empty store."""
    return Writer(harness.store.audit)


def lines(records: list[Record]) -> list[bytes]:
    """Return the records' lines."""
    return [record.line for record in records]


async def test_an_empty_store_vouches_for_nothing(writer: Writer) -> None:
    """No roster, no heads, no records."""
    anchor = await writer.store.anchor()
    assert (anchor.roster, anchor.heads, anchor.floors, anchor.length) == (b"", {}, {}, 0)
    assert anchor.last_id == "0-0"
    assert await writer.store.page("0-0", 10) == []


async def test_records_and_head_are_kept_together(writer: Writer) -> None:
    """In order, byte for byte; the head is that of the last."""
    records = writer.records(3)
    batch = writer.batch(records)
    assert await writer.store.commit(batch) is Committed.DONE
    assert await writer.stored() == lines(records)
    anchor = await writer.store.anchor()
    assert (anchor.heads, anchor.length) == ({"c1": batch.head}, 3)
    ids = [entry_id for entry_id, _ in await writer.store.page("0-0", 2)]
    assert [line for _, line in await writer.store.page(ids[1], 10)] == [records[2].line]
    assert anchor.last_id == (await writer.store.page(ids[1], 10))[0][0]


async def test_a_repetition_adds_nothing(writer: Writer) -> None:
    """Whoever does not know what became of a batch sends it again, with more behind it."""
    first = writer.records(2)
    for _ in range(2):
        assert await writer.store.commit(writer.batch(first)) is Committed.DONE
    more = writer.records(2)
    assert await writer.store.commit(writer.batch([*first, *more])) is Committed.DONE
    assert await writer.store.commit(writer.batch(more, (2, first[-1].mac))) is Committed.DONE
    assert await writer.stored() == lines([*first, *more])


async def test_another_history_is_refused(writer: Writer) -> None:
    """A head that this writer can't have left, ahead, behind or beside: nothing is written over it."""
    records = writer.records(6)
    await writer.store.commit(writer.batch(records[:4]))
    ahead = writer.batch(records[1:2], (1, records[0].mac))
    behind = writer.batch(records[5:6], (5, records[4].mac))
    beside = writer.batch(records[4:], (4, "ff" * 32))
    for batch in (ahead, behind, beside):
        assert await writer.store.commit(batch) is Committed.CONFLICT
    assert await writer.stored() == lines(records[:4])
    lost = Writer(writer.store, "c2")
    assert await lost.store.commit(lost.batch(lost.records(1), (5, "00" * 32))) is Committed.CONFLICT


async def test_a_damaged_head_is_a_conflict(harness: Harness, writer: Writer) -> None:
    """It is not taken for none."""
    if not isinstance(harness, RedisHarness):
        return
    harness.server.ask("HSET", "kms:{ctl}:audit:heads", "c1", "nonsense")
    assert await writer.store.commit(writer.batch(writer.records(1))) is Committed.CONFLICT


async def test_heads_alone_may_be_kept(writer: Writer) -> None:
    """Where the records go elsewhere."""
    batch = replace(writer.batch(writer.records(2)), stream=False)
    assert await writer.store.commit(batch) is Committed.DONE
    assert (await writer.store.anchor()).heads == {"c1": batch.head}
    assert await writer.stored() == []


async def test_an_opening_lists_itself(writer: Writer) -> None:
    """Chain and roster come together, only if the roster is the one that was read, and once."""
    records = writer.records(1)
    batch = replace(writer.batch(records), roster=(b"other", ROSTER))
    assert await writer.store.commit(batch) is Committed.ROSTER_CHANGED
    assert await writer.stored() == []
    batch = replace(batch, roster=(b"", ROSTER))
    for _ in range(2):
        assert await writer.store.commit(batch) is Committed.DONE
    assert (await writer.store.anchor()).roster == ROSTER
    assert await writer.stored() == lines(records)


async def test_trimming_leaves_floors(writer: Writer) -> None:
    """What is before the first record kept goes; only whoever knows the present roster may do it."""
    records = writer.records(5)
    await writer.store.commit(replace(writer.batch(records), roster=(b"", ROSTER)))
    other = Writer(writer.store, "c2")
    await other.store.commit(other.batch(other.records(1)))
    ids = [entry_id for entry_id, _ in await writer.store.page("0-0", 100)]
    following = Roster(2, 1, {"c1": 0}).write(KEY)
    trim = Trim((b"stale", following), {"c1": b"floor"}, ["c2"], ids[3])
    assert not await writer.store.trim(trim)
    assert len(await writer.stored()) == 6
    trim = replace(trim, roster=(ROSTER, following))
    assert await writer.store.trim(trim)
    assert await writer.store.trim(trim)  # a repetition
    anchor = await writer.store.anchor()
    assert (anchor.roster, set(anchor.heads), anchor.floors) == (following, {"c1"}, {"c1": b"floor"})
    assert (anchor.length, len(await writer.stored())) == (3, 3)
    assert anchor.last_id == ids[5]


@pytest.mark.parametrize("cursor", ["", "1", "1-", "-1-0", "1-0;", "a-b", "$", "99999999999999999999-0"])
async def test_a_cursor_is_an_id(writer: Writer, cursor: str) -> None:
    """Anything else is refused before the store sees it."""
    with pytest.raises(InvalidParameter):
        await writer.store.page(cursor, 10)


async def test_the_tail_is_read_backwards(writer: Writer) -> None:
    """The latest first, page by page, until nothing is left; an empty log and a wrong id are told."""
    assert await writer.store.tail(None, 10) == []
    records = writer.records(5)
    await writer.store.commit(writer.batch(records))
    first = await writer.store.tail(None, 2)
    assert [line for _, line in first] == lines(records)[:2:-1]
    second = await writer.store.tail(first[-1][0], 10)
    assert [line for _, line in second] == lines(records)[2::-1]
    assert await writer.store.tail(second[-1][0], 10) == []
    assert sorted(first + second) == sorted(await writer.store.page("0-0", 10))
    assert await writer.store.tail("0-0", 10) == []
    with pytest.raises(InvalidParameter):
        await writer.store.tail("(1-1", 1)

"""Refusals and calls on their way to the audit log: bounded whatever callers do, and none is miscounted."""

from __future__ import annotations

import pytest

from progressdb_kms.domain.errors import AuditUnavailable, PermissionDenied
from progressdb_kms.usecases import calls, refusals
from progressdb_kms.usecases.calls import CallLog
from progressdb_kms.usecases.creation import Wanted, create_deks
from progressdb_kms.usecases.refusals import RefusalLog
from tests.unit.helpers import Clock, Trail, World

DENIED = PermissionDenied("key:read", "dns:stranger")


def counts(trail: Trail) -> list[int]:
    """Return the counts that were written."""
    return [int(event.detail.rpartition("count=")[2].split()[0]) for event in trail.events]


async def test_refusals_are_written_less_and_less_often() -> None:
    """A day of ten refusals a second is some dozen records, and their counts are all of them."""
    clock, trail = Clock(), Trail()
    log = RefusalLog(trail, clock)
    for _ in range(24 * 3600):
        for _ in range(10):
            log.note(DENIED, "/v1/keys", "r1")
        await log.write()
        clock.at += 1
    assert 10 < len(trail.events) < 50
    await log.write(all_of_it=True)
    assert sum(counts(trail)) == 24 * 3600 * 10
    assert (trail.events[0].detail, trail.events[0].request_id) == ("key:read /v1/keys count=10", "r1")


async def test_the_first_refusal_is_written_at_once_again_after_quiet() -> None:
    """Kinds that have been quiet are forgotten."""
    clock, trail = Clock(), Trail()
    log = RefusalLog(trail, clock)
    for _ in range(5):
        log.note(DENIED, "/v1/keys")
        await log.write()
        clock.at += 10_000
        await log.write()
        await log.write()
    assert counts(trail) == [1] * 5
    assert log._kinds == {}


async def test_many_kinds_of_refusals_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond are counted together."""
    monkeypatch.setattr(refusals, "_MOST", 3)
    trail = Trail()
    log = RefusalLog(trail, Clock())
    for number in range(10):
        log.note(PermissionDenied("key:read", f"dns:{number}"), "/")
    await log.write()
    assert counts(trail) == [1, 1, 1, 7]
    assert trail.events[-1].identity == "others"


async def test_calls_are_counted_by_caller() -> None:
    """Once an interval, the rest at the end."""
    clock, trail = Clock(), Trail()
    log = CallLog(trail, "counted", 60, clock)
    for name, count in (("dns:a", 2), ("dns:b", 1), ("dns:a", 3)):
        log.note("encrypt", name, [("k", "t")] * count)
        await log.write()
    assert trail.events == []
    clock.at += 60
    await log.write()
    assert [(event.action, event.identity, event.detail) for event in trail.events] == [
        ("key.encrypt", "dns:a", "count=5 seconds=60"),
        ("key.encrypt", "dns:b", "count=1 seconds=60"),
    ]
    log.note("decrypt", "dns:a", [("k", "t")])
    await log.write(all_of_it=True)
    assert counts(trail) == [5, 1, 1]


async def test_each_call_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its key; what has no room is counted instead."""
    monkeypatch.setattr(calls, "_MOST_EACH", 4)
    clock, trail = Clock(), Trail()
    log = CallLog(trail, "each", 60, clock)
    for number in range(7):
        log.note("encrypt", "dns:a", [(f"k{number}", "t")])
    log.note("decrypt", "dns:a", [("k", "t"), ("l", "t")])
    await log.write(all_of_it=True)
    assert [event.key_id for event in trail.events[:4]] == ["k0", "k1", "k2", "k3"]
    assert [event.action for event in trail.events[4:]] == ["key.encrypt", "key.decrypt"]
    assert [event.detail.split()[0] for event in trail.events[4:]] == ["count=3", "count=2"]


async def test_off_is_off(world: World) -> None:
    """By default nothing is kept of calls."""
    assert not world.kms.calls.wanted


class TestDurable:
    """Creates over an audit log that promises to keep what it is told."""

    async def test_creates_are_announced(self, world: World) -> None:
        """An intent before, an outcome after, for each key."""
        world.trail.durable = True
        await create_deks(world.kms, world.session(), [Wanted("room:1"), Wanted("room:2")], "r")
        assert world.trail.said() == [("key.create", "intent")] * 2 + [("key.create", "ok")] * 2

    async def test_failures_are_told(self, world: World) -> None:
        """So that no announcement is left without an outcome."""
        world.trail.durable = True
        world.store.down = True
        with pytest.raises(Exception, match="down"):
            await create_deks(world.kms, world.session(), [Wanted("room:1")], "r")
        assert world.trail.said() == [("key.create", "intent"), ("key.create", "failed")]
        assert world.trail.events[-1].detail == "store_unavailable"

    async def test_nothing_is_made_unannounced(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """While the log can't be written no key is made."""

        async def refuse(_: object) -> None:
            raise AuditUnavailable

        world.trail.durable = True
        monkeypatch.setattr(world.trail, "record", refuse)
        before = world.store.calls["create"]
        with pytest.raises(AuditUnavailable):
            await create_deks(world.kms, world.session(), [Wanted("room:1")], "r")
        assert world.store.calls["create"] == before

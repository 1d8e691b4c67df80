"""The chained audit log: nothing told is lost, nothing is changed unwritten, and it goes on by itself."""

from __future__ import annotations

import asyncio
import json
import os
import resource
from pathlib import Path

import pytest

from progressdb_kms.audit import chained
from progressdb_kms.audit.reading import files_in, verify_store
from progressdb_kms.domain.audit import AuditKey
from progressdb_kms.domain.errors import AuditUnavailable
from tests.unit.audit.scene import Scene, event, refused


@pytest.fixture
def scene() -> Scene:
    """A store and its processes."""
    return Scene()


async def test_what_is_recorded_is_in_the_stream_and_intact(scene: Scene) -> None:
    """Opened, recorded in order, closed; printed the same."""
    log = scene.log()
    await log.record([event(1, "intent"), event(1)])
    await log.record([event(2)])
    await log.close()
    fields = [json.loads(line) for line in scene.lines()]
    assert [each["audit"] for each in fields] == ["audit.open", *["key.disable"] * 3, "audit.close"]
    assert fields[1]["identity"] == "dns:a"
    assert scene.output.getvalue().encode().splitlines() == scene.lines()
    report = await scene.verify()
    assert (report.problems, report.notes) == ([], [])
    assert report.chains[0].closed


async def test_concurrent_changes_share_one_commit(scene: Scene) -> None:
    """What comes while a commit is under way travels together in the next."""
    log = scene.log()
    await log.open()
    scene.store.gate = asyncio.Event()
    first = asyncio.create_task(log.record([event(0, "intent")]))
    await asyncio.sleep(0)
    others = [asyncio.create_task(log.record([event(number, "intent")])) for number in range(1, 50)]
    await asyncio.sleep(0)
    before = scene.store.commits
    scene.store.gate.set()
    await asyncio.gather(first, *others)
    assert scene.store.commits == before + 2
    assert (await scene.verify()).records == 51


async def test_an_intent_is_durable_when_it_returns(scene: Scene) -> None:
    """Not before: the change waits for it."""
    log = scene.log()
    scene.store.gate = asyncio.Event()
    waiting = asyncio.create_task(log.record([event(1, "intent")]))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    scene.store.gate.set()
    await waiting
    assert len(scene.lines()) == 2


async def test_while_it_can_not_be_written_changes_are_refused(scene: Scene) -> None:
    """Outcomes are kept and written later, and that nothing came of the refused intents is written too."""
    log = scene.log()
    await log.record([event(1, "intent")])
    scene.store.down = True
    await log.record([event(1)])  # what has happened has happened
    assert await refused(log, 2)
    assert await refused(log, 3)
    scene.store.down = False
    await log.tick()
    await log.tick()
    assert not await refused(log, 4)
    await log.record([event(4)])
    await log.close()
    said = [(each.get("request_id"), each["outcome"]) for each in map(json.loads, scene.lines())][1:-1]
    assert said[:2] == [("r1", "intent"), ("r1", "ok")]
    assert sorted(said) == sorted(
        [(f"r{number}", "intent") for number in range(1, 5)]
        + [("r1", "ok"), ("r2", "failed"), ("r3", "failed"), ("r4", "ok")]
    )
    report = await scene.verify()
    assert (report.problems, report.notes) == ([], [])
    assert scene.counts.told["failed store"] >= 2


async def test_a_lost_answer_makes_no_duplicate(scene: Scene) -> None:
    """The commit was made: the next one leaves out what is there."""
    log = scene.log()
    await log.open()
    scene.store.lose_answer = True
    assert await refused(log, 1)
    assert not await refused(log, 2)
    await log.close()
    assert (await scene.verify()).intact
    requests = [json.loads(line).get("request_id") for line in scene.lines()]
    assert requests.count("r2") == 1


async def test_without_the_store_at_first_events_wait(scene: Scene) -> None:
    """A chain that can't be opened yet refuses changes, and keeps what else is told."""
    scene.store.down = True
    log = scene.log()
    await log.record([event(1, "refused", "refused")])
    assert await refused(log, 2)
    scene.store.down = False
    await log.tick()
    await log.close()
    report = await scene.verify()
    assert (report.intact, report.records) == (True, 3)


async def test_room_is_bounded(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no room is counted, and the count is written when it can be."""
    monkeypatch.setattr(chained, "MOST_WAITING", 5)
    log = scene.log()
    await log.open()
    scene.store.down = True
    for number in range(9):
        await log.record([event(number)])
    assert await refused(log, 9)
    assert scene.counts.told["lost store"] == 4
    scene.store.down = False
    await log.tick()
    await log.record([event(10)])
    await log.close()
    (lost,) = [each for each in map(json.loads, scene.lines()) if each["audit"] == "audit.lost"]
    assert lost["detail"] == "count=4"
    assert (await scene.verify()).intact


async def test_a_store_that_lost_records_is_found_out(scene: Scene) -> None:
    """A failover or a restore took the head back: a new chain begins and names the old one's end."""
    log = scene.log()
    await log.record([event(1, "intent"), event(1)])
    old, lines = dict(scene.store.heads), dict(scene.store.stream)
    await log.record([event(2, "intent"), event(2)])
    scene.store.heads, scene.store.stream = old, lines
    assert await refused(log, 3)
    assert not await refused(log, 4)
    await log.close()
    report = await scene.verify()
    assert [(problem.kind, problem.first, problem.last) for problem in report.problems] == [
        ("truncated", 4, 5)
    ]
    assert scene.counts.told["conflict"] == 1


async def test_a_conflict_is_told_without_an_event(scene: Scene) -> None:
    """An idle instance that finds its history gone says so in a new chain at the next tick."""
    log = scene.log()
    await log.record([event(1)])
    given_up = log.chain
    scene.store.heads.clear()
    scene.now += 61
    await log.tick()
    assert scene.counts.told["conflict"] == 1
    await log.tick()
    await log.tick()
    opened = [each for each in map(json.loads, scene.lines()) if each["audit"] == "audit.open"]
    assert [each.get("after", {}).get("chain") for each in opened] == [None, given_up]
    await log.close()


async def test_a_conflict_at_the_end_is_told_too(scene: Scene) -> None:
    """Met by the closing itself, or before it without a tick in between: a closed chain names the other."""
    met_at_the_end, met_before = scene.log("i1"), scene.log("i2")
    for log in (met_at_the_end, met_before):
        await log.record([event(1)])
    given_up = [met_at_the_end.chain, met_before.chain]
    scene.store.heads.clear()
    assert await refused(met_before, 2)
    for log in (met_at_the_end, met_before):
        await log.close()
    lines = list(map(json.loads, scene.lines()))
    named = {each["after"]["chain"]: each["chain"] for each in lines if "after" in each}
    assert sorted(named) == sorted(given_up)
    closed = [each["chain"] for each in lines if each["audit"] == "audit.close"]
    assert sorted(closed) == sorted(named.values())


async def test_an_opening_without_an_answer_is_repeated(scene: Scene) -> None:
    """However often the store takes it and does not say so, there is one chain."""
    log = scene.log()
    for _ in range(5):
        scene.store.lose_answer = True
        with pytest.raises(AuditUnavailable):
            await log.open()
    await log.open()
    await log.close()
    assert len((await scene.store.anchor()).heads) == 1
    report = await scene.verify()
    assert (report.intact, report.records) == (True, 2)


async def test_outcomes_survive_a_conflict(scene: Scene) -> None:
    """What the store lost before it was confirmed is written into the new chain."""
    log = scene.log()
    await log.record([event(1, "intent")])
    scene.store.down = True
    await log.record([event(1)])
    scene.store.down = False
    scene.store.heads.clear()
    await log.tick()
    await log.tick()
    await log.close()
    told = [each for each in map(json.loads, scene.lines()) if each.get("request_id") == "r1"]
    assert [each["outcome"] for each in told] == ["intent", "ok"]
    assert told[0]["chain"] != told[1]["chain"]


async def test_signatures_come_by_number_and_by_time(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint every so many records, and after a minute in which anything was recorded."""
    monkeypatch.setattr(chained, "CHECKPOINT_RECORDS", 10)
    log = scene.log()
    await log.open()
    for number in range(25):
        await log.record([event(number)])

    def checkpoints() -> int:
        return sum(b"audit.checkpoint" in line for line in scene.lines())

    assert checkpoints() == 2
    scene.now += 61
    await log.tick()
    assert checkpoints() == 3
    scene.now += 61
    await log.tick()
    assert checkpoints() == 3  # nothing was recorded since
    await log.close()


async def test_chains_name_those_before_them(scene: Scene) -> None:
    """Once each: so that one that is removed whole is missed, and openings stay small."""
    names = []
    for instance in ("i1", "i2", "i3"):
        log = scene.log(instance)
        await log.record([event(1)])
        names.append(log.chain)
        await log.close()
    openings = [each for each in map(json.loads, scene.lines()) if each["audit"] == "audit.open"]
    assert [each["chains"] for each in openings] == [{}, {names[0]: 3}, {names[1]: 3}]
    scene.store.stream = {
        key: line for key, line in scene.store.stream.items() if names[0].encode() + b'","seq' not in line
    }
    report = await scene.verify()
    assert [(problem.kind, problem.chain) for problem in report.problems] == [("missing_chain", names[0])]
    # Also by somebody who takes its head and its place in the anchor away: a later chain remembers.
    del scene.store.heads[names[0]]
    scene.store.roster = scene.store.roster.replace(f'"{names[0]}":3,'.encode(), b"")
    assert {problem.kind for problem in (await scene.verify()).problems} == {"missing_chain", "anchor"}


async def test_a_forged_roster_is_not_signed_anew(scene: Scene) -> None:
    """Whoever opens a chain on one says so, and carries over what heads there are."""
    log = scene.log()
    await log.record([event(1)])
    await log.close()
    scene.store.roster = b'{"kind":"roster","generation":9}'
    other = scene.log("i2")
    await other.record([event(2)])
    await other.close()
    assert [problem.detail for problem in (await scene.verify()).problems] == [
        "when the chain was opened, the roster did not hold"
    ]


async def test_two_instances_open_at_once(scene: Scene) -> None:
    """Both are listed, whoever came first."""
    logs = [scene.log(f"i{number}") for number in range(8)]
    await asyncio.gather(*(log.record([event(number)]) for number, log in enumerate(logs)))
    await asyncio.gather(*(log.close() for log in logs))
    report = await scene.verify()
    assert (report.problems, len(report.chains)) == ([], 8)


async def test_a_new_key_goes_on_after_the_old_one(scene: Scene) -> None:
    """An auditor gives both public keys; with one of them the other's chains are named as unknown."""
    log = scene.log()
    await log.record([event(1)])
    await log.close()
    fresh = AuditKey(b"\x02" * 32)
    other = scene.log("i2", key=fresh)
    await other.record([event(2)])
    await other.close()
    assert (await verify_store(scene.store, [scene.log()._key.verify, fresh.verify])).intact
    kinds = {problem.kind for problem in (await verify_store(scene.store, [fresh.verify])).problems}
    assert "unknown_key" in kinds


async def test_whoever_comes_while_a_commit_fails_is_answered(scene: Scene) -> None:
    """Nothing ticks in a command: a change that waits behind one that is refused is refused itself."""
    log = scene.log()
    await log.open()
    scene.store.gate, scene.store.down = asyncio.Event(), True
    first = asyncio.create_task(refused(log, 1))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(refused(log, 2))
    await asyncio.sleep(0.01)
    scene.store.gate.set()
    assert all(await asyncio.wait_for(asyncio.gather(first, second), 30))
    scene.store.down = False
    await log.close()
    report = await scene.verify()
    assert (report.problems, report.notes, report.records) == ([], [], 6)


class TestFiles:
    """Records in files."""

    @pytest.fixture
    def scene(self, tmp_path: Path) -> Scene:
        """A store, its processes and a directory."""
        return Scene(tmp_path)

    async def test_files_hold_the_chain(self, scene: Scene, tmp_path: Path) -> None:
        """Over several files by size, and over several processes."""
        for instance in ("i1", "i2"):
            log = scene.log(instance, stream=False)
            for number in range(40):
                await log.record([event(number)])
            await log.close()
        files = files_in([tmp_path])
        assert len(files) > 4
        assert {path.stat().st_mode & 0o777 for path in files} <= {0o640, 0o600}
        report = await scene.verify_directory()
        assert (report.problems, report.records) == ([], 84)
        files[1].unlink()
        assert [problem.kind for problem in (await scene.verify_directory()).problems] == ["removed"]

    async def test_a_file_that_can_not_be_written_stops_changes(
        self, scene: Scene, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where the store is fine; a part of a line that got there is taken back."""
        log = scene.log()
        await log.record([event(1)])
        whole = os.write

        def full(descriptor: int, data: memoryview) -> int:
            if len(data) < 50:
                raise OSError(28, "No space left on device")
            return whole(descriptor, data[:40])

        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            assert await refused(log, 2)
            assert await refused(log, 3)
        assert not await refused(log, 4)
        await log.record([event(4)])
        await log.close()
        assert (await scene.verify()).intact
        report = await scene.verify_directory()
        assert (report.problems, report.notes) == ([], [])
        assert scene.counts.told["failed file"] == 2

    async def test_a_full_disk_stops_changes(self, scene: Scene, tmp_path: Path) -> None:
        """As the kernel tells it, in the middle of a line; with room again it goes on by itself."""
        log = scene.log()
        await log.record([event(1)])
        (path,) = files_in([tmp_path])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40, hard))
        try:
            assert await refused(log, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not await refused(log, 3)
        await log.close()
        report = await scene.verify_directory()
        assert (report.problems, report.chains[0].open_intents) == ([], 1)
        assert (await scene.verify()).intact

    async def test_the_head_never_vouches_for_what_a_file_lacks(self, scene: Scene) -> None:
        """The file comes first: a crash between the two leaves a record that nobody was told of."""
        log = scene.log()
        await log.record([event(1)])
        scene.store.down = True
        assert await refused(log, 2)
        report = await scene.verify_directory()
        assert report.problems == []
        assert report.chains[0].last == 3

    async def test_what_the_store_never_got_is_in_the_file_alone(self, scene: Scene) -> None:
        """Both verify: the stream ends where its head says, with an intent whose outcome the file has."""
        log = scene.log()
        await log.record([event(1, "intent")])
        scene.store.down = True
        await log.record([event(1)])
        stream, files = await scene.verify(), await scene.verify_directory()
        assert (stream.problems, files.problems) == ([], [])
        assert (stream.records, files.records) == (2, 3)
        assert (stream.chains[0].open_intents, files.chains[0].open_intents) == (1, 0)

    async def test_a_torn_last_line_is_no_damage(self, scene: Scene, tmp_path: Path) -> None:
        """It was never acknowledged."""
        log = scene.log()
        await log.record([event(1)])
        (path,) = files_in([tmp_path])
        with path.open("ab") as file:
            file.write(b'{"audit":"key.dis')
        report = await scene.verify_directory()
        assert report.problems == []
        assert "torn" in report.notes[0]


async def test_a_bug_refuses_changes_and_hangs_nobody(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong inside: no change is made unwritten."""
    log = scene.log()
    await log.open()

    async def broken(*_: object) -> None:
        raise RuntimeError("bug")

    with monkeypatch.context() as patched:
        patched.setattr(scene.store, "commit", broken)
        assert await refused(log, 1)
    assert not await refused(log, 2)


async def test_a_caller_that_gives_up_disturbs_nobody(scene: Scene) -> None:
    """Its event is written all the same."""
    log = scene.log()
    await log.open()
    scene.store.gate = asyncio.Event()
    gone = asyncio.create_task(log.record([event(1, "intent")]))
    stays = asyncio.create_task(log.record([event(2, "intent")]))
    await asyncio.sleep(0.01)
    gone.cancel()
    await asyncio.sleep(0)
    scene.store.gate.set()
    await stays
    await log.close()
    assert (await scene.verify()).records == 4

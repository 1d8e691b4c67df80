"""Trimming the stream: only what has been verified, behind signed floors, and no hole is hidden by it."""

from __future__ import annotations

import pytest

from progressdb_kms.audit import trimming
from progressdb_kms.audit.reading import verify_store
from progressdb_kms.audit.trimming import Trimmer
from progressdb_kms.domain.audit import AuditKey, Roster, VerifyKey
from tests.unit.audit.scene import KEY, Scene, event

PUBLIC = VerifyKey.of(KEY.verify.public)


@pytest.fixture
def scene() -> Scene:
    """A store and its processes."""
    return Scene()


async def filled(scene: Scene, instance: str, count: int, *, close: bool = True) -> str:
    """Let a process write a chain; return its name."""
    log = scene.log(instance)
    for number in range(count):
        await log.record([event(number)])
    name = log.chain
    if close:
        await log.close()
    return name


def trimmer(scene: Scene, keep: int, key: AuditKey = KEY, *known: VerifyKey) -> Trimmer:
    """Return what trims."""
    return Trimmer(key, known, scene.store, keep, scene.counts, now=lambda: scene.now)


async def test_a_trimmed_log_is_intact(scene: Scene) -> None:
    """With the MAC key and with the public key, in the middle of chains and at their ends."""
    for round_ in range(6):
        await filled(scene, f"i{round_}", 20)
        assert await trimmer(scene, 30).run() == (0 if round_ == 0 else len_over(scene, 30))
        for keys in ([KEY.verify], [PUBLIC]):
            report = await verify_store(scene.store, keys)
            assert report.problems == [], report.problems


def len_over(scene: Scene, keep: int) -> int:
    """Return what a trim must have taken: chains of 22 records have come, ``keep`` stay."""
    assert len(scene.store.stream) == keep
    return 14 if len(scene.store.heads) == 2 else 22


async def test_all_that_is_too_much_goes(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is more than goes behind one signature: records may come quickly."""
    monkeypatch.setattr(trimming, "MOST_AT_ONCE", 10)
    await filled(scene, "i1", 60)
    await filled(scene, "i2", 60, close=False)
    had = len(scene.store.stream)
    assert await trimmer(scene, 20).run() == had - len(scene.store.stream)
    assert len(scene.store.stream) <= 22
    assert (await verify_store(scene.store, [KEY.verify])).problems == []


async def test_little_is_left_alone(scene: Scene) -> None:
    """A few more than should be kept are not worth the work."""
    await filled(scene, "i1", 30)
    assert await trimmer(scene, 30).run() == 0
    assert len(scene.store.stream) == 32


async def test_chains_that_are_gone_are_forgotten_in_time(scene: Scene) -> None:
    """The anchor stays small, and no opening that remains names one that is forgotten."""
    names = []
    for number in range(30):
        names.append(await filled(scene, f"i{number}", 8))
        await trimmer(scene, 20).run()
        assert (await scene.verify()).problems == []
    assert len(scene.store.heads) <= 8
    assert len(scene.store.floors) <= 8
    assert set(Roster.read(scene.store.roster).chains) == set(scene.store.heads)


async def test_a_silent_open_chain_is_kept_for_a_week(scene: Scene) -> None:
    """It may be of a process that lives; then it counts as ended."""
    name = await filled(scene, "i0", 8, close=False)
    for number in range(12):
        await filled(scene, f"i{number}", 8)
        await trimmer(scene, 20).run()
    assert name in scene.store.heads
    scene.now += trimming.ABANDONED + 1
    for number in range(12):
        await filled(scene, f"j{number}", 8)
        await trimmer(scene, 20).run()
    assert name not in scene.store.heads
    assert (await scene.verify()).problems == []


@pytest.mark.parametrize("number", [0, 1, 4, 9])
async def test_what_does_not_hold_is_not_trimmed(scene: Scene, number: int) -> None:
    """A change or a hole in what would go: all of it stays as evidence, and an alert is raised."""
    await filled(scene, "i1", 40)
    whole = dict(scene.store.stream)
    place = list(whole)[number]
    for spoilt in (
        {key: line for key, line in whole.items() if key != place},
        {key: line.replace(b"room:1", b"room:2") for key, line in whole.items()},
        {**whole, place: b"stray"},
    ):
        if spoilt == whole:
            continue
        scene.store.stream = dict(spoilt)
        before = scene.counts.told["trim refused"]
        assert await trimmer(scene, 10).run() == 0
        assert scene.store.stream == spoilt
        assert scene.counts.told["trim refused"] == before + 1


async def test_a_chain_that_was_removed_whole_stays_missed(scene: Scene) -> None:
    """The opening that names it is not trimmed away while it is missing."""
    name = await filled(scene, "i1", 5)
    await filled(scene, "i2", 40)
    scene.store.stream = {
        key: line for key, line in scene.store.stream.items() if f'"chain":"{name}"'.encode() not in line
    }
    del scene.store.heads[name]
    assert await trimmer(scene, 10).run() == 0
    assert scene.counts.told["trim refused"] == 1


async def test_two_trim_at_once(scene: Scene) -> None:
    """One of them does it; the other finds the roster changed and does nothing."""
    await filled(scene, "i1", 40)
    first, second = trimmer(scene, 10), trimmer(scene, 10)
    anchor = await scene.store.anchor()
    assert await first.run() == 32

    async def stale() -> object:
        return anchor

    scene.store.anchor = stale  # type: ignore[method-assign,assignment] # as it was read before
    assert await second.run() == 0
    del scene.store.anchor
    assert len(scene.store.stream) == 10


async def test_a_new_key_trims_what_the_old_one_wrote(scene: Scene) -> None:
    """With the old one's public half; an auditor has both."""
    await filled(scene, "i1", 40)
    fresh = AuditKey(b"\x02" * 32)
    assert await trimmer(scene, 10, fresh).run() == 0
    assert await trimmer(scene, 10, fresh, PUBLIC).run() == 32
    report = await verify_store(scene.store, [KEY.verify, fresh.verify])
    assert report.problems == []


async def test_where_no_stream_is_old_heads_are_forgotten(scene: Scene) -> None:
    """After three months, so that the anchor stays small."""
    log = scene.log("i1", stream=False)
    await log.record([event(1)])
    await log.close()
    assert await trimmer(scene, 10).forget_old() == 0
    scene.now += trimming.KEPT_WITHOUT_STREAM + 1
    assert await trimmer(scene, 10).forget_old() == 1
    assert (scene.store.heads, Roster.read(scene.store.roster).chains) == ({}, {})


async def test_a_chain_is_not_forgotten_while_an_opening_names_it(scene: Scene) -> None:
    """Trimmed whole, it is known until no record that remains can name it."""
    long = scene.log("long")
    await long.open()
    ended = await filled(scene, "ended", 20)
    await long.record([event(number) for number in range(5)])
    await filled(scene, "later", 4, close=False)  # its opening names the chain that has ended
    for _ in range(2):
        assert await trimmer(scene, 10).run() > 0
        assert ended in scene.store.floors
        assert (await scene.verify()).problems == []
        await long.record([event(number) for number in range(2)])
    await long.record([event(number) for number in range(20)])
    assert await trimmer(scene, 10).run() > 0
    assert ended not in scene.store.heads
    assert (await scene.verify()).problems == []


async def test_no_later_opening_names_a_chain_that_is_trimmed_whole(scene: Scene) -> None:
    """The trim has vouched for it: else it could not be forgotten while that opening is there."""
    long = scene.log("long")
    await long.open()
    ended = await filled(scene, "ended", 8)
    await long.record([event(number) for number in range(30)])
    assert await trimmer(scene, 10).run() > 0
    assert ended in scene.store.floors
    await long.record([event(number) for number in range(6)])
    await filled(scene, "later", 3, close=False)
    assert await trimmer(scene, 10).run() == 10
    assert ended not in scene.store.heads
    assert (await scene.verify()).problems == []

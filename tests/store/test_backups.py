"""Exports, imports, restores, retirements and purges over every store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.domain.backup import Destruction
from progressdb_kms.domain.errors import (
    BackupInvalid,
    Fenced,
    KekMismatch,
    RegistryLost,
    RotationRefused,
    RotationRunning,
    StoreUnavailable,
)
from progressdb_kms.domain.keyring import KekState
from progressdb_kms.domain.keys import ALL_TAGS, KeyState, StateChange, locate
from progressdb_kms.domain.rotation import Rotation
from progressdb_kms.ports import Destroyed, Extras, Imported
from progressdb_kms.store.memory import MemoryStore
from progressdb_kms.usecases import backup, exclusive, importing, rotation, snapshots
from progressdb_kms.usecases.backup import verify_export
from progressdb_kms.usecases.destruction import sweep
from progressdb_kms.usecases.importing import import_export
from progressdb_kms.usecases.restore import Restorer
from progressdb_kms.usecases.retire import retire
from progressdb_kms.usecases.snapshots import verify_snapshot
from tests.store.backup_scene import Bytes, Scene, make_scene
from tests.store.conftest import Harness, RedisHarness, new_kek

DAY = 86_400


@pytest.fixture
async def scene(harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Give an empty store with a registry."""
    monkeypatch.setattr(rotation, "IDLE", 0.01)
    return await make_scene(harness.store, tmp_path)


def _forget(harness: Harness) -> None:
    """Lose everything that the store has."""
    if isinstance(harness, RedisHarness):
        harness.server.ask("FLUSHALL")
    else:
        harness.store = MemoryStore()  # type: ignore[misc] # the memory harness's own attribute


def _drop(harness: Harness, key_id: str) -> None:
    """Lose one record behind the store's back."""
    if isinstance(harness, RedisHarness):
        harness.server.ask("DEL", f"kms:{{{locate(key_id)}}}:dek:{key_id}")
    else:
        del harness.store._records[key_id]  # type: ignore[union-attr] # the memory store's own


async def test_export_and_import_bring_everything_back(scene: Scene, harness: Harness) -> None:
    """Records with all fields, thread index, census, due set, registry, counts and floor come back."""
    enabled, disabled, pending, dead = await scene.create("a", "a", "b", "c")
    await scene.store.keys.change_state(disabled.key_id, StateChange.DISABLE, now=scene.now)
    await scene.schedule(dead.key_id, scene.now - 1)
    swept = await sweep(scene.vault)
    assert swept is not None
    assert swept.destroyed == [dead.key_id]
    await scene.schedule(pending.key_id, scene.now + 7 * DAY)
    await scene.store.keys.reserve_uses({enabled.key_id: 5})
    before = await scene.store.keys.get([record.key_id for record in (enabled, disabled, pending, dead)])
    view, wraps = await scene.store.registry.load(), await scene.store.registry.wraps()
    file = await scene.export()
    _forget(harness)
    new = await scene.elsewhere(harness.store)
    report = await import_export(new.vault, file.chunks)
    assert (report.counts, report.bad) == ({"added": 4}, [])
    assert await new.store.keys.get([record.key_id for record in before if record]) == before
    after = await new.store.registry.load()
    assert view is not None
    assert after == replace(view, revision=1)
    assert await new.store.registry.wraps() == wraps
    assert set((await new.store.backups.floors()).values()) == {1}
    assert await new.store.keys.census() == {1: 3}
    assert dict(await new.store.destruction.due(scene.now + 7 * DAY)) == {
        locate(pending.key_id): [pending.key_id]
    }
    await new.book.start(scene.now)
    (third,) = await new.create("a")
    assert third.version == 3


async def test_interrupted_import_is_run_again(scene: Scene, harness: Harness) -> None:
    """Until an import is through no service starts; the same file goes on, another one is refused."""
    await scene.create("a", "b")
    file = await scene.export()
    await scene.create("c")
    other = await scene.export()
    records = [part for part in [*await scene.store.keys.get(list(scene.deks))] if part]
    _forget(harness)
    new = await scene.elsewhere(harness.store)
    sha256 = backup.inspect_export(file.chunks).ending.sha256
    assert await new.store.backups.begin_import(sha256)
    assert await new.store.backups.import_records(records[:1]) == [Imported.ADDED]
    with pytest.raises(BackupInvalid, match="interrupted"):
        await import_export(new.vault, other.chunks)
    report = await import_export(new.vault, file.chunks)
    assert report.counts == {"added": 1, "present": 1}
    with pytest.raises(BackupInvalid, match="other data"):
        await import_export(new.vault, file.chunks)


async def test_import_makes_only_the_store_that_the_kek_belongs_to(scene: Scene, harness: Harness) -> None:
    """An export of another store than the KEK's fills nothing and leaves no trace; the right one does."""
    await scene.create("a")
    file = await scene.export()
    view = await scene.store.registry.load()
    assert view is not None
    _forget(harness)
    new = await scene.elsewhere(harness.store)
    with pytest.raises(KekMismatch, match=f"export is of store {view.store_id}, but this KEK belongs to"):
        await import_export(replace(new.vault, store_id="ab" * 16), file.chunks)
    assert await new.store.backups.empty()
    await new.store.registry.initialise(new_kek(), "cd" * 16)
    _forget(harness)
    new = await scene.elsewhere(harness.store)
    report = await import_export(replace(new.vault, store_id=view.store_id), file.chunks)
    assert report.counts == {"added": 1}


async def test_no_registry_is_made_while_an_import_fills_the_store(scene: Scene, harness: Harness) -> None:
    """Between the mark and the first record the store looks empty; founding it then would change its id."""
    await scene.create("a")
    file = await scene.export()
    _forget(harness)
    new = await scene.elsewhere(harness.store)
    assert await new.store.backups.begin_import(backup.inspect_export(file.chunks).ending.sha256)
    with pytest.raises(RegistryLost, match="being filled by an import"):
        await new.store.registry.initialise(new_kek())
    await import_export(new.vault, file.chunks)
    await new.book.start(scene.now)


async def test_import_under_a_lost_lock_is_not_finished(scene: Scene, harness: Harness) -> None:
    """Whoever has the lock since may have retired what the records need; the same import can be run again."""
    await scene.create("a")
    file = await scene.export()
    view = await scene.store.registry.load()
    assert view is not None
    _forget(harness)
    new = await scene.elsewhere(harness.store)
    sha256 = backup.inspect_export(file.chunks).ending.sha256
    lost = await new.store.rotation_ledger.acquire("import", 0)
    held = await new.store.rotation_ledger.acquire("another", 60)
    assert await new.store.backups.begin_import(sha256)
    with pytest.raises(Fenced):
        await new.store.backups.finish_import(view, Extras(), lost)
    with pytest.raises(RegistryLost):
        await new.store.registry.initialise(new_kek())
    await new.store.rotation_ledger.release(held)
    assert (await import_export(new.vault, file.chunks)).counts == {"added": 1}
    await new.book.start(scene.now)


async def test_import_that_lost_its_lock_writes_no_more(
    scene: Scene, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the records that it has read already: what they need may be retired by then."""
    (key,) = await scene.create("a")
    file = await scene.export()
    _forget(harness)
    new = await scene.elsewhere(harness.store)
    monkeypatch.setattr(exclusive, "LEASE", 0.0)

    async def take_the_lock(*_: object) -> list[str]:
        await new.store.rotation_ledger.acquire("another", 60)
        return []

    monkeypatch.setattr(importing, "bad_blobs", take_the_lock)
    with pytest.raises(Fenced):
        await import_export(new.vault, file.chunks)
    assert await new.store.keys.get([key.key_id]) == [None]


async def test_merge_adds_and_never_replaces(scene: Scene, harness: Harness) -> None:
    """Only what is missing comes; tombstones of either side win."""
    lost, kept, dead_here, dead_there = await scene.create("a", "b", "c", "d")
    full = await scene.export()
    await scene.schedule(dead_here.key_id, scene.now - 1)
    await sweep(scene.vault)
    await scene.store.keys.change_state(kept.key_id, StateChange.DISABLE, now=scene.now)
    _drop(harness, lost.key_id)
    report = await import_export(scene.vault, full.chunks, merge=True)
    assert report.counts == {"added": 1, "present": 2, "destroyed": 1}
    assert await scene.opens(lost.key_id)
    assert (await scene.record(kept.key_id)).state is KeyState.DISABLED
    assert (await scene.record(dead_here.key_id)).state is KeyState.DESTROYED
    # And the other way round: what the export knows as destroyed does not go on living here.
    await scene.schedule(dead_there.key_id, scene.now - 1)
    await sweep(scene.vault)
    later = await scene.export()
    _forget(harness)
    new = await scene.elsewhere(harness.store)
    await import_export(new.vault, full.chunks)
    report = await import_export(new.vault, later.chunks, merge=True)
    assert sorted(report.destroyed_here) == sorted([dead_here.key_id, dead_there.key_id])
    assert (await new.record(dead_there.key_id)).wrapped == b""


async def test_old_export_needs_consent(scene: Scene, harness: Harness) -> None:
    """An export from which destroyed keys could rise is taken only when that is accepted."""
    await scene.create("a")
    file = await scene.export()
    _forget(harness)
    new = await scene.elsewhere(harness.store)
    new.now += 8 * DAY
    with pytest.raises(BackupInvalid, match="--accept-resurrection"):
        await import_export(new.vault, file.chunks)
    report = await import_export(new.vault, file.chunks, accept_resurrection=True)
    assert report.counts == {"added": 1}


async def test_key_that_fell_due_is_destroyed_after_an_import(scene: Scene, harness: Harness) -> None:
    """A destruction that an export knows as pending is carried out where it is imported."""
    (record,) = await scene.create("a")
    await scene.schedule(record.key_id, scene.now - 5)
    file = await scene.export()
    _forget(harness)
    new = await scene.elsewhere(harness.store)
    await import_export(new.vault, file.chunks)
    swept = await sweep(new.vault)
    assert swept is not None
    assert swept.destroyed == [record.key_id]


async def test_export_reads_damaged_records_past(scene: Scene, harness: Harness) -> None:
    """A record that can't be read is named and does not stop the export."""
    good, bad = await scene.create("a", "b")
    await scene.damage(bad.key_id, b"short")
    file = Bytes()
    _, counts = await backup.export_live(scene.vault, file)
    assert counts.damaged == (bad.key_id,)
    _, broken = await verify_export(scene.source, file.chunks)
    assert broken == [bad.key_id]
    assert good.key_id not in counts.damaged


async def test_sweep_takes_keys_out_of_snapshots(scene: Scene) -> None:
    """A destroyed key is in no snapshot, which is sealed anew without it; the record names the exports."""
    await scene.create(*(f"room:{number}" for number in range(40)))
    made = await scene.rotate()
    await scene.export()
    victim = next(iter(scene.deks))
    await scene.schedule(victim, scene.now - 1)
    swept = await sweep(scene.vault)
    assert swept is not None
    assert (swept.destroyed, swept.rewritten) == ([victim], True)
    report = await verify_snapshot(scene.vault, made.rotation_id)
    assert (report.records, report.sound, report.unsealed) == (39, True, [])
    (written,) = await scene.store.destruction.destructions([victim])
    (note,) = await scene.store.backups.exports()
    assert written is not None
    assert [(held.export_id, held.sha256) for held in written.held_by] == [(note.export_id, note.sha256)]
    assert scene.audit.told("key.destroy") == ["intent", "ok"]
    changes = await scene.store.keys.changes("0/0" if not isinstance(scene.store, MemoryStore) else "0", 0)
    assert victim in changes.key_ids


async def test_snapshot_stays_sealed_where_a_sweep_dies(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right after the store has destroyed a key, a sweep leaves no snapshot without its seal."""
    await scene.create(*(f"room:{number}" for number in range(40)))
    made = await scene.rotate()
    victim = next(iter(scene.deks))
    await scene.schedule(victim, scene.now - 1)
    destroy = scene.store.destruction.destroy

    async def die(*args: Any, **options: Any) -> None:
        await destroy(*args, **options)
        raise StoreUnavailable("killed")

    monkeypatch.setattr(scene.store.destruction, "destroy", die)
    with pytest.raises(StoreUnavailable, match="killed"):
        await sweep(scene.vault)
    report = await verify_snapshot(scene.vault, made.rotation_id)
    assert (report.records, report.sound, report.unsealed) == (39, True, [])


async def test_key_is_destroyed_only_with_all_snapshots_named(scene: Scene) -> None:
    """Where a rotation has begun a snapshot meanwhile nothing is done; the sweep looks again and does it."""
    (record,) = await scene.create("a")
    await scene.rotate()
    await scene.schedule(record.key_id, scene.now - 1)
    destruction = Destruction(record.key_id, scene.now)
    assert await scene.store.destruction.destroy(destruction) is Destroyed.CHANGED
    assert await scene.opens(record.key_id)
    read = scene.store.backups.manifests
    made: list[Rotation] = []

    async def manifests(tag: str) -> Any:
        found = await read(tag)
        if not made:
            made.append(await scene.rotate())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene.store.backups, "manifests", manifests)
        swept = await sweep(scene.vault)
    assert swept is not None
    assert swept.destroyed == [record.key_id]
    report = await verify_snapshot(scene.vault, made[0].rotation_id)
    assert (report.records, report.unsealed) == (0, [])


async def test_cancelled_or_early_keys_are_not_destroyed(scene: Scene) -> None:
    """Only what is pending and due goes."""
    early, cancelled = await scene.create("a", "b")
    await scene.schedule(early.key_id, scene.now + 10)
    await scene.schedule(cancelled.key_id, scene.now - 10)
    await scene.store.keys.change_state(cancelled.key_id, StateChange.CANCEL_DESTRUCTION, now=scene.now)
    swept = await sweep(scene.vault)
    assert swept is not None
    assert swept.destroyed == []
    assert await scene.opens(early.key_id)
    assert await scene.opens(cancelled.key_id)


async def test_one_sweep_at_a_time(scene: Scene) -> None:
    """While another has the right to destroy, a sweep does nothing."""
    (record,) = await scene.create("a")
    await scene.schedule(record.key_id, scene.now - 1)
    assert await scene.store.destruction.lease("other", 60)
    assert await sweep(scene.vault) is None
    assert await scene.store.destruction.lease("other", 0)
    assert await sweep(scene.vault) is not None
    assert await scene.store.destruction.lease("third", 1)


async def test_restore_from_a_snapshot(scene: Scene) -> None:
    """Damaged keys come back under the active KEK; healthy, destroyed and newer ones are left as they are."""
    healthy, damaged, dead, *_ = await scene.create("a", "b", "c")
    made = await scene.rotate()
    await scene.damage(damaged.key_id)
    await scene.store.keys.change_state(damaged.key_id, StateChange.DISABLE, now=scene.now)
    await scene.schedule(dead.key_id, scene.now - 1)
    await sweep(scene.vault)
    found = await Restorer(scene.vault, scene.book).from_snapshot(made.rotation_id)
    assert (found.restored, found.healthy, found.refused) == ([damaged.key_id], 1, {})
    record = await scene.record(damaged.key_id)
    assert (record.kek_version, record.state) == (2, KeyState.DISABLED)
    assert await scene.opens(damaged.key_id)
    assert (await scene.record(dead.key_id)).state is KeyState.DESTROYED
    found = await Restorer(scene.vault, scene.book, force=True).from_snapshot(
        made.rotation_id, [healthy.key_id, "k_AAAAAAAAAAAAAAAAAAAAAAAAAAAA"]
    )
    assert (found.healthy, found.restored, len(found.absent)) == (1, [], 1)


async def test_restore_brings_quarantined_keys_back(scene: Scene) -> None:
    """What is in quarantine and whole in an export is restored, and no longer in quarantine."""
    bad, _ = await scene.create("a", "b")
    file = await scene.export()
    await scene.damage(bad.key_id)
    made = await scene.rotate()
    assert made.outcome == "incomplete"
    assert await snapshots.quarantined(scene.vault, made.rotation_id, ALL_TAGS) == [bad.key_id]
    found = await Restorer(scene.vault, scene.book).from_file(file.chunks)
    assert (found.restored, found.healthy) == ([bad.key_id], 1)
    assert await scene.opens(bad.key_id)
    assert (await scene.record(bad.key_id)).kek_version == 2
    assert await snapshots.quarantined(scene.vault, made.rotation_id, ALL_TAGS) == []


async def test_restore_adds_missing_records_from_a_file(scene: Scene, harness: Harness) -> None:
    """A record that is gone comes back from an export with its metadata; a snapshot can't bring it."""
    (lost,) = await scene.create("a")
    file = await scene.export()
    made = await scene.rotate()
    _drop(harness, lost.key_id)
    found = await Restorer(scene.vault, scene.book).from_snapshot(made.rotation_id)
    assert "from an export" in found.refused[lost.key_id]
    found = await Restorer(scene.vault, scene.book).from_file(file.chunks)
    assert found.added == [lost.key_id]
    assert (await scene.record(lost.key_id)).kek_version == 2
    assert await scene.opens(lost.key_id)


async def test_restore_refuses_what_would_lose_newer_state(scene: Scene) -> None:
    """A record that unwraps to another key than the copy is replaced by force only, and the loss is named."""
    (record,) = await scene.create("a")
    file = await scene.export()
    _, _, (newer,) = await scene.book.wrap([bytes(32)], [(record.key_id, "a")])
    await scene.damage(record.key_id, newer)
    found = await Restorer(scene.vault, scene.book).from_file(file.chunks)
    assert found.forcible == [record.key_id]
    assert not await scene.opens(record.key_id)
    found = await Restorer(scene.vault, scene.book, force=True).from_file(file.chunks)
    assert list(found.lost) == [record.key_id]
    assert await scene.opens(record.key_id)


async def test_retire_after_a_rotation(scene: Scene) -> None:
    """Refused while a snapshot or the export needs the version; then it is marked, once."""
    await scene.create("a", "b")
    old = await scene.export()
    with pytest.raises(RotationRefused, match="only a decrypt-only"):
        await retire(scene.vault, 1, old.chunks)
    made = await scene.rotate()
    with pytest.raises(RotationRefused, match=f"snapshot of {made.rotation_id} holds 2 copies"):
        await retire(scene.vault, 1, old.chunks)
    await snapshots.purge(scene.vault, made.rotation_id)
    with pytest.raises(BackupInvalid, match="needs KEK version 1 itself"):
        await retire(scene.vault, 1, old.chunks)
    fresh = await scene.export()
    (late,) = await scene.create("c")
    with pytest.raises(BackupInvalid, match=f"lacks 1 of 3 keys: {late.key_id}"):
        await retire(scene.vault, 1, fresh.chunks)
    fresh = await scene.export()
    view = await retire(scene.vault, 1, fresh.chunks)
    assert view.keks[1].state is KekState.RETIRED
    assert await retire(scene.vault, 1, fresh.chunks) == view
    assert scene.audit.told("kek.retire") == ["intent", "ok"]
    await scene.book.refresh()
    for key_id in scene.deks:
        assert await scene.opens(key_id)
    with pytest.raises(BackupInvalid, match="retired in the store"):
        await import_export(scene.vault, old.chunks, merge=True)


async def test_a_version_erased_since_the_export_is_retired_again(scene: Scene, harness: Harness) -> None:
    """The export that a version was retired on knows it still, and so does a store that is filled from it."""
    await scene.create("a")
    made = await scene.rotate()
    await snapshots.purge(scene.vault, made.rotation_id)
    file = await scene.export()
    await retire(scene.vault, 1, file.chunks)
    scene.path.write_text(f"versions:\n  2: {scene.source.export(2).hex()}\n")
    scene.source.reload({})
    _forget(harness)
    new = await scene.elsewhere(harness.store)
    await import_export(new.vault, file.chunks)
    with pytest.raises(KekMismatch, match=r"version 1 \(decrypt_only\) is not loaded: add it, or retire it"):
        await new.book.start(new.now)
    await new.book.start(new.now, may_lack=True)
    await retire(new.vault, 1, file.chunks)
    await new.book.start(new.now)
    for key_id in scene.deks:
        assert await new.opens(key_id)


async def test_the_active_version_may_not_be_lacking(scene: Scene) -> None:
    """Nor may any version be another key than the registered one."""
    await scene.rotate()
    second = scene.source.export(2).hex()
    for content in (f"  1: {scene.source.export(1).hex()}", f"  1: {'ab' * 32}\n  2: {second}"):
        scene.path.write_text(f"versions:\n{content}\n")
        scene.source.reload({})
        with pytest.raises(KekMismatch):
            await scene.book.start(scene.now, may_lack=True)


async def test_retire_counts_records_and_not_the_census(scene: Scene, harness: Harness) -> None:
    """A record under the version is found though no census names it."""
    (record,) = await scene.create("a")
    made = await scene.rotate()
    await snapshots.purge(scene.vault, made.rotation_id)
    if isinstance(harness, RedisHarness):
        harness.server.ask(
            "HSET", f"kms:{{{locate(record.key_id)}}}:dek:{record.key_id}", "wrapped", record.wrapped
        )
    else:
        stored = harness.store._records[record.key_id]  # type: ignore[union-attr] # the memory store's own
        harness.store._records[record.key_id] = replace(stored, wrapped=record.wrapped)  # type: ignore[union-attr] # likewise
    with pytest.raises(RotationRefused, match=f"1 keys are wrapped under it: {record.key_id}"):
        await retire(scene.vault, 1, Bytes().chunks)


async def test_purge_keeps_what_quarantine_may_need(scene: Scene) -> None:
    """A snapshot goes only by force while keys are in quarantine, and by age when it is old."""
    bad, _ = await scene.create("a", "b")
    await scene.damage(bad.key_id)
    made = await scene.rotate()
    with pytest.raises(RotationRefused, match=bad.key_id):
        await snapshots.purge(scene.vault, made.rotation_id)
    assert await snapshots.purge_older(scene.vault, 1) == []
    scene.now += 2 * DAY
    assert await snapshots.purge_older(scene.vault, 1, force=True) == [made.rotation_id]
    assert await scene.store.backups.snapshots() == {}
    with pytest.raises(BackupInvalid, match="no snapshot"):
        await snapshots.purge(scene.vault, made.rotation_id)


async def test_snapshot_is_exported_with_live_metadata(scene: Scene) -> None:
    """A rotation's snapshot in a file: blobs under the old KEK, states as they are now."""
    (record,) = await scene.create("a")
    made = await scene.rotate()
    await scene.store.keys.change_state(record.key_id, StateChange.DISABLE, now=scene.now)
    file = Bytes()
    note, counts = await backup.export_snapshot(scene.vault, made.rotation_id, file)
    assert (note.rotation_id, counts.by_version) == (made.rotation_id, {1: 1})
    export, bad = await verify_export(scene.source, file.chunks)
    assert bad == []
    ((found,),) = list(backup.records_of(file.chunks, export))
    assert (found.wrapped, found.state) == (record.wrapped, KeyState.DISABLED)


async def test_nothing_runs_beside_a_rotation(scene: Scene) -> None:
    """Imports, restores, purges and retirements wait for whoever holds the lock."""
    await scene.create("a")
    file = await scene.export()
    lock = await scene.store.rotation_ledger.acquire("rotation", 60)
    for action in (
        import_export(scene.vault, file.chunks, merge=True),
        Restorer(scene.vault, scene.book).from_file(file.chunks),
        snapshots.purge(scene.vault, "r"),
        retire(scene.vault, 1, file.chunks),
    ):
        with pytest.raises(RotationRunning):
            await action
    await scene.store.rotation_ledger.release(lock)
    assert (await import_export(scene.vault, file.chunks, merge=True)).counts == {"present": 1}

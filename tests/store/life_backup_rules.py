"""Exports, restores, imports, purges, destruction and retirement, also with everything else in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from progressdb_kms.domain.envelope import parse_blob
from progressdb_kms.domain.errors import BackupInvalid, RotationRunning
from progressdb_kms.domain.keyring import KekState
from progressdb_kms.domain.keys import DekRecord
from progressdb_kms.domain.rotation import Step
from progressdb_kms.store.memory import MemoryStore
from progressdb_kms.usecases.backup import inspect_export, records_of, verify_export
from progressdb_kms.usecases.importing import ImportReport
from progressdb_kms.usecases.restore import Restored
from tests.store.backup_scene import Bytes
from tests.store.life_actors import Actor, Witness
from tests.store.life_base import DAY, File, LifeBase
from tests.store.life_model import DESTROYED

numbers = st.integers(0, 1000)


class BackupRules(LifeBase):
    """See the module."""

    @rule(at_once=st.booleans())
    def export(self, at_once: bool) -> None:
        """An export is made."""

        async def begin() -> Actor:
            return self.house.begin("export", self.house.export, at_once)

        actor = self.run(begin())
        actor.before = set(self.live())
        self.begin(actor, at_once=at_once)

    def after_export(self, actor: Actor, content: Bytes) -> None:
        """It is sound, and holds every key that has lived from its beginning to its end."""
        export, bad = self.run(verify_export(self.house.source, content.chunks))
        held = {record.key_id: record for batch in records_of(content.chunks, export) for record in batch}
        assert actor.before & set(self.live()) <= set(held)
        assert {key_id for key_id in bad if key_id in self.model.records} <= self.damaged | self.dead
        self.keep(content, whole=actor.subject)

    def keep(self, content: Bytes, *, whole: bool = True) -> None:
        """Keep an export; where it is whole, with what it must hold: the model, and the store's blobs."""
        records = {**self.model.records, **self.live()} if whole else None
        at = inspect_export(content.chunks).header.created_at
        self.files.append(File(content, at, records, frozenset(self.damaged)))

    @rule(at_once=st.booleans())
    def sweep(self, at_once: bool) -> None:
        """What is due is destroyed."""

        async def begin() -> Actor:
            return self.house.begin("sweep", self.house.sweep)

        actor = self.run(begin())
        actor.before = {key_id for key_id in self.model.records if self.model.due(key_id, self.now)}
        self.begin(actor, at_once=at_once)
        if at_once:
            assert not actor.before & set(self.live())

    def after_sweep(self, actor: Actor, done: int) -> None:
        """No more than what was due."""
        assert done <= len(actor.before)

    @rule(snapshot=numbers, key=numbers, whole=st.booleans(), at_once=st.booleans())
    def restore_snapshot(self, snapshot: int, key: int, whole: bool, at_once: bool) -> None:
        """Damaged keys are restored from a rotation's snapshot, all of them or one."""
        names = sorted(self.run(self.store.backups.snapshots()))
        key_id = self.pick(key)
        if not names or key_id is None:
            return
        name = names[snapshot % len(names)]
        chosen: Sequence[str] = () if whole else [key_id]

        async def begin() -> Actor:
            return self.house.begin(
                "restore", partial(self.house.restore, rotation_id=name, key_ids=chosen), at_once
            )

        actor = self.run(begin())
        copies = {key: blob for _, key, blob in self.copies(name)}
        live = self.live()
        actor.before = {
            key_id
            for key_id in self.damaged & set(copies) & set(chosen or copies)
            if self.opens(key_id, _with(live[key_id], copies[key_id]))
        }
        self.begin(actor, at_once=at_once)

    @precondition(lambda self: self.files)
    @rule(file=numbers, key=numbers, whole=st.booleans(), at_once=st.booleans())
    def restore_file(self, file: int, key: int, whole: bool, at_once: bool) -> None:
        """Damaged keys are restored from an export."""
        chosen = self.files[file % len(self.files)]
        key_id = self.pick(key)
        ids = [] if whole or key_id is None else [key_id]

        async def begin() -> Actor:
            command = partial(self.house.restore_file, file=chosen.content, key_ids=ids)
            return self.house.begin("restore", command, at_once)

        actor = self.run(begin())
        actor.before = set()
        if chosen.records is not None and self.usable(chosen):
            held = set(chosen.records) - chosen.damaged
            actor.before = self.damaged & (held & set(ids) if ids else held)
        self.begin(actor, at_once=at_once)
        # What was lost with the store and was still in the file has come back.
        self.adopt(chosen)

    def after_restore(self, actor: Actor, report: Restored) -> None:
        """What had a good copy is mended, if nothing came in between; what is said to be is."""
        live = self.live()
        for key_id in (*report.restored, *report.added):
            assert key_id not in live or key_id not in self.model.records or self.opens(key_id, live[key_id])
        if actor.subject:
            assert actor.before <= set(report.restored)
        assert not report.lost

    @rule(snapshot=numbers, force=st.booleans(), at_once=st.booleans())
    def purge(self, snapshot: int, force: bool, at_once: bool) -> None:
        """A snapshot is purged."""
        names = sorted(self.run(self.store.backups.snapshots()))
        if not names:
            return
        name = names[snapshot % len(names)]

        async def begin() -> Actor:
            return self.house.begin("purge", partial(self.house.purge, rotation_id=name, force=force), name)

        self.begin(self.run(begin()), at_once=at_once)

    def after_purge(self, actor: Actor, slots: int) -> None:
        """It is gone, and it was of a rotation that needs it no more."""
        assert slots
        assert actor.subject not in self.run(self.store.backups.snapshots())

    @precondition(lambda self: self.rotated)
    @rule(at_once=st.booleans())
    def retire(self, at_once: bool) -> None:
        """The oldest KEK version that is left is retired, unless it is needed; then its key is erased."""
        view = self.view()
        left = [version for version, kek in sorted(view.keks.items()) if kek.state is not KekState.RETIRED]
        actor = self.begin_retirement(left[0], at_once=at_once)
        if at_once and actor.task.exception() is None:
            assert not actor.before, "it was retired though it is needed"
            self.keep(actor.task.result())

    def begin_retirement(self, version: int, *, at_once: bool) -> Actor:
        """Retire a version, with what needs it noted before."""

        async def begin() -> Actor:
            return self.house.begin("retire", partial(self.house.retire, version=version), version)

        actor = self.run(begin())
        actor.before = self.needing(version)
        return self.begin(actor, at_once=at_once)

    def needing(self, version: int) -> list[str]:
        """Return the keys whose record or copy is under a version."""
        records = [key_id for key_id, record in self.live().items() if record.kek_version == version]
        copies = [key_id for _, key_id, blob in self.copies() if parse_blob(blob).kek_version == version]
        return records + copies

    def after_retire(self, actor: Actor, _: Bytes) -> None:
        """Nothing needs it."""
        assert self.needing(actor.subject) == []
        self.run(self.house.erase(actor.subject))

    def usable(self, file: File) -> bool:
        """Say whether the KEKs that an export needs still exist."""
        export = inspect_export(file.content.chunks)
        needed = {kek.version for kek in export.needed} | {export.header.seal_version}
        return needed <= self.house.source.versions()

    @precondition(lambda self: self.files)
    @rule(file=numbers, luck=st.sampled_from([True, True, False]))
    def lose_the_store(self, file: int, luck: bool) -> None:
        """The store is lost, and another is filled from an export; what was destroyed since is so again."""
        chosen = self.files[file % len(self.files)]
        if luck or chosen.records is None:
            return
        if not self.usable(chosen) or self.now - chosen.at >= 7 * DAY:
            empty = MemoryStore()
            taken = self.tried(self.house.take_in(self.gate(), chosen.content, empty, merge=False))
            assert isinstance(taken, BackupInvalid)
            assert self.run(empty.backups.empty())
            return
        erased = self.erased(chosen)
        if erased and chosen.damaged:
            return  # nothing is retired while there are keys that do not open: they have to be restored first
        for actor in list(self.actors):
            self.end(actor)
        self.losses += 1
        self.harness.lose_all()
        taken = self.tried(self.house.take_in(self.gate(), chosen.content, self.harness.store, merge=False))
        assert isinstance(taken, ImportReport)
        assert taken.counts == ({"added": len(chosen.records)} if chosen.records else {})
        assert set(taken.bad) == set(chosen.damaged)
        self.model.records = dict(chosen.records)
        self.damaged = set(chosen.damaged)
        self.blobs, self.floors = {}, {}
        self.imported |= {record.wrapped for record in chosen.records.values()}
        self.house.store = self.harness.store
        self.house.witness = Witness()
        self.retire_what_is_erased(erased)
        self.run(self.house.settle(self.harness.store))
        self.destroy_again()

    def erased(self, file: File) -> set[int]:
        """Return the versions that an export's store would not start without, and that are no more."""
        registry = inspect_export(file.content.chunks).registry
        old = {kek.version for kek in registry.keks if kek.state is KekState.DECRYPT_ONLY}
        return old - self.house.source.versions()

    def retire_what_is_erased(self, erased: set[int]) -> None:
        """Versions that were erased since the export are retired in its store."""
        book = self.house.book(self.gate())
        self.run(book.start(self.now, may_lack=True))
        if max(erased, default=0) > self.view().active:
            # One that was rolled back can only be retired once a rotation has raised the floors above it.
            self.run(self.house.lead(self.gate(), "leader"))
            self.mending = True
        for version in sorted(erased):
            self.run(self.house.retire(self.gate(), version))

    @precondition(lambda self: self.rotated and not self.actors)
    @rule()
    def lose_a_key(self) -> None:
        """The KEK that was rolled back is lost; no key and no copy is under it."""
        latest = self.latest()
        if latest is None or latest.step is not Step.ROLLED_BACK or self.needing(latest.target_version):
            return
        kek = self.view().keks.get(latest.target_version)
        if kek is not None and kek.state is KekState.DECRYPT_ONLY:
            self.run(self.house.erase(kek.version))

    def destroy_again(self) -> None:
        """What an import brought, and what is due by now, goes."""
        self.sweeping = True
        self.run(self.house.sweep(self.gate()))

    @precondition(lambda self: self.files)
    @rule(file=numbers)
    def merge(self, file: int) -> None:
        """What the store lacks comes from an export; no record is replaced, and tombstones win."""
        chosen = self.files[file % len(self.files)]
        taken = self.tried(self.house.take_in(self.gate(), chosen.content, self.store, merge=True))
        if isinstance(taken, ImportReport):
            self.sweeping = True
            self.adopt(chosen)
            self.destroy_again()
        else:
            assert isinstance(taken, RotationRunning | BackupInvalid)

    def adopt(self, file: File) -> None:
        """Take into the model what came back, as the file had it."""
        export = inspect_export(file.content.chunks)
        for batch in records_of(file.content.chunks, export):
            for record in batch:
                if record.key_id in self.model.records:
                    continue
                (found,) = self.run(self.store.keys.get([record.key_id]))
                if found is None:
                    continue
                self.model.records[record.key_id] = record
                self.imported.add(record.wrapped)
                if record.key_id in file.damaged:
                    self.damaged.add(record.key_id)
                assert (
                    record.state is DESTROYED
                    or record.key_id not in self.dead
                    or self.model.due(record.key_id, self.now)
                )


def _with(record: DekRecord, blob: bytes) -> DekRecord:
    return replace(record, wrapped=blob, kek_version=parse_blob(blob).kek_version)

"""Rotations of the KEK and rollbacks: led, shared, stopped anywhere, taken over, resumed."""

from __future__ import annotations

from functools import partial

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from progressdb_kms.domain.rotation import Rotation, Step
from tests.store.life_actors import Actor
from tests.store.life_base import OWNERS, LifeBase

owners = st.sampled_from(OWNERS)
numbers = st.integers(0, 1000)


class RotationRules(LifeBase):
    """See the module."""

    @rule(owner=owners, at_once=st.booleans())
    def lead(self, owner: str, at_once: bool) -> None:
        """A run leads: it begins a rotation or resumes one; under the leader's own name it takes over."""
        self.rotated = True

        async def begin() -> Actor:
            return self.house.begin("lead", partial(self.house.lead, owner=owner))

        self.begin(self.run(begin()), at_once=at_once)

    @precondition(lambda self: any(actor.kind in {"lead", "roll back"} for actor in self.actors))
    @rule()
    def join(self) -> None:
        """A worker shares what is under way."""

        async def begin() -> Actor:
            return self.house.begin("join", self.house.join)

        self.begin(self.run(begin()), at_once=False)

    @precondition(lambda self: self.rotated)
    @rule(owner=owners, at_once=st.booleans())
    def roll_back(self, owner: str, at_once: bool) -> None:
        """The latest rotation is turned back, or a rollback that was stopped is resumed."""

        async def begin() -> Actor:
            return self.house.begin("roll back", partial(self.house.roll_back, owner=owner))

        self.begin(self.run(begin()), at_once=at_once)

    @precondition(lambda self: self.actors)
    @rule(actor=numbers, calls=st.sampled_from([1, 2, 5, 20, 60]))
    def go_on(self, actor: int, calls: int) -> None:
        """A command makes its next calls of the store."""
        self.advance(self.actors[actor % len(self.actors)], calls)

    @precondition(lambda self: self.actors)
    @rule(calls=st.integers(1, 40))
    def push(self, calls: int) -> None:
        """The latest command makes its next calls."""
        self.advance(self.actors[-1], calls)

    @precondition(lambda self: self.actors)
    @rule(actor=numbers)
    def finish(self, actor: int) -> None:
        """A command goes on to its end; a worker, which may have to wait for others, for a while."""
        chosen = self.actors[actor % len(self.actors)]
        if chosen.kind == "join":
            self.advance(chosen, 100)
            return
        self._note(chosen)
        self.run(chosen.finish())
        self.collect()

    @precondition(lambda self: self.actors)
    @rule(actor=numbers)
    def kill(self, actor: int) -> None:
        """A command is killed where it stands, and its lock stays behind."""
        self.end(self.actors[actor % len(self.actors)])

    @rule()
    def lease_runs_out(self) -> None:
        """Whoever holds the lock of rotations has been silent for too long."""
        self.free_lock()

    def after_lead(self, _: Actor, rotation: Rotation | None) -> None:
        """A rotation that has ended has left no key that opens under an older version."""
        assert rotation is not None
        latest = self.latest()
        assert latest is not None
        if latest.rotation_id != rotation.rotation_id or latest.step is not Step.COMPLETE:
            return  # another came after it, before it could say that it was done
        view = self.view()
        assert view.active == rotation.target_version
        assert min(self.run(self.store.backups.floors()).values()) >= rotation.target_version
        old = {key_id for key_id, record in self.live().items() if record.kek_version < view.active}
        assert old <= self.damaged
        assert latest.outcome == "incomplete" or not old

    def after_join(self, actor: Actor, rotation: Rotation | None) -> None:
        """A worker has nothing to say of its own."""

    def after_roll_back(self, _: Actor, rotation: Rotation) -> None:
        """A rollback that has ended has made the source version active, and lowered no floor below it."""
        latest = self.latest()
        assert latest is not None
        if latest.rotation_id != rotation.rotation_id or latest.step is not Step.ROLLED_BACK:
            return
        assert self.view().active == rotation.source_version
        assert max(self.run(self.store.backups.floors()).values()) <= rotation.source_version

"""When a KEK is made, named, founded: the table, case by case, and what holds over all cases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.domain.errors import ProvisionRefused
from progressdb_kms.provision.kek import PENDING, Kept, Step, Stored, next_step

ID, OTHER = "ab" * 16, "cd" * 16
KEKS = {1: "value 1"}
FRESH = Kept("Secret x", KEKS, ID, PENDING)
USED = Kept("Secret x", KEKS, ID, ID)
EMPTY = Stored(empty=True)
FULL = Stored(empty=False, store_id=ID, keks=KEKS)
LOST = Stored(empty=False, lost="the registry is lost")


@pytest.mark.parametrize(
    "kept, stored, step",
    [
        (None, EMPTY, Step.MAKE),
        (None, FULL, "put the Secret back"),
        (None, LOST, "put the Secret back"),
        (replace(FRESH, keks={}), EMPTY, "holds no KEK file"),
        (replace(USED, keks={}), FULL, "holds no KEK file"),
        (FRESH, EMPTY, Step.FOUND),
        (Kept("Secret x", KEKS, "", ""), EMPTY, Step.NAME),
        (Kept("Secret x", KEKS, "", PENDING), EMPTY, Step.NAME),
        (USED, EMPTY, "the store is empty"),
        (Kept("Secret x", KEKS, "", ID), EMPTY, "the store is empty"),
        (Kept("Secret x", KEKS, ID, ""), EMPTY, "the store is empty"),
        (FRESH, FULL, Step.MARK),
        (Kept("Secret x", KEKS, ID, ""), FULL, Step.MARK),
        (USED, FULL, Step.NOTHING),
        (Kept("Secret x", KEKS, "", ""), FULL, Step.PIN),
        (replace(USED, store_id=OTHER), FULL, "belongs to store"),
        (replace(FRESH, store_id=OTHER), FULL, "belongs to store"),
        (replace(USED, keks={1: "another"}), FULL, "is another key"),
        (replace(USED, keks={2: "value 1"}), FULL, "is missing"),
        (replace(USED, keks={**KEKS, 2: "unused"}), FULL, Step.NOTHING),
        (USED, LOST, "the registry is lost"),
        (FRESH, LOST, "the registry is lost"),
    ],
)
def test_table(kept: Kept | None, stored: Stored, step: Step | str) -> None:
    """Where something is made, and where it is said what is lost."""
    if isinstance(step, Step):
        assert next_step("Secret x", kept, stored, create=True) is step
    else:
        with pytest.raises(ProvisionRefused, match=step):
            next_step("Secret x", kept, stored, create=True)


@pytest.mark.parametrize(
    "kept, stored, says",
    [
        (None, None, "make it"),
        (None, EMPTY, "make it"),
        (FRESH, None, ""),
        (FRESH, EMPTY, ""),
        (Kept("Secret x", KEKS, "", ""), FULL, ""),
        (replace(FRESH, keks={}), None, "holds no KEK file"),
        (replace(USED, keks={1: "another"}), FULL, "is another key"),
        (USED, LOST, "the registry is lost"),
    ],
)
def test_required(kept: Kept | None, stored: Stored | None, says: str) -> None:
    """Without `create` there is never anything to do but to say what is wrong."""
    if says:
        with pytest.raises(ProvisionRefused, match=says):
            next_step("Secret x", kept, stored, create=False)
    else:
        assert next_step("Secret x", kept, stored, create=False) is Step.NOTHING


keks = st.dictionaries(st.integers(1, 3), st.sampled_from(["a", "b"]), max_size=3)
ids = st.sampled_from(["", ID, OTHER])
kepts = st.none() | st.builds(Kept, st.just("Secret x"), keks, ids, st.sampled_from(["", PENDING, ID, OTHER]))
storeds = (
    st.just(EMPTY)
    | st.just(LOST)
    | st.builds(Stored, empty=st.just(False), store_id=st.sampled_from([ID, OTHER]), keks=keks)
)


@pytest.mark.fuzz
@given(kepts, storeds)
def test_no_key_is_endangered(kept: Kept | None, stored: Stored) -> None:
    """A KEK is made only for an empty store without a Secret; a store is founded only under a fresh one."""
    try:
        step = next_step("Secret x", kept, stored, create=True)
    except ProvisionRefused:
        return
    if step is Step.MAKE:
        assert kept is None
        assert stored.empty
        return
    assert kept is not None
    assert kept.keks
    if step in {Step.FOUND, Step.NAME}:
        assert stored.empty
        assert not kept.founded
    else:
        assert stored.keks is not None
        assert stored.keks.items() <= kept.keks.items()
        assert kept.store_id in {"", stored.store_id}


@dataclass
class World:
    """A Secret and a store that steps are done to."""

    kept: Kept | None
    stored: Stored

    def do(self, step: Step) -> None:
        """Do a step as `founding` does."""
        if step is Step.MAKE:
            self.kept = FRESH
        elif step is Step.FOUND:
            assert self.kept is not None
            top = max(self.kept.keks)
            self.stored = Stored(empty=False, store_id=self.kept.store_id, keks={top: self.kept.keks[top]})
        elif self.kept is not None:
            changes: dict[str, Any] = {
                Step.NAME: {"store_id": ID, "mark": PENDING},
                Step.PIN: {"store_id": self.stored.store_id, "mark": self.stored.store_id},
                Step.MARK: {"mark": self.stored.store_id},
            }[step]
            self.kept = replace(self.kept, **changes)


@pytest.mark.fuzz
@given(kepts, storeds)
def test_steps_come_to_an_end(kept: Kept | None, stored: Stored) -> None:
    """From any state that is not refused, a few steps lead to a pair, and none on the way is refused."""
    world = World(kept, stored)
    try:
        step = next_step("Secret x", world.kept, world.stored, create=True)
    except ProvisionRefused:
        return
    for _ in range(4):
        if step is Step.NOTHING:
            break
        world.do(step)
        step = next_step("Secret x", world.kept, world.stored, create=True)
    assert step is Step.NOTHING
    assert world.kept is not None
    assert world.kept.store_id == world.kept.mark == world.stored.store_id

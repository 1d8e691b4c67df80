"""The whole life of keys against a model: any order of changes, on the memory store and on real servers."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from progressdb_kms.domain.backup import Destruction
from progressdb_kms.domain.errors import KeyDestroyed, KmsError, StaleKek
from progressdb_kms.domain.keys import StateChange, locate
from progressdb_kms.store.redis import StoreSettings, open_store
from tests.store.conftest import VARIANTS, Harness, MemoryHarness, RedisHarness, new_dek
from tests.store.life_model import DESTROYED, KeyModel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.store.servers import Server

THREADS = ("room:1", "room:2")
FUTURE = 4_000_000_000
threads = st.sampled_from(THREADS)
VERSIONS = range(1, 5)
versions = st.sampled_from(VERSIONS)


class KeyLife(RuleBasedStateMachine):
    """Keys of two threads. What KEKs, rotations and backups do with them is ``test_whole_life``."""

    keys = Bundle("keys")
    open_harness: Callable[[asyncio.Runner], Harness]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.harness = type(self).open_harness(self.runner)
        self.store = self.harness.store
        self.model = KeyModel()
        self.floors: dict[str, int] = {}
        self.now = 1_700_000_000
        for version in VERSIONS:  # the census asks for versions that wrapped something
            self.tried(self.store.registry.reserve_wraps(version, 1))

    def teardown(self) -> None:
        """Compare the census, which asks every slot and is too slow for each step; close the store."""
        try:
            assert self.tried(self.store.keys.census()) == self.model.census()
        finally:
            self.runner.run(self.store.close())
            self.runner.close()

    def tried(self, call: Awaitable[Any]) -> Any:
        """Return what a call returned, or the class of the error that it raised."""

        async def run() -> Any:
            return await call

        try:
            return self.runner.run(run())
        except KmsError as error:
            return type(error)

    @rule(target=keys, thread=threads, version=versions, rotating=st.booleans())
    def make(self, thread: str, version: int, rotating: bool) -> str:
        """Create a key, or rotate a thread's; below the slot's floor neither is done."""
        dek = new_dek(thread, kek_version=version)
        if rotating:
            made = self.tried(self.store.keys.rotate(dek))
        else:
            (found,) = self.runner.run(self.create(dek))
            made = type(found) if isinstance(found, KmsError) else found
        if version < self.floors.get(locate(dek.key_id), 0):
            assert made is StaleKek
            return dek.key_id
        if rotating:
            self.model.supersede(thread, dek.created_at)
        assert made == self.model.made(dek)
        return dek.key_id

    async def create(self, dek: Any) -> Any:
        """Create one key."""
        return await self.store.keys.create([dek])

    @rule(key_id=keys, rotating=st.booleans())
    def replay(self, key_id: str, rotating: bool) -> None:
        """The id of a key that is there returns it as it has become, and changes nothing."""
        if (known := self.model.records.get(key_id)) is None:
            return
        dek = new_dek(known.thread_id, key_id=key_id, kek_version=4)
        if rotating:
            assert self.tried(self.store.keys.rotate(dek)) == known
        else:
            assert self.runner.run(self.create(dek)) == [known]

    @rule(key_id=keys, change=st.sampled_from(StateChange), due=st.booleans())
    def change(self, key_id: str, change: StateChange, due: bool) -> None:
        """A change of state."""
        if key_id not in self.model.records:
            return
        self.now += 1
        at = self.now if due else FUTURE
        found = self.tried(self.store.keys.change_state(key_id, change, now=self.now, destroy_at=at))
        expected = self.model.change(key_id, change, now=self.now, destroy_at=at)
        assert found is expected if isinstance(expected, type) else found == expected

    @rule(key_id=keys)
    def destroy(self, key_id: str) -> None:
        """A key goes when it is due, not before, and for good."""
        if key_id not in self.model.records:
            return
        self.now += 1
        found = self.tried(self.store.destruction.destroy(Destruction(key_id, self.now)))
        assert found is self.model.destroy(key_id, self.now)

    @rule(key_id=keys, version=versions, stale=st.booleans())
    def rewrap(self, key_id: str, version: int, stale: bool) -> None:
        """A blob is replaced only by who knows the present one, and never to below the floor."""
        if (known := self.model.records.get(key_id)) is None:
            return
        fresh = secrets.token_bytes(64)
        seen = replace(known, wrapped=secrets.token_bytes(64)) if stale else known
        found = self.tried(self.store.keys.rewrap(seen, fresh, f"kek_{version}", version))
        if known.state is DESTROYED:
            assert found is KeyDestroyed
        elif version < self.floors.get(locate(key_id), 0):
            assert found is StaleKek
        else:
            assert found is not stale
            if found:
                self.model.rewrapped(key_id, fresh, f"kek_{version}", version)

    @rule(thread=threads, version=versions)
    def raise_floor(self, thread: str, version: int) -> None:
        """A rotation of the KEK comes to a slot."""
        tag = locate(new_dek(thread).key_id)
        self.floors[tag] = max(version, self.floors.get(tag, 0))
        self.harness.set_floor(thread, self.floors[tag])

    @rule(key_id=keys, count=st.integers(1, 1000))
    def use(self, key_id: str, count: int) -> None:
        """Encryptions are counted, whatever the state."""
        totals = self.tried(self.store.keys.reserve_uses({key_id: count}))
        known = key_id in self.model.records
        assert totals == ({key_id: self.model.used(key_id, count)} if known else {})

    @invariant()
    def the_store_is_as_the_model(self) -> None:
        """Every record."""
        found = self.tried(self.store.keys.get(list(self.model.records)))
        assert found == list(self.model.records.values())


@pytest.mark.fuzz
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_life_of_keys(variant: str, servers: Callable[[str], Server]) -> None:
    """After each step of any order of steps the store holds what the model holds."""

    def opened(runner: asyncio.Runner) -> Harness:
        if variant == "memory":
            return MemoryHarness()
        server = servers(variant)
        server.ask("FLUSHALL")
        return RedisHarness(server, runner.run(open_store(StoreSettings(server.url))))

    machine = type("KeyLifeOfVariant", (KeyLife,), {"open_harness": staticmethod(opened)})
    # Each step on a server waits for its disk: make fuzz lives fewer lives there.
    most = settings().max_examples if variant == "memory" else min(settings().max_examples, 500)
    run_state_machine_as_test(machine, settings=settings(max_examples=most))

"""The whole life of keys against a model: any order of changes, on the memory store and on real servers."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from progressdb_kms.domain.backup import Destruction
from progressdb_kms.domain.errors import InvalidTransition, KeyDestroyed, KmsError, StaleKek
from progressdb_kms.domain.keys import DekRecord, KeyState, StateChange, locate
from progressdb_kms.ports.backup import Destroyed
from progressdb_kms.store.redis import StoreSettings, open_store
from tests.store.conftest import VARIANTS, Harness, MemoryHarness, RedisHarness, new_dek

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.store.servers import Server

ENABLED, DECRYPT_ONLY = KeyState.ENABLED, KeyState.DECRYPT_ONLY
DISABLED, PENDING, DESTROYED = KeyState.DISABLED, KeyState.PENDING_DESTRUCTION, KeyState.DESTROYED
THREADS = ("room:1", "room:2")
FUTURE = 4_000_000_000
threads = st.sampled_from(THREADS)
VERSIONS = range(1, 5)
versions = st.sampled_from(VERSIONS)


class KeyLife(RuleBasedStateMachine):
    """Keys of two threads; the model is what the documents say, not what a store does."""

    keys = Bundle("keys")
    open_harness: Callable[[asyncio.Runner], Harness]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.harness = type(self).open_harness(self.runner)
        self.store = self.harness.store
        self.model: dict[str, DekRecord] = {}
        self.floors: dict[str, int] = {}
        self.now = 1_700_000_000
        for version in VERSIONS:  # the census asks for versions that wrapped something
            self.tried(self.store.registry.reserve_wraps(version, 1))

    def teardown(self) -> None:
        """Compare the census, which asks every slot and is too slow for each step; close the store."""
        try:
            live = Counter(record.kek_version for record in self.model.values() if record.wrapped)
            assert self.tried(self.store.keys.census()) == dict(live)
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

    def add(self, dek: Any) -> DekRecord:
        """Put a new DEK into the model."""
        version = 1 + sum(record.thread_id == dek.thread_id for record in self.model.values())
        record = DekRecord(
            dek.key_id,
            dek.thread_id,
            dek.wrapped,
            dek.kek_id,
            dek.kek_version,
            version,
            ENABLED,
            dek.created_at,
            dek.created_by,
        )
        self.model[dek.key_id] = record
        return record

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
            for key_id, known in self.model.items():
                if known.thread_id == thread and known.state is ENABLED:
                    self.model[key_id] = replace(known, state=DECRYPT_ONLY, changed_at=dek.created_at)
                elif known.thread_id == thread and known.state in {DISABLED, PENDING}:
                    self.model[key_id] = replace(known, resume_state=DECRYPT_ONLY)
        assert made == self.add(dek)
        return dek.key_id

    async def create(self, dek: Any) -> Any:
        """Create one key."""
        return await self.store.keys.create([dek])

    @rule(key_id=keys, rotating=st.booleans())
    def replay(self, key_id: str, rotating: bool) -> None:
        """The id of a key that is there returns it as it has become, and changes nothing."""
        if (known := self.model.get(key_id)) is None:
            return
        dek = new_dek(known.thread_id, key_id=key_id, kek_version=4)
        if rotating:
            assert self.tried(self.store.keys.rotate(dek)) == known
        else:
            assert self.runner.run(self.create(dek)) == [known]

    @rule(key_id=keys, change=st.sampled_from(StateChange), due=st.booleans())
    def change(self, key_id: str, change: StateChange, due: bool) -> None:
        """A change of state."""
        if (known := self.model.get(key_id)) is None:
            return
        self.now += 1
        at = self.now if due else FUTURE
        found = self.tried(self.store.keys.change_state(key_id, change, now=self.now, destroy_at=at))
        if known.state is DESTROYED:
            assert found is KeyDestroyed
            return
        resume = known.state if known.state in {ENABLED, DECRYPT_ONLY} else known.resume_state
        to, repeated = {
            StateChange.DISABLE: (DISABLED if known.state is not PENDING else None, DISABLED),
            StateChange.ENABLE: (known.resume_state if known.state is DISABLED else None, known.state),
            StateChange.SCHEDULE_DESTRUCTION: (PENDING, PENDING),
            StateChange.CANCEL_DESTRUCTION: (DISABLED if known.state is PENDING else None, DISABLED),
        }[change]
        usable = known.state in {ENABLED, DECRYPT_ONLY}
        if (change is StateChange.ENABLE and usable) or (
            change is not StateChange.ENABLE and known.state is repeated
        ):
            expected = known
        elif to is None:
            assert found is InvalidTransition
            return
        else:
            if change is StateChange.ENABLE:
                resume = ENABLED
            expected = replace(
                known,
                state=to,
                resume_state=resume,
                changed_at=self.now,
                destroy_at=at if to is PENDING else None,
            )
        assert found == expected
        self.model[key_id] = expected

    @rule(key_id=keys)
    def destroy(self, key_id: str) -> None:
        """A key goes when it is due, not before, and for good."""
        if (known := self.model.get(key_id)) is None:
            return
        self.now += 1
        found = self.tried(self.store.destruction.destroy(Destruction(key_id, self.now)))
        if known.state is DESTROYED:
            assert found is Destroyed.DONE
        elif known.state is PENDING and known.destroy_at != FUTURE:
            assert found is Destroyed.DONE
            self.model[key_id] = replace(
                known,
                state=DESTROYED,
                wrapped=b"",
                changed_at=self.now,
                destroy_at=None,
                resume_state=ENABLED,
            )
        else:
            assert found is Destroyed.NOT_DUE

    @rule(key_id=keys, version=versions, stale=st.booleans())
    def rewrap(self, key_id: str, version: int, stale: bool) -> None:
        """A blob is replaced only by who knows the present one, and never to below the floor."""
        if (known := self.model.get(key_id)) is None:
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
                self.model[key_id] = replace(
                    known, wrapped=fresh, kek_id=f"kek_{version}", kek_version=version
                )

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
        if (known := self.model.get(key_id)) is None:
            assert totals == {}
            return
        self.model[key_id] = replace(known, uses=known.uses + count)
        assert totals == {key_id: known.uses + count}

    @invariant()
    def the_store_is_as_the_model(self) -> None:
        """Every record."""
        found = self.tried(self.store.keys.get(list(self.model)))
        assert found == list(self.model.values())


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

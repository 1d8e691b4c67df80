"""The promise of the cache against a model: no answer from memory with a state that changed over 1 s ago."""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from progressdb_kms.domain.keys import KeyState
from progressdb_kms.usecases.keycache import CachedDek, DekCache
from tests.unit.helpers import Clock, labelled

CIPHER = AESGCM(labelled("dek"))
KEYS = ("a", "b")
NOTICE_LIFE = 2.0
"""Seconds after which the store refuses to make a change for its notice (rule 1)."""
steps = st.sampled_from([0.1, 0.6, 1.0, 1.9, 2.6, 4.5])
keys = st.sampled_from(KEYS)


@dataclass
class Load:
    """A load under way: when it began, and, once the store has read, what it found."""

    key_id: str
    began: float
    state: KeyState | None = None


@dataclass
class Store:
    """The truth: each key's states over time, and the notices in order."""

    history: dict[str, list[tuple[float, KeyState]]] = field(
        default_factory=lambda: {key: [(float("-inf"), KeyState.ENABLED)] for key in KEYS}
    )
    notices: list[str] = field(default_factory=list)
    changing: list[tuple[str, float]] = field(default_factory=list)

    def state(self, key_id: str) -> KeyState:
        """Return the state now."""
        return self.history[key_id][-1][1]

    def states_since(self, key_id: str, moment: float) -> set[KeyState]:
        """Return every state that the key had at ``moment`` or later."""
        past = [state for at, state in self.history[key_id] if at <= moment]
        return {past[-1]} | {state for at, state in self.history[key_id] if at > moment}


class CacheAgainstTheTruth(RuleBasedStateMachine):
    """Loads, notices, changes, reads, restarts and pauses in any order, each in its separate steps."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.store = Store()
        self.cache = DekCache(max_keys=1, ttl=60, max_stale=30, clock=self.clock)
        self.loads: list[Load] = []
        self.cursor = 0
        self.read_under_way: tuple[float, int, list[str]] | None = None
        self.cache.restart()
        self.clock.at += 10
        self.cache.read(self.clock.at)

    @rule(seconds=steps)
    def pass_time(self, seconds: float) -> None:
        """Time goes on: slow calls, a paused process."""
        self.clock.at += seconds

    @rule(key_id=keys, seen=st.booleans())
    def put_notice(self, key_id: str, seen: bool) -> None:
        """Somebody begins a change (rule 1, first half); the instance may see it at once."""
        self.store.notices.append(key_id)
        self.store.changing.append((key_id, self.clock.at))
        if seen:
            self.read_at_once()

    @precondition(lambda self: self.store.changing)
    @rule(newest=st.booleans())
    def make_change(self, newest: bool) -> None:
        """The change is made, or refused for its age (rule 1, second half)."""
        key_id, noticed = self.store.changing.pop(-1 if newest else 0)
        if self.clock.at - noticed <= NOTICE_LIFE:
            disabled = self.store.state(key_id) is KeyState.ENABLED
            state = KeyState.DISABLED if disabled else KeyState.ENABLED
            self.store.history[key_id].append((self.clock.at, state))

    @rule(key_id=keys, seen=st.booleans(), waits=st.tuples(steps, steps))
    def change_at_once(self, key_id: str, seen: bool, waits: tuple[float, float]) -> None:
        """A whole change, and then some time."""
        self.put_notice(key_id, seen)
        self.clock.at += waits[0]
        self.make_change(newest=True)
        self.clock.at += waits[1]

    @rule(key_id=keys, answered=st.booleans())
    def begin_load(self, key_id: str, answered: bool) -> None:
        """A request misses and asks the store, which may read the record at once."""
        self.loads.append(Load(key_id, self.clock.at, self.store.state(key_id) if answered else None))

    @precondition(lambda self: any(load.state is None for load in self.loads))
    @rule()
    def store_answers(self) -> None:
        """The store reads the record for the oldest load that waits."""
        load = next(load for load in self.loads if load.state is None)
        load.state = self.store.state(load.key_id)

    @precondition(lambda self: any(load.state is not None for load in self.loads))
    @rule(newest=st.booleans(), then_read=st.booleans())
    def finish_load(self, newest: bool, then_read: bool) -> None:
        """The answer arrives, in any order; a read of the notices may follow at once."""
        answered = [load for load in self.loads if load.state is not None]
        load = answered[-1 if newest else 0]
        self.loads.remove(load)
        assert load.state is not None
        self.cache.put(
            CachedDek(
                key_id=load.key_id,
                thread_id="t",
                cipher=CIPHER,
                state=load.state,
                version="1",
                loaded_at=load.began,
            )
        )
        if then_read:
            self.read_at_once()

    @rule(key_id=keys, seconds=st.sampled_from([0.0, 0.2]))
    def load_at_once(self, key_id: str, seconds: float) -> None:
        """A whole load, as fast as most are."""
        began = self.clock.at
        state = self.store.state(key_id)
        self.clock.at += seconds
        self.loads.append(Load(key_id, began, state))
        self.finish_load(newest=True, then_read=True)

    @rule(key_id=keys, seen=st.booleans(), waits=st.tuples(steps, steps, steps))
    def load_across_a_change(self, key_id: str, seen: bool, waits: tuple[float, float, float]) -> None:
        """The order that hurts most: notice, load, change, answer, with any times between them."""
        self.put_notice(key_id, seen)
        self.clock.at += waits[0]
        self.begin_load(key_id, answered=True)
        self.clock.at += waits[1]
        self.make_change(newest=True)
        self.clock.at += waits[2]
        self.finish_load(newest=True, then_read=True)

    @precondition(lambda self: self.read_under_way is None)
    @rule(waits=st.sampled_from([0.0, 0.3, 1.5]))
    def begin_read(self, waits: float) -> None:
        """The instance reads the notices after its cursor; the store answers some time later."""
        began = self.clock.at
        self.clock.at += waits
        end = len(self.store.notices)
        self.read_under_way = (began, end, self.store.notices[self.cursor : end])

    @precondition(lambda self: self.read_under_way is not None)
    @rule()
    def finish_read(self) -> None:
        """The notices arrive and are applied."""
        assert self.read_under_way is not None
        began, self.cursor, noticed = self.read_under_way
        self.read_under_way = None
        self.cache.forget(noticed)
        self.cache.read(began)

    @rule()
    def read_at_once(self) -> None:
        """A whole read, as most are."""
        if self.read_under_way is None:
            self.begin_read(0.0)
        self.finish_read()

    @rule(number=st.integers(0, 9))
    def others_notices(self, number: int) -> None:
        """Now and then very many other keys are noticed, so that old notices are tidied away."""
        if number:
            return
        self.cache.forget(f"other {number}" for number in range(1100))

    @rule(number=st.integers(0, 4), late=st.sampled_from([0.0, 0.5, 3.0]))
    def restart(self, number: int, late: float) -> None:
        """Now and then notices may have been missed: begin at the stream's present end."""
        if number:
            return
        self.cursor = len(self.store.notices)
        self.read_under_way = None
        self.clock.at += late
        self.cache.restart()

    @invariant()
    def no_answer_is_over_a_second_old(self) -> None:
        """Whatever is found in memory was the key's state within the last second."""
        for key_id in KEYS:
            found = self.cache.lookup(key_id)
            if found is not None:
                assert found.state in self.store.states_since(key_id, self.clock.at - 1.0)
        assert len(self.cache) <= 1


TestCacheAgainstTheTruth = CacheAgainstTheTruth.TestCase
TestCacheAgainstTheTruth.settings = settings(
    max_examples=80, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)

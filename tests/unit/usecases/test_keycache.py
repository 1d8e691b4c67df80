"""The cache's three rules, each alone, on a clock that is set."""

from __future__ import annotations

import gc

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.domain.keys import KeyState
from progressdb_kms.usecases.keycache import FREE_USES, FRESH, QUIET, SETTLE, USES_BLOCK, CachedDek, DekCache
from tests.unit.helpers import Clock, labelled

CIPHER = AESGCM(labelled("dek"))


def key(
    key_id: str, loaded_at: float, state: KeyState = KeyState.ENABLED, *, exhausted: bool = False
) -> CachedDek:
    """Return a key as a load that began then brought it."""
    return CachedDek(
        key_id=key_id,
        thread_id="t",
        cipher=CIPHER,
        state=state,
        version="1",
        loaded_at=loaded_at,
        exhausted=exhausted,
    )


def test_the_garbage_collector_does_not_look_at_cached_keys() -> None:
    """At 100,000 of them it would hold the event loop for 30 ms each time."""
    assert not gc.is_tracked(key("a", 0))


@pytest.fixture
def clock() -> Clock:
    """A clock that stands."""
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> DekCache:
    """A cache that is settled and vouched for."""
    cache = DekCache(max_keys=2, ttl=300, max_stale=30, clock=clock)
    cache.restart()
    clock.at += 10
    cache.read(clock.at)
    return cache


def test_a_key_is_found_again(cache: DekCache, clock: Clock) -> None:
    """What was put is what comes back."""
    put = key("a", clock.at)
    assert cache.put(put) is put
    assert cache.lookup("a") is put
    assert cache.lookup("b") is None
    assert len(cache) == 1


def test_a_noticed_key_leaves_at_once(cache: DekCache, clock: Clock) -> None:
    """Rule 2: a notice drops the key."""
    cache.put(key("a", clock.at))
    cache.put(key("b", clock.at))
    cache.forget(["a", "unknown"])
    assert cache.lookup("a") is None
    assert cache.lookup("b") is not None


def test_a_noticed_key_stays_out_for_5_seconds(cache: DekCache, clock: Clock) -> None:
    """Rule 2: loads after the notice serve their request only, until the change must have been made."""
    cache.forget(["a"])
    for _ in range(4):
        clock.at += QUIET / 5
        fresh = key("a", clock.at)
        assert cache.put(fresh) is fresh
        assert len(cache) == 0
    clock.at += QUIET / 5
    cache.put(key("a", clock.at))
    assert len(cache) == 1


def test_a_load_that_began_before_the_notice_is_never_cached(cache: DekCache, clock: Clock) -> None:
    """Rule 2: however late it comes."""
    began = clock.at
    clock.at += 0.5
    cache.forget(["a"])
    for _ in range(5):
        cache.put(key("a", began))
        assert len(cache) == 0
        clock.at += 2


def test_not_even_when_the_notice_has_been_tidied_away(cache: DekCache, clock: Clock) -> None:
    """Rule 2: thousands of other notices must not make room for an old load."""
    began = clock.at
    clock.at += 0.1
    cache.forget(["a"])
    clock.at += QUIET + 0.1
    cache.forget(str(number) for number in range(3000))
    cache.put(key("a", began))
    assert len(cache) == 0


def test_a_load_that_read_before_the_change_and_came_after_the_quiet_is_not_cached(
    cache: DekCache, clock: Clock
) -> None:
    """Rule 2: a load between notice and change may take 5 s, in a paused process say: its state is old."""
    cache.forget(["a"])
    clock.at += 0.5
    began = clock.at  # the record changes up to 2 s after the notice
    clock.at += QUIET
    cache.put(key("a", began))
    assert len(cache) == 0


@pytest.mark.parametrize("age, trusted", [(0, True), (FRESH, True), (FRESH + 0.001, False), (3600, False)])
def test_memory_is_trusted_for_a_second_after_a_read_began(
    cache: DekCache, clock: Clock, age: float, trusted: bool
) -> None:
    """Rule 3: a second after the last whole read of the notices began, the store is asked instead."""
    cache.put(key("a", clock.at))
    clock.at += age
    assert (cache.lookup("a") is not None) is trusted
    cache.read(clock.at)
    assert (cache.lookup("a") is not None) is (age < 300)


def test_a_slow_read_vouches_from_its_beginning(cache: DekCache, clock: Clock) -> None:
    """Rule 3: what counts is when the read began, for a notice may have come right after."""
    cache.put(key("a", clock.at))
    began = clock.at
    clock.at += 5
    cache.read(began)
    assert cache.lookup("a") is None


def test_nothing_is_trusted_at_first(clock: Clock) -> None:
    """A new cache has read no notices, and caches nothing before it is told to."""
    cache = DekCache(max_keys=2, ttl=300, max_stale=30, clock=clock)
    cache.put(key("a", clock.at))
    cache.read(clock.at)
    assert cache.lookup("a") is None


def test_after_a_restart_nothing_is_cached_until_it_has_settled(cache: DekCache, clock: Clock) -> None:
    """A change whose notice was put before the first read may still be made for 2 s."""
    cache.put(key("a", clock.at))
    cache.restart()
    restarted = clock.at
    assert cache.lookup("a") is None
    assert cache.lookup_stale("a") is None
    cache.put(key("a", restarted + SETTLE - 0.001))
    assert len(cache) == 0
    clock.at = restarted + SETTLE
    cache.put(key("a", clock.at))
    assert cache.lookup("a") is None  # cached, but no read vouches yet
    cache.read(clock.at)
    assert cache.lookup("a") is not None


def test_a_key_is_loaded_again_after_its_time(cache: DekCache, clock: Clock) -> None:
    """The time to live counts from the load."""
    cache.put(key("a", clock.at))
    clock.at += 300
    cache.read(clock.at)
    assert cache.lookup("a") is not None
    clock.at += 0.1
    cache.read(clock.at)
    assert cache.lookup("a") is None


def test_the_least_recently_used_goes_first(cache: DekCache, clock: Clock) -> None:
    """The bound holds, and what is in use stays."""
    cache.put(key("a", clock.at))
    cache.put(key("b", clock.at))
    assert cache.lookup("a") is not None
    cache.put(key("c", clock.at))
    assert len(cache) == 2
    assert cache.lookup("b") is None
    assert cache.lookup("a") is not None


def test_a_newer_load_brings_its_state_to_the_cached_object(cache: DekCache, clock: Clock) -> None:
    """The object stays, so that its count of uses goes on; an older load changes nothing."""
    first = cache.put(key("a", clock.at))
    first.spend(3)
    clock.at += 0.5
    assert cache.put(key("a", clock.at, KeyState.DISABLED, exhausted=True)) is first
    assert cache.put(key("a", clock.at - 0.2)) is first
    assert first.state is KeyState.DISABLED
    assert first.exhausted
    assert first.uses_left == FREE_USES - 3


def test_stale_keys_serve_for_their_time(cache: DekCache, clock: Clock) -> None:
    """While the store is away keys serve for max_stale after the last read began, and no longer."""
    put = cache.put(key("a", clock.at))
    clock.at += 30
    assert cache.lookup("a") is None
    assert cache.lookup_stale("a") is put
    clock.at += 0.001
    assert cache.lookup_stale("a") is None


def test_max_stale_zero_is_never(clock: Clock) -> None:
    """The operator who wants no stale answer gets none."""
    cache = DekCache(max_keys=2, ttl=300, max_stale=0, clock=clock)
    cache.restart()
    clock.at += 10
    cache.put(key("a", clock.at))
    cache.read(clock.at)
    clock.at += 0.001
    assert cache.lookup("a") is not None
    assert cache.lookup_stale("a") is None


def test_uses_are_counted_once(cache: DekCache, clock: Clock) -> None:
    """What was reserved is not reported again when it is spent, nor when the key leaves."""
    held = cache.put(key("a", clock.at))
    held.spend(10)
    assert held.unreported == 10
    in_store = held.unreported + USES_BLOCK
    held.reserved(in_store)
    assert held.unreported == 0
    assert held.uses_left == USES_BLOCK + FREE_USES
    held.spend(USES_BLOCK)
    assert held.unreported == 0
    cache.forget(["a"])
    assert cache.take_owed() == {}


def test_uses_of_keys_that_leave_are_owed(cache: DekCache, clock: Clock) -> None:
    """By notice, by eviction, by restart, or after one request: what the store does not know is reported."""
    for key_id in "ab":
        cache.put(key(key_id, clock.at)).spend(2)
    cache.put(key("c", clock.at)).spend(1)  # a is evicted
    cache.forget(["b"])
    once = key("a", clock.at)
    once.spend(5)
    cache.settle(once)
    cache.settle(once)
    held = cache.lookup("c")
    assert held is not None
    cache.settle(held)  # is cached and goes on counting
    assert cache.take_owed() == {"a": 7, "b": 2}
    assert cache.take_owed() == {}
    cache.restart()
    cache.owe({"a": 7})
    assert cache.take_owed() == {"c": 1, "a": 7}


def test_repr_shows_no_key() -> None:
    """Id and state only."""
    assert repr(key("a", 0)) == "CachedDek('a', state=<KeyState.ENABLED: 'enabled'>)"

"""How much an identity may ask for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.domain.errors import TooManyRequests
from progressdb_kms.domain.quota import Limit, Part, Quota


@given(
    rate=st.integers(1, 1000),
    burst=st.integers(1, 1000),
    calls=st.lists(st.tuples(st.floats(0, 3), st.integers(1, 300)), max_size=60),
)
def test_no_more_than_the_rate_over_any_time(rate: int, burst: int, calls: list[tuple[float, int]]) -> None:
    """All that is let in is at most the burst, what the rate gives, and the last batch's debt."""
    quota = Quota(Limit(rate, burst, 0), now=0.0)
    now, done, last = 0.0, 0, 0
    for pause, operations in calls:
        now += pause
        try:
            quota.enter(now)
        except TooManyRequests:
            continue
        quota.charge(operations - 1)
        quota.leave()
        assert done <= burst + rate * now + 1e-6
        done, last = done + operations, operations
    assert done - last <= burst + rate * now + 1e-6


@given(rate=st.integers(1, 1000), debt=st.integers(0, 5000))
def test_after_the_wait_it_named_it_lets_in(rate: int, debt: int) -> None:
    """Retry-After is neither a lie nor a moment too long."""
    quota = Quota(Limit(rate, 1, 0), now=0.0)
    quota.enter(0.0)
    quota.charge(debt)
    quota.leave()
    with pytest.raises(TooManyRequests) as refused:
        quota.enter(0.0)
    wait = refused.value.retry_after
    with pytest.raises(TooManyRequests):
        quota.enter(wait - 1.001 / rate)
    quota.enter(wait)


def test_a_cap_on_what_is_under_way() -> None:
    """A place is free again when a request ends, and a refused one has taken none."""
    quota = Quota(Limit(0, 0, 2), now=0.0)
    quota.enter(0.0)
    quota.enter(0.0)
    for _ in range(3):
        with pytest.raises(TooManyRequests):
            quota.enter(0.0)
    quota.leave()
    quota.enter(0.0)


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    """Nor does it take anything away."""
    quota = Quota(Limit(1, 1, 0), now=10.0)
    quota.enter(10.0)
    quota.leave()
    for now in (10.0, 3.0):
        with pytest.raises(TooManyRequests):
            quota.enter(now)


def test_unused_means_the_same_as_a_fresh_one() -> None:
    """What is under way, or not yet refilled, is kept."""
    quota = Quota(Limit(1, 1, 1), now=0.0)
    assert quota.unused(0.0)
    quota.enter(0.0)
    assert not quota.unused(9.0)
    quota.leave()
    assert quota.unused(9.0)


@given(total=st.integers(0, 10_000), workers=st.integers(1, 64))
def test_parts_are_the_whole(total: int, workers: int) -> None:
    """All workers' parts together are exactly the total, and none differs from another by more than one."""
    parts = [Part(number, workers).of(total) for number in range(workers)]
    assert sum(parts) == total
    assert max(parts) - min(parts) <= 1


@given(
    rate=st.integers(1, 1000),
    burst=st.integers(1, 1000),
    workers=st.integers(1, 8),
    calls=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), max_size=100),
)
def test_workers_let_in_no_more_than_one_process(
    rate: int, burst: int, workers: int, calls: list[tuple[float, int]]
) -> None:
    """However requests are spread over workers: the burst and the rate, and of each worker its last one."""
    quotas = [Quota(Limit(rate, burst, 0), 0.0, Part(number, workers)) for number in range(workers)]
    now, let_in = 0.0, 0
    for pause, which in calls:
        now += pause
        try:
            quotas[which % workers].enter(now)
        except TooManyRequests:
            continue
        let_in += 1
        assert let_in <= burst + rate * now + workers + 1e-6


@given(concurrent=st.integers(1, 100), workers=st.integers(1, 64))
def test_requests_under_way_over_all_workers(concurrent: int, workers: int) -> None:
    """As many as the limit says; where there are more workers than that, one each."""
    let_in = 0
    for number in range(workers):
        quota = Quota(Limit(0, 0, concurrent), 0.0, Part(number, workers))
        with pytest.raises(TooManyRequests):  # noqa: PT012 - until it is full
            while True:
                quota.enter(0.0)
                let_in += 1
    assert let_in == max(concurrent, workers)


def test_a_refusal_names_the_limit_that_was_configured() -> None:
    """Not a worker's part of it, which stands in no policy."""
    quota = Quota(Limit(100, 2, 0), 0.0, Part(0, 2))
    quota.enter(0.0)
    with pytest.raises(TooManyRequests, match="100 operations a second"):
        quota.enter(0.0)

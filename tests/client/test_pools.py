"""Which pool a call gets, and when one is closed."""

from __future__ import annotations

import ssl

import pytest

from progressdb_kms.client import ProviderClosed
from progressdb_kms.client.pools import Pools


class Harness:
    """Pools that are only numbered."""

    def __init__(self) -> None:
        self.made = 0
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.pools: Pools[int] = Pools(self.make, lambda: self.context)

    def make(self, _: ssl.SSLContext | None) -> int:
        """Make the next pool."""
        self.made += 1
        return self.made

    def renew(self) -> None:
        """Take another context from now on."""
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@pytest.fixture
def harness() -> Harness:
    """Fresh pools."""
    return Harness()


def test_one_context_is_one_pool(harness: Harness) -> None:
    """Calls share it, and giving it back closes nothing."""
    one, closed = harness.pools.enter()
    two, _ = harness.pools.enter()
    assert one is two
    assert closed == []
    assert harness.pools.leave(one) == harness.pools.leave(two) == []
    assert harness.made == 1


def test_an_idle_pool_is_closed_by_a_renewal(harness: Harness) -> None:
    """The call that finds the new context closes the old pool."""
    lease, _ = harness.pools.enter()
    harness.pools.leave(lease)
    harness.renew()
    fresh, closed = harness.pools.enter()
    assert (fresh.pool, closed) == (2, [1])


def test_a_pool_in_use_is_closed_by_its_last_call(harness: Harness) -> None:
    """Not before, and once."""
    one, _ = harness.pools.enter()
    two, _ = harness.pools.enter()
    harness.renew()
    fresh, closed = harness.pools.enter()
    assert closed == []
    assert harness.pools.leave(one) == []
    assert harness.pools.leave(two) == [1]
    assert harness.pools.leave(fresh) == []


def test_close_waits_for_calls(harness: Harness) -> None:
    """It closes what is idle; what is in use follows with its last call; nothing new begins."""
    lease, _ = harness.pools.enter()
    assert harness.pools.close() == []
    assert harness.pools.close() == []
    with pytest.raises(ProviderClosed):
        harness.pools.enter()
    assert harness.pools.leave(lease) == [1]


def test_close_of_an_idle_pool(harness: Harness) -> None:
    """It is closed at once."""
    lease, _ = harness.pools.enter()
    harness.pools.leave(lease)
    assert harness.pools.close() == [1]


def test_a_context_that_fails_makes_no_pool() -> None:
    """The error reaches the call."""

    def fail() -> ssl.SSLContext:
        raise ProviderClosed

    with pytest.raises(ProviderClosed):
        Pools(lambda _: 1, fail).enter()

"""The number that ``kek add`` gives a key: the one that the next rotation takes."""

from __future__ import annotations

import pytest

from progressdb_kms.bootstrap.kek import next_version
from progressdb_kms.domain.errors import RotationRefused
from progressdb_kms.domain.keyring import KekInfo, KekState
from progressdb_kms.ports import RegistryView


def view(active: int, **states: KekState) -> RegistryView:
    """Return a registry with these versions, given as ``v1`` and so on."""
    keks = {
        int(name[1:]): KekInfo(int(name[1:]), f"kek_{name}", "file", name[1:], "", state, 0)
        for name, state in states.items()
    }
    return RegistryView("ab" * 16, keks, active, 0)


def test_the_next_one() -> None:
    """Above what the file has and what the registry knows, also where the file has lost it."""
    assert next_version(frozenset({1, 2}), None) == 3
    assert next_version(frozenset({1}), view(1, v1=KekState.ACTIVE)) == 2
    rolled_back = view(1, v1=KekState.ACTIVE, v2=KekState.RETIRED)
    assert next_version(frozenset({1}), rolled_back) == 3
    assert next_version(frozenset({1, 2}), rolled_back) == 3


@pytest.mark.parametrize(
    "registry", [view(1, v1=KekState.ACTIVE), view(1, v1=KekState.ACTIVE, v2=KekState.STAGED)]
)
def test_one_that_is_not_in_use_goes_first(registry: RegistryView) -> None:
    """A rotation would take that one, and not the key that was added."""
    with pytest.raises(RotationRefused, match="KEK version 2 is in the KEK file and not in use yet"):
        next_version(frozenset({1, 2}), registry)

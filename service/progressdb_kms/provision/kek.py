"""Whether a KEK may be made, from what the Secret and the store hold: pure, a table of cases.

A KEK is made only where there is nothing that another one could have wrapped. A store that is empty under a
KEK that has been in use means that the data is gone, or that this is another store: keys made in it would
hide that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from progressdb_kms.domain.errors import ProvisionRefused

FOUNDED: Final = "progressdb-kms.io/founded"
"""Annotation of the Secret: the id of the store once its registry was made under it, ``PENDING`` before."""
PENDING: Final = "pending"


class Step(StrEnum):
    """What to do next; after each but NOTHING, look again."""

    MAKE = "make"
    """Make a KEK and a store's id, and the Secret with them."""
    NAME = "name"
    """Write a new store's id into the Secret."""
    PIN = "pin"
    """Write the id of the store, whose data is under this KEK, into the Secret."""
    FOUND = "found"
    """Make the store's registry with the Secret's id and highest version."""
    MARK = "mark"
    """Note in the Secret that the store has its registry."""
    NOTHING = "nothing"
    """All is there."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What the Secret holds.

    Attributes:
        name: How messages call it.
        keks: Check values by version, or names of keys that are kept elsewhere; empty where it holds no KEK
            file.
        store_id: The store that they belong to; empty where that is not in it.
        mark: Its annotation FOUNDED; empty where it has none.
    """

    name: str
    keks: Mapping[int, str]
    store_id: str
    mark: str

    @property
    def founded(self) -> bool:
        """Whether a store had its registry made under it.

        So it had if the Secret has an id and no mark at all: it was put back by hand from its data alone.
        """
        return self.mark != PENDING and bool(self.mark or self.store_id)


@dataclass(frozen=True, slots=True)
class Stored:
    """What the store holds.

    Attributes:
        empty: Neither registry nor keys.
        store_id: Its id; empty where it has no registry.
        keks: Likewise, of the versions that its keys need, from the registry.
        lost: Why there are keys but no registry that can be read; empty where that is not so.
    """

    empty: bool
    store_id: str = ""
    keks: Mapping[int, str] | None = None
    lost: str = ""


def next_step(name: str, kept: Kept | None, stored: Stored | None, *, create: bool) -> Step:
    """Decide.

    Args:
        name: How messages call the Secret.
        kept: The Secret, None where there is none.
        stored: The store, None where it is not to be asked; only without ``create``.
        create: Whether what is missing is made; else the Secret is only checked.

    Raises:
        ProvisionRefused: Says what is lost, and what to do.
    """
    if kept is None:
        return _without_secret(name, stored, create=create)
    if not kept.keks:
        raise ProvisionRefused(
            f"{name} holds no KEK file: put it back from its copy, or recover it (progressdb-kms kek escrow"
            " recover); an existing Secret gets no new one"
        )
    if stored is None:
        return Step.NOTHING
    if stored.lost:
        raise ProvisionRefused(stored.lost)
    if stored.empty:
        return _over_an_empty_store(kept, create=create)
    _require_same(kept, stored)
    if not create or (kept.store_id and kept.mark == stored.store_id):
        return Step.NOTHING
    return Step.MARK if kept.store_id else Step.PIN


def _without_secret(name: str, stored: Stored | None, *, create: bool) -> Step:
    if not create:
        raise ProvisionRefused(f"there is no {name}: make it with the KEK file in it")
    if stored is not None and stored.empty:
        return Step.MAKE
    raise ProvisionRefused(
        f"there is no {name}, but the store holds keys that need its KEK: put the Secret back from its copy,"
        " or recover the KEK (progressdb-kms kek escrow recover); a new KEK would open none of them"
    )


def _over_an_empty_store(kept: Kept, *, create: bool) -> Step:
    if not create:
        # The service makes the registry, unless it was told which store is its own.
        return Step.NOTHING
    if kept.founded:
        store = kept.store_id or "another store"
        raise ProvisionRefused(
            f"the store is empty, but the KEK in {kept.name} was in use with store {store}: bring the store's"
            " volume back, or import a backup (progressdb-kms backup import); to begin anew on purpose, with"
            " all keys lost, delete the Secret"
        )
    return Step.FOUND if kept.store_id else Step.NAME


def _require_same(kept: Kept, stored: Stored) -> None:
    if kept.store_id and kept.store_id != stored.store_id:
        raise ProvisionRefused(
            f"the KEK in {kept.name} belongs to store {kept.store_id}, but this is store {stored.store_id}:"
            " point store.url at the right store, or use this store's own Secret"
        )
    for version, value in sorted((stored.keks or {}).items()):
        if kept.keks.get(version) != value:
            problem = "is another key" if version in kept.keks else "is missing"
            raise ProvisionRefused(
                f"KEK version {version}, which the store's keys need, {problem} in {kept.name}: put the right"
                " one back"
            )

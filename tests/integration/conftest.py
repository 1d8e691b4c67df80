"""Worlds for the integration tests: a store, and services on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.drill import Machine
from tests.integration.world import Instance, World


@pytest.fixture(scope="module")
def new_world() -> Iterator[Callable[..., World]]:
    """Give what makes a world, ended with the module; services in it must end with exit code 0."""
    worlds: list[World] = []

    def make(**options: object) -> World:
        worlds.append(World(**options))  # type: ignore[arg-type] # checked by World's own signature
        return worlds[-1]

    yield make
    for world in worlds:
        world.terminate()
    failures = []
    for world in worlds:
        try:
            world.close()
        except AssertionError as error:
            failures.append(error)
    if failures:
        raise failures[0]


@pytest.fixture(scope="module")
def world(new_world: Callable[..., World]) -> World:
    """Run one service on a store; modules that need another world have a fixture of this name."""
    made = new_world()
    made.store.start()
    made.instance("a").start()
    return made


@pytest.fixture
def service(world: World) -> Instance:
    """Give the running service."""
    return world.instances[0]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine with a store that a service has been started on."""
    made = Machine(tmp_path / "one")
    made.start_store()
    with made.service():
        pass
    yield made
    made.lose()

"""Fixtures of the unit tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.helpers import World, make_world


@pytest.fixture
async def world(tmp_path: Path) -> World:
    """A service over the memory store and a KEK file, on a clock that stands still."""
    return await make_world(tmp_path)

"""Heartbeats that somebody with access to Redis wrote: none breaks the reading of others, or a rotation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.domain.errors import InstancesMissing
from progressdb_kms.ports import Heartbeat
from progressdb_kms.store.redis.schema import INSTANCES_KEY
from tests.store.conftest import RedisHarness
from tests.store.servers import Server
from tests.store.test_rotation_end_to_end import Scene, few, hasty, make_scene

__all__ = ["few", "hasty"]

GOOD = asdict(Heartbeat("x", 4e9, 1.0, "r", (1,), 1, "", 1))
NONE: Sequence[bytes] = [
    b"",
    b"7",
    b"[" * 100_000,
    *(
        json.dumps({**GOOD, **spoiled}).encode()
        for spoiled in (
            {"at": "9999999999"},
            {"at": 10**400},
            {"kek_versions": 5},
            {"kek_versions": None},
            {"revision": "1"},
            {"revision": 10**400, "kek_versions": [1, 2]},
        )
    ),
]


@pytest.fixture
async def scene(
    own_server: Callable[..., Server], opened: Callable[..., Any], tmp_path: Path, few: Sequence[str]
) -> Scene:
    """Give a store with a registry."""
    server = own_server()
    made = await make_scene(RedisHarness(server, await opened(server.url)), tmp_path)
    made.tags = few
    return made


def forge(scene: Scene, entry: bytes) -> None:
    """Write an entry that no instance has written."""
    assert isinstance(scene.harness, RedisHarness)
    scene.harness.server.ask("HSET", INSTANCES_KEY, "x", entry)


def names(scene: Scene) -> set[bytes]:
    """Return the names of the entries."""
    assert isinstance(scene.harness, RedisHarness)
    return set(scene.harness.server.ask("HKEYS", INSTANCES_KEY))


async def rotated(scene: Scene) -> str:
    """Rotate, and return the outcome."""
    done = await scene.rotator().run()
    assert done is not None
    return done.outcome


@pytest.mark.parametrize("entry", NONE, ids=[str(number) for number in range(len(NONE))])
async def test_what_is_none_is_left_out_and_goes(scene: Scene, entry: bytes) -> None:
    """Others are read, and the next sweep forgets it."""
    forge(scene, entry)
    beats = scene.harness.store.heartbeats
    own = Heartbeat("own", 1_700_000_100.0, 1.0, "r", (1,), 1, "", 1)
    await beats.beat(own)
    assert await beats.live() == [own]
    assert names(scene) == {b"own"}


@pytest.mark.parametrize("entry", NONE[:7], ids=[str(number) for number in range(7)])
async def test_what_is_none_stops_no_rotation(scene: Scene, entry: bytes) -> None:
    """Neither the wait for instances nor the script that activates minds it."""
    forge(scene, entry)
    assert await rotated(scene) == "clean"


async def test_what_the_script_alone_counts_is_named_in_the_end(scene: Scene) -> None:
    """The wait can't see it, the activation does: that ends with its name, and goes on once it is gone."""
    forge(scene, json.dumps({**GOOD, "revision": True}).encode())
    clock = count(1_700_000_100)
    with pytest.raises(InstancesMissing, match="x"):
        await scene.rotator(clock=lambda: float(next(clock))).run()
    assert isinstance(scene.harness, RedisHarness)
    scene.harness.server.ask("HDEL", INSTANCES_KEY, "x")
    assert await rotated(scene) == "clean"

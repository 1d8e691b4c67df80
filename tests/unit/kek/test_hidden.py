"""What is known of a key while its place is away, and when that is looked at again."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

import pytest
from structlog.testing import capture_logs

from progressdb_kms.domain.errors import KekUnreachable, WrappedKeyInvalid
from progressdb_kms.kek import hidden
from progressdb_kms.kek.hidden import HiddenKeks
from progressdb_kms.kek.keyfile import KeyName
from progressdb_kms.kek.threads import Threads
from progressdb_kms.kek.vault import VaultKeeper
from tests.keepers.transit import Transit


async def until(condition: Callable[[], object]) -> None:
    """Wait for something; only a failure takes long."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_what_is_known_stands_while_the_place_is_away(engine: Transit, keeper: VaultKeeper) -> None:
    """A key that was the right one still is; nothing is said of one that was never seen."""
    keks, fresh = HiddenKeks(keeper, 10), HiddenKeks(keeper, 10)
    name = KeyName("vault", "k@1")
    value = await keks.check_value(name)
    assert await keks.matches(name, value)
    engine.sealed = True
    assert await keks.matches(name, value)
    for _ in range(5):
        with pytest.raises(KekUnreachable, match="503"):
            await fresh.matches(name, value)
    before = len(engine.calls)
    with pytest.raises(KekUnreachable, match="503"):
        await fresh.matches(name, value)
    assert len(engine.calls) == before


async def test_a_key_that_was_replaced_is_noticed(
    engine: Transit, keeper: VaultKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the same name and version: it is looked at again in the background."""
    keks, name = HiddenKeks(keeper, 10), KeyName("vault", "k@1")
    value = await keks.check_value(name)
    assert await keks.matches(name, value)
    before = len(engine.calls)
    assert await keks.matches(name, value)
    assert len(engine.calls) == before
    engine.keys["k"] = [os.urandom(32)]
    monkeypatch.setattr(hidden, "RECHECK", 0.0)
    assert await keks.matches(name, value)
    for _ in range(1000):
        if not await keks.matches(name, value):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it was not noticed")


async def test_a_failed_look_changes_nothing(
    engine: Transit, keeper: VaultKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is logged; the key is still the right one."""
    keks, name = HiddenKeks(keeper, 10), KeyName("vault", "k@1")
    value = await keks.check_value(name)
    assert await keks.matches(name, value)
    monkeypatch.setattr(hidden, "RECHECK", 0.0)
    engine.sealed = True
    with capture_logs() as logs:
        assert await keks.matches(name, value)
        await until(lambda: logs)
    assert logs[0]["event"] == "kek_not_checked"
    assert await keks.matches(name, value)


async def test_errors_of_one_item_are_its_own(engine: Transit, keeper: VaultKeeper) -> None:
    """Also in a batch of several calls."""
    keks, name = HiddenKeks(keeper, 10), KeyName("vault", "k@1")
    deks = [os.urandom(32) for _ in range(2 * keeper.chunk + 1)]
    aads = [b"%d" % number for number in range(len(deks))]
    bodies = await keks.wrap(name, deks, aads)
    aads[keeper.chunk] = b"other"
    opened = await keks.unwrap(name, bodies, aads)
    assert [number for number, key in enumerate(opened) if isinstance(key, WrappedKeyInvalid)] == [
        keeper.chunk
    ]


async def test_a_call_that_is_given_up_is_never_made() -> None:
    """What still waits for a thread when its time is over is dropped."""
    threads, made = Threads("test", 1), []
    blocking = asyncio.create_task(threads.call(lambda: time.sleep(0.5), 10))
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await threads.call(lambda: made.append("late"), 0.05)
    await blocking
    await threads.call(lambda: made.append("next"), 10)
    assert made == ["next"]

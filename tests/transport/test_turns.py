"""What a pass of the event loop has left is shared."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Any

import pytest

from progressdb_kms.transport.turns import WHILE, Turns


async def test_a_pass_ends_after_a_while_and_all_get_their_turn() -> None:
    """Of many that always want more each is called as often as the others, and the loop goes on."""
    now = count()
    # Each look at the clock is a quarter of the while later.
    turns = Turns(lambda: next(now) * WHILE / 4)
    called: list[int] = []
    passes: list[int] = []

    def wants(number: int) -> None:
        called.append(number)
        if len(called) < 90:
            turns.wait(lambda: wants(number))

    for number in range(10):
        turns.wait(lambda number=number: wants(number))  # type: ignore[misc]  # a default binds it
    assert called == []
    while len(called) < 90:
        before = len(called)
        await asyncio.sleep(0)
        passes.append(len(called) - before)
    assert max(passes) <= 5
    assert called[:90] == [*range(10)] * 9


async def test_one_that_fails_costs_the_others_nothing() -> None:
    """They get their turn all the same."""
    turns = Turns()
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    done = asyncio.Event()

    def fails() -> None:
        raise ValueError("a bug")

    turns.wait(fails)
    turns.wait(done.set)
    await asyncio.wait_for(done.wait(), 10)
    assert isinstance(told[0]["exception"], ValueError)


@pytest.mark.parametrize("many", [1, 3])
async def test_whoever_asks_is_called_once(many: int) -> None:
    """And not in the pass that is under way."""
    turns = Turns()
    called = 0

    def once() -> None:
        nonlocal called
        called += 1

    for _ in range(many):
        turns.wait(once)
    assert called == 0
    for _ in range(10):
        await asyncio.sleep(0)
    assert called == many

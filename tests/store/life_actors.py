"""Commands that stop before every call of the store, so that anything can come in between, or end them."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from progressdb_kms.ports import Claim, Lock

_TURNS = 8
"""Turns of the loop in which what needs no store comes to rest: futures' callbacks, gathered tasks' ends."""
_LONG = 3600.0


class KilledError(Exception):
    """Stands for a kill: what it passes through may call the store no more, as the dead can't."""


class Gate:
    """Where the calls of one command wait.

    Attributes:
        waiting: Calls that wait.
        under_way: Calls that have passed and are not done.
    """

    def __init__(self) -> None:
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.under_way = 0
        self._open = False
        self._dead = False

    async def passed(self) -> None:
        """Wait to be let through.

        Raises:
            KilledError: Nobody is let through any more.
        """
        if not (self._open or self._dead):
            self.waiting.append(asyncio.get_running_loop().create_future())
            await self.waiting[-1]
        if self._dead:
            raise KilledError

    def let_one_pass(self) -> None:
        """Let the call through that has waited longest."""
        self.waiting.popleft().set_result(None)

    def open(self) -> None:
        """Let all through from now on."""
        self._open = True
        while self.waiting:
            self.let_one_pass()

    def kill(self) -> None:
        """Let none through any more."""
        self._dead = True
        while self.waiting:
            self.let_one_pass()


class Witness:
    """Knows who has the lock and the slots, and that nobody else's call was let through."""

    def __init__(self) -> None:
        self._lock = 0
        self._slots: dict[str, int] = {}

    def saw(self, name: str, words: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        """Take note of a call that the store has answered without an error."""
        if name == "acquire":
            self._lock = result.token
        elif name == "take":
            for claim in words[0]:
                assert claim.token >= self._slots.get(claim.tag, 0), "a slot was taken by an older claim"
                self._slots[claim.tag] = claim.token
        elif name != "release":
            given = [*words, *options.values()]
            claims = [word for word in given if isinstance(word, Claim)]
            claims += [each for word in given if isinstance(word, list) for each in word if _is_claim(each)]
            if name not in {"extend", "finish"}:  # these are about claims of the ledger, and not about a slot
                assert all(self._slots[each.tag] == each.token for each in claims), f"{name} came too late"
            locks = [word for word in given if isinstance(word, Lock)]
            assert all(lock.token == self._lock for lock in locks), f"{name} came too late"


def _is_claim(word: object) -> bool:
    return isinstance(word, Claim)


class Gated:
    """A port whose every call passes a gate, and is seen by a witness.

    Leases run out by a rule of the machine and never by the time that a test takes: the lock's are long, and
    a slot's are over at once, so that another worker may always take it over.
    """

    def __init__(self, port: object, gate: Gate, witness: Witness) -> None:
        self._port = port
        self._gate = gate
        self._witness = witness

    def __getattr__(self, name: str) -> Any:
        """Return a method of the port, behind the gate."""
        method = getattr(self._port, name)
        if inspect.iscoroutinefunction(method):
            return self._call(name, method)
        return self._batches(method) if inspect.isasyncgenfunction(method) else method

    def _call(self, name: str, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @wraps(method)
        async def call(*args: Any, **options: Any) -> Any:
            await self._gate.passed()
            self._gate.under_way += 1
            if name in {"acquire", "renew"}:
                args = (args[0], _LONG)
            elif name == "claim":
                args = (*args[:-1], 0.0)
            try:
                result = await method(*args, **options)
                self._witness.saw(name, args, options, result)
            finally:
                self._gate.under_way -= 1
            return result

        return call

    def _batches(self, method: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
        @wraps(method)
        async def batches(*args: Any, **options: Any) -> AsyncIterator[Any]:
            source = method(*args, **options)
            while True:
                await self._gate.passed()
                self._gate.under_way += 1
                try:
                    batch = await anext(source, None)
                finally:
                    self._gate.under_way -= 1
                if batch is None:
                    return
                yield batch

        return batches


@dataclass
class Actor:
    """A command under way.

    Attributes:
        kind: What it is: ``lead``, ``roll back``, ``retire`` and so on.
        subject: What it is about: a rotation's id, a KEK version.
        before: What its check at the end has to know of its beginning.
    """

    kind: str
    gate: Gate
    task: asyncio.Task[Any]
    subject: Any = None
    before: Any = field(default=None, repr=False)

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.task.done()

    async def advance(self, calls: int) -> None:
        """Let it make some calls of the store, one after the other, and come to rest before the next."""
        for _ in range(calls):
            await self._rest()
            if self.over:
                return
            self.gate.let_one_pass()
            await self._rest()

    async def finish(self) -> None:
        """Let it go on to its end."""
        self.gate.open()
        await asyncio.wait([self.task])

    async def kill(self) -> None:
        """End it where it stands."""
        self.gate.kill()
        await asyncio.wait([self.task])

    async def _rest(self) -> None:
        turns = 0
        while turns < _TURNS and not self.over:
            quiet = self.gate.waiting and not self.gate.under_way
            turns = turns + 1 if quiet else 0
            await asyncio.sleep(0)

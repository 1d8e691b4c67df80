"""Lets calls of many tasks travel as batches; the rules are those of ``coalescing``."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, TypeVar

from progressdb_kms.client.aio import AsyncHttpSender
from progressdb_kms.client.coalescing import (
    ALONE,
    OUT_AT_MOST,
    OUT_AT_ONCE,
    PATIENCE,
    Join,
    Kind,
    Limits,
    Outcome,
    Part,
    batch,
    coalesced,
    late,
    part_of,
)
from progressdb_kms.client.errors import ProviderClosed
from progressdb_kms.client.exchange import Attempt, Options, Pause, Rules, adrive
from progressdb_kms.client.protocol import Call
from progressdb_kms.client.retry import Failure

T = TypeVar("T")


class _Waiter:
    """A call that waits for its outcome, in one task."""

    __slots__ = ("batch", "expires", "outcome", "part", "since")

    def __init__(
        self, part: Part[Any], since: float, timeout: float, outcome: asyncio.Future[Outcome[Any]]
    ) -> None:
        self.part = part
        self.since = since
        self.expires = since + timeout
        self.outcome = outcome
        self.batch: _Batch | None = None

    def expire(self, where: object) -> None:
        if not self.outcome.done():
            self.outcome.set_result(late(where))


class _Batch:
    """A request that is out, in a task of its own: no caller's end ends it for the others."""

    __slots__ = ("task", "waiters", "waiting")

    def __init__(self, waiters: list[_Waiter]) -> None:
        self.waiters = waiters
        self.waiting = len(waiters)
        self.task: asyncio.Task[None] | None = None
        for waiter in waiters:
            waiter.batch = self

    def leave(self) -> None:
        """Note that one of the callers has gone; the last one ends the request."""
        self.waiting -= 1
        if self.waiting == 0 and self.task is not None:
            self.task.cancel()


class _Lane:
    """The calls of one kind. All in one event loop, so that what does not await is not interrupted."""

    def __init__(self, sender: AsyncHttpSender, limits: Limits) -> None:
        self._sender = sender
        self._limits = limits
        self.loop = asyncio.get_running_loop()
        self._gathered: deque[_Waiter] = deque()
        self._out: set[_Batch] = set()
        self._called = False
        self._watching = False

    async def join(self, step: Join) -> Outcome[Any]:
        """Return the outcome of a call, at its deadline at the latest."""
        waiter = _Waiter(step.part, self.loop.time(), step.timeout, self.loop.create_future())
        timer = self.loop.call_at(waiter.expires, waiter.expire, self._sender.endpoint)
        self._gathered.append(waiter)
        if len(self._out) >= OUT_AT_ONCE:
            self._watch()
        elif not self._called:
            # After whatever else is ready to run now, so that all calls of this moment go together.
            self._called = True
            self.loop.call_soon(self._depart)
        try:
            return await waiter.outcome
        finally:
            timer.cancel()
            if waiter.batch is not None:
                waiter.batch.leave()

    def depart_all(self) -> None:
        """Send all that have gathered, however many requests are out."""
        while self._gathered:
            self._send(self._take())

    def _depart(self) -> None:
        self._called = False
        while self._gathered and len(self._out) < OUT_AT_ONCE:
            self._send(self._take())

    def _watch(self) -> None:
        """See to it that what has gathered does not wait for requests that hang."""
        if not self._watching and self._gathered:
            self._watching = True
            self.loop.call_at(self._gathered[0].since + PATIENCE, self._relieve)

    def _relieve(self) -> None:
        self._watching = False
        overdue = self.loop.time() - PATIENCE
        if self._gathered and self._gathered[0].since <= overdue:
            if len(self._out) >= OUT_AT_MOST:
                return
            self._send(self._take())
        self._watch()

    def _take(self) -> list[_Waiter]:
        """Return the next batch: those that have waited longest, without the ones who have gone."""
        taken: list[_Waiter] = []
        size = 0
        while self._gathered:
            waiter = self._gathered[0]
            size += len(waiter.part.body)
            if taken and not self._limits.fits(len(taken) + 1, size):
                break
            self._gathered.popleft()
            if waiter.outcome.done():
                size -= len(waiter.part.body)
            else:
                taken.append(waiter)
        return taken

    def _send(self, waiters: list[_Waiter]) -> None:
        if not waiters:
            return
        sent = _Batch(waiters)
        self._out.add(sent)
        sent.task = self.loop.create_task(self._carry(sent))
        sent.task.add_done_callback(lambda _: self._returned(sent))

    async def _carry(self, sent: _Batch) -> None:
        timeout = max(waiter.expires for waiter in sent.waiters) - self.loop.time()
        steps = batch([waiter.part for waiter in sent.waiters], timeout, self._limits)
        outcomes = await adrive(steps, self._sender.perform)
        for waiter, outcome in zip(sent.waiters, outcomes, strict=True):
            if not waiter.outcome.done():
                waiter.outcome.set_result(outcome)

    def _returned(self, sent: _Batch) -> None:
        # Runs after the callers that the batch has woken, so that their next calls are there already.
        self._out.discard(sent)
        for waiter in sent.waiters:
            if not waiter.outcome.done():
                # Its task was ended from outside: nothing is known of the calls, and all may be repeated.
                waiter.outcome.set_result(ALONE)
        self._depart()
        self._watch()


class CoalescingSender:
    """Carries calls over an ``AsyncHttpSender``, those of the same moment as one batch.

    Belongs to the event loop that first uses it.

    Args:
        sender: Carries the requests.
        rules: Those of ``sender``.
    """

    def __init__(self, sender: AsyncHttpSender, rules: Rules) -> None:
        self._sender = sender
        self._rules = rules
        self._limits = Limits(rules.now)
        self._lanes: dict[Kind, _Lane] = {}
        self._closed = False

    async def send(self, call: Call[T], options: Options) -> T:
        """Make a call and return its answer; see ``exchange`` for what is raised."""
        part = part_of(call, options, self._rules.encoding)
        if part is None or not self._limits.batches(part.kind):
            return await self._sender.send(call, options)
        return await adrive(coalesced(part, options, self._rules, self._sender.endpoint), self._perform)

    async def close(self) -> None:
        """Take no more calls; those under way finish, also those that have only gathered."""
        self._closed = True
        for lane in self._lanes.values():
            lane.depart_all()
        # The batches' tasks begin, and with that have their place in the sender, before it closes.
        await asyncio.sleep(0)
        await self._sender.close()

    async def _perform(self, step: Join | Attempt | Pause) -> object:
        if not isinstance(step, Join):
            return await self._sender.perform(step)
        if self._closed:
            return Failure(ProviderClosed())
        return await self._lane(step.part.kind).join(step)

    def _lane(self, kind: Kind) -> _Lane:
        lane = self._lanes.get(kind)
        if lane is None or lane.loop is not asyncio.get_running_loop():
            lane = self._lanes[kind] = _Lane(self._sender, self._limits)
        return lane

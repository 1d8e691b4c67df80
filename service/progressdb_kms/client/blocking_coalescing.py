"""Lets calls of many threads travel as batches; the rules are those of ``coalescing``.

There is no thread of its own: the thread of one of the calls sends for the others of its batch.
"""

from __future__ import annotations

import os
import time
from threading import Event, Lock
from typing import Any, TypeVar

from progressdb_kms.client.blocking import Reservation, SyncHttpSender
from progressdb_kms.client.coalescing import (
    ALONE,
    KINDS,
    OUT_AT_MOST,
    OUT_AT_ONCE,
    PATIENCE,
    Join,
    Limits,
    Outcome,
    Part,
    batch,
    coalesced,
    fresh,
    late,
    part_of,
)
from progressdb_kms.client.errors import ProviderClosed
from progressdb_kms.client.exchange import Attempt, Options, Pause, Rules, drive
from progressdb_kms.client.protocol import Call
from progressdb_kms.client.retry import Failure
from progressdb_kms.domain.errors import KmsError

T = TypeVar("T")


class _Waiter:
    """A call that waits in its thread: for its outcome, or for its turn to send a batch."""

    __slots__ = ("expires", "lead", "outcome", "part", "woken")

    def __init__(self, part: Part[Any], expires: float) -> None:
        self.part = part
        self.expires = expires
        self.woken = Event()
        self.outcome: Outcome[Any] | None = None
        self.lead: _Batch | None = None


class _Batch:
    """Calls that go together, and their place in the sender, or why they have none."""

    __slots__ = ("place", "waiters")

    def __init__(self, waiters: list[_Waiter], place: Reservation | KmsError) -> None:
        self.waiters = waiters
        self.place = place


class _Lane:
    """The calls of one kind."""

    def __init__(self, sender: SyncHttpSender, limits: Limits) -> None:
        self._sender = sender
        self._limits = limits
        self._lock = Lock()
        self._gathered: list[_Waiter] = []
        self._out = 0
        self._closed = False

    def join(self, step: Join) -> Outcome[Any]:
        """Return the outcome of a call, at its deadline at the latest; send a batch meanwhile if need be."""
        waiter = _Waiter(step.part, time.monotonic() + step.timeout)
        try:
            with self._lock:
                if self._closed:
                    return Failure(ProviderClosed())
                self._gathered.append(waiter)
                self._depart()
            while True:
                if waiter.lead is not None:
                    self._carry(waiter, waiter.lead)
                elif not waiter.woken.wait(min(waiter.expires - time.monotonic(), PATIENCE)):
                    if time.monotonic() < waiter.expires:
                        self._relieve(waiter)
                    elif self._gives_up(waiter):
                        return late(self._sender.endpoint)
                if waiter.outcome is not None:
                    return waiter.outcome
        except BaseException:
            self._abandon(waiter)
            raise

    def close(self) -> None:
        """Take no more calls; let all that have gathered depart, however many requests are out."""
        with self._lock:
            self._closed = True
            while self._gathered:
                self._appoint()

    def _depart(self) -> None:
        while self._gathered and self._out < OUT_AT_ONCE:
            self._appoint()

    def _appoint(self) -> None:
        """Form the next batch of those that have waited longest, and wake the thread that sends it.

        It is the one whose deadline is the last: the request ends with that, and no other call outlives it.
        The lock is held.
        """
        taken: list[_Waiter] = []
        size = 0
        for waiter in self._gathered:
            size += len(waiter.part.body)
            if taken and not self._limits.fits(len(taken) + 1, size):
                break
            taken.append(waiter)
        del self._gathered[: len(taken)]
        leader = max(taken, key=lambda waiter: waiter.expires)
        place: Reservation | KmsError
        try:
            place = self._sender.reserve()
        except KmsError as error:
            place = error
        self._out += 1
        leader.lead = _Batch(taken, place)
        leader.woken.set()

    def _carry(self, leader: _Waiter, sent: _Batch) -> None:
        """Send the batch that ``leader`` was appointed for."""
        # Where this is interrupted, as by KeyboardInterrupt, the others make their calls themselves.
        outcomes: list[Outcome[Any]] = [ALONE] * len(sent.waiters)
        try:
            outcomes = self._send(sent, leader.expires)
        finally:
            with self._lock:
                self._finish(leader, sent, outcomes)

    def _send(self, sent: _Batch, expires: float) -> list[Outcome[Any]]:
        place = sent.place
        if isinstance(place, KmsError):
            return [Failure(fresh(place)) for _ in sent.waiters]
        parts = [waiter.part for waiter in sent.waiters]
        timeout = max(0.0, expires - time.monotonic())
        steps = batch(parts, timeout, self._limits)
        return drive(steps, lambda attempt: self._sender.attempt(place, attempt))

    def _finish(self, leader: _Waiter, sent: _Batch, outcomes: list[Outcome[Any]]) -> None:
        """Give a batch's outcomes to its calls, and let the next one depart; the lock is held."""
        leader.lead = None
        self._out -= 1
        for waiter, outcome in zip(sent.waiters, outcomes, strict=True):
            waiter.outcome = outcome
            waiter.woken.set()
        self._depart()

    def _relieve(self, waiter: _Waiter) -> None:
        """Let a call that has gathered for long depart: the requests that are out may hang."""
        with self._lock:
            if waiter in self._gathered and self._out < OUT_AT_MOST:
                self._appoint()

    def _gives_up(self, waiter: _Waiter) -> bool:
        """Let a call go whose time is over, unless something has happened to it just now."""
        with self._lock:
            if waiter.lead is not None or waiter.outcome is not None:
                return False
            self._forget(waiter)
            return True

    def _forget(self, waiter: _Waiter) -> None:
        """Drop a call that has not been sent; the lock is held."""
        if waiter in self._gathered:
            self._gathered.remove(waiter)

    def _abandon(self, waiter: _Waiter) -> None:
        """Let a call go whose thread was interrupted, and the batch that it should have sent to its calls."""
        with self._lock:
            self._forget(waiter)
            sent = waiter.lead
            if sent is not None:
                if not isinstance(sent.place, KmsError):
                    self._sender.give_back(sent.place)
                self._finish(waiter, sent, [ALONE] * len(sent.waiters))


class SyncCoalescingSender:
    """Carries calls over a ``SyncHttpSender``, those of the same moment as one batch.

    Safe to use from many threads; across ``fork`` as ``SyncHttpSender``.

    Args:
        sender: Carries the requests.
        rules: Those of ``sender``.
    """

    def __init__(self, sender: SyncHttpSender, rules: Rules) -> None:
        self._sender = sender
        self._rules = rules
        self._limits = Limits(rules.now)
        self._start()

    def send(self, call: Call[T], options: Options) -> T:
        """Make a call and return its answer; see ``exchange`` for what is raised."""
        part = part_of(call, options, self._rules.encoding)
        if part is None or not self._limits.batches(part.kind):
            return self._sender.send(call, options)
        return drive(coalesced(part, options, self._rules, self._sender.endpoint), self._perform)

    def close(self) -> None:
        """Take no more calls; those under way in other threads finish, also if they have only gathered."""
        for lane in self._lanes.values():
            lane.close()
        self._sender.close()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lanes = {kind: _Lane(self._sender, self._limits) for kind in KINDS.values()}

    def _perform(self, step: Join | Attempt | Pause) -> object:
        if not isinstance(step, Join):
            return self._sender.perform(step)
        if self._pid != os.getpid():
            # The threads that the parent's calls wait in are not here, and its locks may be held for ever.
            self._start()
        return self._lanes[step.part.kind].join(step)

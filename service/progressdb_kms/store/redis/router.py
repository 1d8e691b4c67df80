"""Sends commands to the nodes that hold their slots, and tries again where that is safe and can help."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeAlias

from progressdb_kms.domain.errors import KmsError, StoreUnavailable
from progressdb_kms.store.redis.address import Endpoint
from progressdb_kms.store.redis.durability import FSYNC_PERIOD
from progressdb_kms.store.redis.failures import Again, Failure
from progressdb_kms.store.redis.lane import Lane
from progressdb_kms.store.redis.link import Argument, Command, Reply
from progressdb_kms.store.redis.scripts import Script
from progressdb_kms.store.redis.topology import Topology
from progressdb_kms.store.settings import StoreSettings

_FIRST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 0.25
_SCRIPTS_A_SECOND: Final = 2_000
"""A low guess for a busy server, to bound the time of large batches."""
_READ_TRIES: Final = 3
"""Reads give up early: their callers may have a copy in memory, and need to know soon."""
_PART: Final = 128
"""Calls that go to a node together, as far as they take as long as plain commands."""


@dataclass(frozen=True, slots=True)
class Call:
    """A command or a script for one slot.

    Attributes:
        tag: The slot's tag.
        args: The command; for a script, its keys and arguments.
        script: The script, if it is one.
        keys: How many of ``args`` are the script's keys.
        weight: How many plain commands it takes as long as.
    """

    tag: str
    args: Command
    script: Script | None = None
    keys: int = 0
    weight: int = 1

    def command(self, *, whole: bool) -> Command:
        """Return what to send: a script by its name, or ``whole`` where the server does not know it."""
        if self.script is None:
            return self.args
        if whole:
            return ("EVAL", self.script.source, self.keys, *self.args)
        return ("EVALSHA", self.script.sha, self.keys, *self.args)


def script_call(tag: str, script: Script, keys: Sequence[str], *args: Argument, weight: int = 1) -> Call:
    """Return the call of a script; its ``weight`` is how many plain commands it takes as long as."""
    return Call(tag, (*keys, *args), script, len(keys), weight)


@dataclass(slots=True)
class _Attempt:
    """What is known about one call so far."""

    call: Call
    reply: Reply | Failure = None
    whole: bool = False
    elsewhere: Endpoint | None = None


_Sent: TypeAlias = dict["asyncio.Future[list[Reply | Failure]]", "list[_Attempt]"]


class Router:
    """Runs calls over a topology within the time that an operation has."""

    def __init__(self, topology: Topology, settings: StoreSettings) -> None:
        self.topology = topology
        self._settings = settings

    async def write(self, calls: Sequence[Call]) -> list[Reply | Failure]:
        """Run calls that change something; each is safe to repeat. What returns normally is durable."""
        slow = any(node.finding is not None and node.finding.slow for node in self.topology.primaries())
        # A batch of thousands is thousands of scripts on one core: give it the time that they take.
        seconds = self._settings.command_timeout + FSYNC_PERIOD * slow + len(calls) / _SCRIPTS_A_SECOND
        return await self._run(calls, durable=True, seconds=seconds)

    async def read(self, calls: Sequence[Call]) -> list[Reply | Failure]:
        """Run calls that change nothing that has to last."""
        return await self._run(calls, durable=False, seconds=self._settings.command_timeout)

    async def read_in_parts(self, calls: Sequence[Call]) -> list[Reply | Failure]:
        """As ``read``, for what looks at every slot now and then, beside requests: in several round trips.

        All 1,024 slots at once would hold the event loop, and whoever else reads, for 5 ms.
        """
        replies: list[Reply | Failure] = []
        for start in range(0, len(calls), _PART):
            replies += await self.read(calls[start : start + _PART])
        return replies

    async def write_one(self, call: Call) -> Reply:
        """Run one call that changes something.

        Raises:
            StoreUnavailable, StoreNotDurable: No reply, or none that can be trusted.
        """
        return checked((await self.write([call]))[0])

    async def read_one(self, call: Call) -> Reply:
        """Run one call that changes nothing that has to last.

        Raises:
            StoreUnavailable: No reply.
        """
        return checked((await self.read([call]))[0])

    async def _run(self, calls: Sequence[Call], *, durable: bool, seconds: float) -> list[Reply | Failure]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        attempts = [_Attempt(call) for call in calls]
        todo = attempts
        pause = _FIRST_PAUSE
        tries = 0
        while todo:
            await self._attempt(todo, durable=durable, deadline=deadline)
            todo = [attempt for attempt in todo if self._again(attempt)]
            if any(attempt.reply.again is Again.SOON for attempt in todo):
                tries += 1
                self.topology.invalidate()
                if loop.time() + pause >= deadline or (tries >= _READ_TRIES and not durable):
                    break
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        return [attempt.reply for attempt in attempts]

    async def _attempt(self, attempts: Sequence[_Attempt], *, durable: bool, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self.topology.ready()
        except (StoreUnavailable, TimeoutError) as error:
            again = Again.NEVER if self.topology.closed else Again.SOON
            for attempt in attempts:
                attempt.reply = Failure(
                    error if isinstance(error, StoreUnavailable) else _why(attempt), again
                )
            return
        sent = self._submit(attempts, durable=durable)
        if not sent:
            return
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    for future in sent:
                        await future
        finally:
            for future, parcel in sent.items():
                # Taking it back helps only while it is queued; once sent, its fate is unknown to us.
                if future.done() and not future.cancelled():
                    for attempt, reply in zip(parcel, future.result(), strict=True):
                        attempt.reply = reply
                else:
                    # A node that keeps its connections but does not answer may have a successor by now.
                    self.topology.invalidate()
                    for attempt in parcel:
                        attempt.reply = Failure(_why(attempt))
                    future.cancel()

    def _submit(self, attempts: Sequence[_Attempt], *, durable: bool) -> _Sent:
        parcels: dict[tuple[Lane, bool], list[_Attempt]] = {}
        for attempt in attempts:
            elsewhere, attempt.elsewhere = attempt.elsewhere, None
            node = self.topology.at(elsewhere) if elsewhere else self.topology.find(attempt.call.tag)
            if node is None:
                attempt.reply = Failure(
                    StoreUnavailable("no node of the store holds this key's slot"), Again.SOON
                )
                continue
            lane = node.writes if durable else node.reads
            parcels.setdefault((lane, elsewhere is not None), []).append(attempt)
        sent: _Sent = {}
        for (lane, asking), some in parcels.items():
            for parcel in _parts(some):
                commands = [attempt.call.command(whole=attempt.whole) for attempt in parcel]
                weight = sum([attempt.call.weight for attempt in parcel])
                sent[lane.submit(commands, asking=asking, weight=weight)] = parcel
        return sent

    @staticmethod
    def _again(attempt: _Attempt) -> bool:
        failure = attempt.reply
        if not isinstance(failure, Failure) or failure.again is Again.NEVER:
            return False
        if failure.again is Again.WITH_SOURCE:
            if attempt.whole:
                return False
            attempt.whole = True
        attempt.elsewhere = failure.endpoint
        return True


def _parts(attempts: list[_Attempt]) -> Iterator[list[_Attempt]]:
    """Cut what goes to one node into parcels, between which others' may travel."""
    if len(attempts) == 1:
        yield attempts
        return
    begin = weight = 0
    for end, attempt in enumerate(attempts, 1):
        weight += attempt.call.weight
        if weight >= _PART or end == len(attempts):
            yield attempts[begin:end]
            begin, weight = end, 0


def checked(reply: Reply | Failure) -> Reply:
    """Return a reply.

    Raises:
        KmsError: There is none; the failure's error.
    """
    if isinstance(reply, Failure):
        raise reply.error
    return reply


def _why(attempt: _Attempt) -> KmsError:
    # Why an earlier try failed says more than that the time is over.
    if isinstance(attempt.reply, Failure):
        return attempt.reply.error
    return StoreUnavailable("the store did not answer in time")

"""A lane: one connection to one server that many callers share, batch after batch.

What is submitted while a batch is under way travels as the next one (group commit without a fixed delay): an
idle lane answers at once, a busy one lets its callers share a round trip, and for writes the fsync and the
confirmation too.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple, Protocol

import structlog
from redis.exceptions import RedisError

from progressdb_kms.domain.errors import KmsError, StoreUnavailable
from progressdb_kms.store.redis.address import Endpoint
from progressdb_kms.store.redis.failures import Again, Failure, broken, lost, translate
from progressdb_kms.store.redis.link import Command, Link, Reply

log = structlog.get_logger(__name__)

BATCH: Final = 512
"""Commands in one write after which no parcel is added: bounds what one lost answer leaves in doubt, and how
long others wait.

A command of weight n counts as n, so that what is heavy travels in several batches: the server works on one
while the callers work on what came with the one before.
"""

_ASKING: Final = ("ASKING",)


class _Parcel(NamedTuple):
    """Commands of one caller that wait for their batch."""

    commands: Sequence[Command]
    asking: bool
    weight: int
    future: asyncio.Future[list[Reply | Failure]]

    def settle(self, failure: Failure) -> None:
        """Let all have failed for one reason, unless they have their replies."""
        if not self.future.done():
            self.future.set_result([failure] * len(self.commands))


class StoreObserver(Protocol):
    """What the store tells the metrics. Cheap and never failing."""

    def round_trip(self, lane: str, commands: int, seconds: float) -> None:
        """Count a batch that was answered; ``lane`` is ``read`` or ``write``."""

    def failure(self, lane: str) -> None:
        """Count a batch that was not."""


class Silent:
    """A StoreObserver that nobody listens to."""

    def round_trip(self, lane: str, commands: int, seconds: float) -> None:
        """Count nothing."""

    def failure(self, lane: str) -> None:
        """Count nothing."""


class Lane:
    """Runs commands over one connection, opened when first needed and again after each failure.

    Args:
        name: ``read`` or ``write``, for the observer.
        endpoint: The server, for messages.
        open_link: Opens a connection.
        confirm: Called before each batch with the connection; returns the command to send behind the batch
            and what judges its reply, or None. It raises a KmsError to refuse the batch.
        timeout: Seconds that a batch may take.
        observer: Told of each batch.
    """

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        open_link: Callable[[], Awaitable[Link]],
        *,
        timeout: float,
        observer: StoreObserver,
        confirm: Callable[[Link], Awaitable[Confirmation | None]] | None = None,
    ) -> None:
        self._name = name
        self._endpoint = endpoint
        self._open_link = open_link
        self._confirm = confirm
        self._timeout = timeout
        self._observer = observer
        self._queue: deque[_Parcel] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._link: Link | None = None
        self._closed = False

    def submit(
        self, commands: Sequence[Command], *, asking: bool = False, weight: int | None = None
    ) -> asyncio.Future[list[Reply | Failure]]:
        """Queue commands that travel together. The future gets the reply of each, or a ``Failure``.

        Cancelling the future takes the commands back if they have not been sent.

        Args:
            commands: Commands with their arguments.
            asking: Say ASKING before each: the node is about to take over the slot.
            weight: How many plain commands they take as long as; one each where it is not given.
        """
        future: asyncio.Future[list[Reply | Failure]] = asyncio.get_running_loop().create_future()
        parcel = _Parcel(commands, asking, len(commands) if weight is None else weight, future)
        if self._closed:
            parcel.settle(_closed())
            return future
        self._queue.append(parcel)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        return future

    async def close(self) -> None:
        """Stop and fail what is under way or queued."""
        self._closed = True
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait([self._worker])
        await self._drop()
        while self._queue:
            self._queue.popleft().settle(_closed())

    async def _work(self) -> None:
        try:
            while self._queue:
                batch: list[_Parcel] = []
                weight = 0
                while self._queue and weight < BATCH:
                    parcel = self._queue.popleft()
                    if not parcel.future.done():
                        batch.append(parcel)
                        weight += parcel.weight
                if not batch:
                    continue
                try:
                    await self._run(batch)
                except Exception:  # a bug must not keep those waiting that come after whom it met
                    log.exception("store_lane_broken", lane=self._name)
        finally:
            self._worker = None

    async def _run(self, batch: Sequence[_Parcel]) -> None:
        failure: Failure | None = None
        try:
            link = await self._ready()
            confirmation = await self._confirm(link) if self._confirm else None
            commands: list[Command] = []
            for parcel in batch:
                if parcel.asking:
                    commands += [part for command in parcel.commands for part in (_ASKING, command)]
                else:
                    commands += parcel.commands
            if confirmation:
                commands.append(confirmation.command)
            started = time.perf_counter()
            replies = await link.run(commands, self._timeout)
            self._observer.round_trip(self._name, len(commands), time.perf_counter() - started)
            doubt = confirmation.judge(replies.pop()) if confirmation else None
            if self._deliver(batch, replies, doubt):
                await self._drop()
        except KmsError as error:
            failure = Failure(error, Again.SOON if isinstance(error, StoreUnavailable) else Again.NEVER)
        except (RedisError, OSError, TimeoutError) as error:
            failure = lost(error, self._endpoint)
        except asyncio.CancelledError:
            failure = _closed()
            raise
        finally:
            # Also when our own code broke: nobody may wait for what will not come.
            undone = [parcel for parcel in batch if not parcel.future.done()]
            if undone:
                self._observer.failure(self._name)
            for parcel in undone:
                parcel.settle(failure or broken())

    @staticmethod
    def _deliver(
        batch: Sequence[_Parcel],
        replies: list[Reply],
        doubt: Failure | None,
    ) -> bool:
        """Hand out the replies; say whether the server may no longer be the right one."""
        suspect = doubt is not None
        answers = iter(replies)
        for parcel in batch:
            delivered: list[Reply | Failure] = []
            for _ in parcel.commands:
                if parcel.asking:
                    next(answers)
                reply = next(answers)
                failure = translate(reply) or doubt
                suspect = suspect or (failure is not None and failure.again is Again.SOON)
                delivered.append(failure or reply)
            if not parcel.future.done():
                parcel.future.set_result(delivered)
        return suspect

    async def _ready(self) -> Link:
        if self._link is None or not self._link.alive:
            self._link = await self._open_link()
        return self._link

    async def _drop(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.close()


class Confirmation:
    """The command behind a batch that makes the server wait for disks or replicas, and what it must reply.

    Args:
        command: WAIT or WAITAOF.
        least: Least value of each number in the reply.
    """

    def __init__(self, command: Command, least: tuple[int, ...]) -> None:
        self.command = command
        self._least = least

    def judge(self, reply: Reply) -> Failure | None:
        """Return why the batch can't be acknowledged, None if it can."""
        counts = reply if isinstance(reply, list) else [reply]
        if all(isinstance(count, int) for count in counts) and all(
            count >= least for count, least in zip(counts, self._least, strict=True)
        ):
            return None
        return Failure(
            StoreUnavailable(
                "the store did not confirm in time that the write is on disk and on its replicas"
            ),
            Again.SOON,
        )


def _closed() -> Failure:
    return Failure(StoreUnavailable("the connection to the store was closed"), Again.SOON)

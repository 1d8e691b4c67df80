"""The making of DEKs, for all callers together.

A create waits three times for the disk: for its intent in the audit log, for the record, for the outcome.
Callers that come while others wait share what comes next: one wrap, one write, one record of each kind for
all of them. A lone caller waits for nobody. Two groups at most are under way: one is worked on while the
store fsyncs what is the other's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextvars import Context
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.domain.errors import (
    BatchTooLarge,
    InternalError,
    KeyDestroyed,
    KmsError,
    StaleKek,
    StoreUnavailable,
)
from progressdb_kms.domain.keys import (
    DEK_BYTES,
    UNIQUE_BYTES,
    DekRecord,
    KeyState,
    NewDek,
    check_idempotency_key,
    check_thread_id,
    derive_key_id,
    new_key_id,
)
from progressdb_kms.domain.policy import Permission
from progressdb_kms.ports import AuditEvent
from progressdb_kms.usecases.keycache import CachedDek

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from progressdb_kms.usecases.context import Kms
    from progressdb_kms.usecases.session import Session

GROUP: Final = 128
"""DEKs that are made together at most: naming, wrapping, sending and auditing them holds the event loop."""
_GROUPS: Final = 2
_PATIENCE: Final = 0.25
"""Seconds after which whoever comes waits for no group that is under way: the store may hang."""
_ATTEMPTS: Final = 3
"""Tries of a wrap that races with a rotation of the KEK."""


class Wanted(NamedTuple):
    """A DEK that a caller asks for; with an idempotency key, the same one each time."""

    thread_id: str
    idempotency_key: str | None = None


class Order(NamedTuple):
    """A DEK about to be made: its names, and who asked for it in which request."""

    key_id: str
    thread_id: str
    identity: str
    request_id: str


Result: TypeAlias = "DekRecord | KmsError"


class _Item:
    """An order and what has come of it so far.

    Attributes:
        order: What is wanted.
        result: None until it is known, and where the store did not take it.
        made: This very order made the key.
    """

    __slots__ = ("made", "order", "result")

    def __init__(self, order: Order) -> None:
        self.order = order
        self.result: Result | None = None
        self.made = False


class Share:
    """What one caller wants of a group, and how it is told."""

    __slots__ = ("_tell", "items")

    def __init__(self, orders: Sequence[Order], tell: Callable[[list[Result] | Exception], None]) -> None:
        self.items = [_Item(order) for order in orders]
        self._tell: Callable[[list[Result] | Exception], None] | None = tell

    @property
    def given_up(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._tell is None

    def give_up(self) -> None:
        """Be told nothing. What was begun is ended and recorded all the same; what was not is never made."""
        self._tell = None

    def end(self, failure: Exception | None) -> None:
        """Tell the caller how it went.

        Args:
            failure: Why nothing was made in the whole group. Else each item says for itself how it went.
        """
        tell, self._tell = self._tell, None
        if tell is None:
            return
        results = [item.result or StoreUnavailable() for item in self.items]
        if failure is None or any(isinstance(result, DekRecord) for result in results):
            tell(results)
        else:
            tell(failure)


class Creation:
    """Makes DEKs in groups.

    Args:
        kms: What it makes them with.
    """

    def __init__(self, kms: Kms) -> None:
        self._kms = kms
        self._waiting: deque[Share] = deque()
        self._groups: set[asyncio.Task[None]] = set()
        self._late = 0.0

    def order(self, orders: Sequence[Order], tell: Callable[[list[Result] | Exception], None]) -> Share:
        """Have DEKs made; what is told of as made can't be lost.

        Args:
            orders: ``GROUP`` at most.
            tell: Called once, from the event loop: with one result each, in order, or with why none could be
                made, a reason that has nothing to do with any of them.
        """
        loop = asyncio.get_running_loop()
        share = Share(orders, tell)
        self._waiting.append(share)
        now = loop.time()
        if len(self._groups) < _GROUPS or now >= self._late:
            self._late = now + _PATIENCE
            # In a context of its own: what is logged there is not the first caller's alone.
            self._groups.add(loop.create_task(self._work(), context=Context()))
        return share

    async def make(self, orders: Sequence[Order]) -> list[Result]:
        """As ``order``, and wait; returns the results.

        Who is cancelled meanwhile has given up its share.

        Raises:
            KmsError: None could be made, for a reason that has nothing to do with any of them.
        """
        done: asyncio.Future[list[Result]] = asyncio.get_running_loop().create_future()

        def tell(results: list[Result] | Exception) -> None:
            if done.done():
                return  # cancelled, and not yet given up
            if isinstance(results, Exception):
                done.set_exception(results)
            else:
                done.set_result(results)

        share = self.order(orders, tell)
        try:
            return await done
        finally:
            share.give_up()

    async def settle(self) -> None:
        """Wait until nothing is under way."""
        while self._groups:
            await asyncio.wait(self._groups)

    async def _work(self) -> None:
        try:
            await self._work_all()
        finally:
            # In the very step that found nobody waiting: who comes after it begins another.
            self._groups -= {asyncio.current_task()}

    async def _work_all(self) -> None:
        while self._waiting:
            self._late = asyncio.get_running_loop().time() + _PATIENCE
            shares: list[Share] = []
            count = 0
            while self._waiting and (not shares or count + len(self._waiting[0].items) <= GROUP):
                share = self._waiting.popleft()
                if not share.given_up:
                    shares.append(share)
                    count += len(share.items)
            if shares:
                await self._make(shares)

    async def _make(self, shares: Sequence[Share]) -> None:
        items = [item for share in shares for item in share.items]
        failure: Exception | None = InternalError()
        try:
            failure = await self._audited(items)
        except Exception as error:  # noqa: BLE001 - each caller explains it to its log
            failure = error
        finally:
            loop = asyncio.get_running_loop()
            for share in shares:
                # Each by itself: nobody's way of being told may keep the others from it.
                loop.call_soon(share.end, failure)

    async def _audited(self, items: Sequence[_Item]) -> KmsError | None:
        audit = self._kms.audit
        if audit.durable:
            await audit.record([_event(item.order, "intent") for item in items])
        failure: KmsError | None = None
        try:
            await self._store_all(items)
        except KmsError as error:
            failure = error
        outcomes = []
        for item in items:
            if isinstance(item.result, DekRecord):
                outcomes.append(_event(item.order, "ok", "" if item.made else "replay"))
            elif audit.durable:
                outcomes.append(_event(item.order, "failed", (item.result or StoreUnavailable).code))
        await audit.record(outcomes)
        return failure

    async def _store_all(self, items: Sequence[_Item]) -> None:
        todo = items
        for _ in range(_ATTEMPTS):
            await self._store(todo)
            todo = [item for item in todo if isinstance(item.result, StaleKek)]
            if not todo:
                return
            # The KEK was rotated while this instance still knew the old one: learn the new one, wrap again.
            await self._kms.keks.refresh()

    async def _store(self, items: Sequence[_Item]) -> None:
        kms = self._kms
        random = kms.random(DEK_BYTES * len(items))
        deks = [random[at : at + DEK_BYTES] for at in range(0, len(random), DEK_BYTES)]
        names = [(item.order.key_id, item.order.thread_id) for item in items]
        version, kek_id, blobs = await kms.keks.wrap(deks, names)
        now = int(kms.now())
        began = kms.clock()
        new = [
            NewDek(
                key_id=item.order.key_id,
                thread_id=item.order.thread_id,
                wrapped=blob,
                kek_id=kek_id,
                kek_version=version,
                created_at=now,
                created_by=item.order.identity,
            )
            for item, blob in zip(items, blobs, strict=True)
        ]
        stored = await kms.store.create(new)
        for item, dek, blob, result in zip(items, deks, blobs, stored, strict=True):
            if isinstance(result, DekRecord) and result.state is KeyState.DESTROYED:
                item.result = KeyDestroyed("the key that this Idempotency-Key made has been destroyed")
                continue
            item.result = result
            # Ours and not an earlier call's: what it wraps is known.
            if isinstance(result, DekRecord) and result.wrapped == blob:
                item.made = True
                remember(kms, result, dek, began)


def remember(kms: Kms, record: DekRecord, dek: bytes, began: float) -> None:
    """Keep a DEK that was just made in memory; ``began`` is the cache's time before it was stored."""
    kms.cache.put(
        CachedDek(
            key_id=record.key_id,
            thread_id=record.thread_id,
            cipher=AESGCM(dek),
            state=record.state,
            version=str(record.version),
            loaded_at=began,
        )
    )


async def create_deks(
    kms: Kms, session: Session, wanted: Sequence[Wanted | KmsError], request_id: str
) -> list[Result]:
    """Make DEKs, or find those that the same idempotency keys made before; one result each, in order.

    Returns only when what it returns can't be lost. Many are made in slices, between which others have their
    turn and grants are looked at anew.

    Args:
        kms: The service.
        session: Who asks.
        wanted: What for; an error stays in its place.
        request_id: For the audit log.

    Raises:
        PermissionDenied: The caller may create no key at all.
        BatchTooLarge: Too many.
        ServiceError: Nothing could be made. Where a slice fails of which earlier ones have made something, it
            and those that come after it, which are not tried, have its error for each item.
    """
    if len(wanted) > kms.bounds.batch_items:
        raise BatchTooLarge(f"a batch has at most {kms.bounds.batch_items} items, this one has {len(wanted)}")
    results: list[Result] = []
    for begin in range(0, len(wanted) or 1, GROUP):
        try:
            results += await _create_some(kms, session, wanted[begin : begin + GROUP], request_id)
        except KmsError as error:
            if not any(isinstance(result, DekRecord) for result in results):
                raise
            return results + [each if isinstance(each, KmsError) else error for each in wanted[begin:]]
    return results


async def _create_some(
    kms: Kms, session: Session, wanted: Sequence[Wanted | KmsError], request_id: str
) -> list[Result]:
    grants = session.grants()
    if not grants.allows_some(Permission.CREATE):
        grants.require(Permission.CREATE)
    orders: list[Order] = []
    refused: list[KmsError | None] = []
    for want in wanted:
        try:
            orders.append(order_of(kms, session, want, request_id))
            refused.append(None)
        except KmsError as error:
            refused.append(error)
    made = iter(await kms.creation.make(orders) if orders else ())
    return [next(made) if error is None else error for error in refused]


def order_of(kms: Kms, session: Session, want: Wanted | KmsError, request_id: str) -> Order:
    """Return the order of a caller that may give it.

    Raises:
        KmsError: A name is not well-formed, or the caller may not; or ``want``, where it is one.
    """
    if isinstance(want, KmsError):
        raise want
    thread_id = check_thread_id(want.thread_id)
    session.grants().require(Permission.CREATE, thread_id)
    if want.idempotency_key is None:
        key_id = new_key_id(thread_id, kms.random(UNIQUE_BYTES))
    else:
        key_id = derive_key_id(session.name, check_idempotency_key(want.idempotency_key), thread_id)
    return Order(key_id, thread_id, session.name, request_id)


def _event(order: Order, outcome: str, detail: str = "") -> AuditEvent:
    return AuditEvent(
        "key.create", outcome, order.identity, order.request_id, order.key_id, order.thread_id, detail
    )

"""Calls of the same moment that travel as one batch: the rules, without I/O, for tasks and threads alike.

A call alone goes out at once, as it would without this. While requests of its kind are out, further calls
gather, and go together when one comes back: no call waits for a clock. A batch is one *try* of each of its
calls: deadline, retries and pauses stay each call's own (``exchange.retrying``), and a call gets what the
single request would have given it. What a batch's answer can't say exactly is asked again alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Generic, TypeAlias, TypeVar

import msgspec

from progressdb_kms.client.errors import ConnectionFailed, TlsFailed
from progressdb_kms.client.exchange import Attempt, Options, Pause, Rules, attempt, retrying
from progressdb_kms.client.plans import CreateResults, DecryptResults, EncryptResults, Plaintext
from progressdb_kms.client.protocol import Call, Encoding, Reply, Request, encode, item_error, read
from progressdb_kms.client.retry import Failure
from progressdb_kms.client.types import CreatedDek, Encrypted
from progressdb_kms.domain.errors import (
    BatchTooLarge,
    BodyTooLarge,
    CertificateExpired,
    DeadlineExceeded,
    KmsError,
    MethodNotAllowed,
    NotReady,
    Overloaded,
    PermissionDenied,
    RouteNotFound,
    TooManyRequests,
)

T = TypeVar("T")

MAX_ITEMS: Final = 512
MAX_BYTES: Final = 2**20
"""Far below the service's usual limits (10,000 items, 16 MiB): a larger batch gains nothing any more, and
each of its calls waits for all of it."""
LEAST_BYTES: Final = 2**10
"""A service that takes less in a batch is sent none."""
ALONE_BYTES: Final = 2**16
"""A call with a larger message goes alone: small ones would wait for its way over the wire."""
OUT_AT_ONCE: Final = 2
"""Requests of one kind that are out before calls gather: one is worked on while the next is prepared."""
PATIENCE: Final = 0.25
"""Seconds that a call gathers at most: a request that hangs must not hold up those that are not in it."""
OUT_AT_MOST: Final = 8
"""Requests of one kind that are out at most, where some hang."""
JOINT_TRIES: Final = 2
"""Tries of a call that may join others; if these fail it is alone with whatever is wrong."""
NO_BATCHES_SECONDS: Final = 60.0
"""How long a service that had no batch route is not asked for one again."""

_TOO_LARGE: Final = (BatchTooLarge, BodyTooLarge)
_NO_BATCHES: Final = (RouteNotFound, MethodNotAllowed)
_OF_ALL: Final = (ConnectionFailed, TooManyRequests, Overloaded, NotReady)
"""Failures that no item of a batch can be the cause of: their calls may go together again."""
_IDEMPOTENCY_KEY: Final = re.compile(r"[!-~]{1,255}")
_AGAIN: Final = 503
_REFUSED: Final = 400


class Detour(Enum):
    """In the place of a call's outcome: what to do instead, in the same try."""

    ALONE = "make the call alone"
    REJOIN = "join others again, within limits that have become narrower"


ALONE: Final = Detour.ALONE
REJOIN: Final = Detour.REJOIN
Outcome: TypeAlias = T | Failure | Detour


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of call that has a batch route.

    Attributes:
        path: The batch's route.
        answer: Type of its answer.
        value: Makes the single call's answer of an item's result.
    """

    path: str
    answer: type[Any]
    value: Callable[[Any], Any]


def _as_it_is(value: CreatedDek | Encrypted) -> CreatedDek | Encrypted:
    return value


KINDS: Final = {
    "/create_dek_for_thread": Kind("/create_dek_batch", CreateResults, _as_it_is),
    "/encrypt": Kind("/encrypt_batch", EncryptResults, _as_it_is),
    "/decrypt": Kind("/decrypt_batch", DecryptResults, Plaintext),
}


@dataclass(slots=True)
class Part(Generic[T]):
    """A call as an item of a batch.

    Attributes:
        kind: Which batches it can be part of.
        call: The call.
        encoding: Of its body.
        body: The item, encoded: here and not with the batch, so that what can't be encoded fails alone.
    """

    kind: Kind
    call: Call[T]
    encoding: Encoding
    body: bytes = field(repr=False)
    _request: Request | None = None

    def alone(self, timeout: float) -> Generator[Attempt, Reply, T | Failure]:
        """Make one try of the call alone: the same request each time, as ``exchange`` does."""
        if self._request is None:
            self._request = encode(self.call, self.encoding, {})
        return attempt(self.call, self._request, timeout)


@dataclass(frozen=True, slots=True)
class Join:
    """Step: let the part travel with others, or alone if there are none, and return its ``Outcome``."""

    part: Part[Any]
    timeout: float


@dataclass(slots=True)
class Limits:
    """What the service takes at once, as far as it has said so.

    Attributes:
        items: Items of one batch.
        size: Bytes of their bodies.
        now: As in ``Rules``.
    """

    now: Callable[[], float]
    items: int = MAX_ITEMS
    size: int = MAX_BYTES
    _without: dict[str, float] = field(default_factory=dict)

    def batches(self, kind: Kind) -> bool:
        """Say whether the service may have this kind's batch route, and takes more than one item there."""
        if self.items < 2 or self.size < LEAST_BYTES:  # noqa: PLR2004 - a batch of one is none
            return False
        return self.now() >= self._without.get(kind.path, float("-inf"))

    def no_batches(self, kind: Kind) -> None:
        """Note that it has none."""
        self._without[kind.path] = self.now() + NO_BATCHES_SECONDS

    def fits(self, items: int, size: int) -> bool:
        """Say whether a batch of so many items and bytes is within the limits."""
        return items <= self.items and size <= self.size

    def refused(self, error: KmsError, items: int, size: int) -> None:
        """Note that a batch was too large."""
        if isinstance(error, BatchTooLarge):
            self.items = min(self.items, max(1, items // 2))
        else:
            self.size = min(self.size, size // 2)


def part_of(call: Call[T], options: Options, encoding: Encoding) -> Part[T] | None:
    """Return a call as an item of a batch, None if it goes alone.

    Alone go: kinds without a batch route; what carries headers of its caller's, for a trace is of one
    request; large messages; an Idempotency-Key that is not well-formed as a header, since only there it is
    refused as one; and fields of types that the contract does not have.

    Raises:
        UnicodeEncodeError: A field is a str that has no UTF-8.
    """
    kind = KINDS.get(call.path)
    if kind is None or options.headers or call.body is None:
        return None
    body = dict(call.body)
    if call.idempotency_key is not None:
        body["idempotency_key"] = call.idempotency_key
        if not _IDEMPOTENCY_KEY.fullmatch(call.idempotency_key):
            return None
    if not all(isinstance(value, str | bytes) for value in body.values()):
        return None
    if sum(map(len, body.values())) > ALONE_BYTES:
        return None
    encoded = msgspec.msgpack.encode(body) if encoding == "msgpack" else msgspec.json.encode(body)
    return Part(kind, call, encoding, encoded)


def coalesced(
    part: Part[T], options: Options, rules: Rules, where: object
) -> Generator[Join | Attempt | Pause, Any, T]:
    """Do what ``exchange`` does for the part's call, but let its tries join others.

    Yields steps; a ``Join`` is sent its ``Outcome``.

    Args:
        part: The call.
        options: Of the call.
        rules: Of the provider.
        where: Name of the service, for an error.

    Raises:
        KmsError: As ``exchange``.
    """
    return retrying(_Tries(part, rules, where).once, options, rules)


class _Tries(Generic[T]):
    def __init__(self, part: Part[T], rules: Rules, where: object) -> None:
        self._part = part
        self._where = where
        self._now = rules.now
        self._joins = JOINT_TRIES

    def once(self, remaining: float) -> Generator[Join | Attempt, Any, T | Failure]:
        expires = self._now() + remaining
        while self._joins > 0:
            outcome: Outcome[T] = yield Join(self._part, remaining)
            if outcome is ALONE:
                self._joins = 0
            elif isinstance(outcome, Failure):
                # What one item may have caused must not meet its companions a second time.
                self._joins = self._joins - 1 if isinstance(outcome.error, _OF_ALL) else 0
                return outcome
            elif outcome is not REJOIN:
                return outcome
            remaining = expires - self._now()
            if remaining <= 0:
                return late(self._where)
        return (yield from self._part.alone(remaining))


def late(where: object) -> Failure:
    """Return the outcome of a call whose time was over while it waited for its batch, to ``where``."""
    return Failure(DeadlineExceeded(f"{where} did not answer in time"))


def batch(
    parts: Sequence[Part[Any]], timeout: float, limits: Limits
) -> Generator[Attempt, Reply, list[Outcome[Any]]]:
    """Make one try of calls of one kind, and return each one's outcome, in order.

    Args:
        parts: The calls, at least one.
        timeout: Seconds for the request.
        limits: Learn from a refusal.
    """
    first = parts[0]
    if len(parts) == 1:
        return [(yield from first.alone(timeout))]
    kind = first.kind
    items = [msgspec.Raw(part.body) for part in parts]
    call = Call("POST", kind.path, kind.answer, {"items": items})
    request = encode(call, first.encoding, {})
    try:
        reply = yield Attempt(request, timeout)
    except KmsError as error:
        found, request_id = Failure(error), ""
    else:
        found, request_id = read(call, reply), _request_id(request.headers)
    if isinstance(found, Failure):
        return _failed(kind, found, parts, limits)
    if len(found.results) != len(parts):
        return [ALONE] * len(parts)
    return [_outcome(kind, result, request_id) for result in found.results]


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    return dict(headers)[b"x-request-id"].decode()


def _failed(kind: Kind, failure: Failure, parts: Sequence[Part[Any]], limits: Limits) -> list[Outcome[Any]]:
    """Return what a batch that failed as a whole means for each of its calls.

    A refusal of the caller, a failed connection or one that is worth another try is each one's own. Anything
    else may be a single item's doing, or that of something on the way that does not know batches.
    """
    error = failure.error
    if isinstance(error, _TOO_LARGE):
        limits.refused(error, len(parts), sum(len(part.body) for part in parts))
        return [REJOIN] * len(parts)
    if isinstance(error, _NO_BATCHES) or (isinstance(error, PermissionDenied) and not error.identity):
        limits.no_batches(kind)
    elif (
        failure.transient
        or isinstance(error, PermissionDenied | CertificateExpired | ConnectionFailed | TlsFailed)
        or (failure.status == 0 and isinstance(error, DeadlineExceeded))
    ):
        return [Failure(fresh(error), failure.status, failure.retry_after) for _ in parts]
    return [ALONE] * len(parts)


def _outcome(kind: Kind, result: Any, request_id: str) -> Outcome[Any]:  # noqa: ANN401 - one of three structs
    if result.error is None:
        value = result.take()
        return ALONE if value is None else kind.value(value)
    error = item_error(result.error)
    if isinstance(error, PermissionDenied):
        # Only a problem document names the permission and the identity.
        return ALONE
    vars(error)["request_id"] = request_id
    # An item has no status of its own; it only says whether a retry may help.
    return Failure(error, _AGAIN if error.retryable else _REFUSED)


def fresh(error: KmsError) -> KmsError:
    """Return an error like ``error`` for another caller: an exception that is raised twice mixes tracebacks.

    Its cause is left out, whose frames hold what the other callers sent.
    """
    cls = type(error)
    copy = cls.__new__(cls)
    copy.args = error.args
    vars(copy).update(vars(error))
    return copy

"""The wire contract without I/O: requests are built and answers read here, for every transport alike."""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, Generic, Literal, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from progressdb_kms import __version__
from progressdb_kms.client.errors import ProtocolViolation, RemoteError, error_from
from progressdb_kms.client.retry import Failure, parse_retry_after
from progressdb_kms.domain import errors as domain
from progressdb_kms.domain.errors import InvalidHeader, KmsError

T = TypeVar("T")
Encoding = Literal["json", "msgpack"]

USER_AGENT: Final = f"progressdb-kms-client/{__version__}"
MAX_ANSWER_BYTES: Final = 32 * 2**20
"""Largest answer that is read. The largest request is 16 MiB, and no answer is twice its request's size."""
MAX_DETAIL_CHARS: Final = 500
THREADS: Final = "/v1/threads/"

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FIELD_VALUE: Final = re.compile(r"[\x20-\x7e]*")
_OURS: Final = frozenset({
    "accept", "connection", "content-length", "content-type", "expect", "host", "idempotency-key",
    "transfer-encoding", "upgrade", "user-agent",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request, before it is encoded. Its body is the very item that a batch of such calls would hold.

    Attributes:
        method: HTTP method.
        path: Path, with what is variable in it already quoted.
        answer: Type of the answer's body; ``bytes`` takes it as it comes.
        body: Members of the request's body, None for none.
        query: Query parameters.
        idempotency_key: Makes a create safe to repeat.
    """

    method: str
    path: str
    answer: type[T]
    body: Mapping[str, Any] | None = field(default=None, repr=False)
    query: Mapping[str, str] = field(default_factory=dict)
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """An encoded request."""

    method: str
    target: str
    headers: list[tuple[bytes, bytes]]
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as it came. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


class _Problem(msgspec.Struct):
    """Problem document (RFC 9457) and its extension members."""

    code: str
    detail: str = ""
    title: str = ""
    retryable: bool | None = None
    request_id: str = ""
    permission: str = ""
    identity: str = ""


class ItemError(msgspec.Struct):
    """What stands in a failed item's place in a batch's answer."""

    code: str
    detail: str = ""
    retryable: bool | None = None


def new_idempotency_key() -> str:
    """Return a key that no other call has."""
    return secrets.token_hex(16)


def key_path(key_id: str, verb: str = "") -> str:
    """Return the path of a key's resource, or of a change to it."""
    return f"/v1/keys/{quote(key_id, safe='')}" + (f"/{verb}" if verb else "")


def thread_path(thread_id: str, verb: str) -> str:
    """Return the path of a change to a thread's keys."""
    return f"{THREADS}{quote(thread_id, safe='')}/{verb}"


def binary(name: str, value: object) -> bytes:
    """Return ``value`` as bytes.

    Raises:
        TypeError: It is not bytes-like. A str would be sent as base64 text, which it might even look like.
    """
    if not isinstance(value, bytes | bytearray | memoryview):
        raise TypeError(f"{name} must be bytes, not {type(value).__name__}")
    return bytes(value)


def encode(call: Call[Any], encoding: Encoding, headers: Mapping[str, str]) -> Request:
    """Encode a call.

    Args:
        call: What to ask.
        encoding: Of the body, and asked for in the answer.
        headers: The caller's own: ``traceparent``, ``tracestate``, ``X-Request-Id`` and such.

    Raises:
        InvalidHeader: A header that is not well-formed, or that is the client's to set.
    """
    fields = {name.lower(): value for name, value in headers.items()}
    for name, value in fields.items():
        if name in _OURS or not _TOKEN.fullmatch(name) or not _FIELD_VALUE.fullmatch(value):
            raise InvalidHeader(
                "a header given to the client is not well-formed, or is the client's own to set"
            )
    fields.setdefault("x-request-id", uuid.uuid4().hex)
    # This alone, although errors are problem documents: the fast door takes no list (ADR 14).
    fields["accept"] = f"application/{encoding}"
    fields["user-agent"] = USER_AGENT
    body = b""
    if call.body is not None:
        body = msgspec.msgpack.encode(call.body) if encoding == "msgpack" else msgspec.json.encode(call.body)
        fields["content-type"] = f"application/{encoding}"
    if call.method != "GET":
        fields["content-length"] = str(len(body))
    if call.idempotency_key is not None:
        if not call.idempotency_key or not _FIELD_VALUE.fullmatch(call.idempotency_key):
            raise InvalidHeader("Idempotency-Key must be visible ASCII characters")
        fields["idempotency-key"] = call.idempotency_key
    target = call.path + (f"?{urlencode(call.query)}" if call.query else "")
    return Request(call.method, target, [(n.encode(), v.encode()) for n, v in fields.items()], body)


def read(call: Call[T], reply: Reply) -> T | Failure:
    """Return the answer to ``call``, or why there is none."""
    if reply.status == HTTPStatus.OK:
        try:
            return _decode(reply, call.answer)
        except msgspec.MsgspecError as error:
            # Decoding errors name a place and a type, never a value.
            violation = ProtocolViolation(f"the answer to {call.method} {call.path} can't be read: {error}")
            return Failure(violation, reply.status)
    retry_after = parse_retry_after(reply.headers.get("retry-after"), reply.headers.get("date"))
    return Failure(_problem(call, reply), reply.status, retry_after)


def _decode(reply: Reply, answer: type[T]) -> T:
    if answer is bytes:
        return reply.body  # type: ignore[return-value] # T is bytes here, which a checker can't see
    # An older service names no or another type for its JSON, so only msgpack has to be said.
    if "msgpack" in reply.headers.get("content-type", ""):
        return msgspec.msgpack.decode(reply.body, type=answer, strict=False)
    return msgspec.json.decode(reply.body, type=answer, strict=False)


def _problem(call: Call[Any], reply: Reply) -> KmsError:
    request_id = reply.headers.get("x-request-id", "")
    if reply.status < HTTPStatus.BAD_REQUEST:
        return ProtocolViolation(f"the answer to {call.method} {call.path} has status {reply.status}")
    try:
        problem = _decode(reply, _Problem)
    except msgspec.MsgspecError:
        return _plain(call, reply)
    return error_from(
        problem.code,
        _one_line(problem.detail or problem.title),
        retryable=problem.retryable,
        request_id=_one_line(problem.request_id or request_id),
        permission=_one_line(problem.permission),
        identity=_one_line(problem.identity),
    )


_BY_STATUS: Final[dict[int, type[KmsError]]] = {
    400: domain.InvalidField,
    404: domain.KeyNotFound,
    405: domain.MethodNotAllowed,
    408: domain.RequestTimeout,
    409: domain.StateConflict,
    413: domain.BodyTooLarge,
    415: domain.UnsupportedMediaType,
    422: domain.AuthenticationFailed,
    429: domain.TooManyRequests,
    431: domain.HeadersTooLarge,
    500: domain.InternalError,
    502: domain.NotReady,
    503: domain.NotReady,
    504: domain.DeadlineExceeded,
}
# What an older service says of a wrong key, wrong AAD or forged ciphertext, under whatever status.
_FORGED: Final = "message authentication failed"
# What it says of a path that it does not have; a missing key is 404 as well.
_NO_ROUTE: Final = "404 page not found"


def _plain(call: Call[Any], reply: Reply) -> KmsError:
    """Return the error of an answer without a problem document, as an older service or a proxy gives."""
    text = _one_line(reply.body[: 4 * MAX_DETAIL_CHARS].decode("utf-8", "replace"))
    detail = f"{text or 'no detail'} (status {reply.status})"
    if _FORGED in text:
        return domain.AuthenticationFailed(detail)
    if reply.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        return domain.PermissionDenied("", "", detail)
    if reply.status == HTTPStatus.NOT_FOUND and (text == _NO_ROUTE or call.path.endswith("_batch")):
        return domain.RouteNotFound(detail)
    cls = _BY_STATUS.get(reply.status)
    return cls(detail) if cls else RemoteError(f"http_{reply.status}", detail)


def _one_line(text: str) -> str:
    """Return ``text`` fit for a log: printable, on one line, bounded."""
    return "".join(c if c.isprintable() else " " for c in text.strip()[:MAX_DETAIL_CHARS])


def item_error(error: ItemError) -> KmsError:
    """Return the typed error of a failed batch item."""
    return error_from(error.code, _one_line(error.detail), retryable=error.retryable)


def base64_size(size: int) -> int:
    """Return the length of ``size`` bytes in base64."""
    return (size + 2) // 3 * 4


def body_size(item: Mapping[str, Any], encoding: Encoding) -> int:
    """Return about how many bytes a batch item takes, never too few."""
    total = 16
    for name, value in item.items():
        if isinstance(value, bytes):
            size = base64_size(len(value)) if encoding == "json" else len(value)
        else:
            # A character takes at most 6 bytes in JSON, as an escape.
            size = len(value) if value.isascii() and value.isprintable() else 6 * len(value)
        total += len(name) + size + 8
    return total


def split(
    items: Iterable[Mapping[str, Any]], encoding: Encoding, max_items: int, max_bytes: int
) -> list[list[Mapping[str, Any]]]:
    """Split batch items, in order, into requests of at most so many items and about so many bytes.

    An item that is too large by itself goes alone: the service refuses it, and nothing else with it.
    """
    parts: list[list[Mapping[str, Any]]] = []
    room = 0
    for item in items:
        size = body_size(item, encoding)
        if not parts or len(parts[-1]) >= max_items or size > room:
            parts.append([])
            room = max_bytes
        parts[-1].append(item)
        room -= size
    return parts

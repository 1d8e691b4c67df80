"""The hot routes for the transport's fast door: the same handlers, checks and errors, less around them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, cast
from urllib.parse import parse_qs

import structlog

from progressdb_kms.api.answering import (
    authorise,
    explain,
    given_request_id,
    log_context,
    new_request_id,
    perform,
)
from progressdb_kms.api.call import Call
from progressdb_kms.api.handlers import create_request, created
from progressdb_kms.api.longbatch import LONG_BYTES
from progressdb_kms.api.problems import problem_of
from progressdb_kms.api.routes import ROUTES
from progressdb_kms.domain import errors
from progressdb_kms.usecases.messages import JSON, MSGPACK

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from progressdb_kms.api.answering import Api, Counted
    from progressdb_kms.api.call import Answer, Route
    from progressdb_kms.usecases.creation import Order, Result, Share
    from progressdb_kms.usecases.encryption import Hot, Loaded, Miss
    from progressdb_kms.usecases.session import Session

    HotFunction = Callable[[Session, str, str, bytes, Loaded], bytes | Miss]
    RawAnswer = tuple[int, bytes, Answer, bool]
    Tell = Callable[[Callable[[], RawAnswer]], None]

log = structlog.get_logger(__name__)

HOT_PATHS: Final = (
    "/encrypt",
    "/decrypt",
    "/encrypt_batch",
    "/decrypt_batch",
    "/create_dek_for_thread",
    "/create_dek_batch",
    "/get_wrapped",
    "/rewrap",
    "/healthz",
)
"""All routes of the wire contract: one of them left out would make a connection slow for ever."""
_CREATE: Final = "/create_dek_for_thread"

# What stands in these fields and in no other way is understood here; all else is the slow way's to negotiate.
_TYPES: Final = {"": JSON, JSON: JSON, MSGPACK: MSGPACK}
_ACCEPTS: Final = {"": None, "*/*": None, JSON: JSON, MSGPACK: MSGPACK}


class Head(Protocol):
    """What the transport tells of a request's head; each field stands there once."""

    @property
    def method(self) -> str:
        """GET or POST."""

    @property
    def path(self) -> str:
        """Without the query."""

    @property
    def query(self) -> str:
        """What follows the question mark."""

    @property
    def fields(self) -> Mapping[str, str]:
        """Values by lower-case name."""


class ApiDoor:
    """What the fast door needs to know of the API.

    Args:
        api: What the app serves with.
        hot: The hot functions.
        counted: Called for each answer, as ``Api.counted``.
        debug: Whether each request is logged.
    """

    def __init__(self, api: Api, hot: Hot, counted: Counted, *, debug: bool) -> None:
        self._api = replace(api, counted=counted)
        self._debug = debug
        self._routes = {(route.method, route.path): route for route in ROUTES if route.path in HOT_PATHS}
        self._hot: dict[str, HotFunction] = {
            "/encrypt": hot.encrypt,
            "/decrypt": hot.decrypt,
            "/encrypt_batch": hot.encrypt_batch,
            "/decrypt_batch": hot.decrypt_batch,
        }
        self._functions = hot
        self.starts = tuple(
            f"{method} {path}{'?' if route.parameters else ' HTTP/1.1'}".encode()
            for (method, path), route in self._routes.items()
        )

    def ready(self, head: Head) -> HotRequest | None:
        """Make a request ready to be answered; None if it asks for anything out of the ordinary."""
        route = self._routes.get((head.method, head.path))
        if route is None or (head.query and not route.parameters):
            return None
        content_type = _TYPES.get(head.fields.get("content-type", ""))
        accept = head.fields.get("accept", "")
        if content_type is None or accept not in _ACCEPTS:
            return None
        return HotRequest(
            self._api,
            self._functions,
            route,
            head,
            content_type=content_type,
            accept=_ACCEPTS[accept] or content_type,
            hot=self._hot.get(head.path),
            debug=self._debug,
        )


class HotRequest:
    """A request for a hot route, of which all but the body is known."""

    __slots__ = (
        "_accept",
        "_api",
        "_at_once",
        "_content_type",
        "_counted",
        "_creates",
        "_debug",
        "_functions",
        "_head",
        "_hot",
        "_path",
        "_prefix",
        "_request_id",
        "_route",
        "body_limit",
    )

    def __init__(
        self,
        api: Api,
        functions: Hot,
        route: Route,
        head: Head,
        *,
        content_type: str,
        accept: str,
        hot: HotFunction | None,
        debug: bool,
    ) -> None:
        self._api = api
        self._counted = api.counted
        self._functions = functions
        self._route = route
        self._path = route.path
        self._head = head
        self._content_type = content_type
        self._accept = accept
        self._hot = hot
        self._creates = route.path == _CREATE
        self._debug = debug
        self._request_id = given_request_id(head.fields.get("x-request-id", ""))
        self._prefix = b"content-type: %b\r\ncontent-length: " % accept.encode()
        self.body_limit = api.body_limit(route)
        self._at_once = LONG_BYTES if route.batch else self.body_limit

    def answer(
        self, session: object, body: bytes
    ) -> RawAnswer | Callable[[], Awaitable[RawAnswer]] | PendingCreate:
        """Answer out of memory, or return what waits for the answer; never raises."""
        began = time.perf_counter()
        caller = cast("Session", session)
        request_id = self._request_id or new_request_id()
        # A caller with limits holds a place while it is answered, which ``perform`` sees to; and a long batch
        # is cut there.
        if self._hot is not None and len(body) <= self._at_once and not caller.limited:
            try:
                answer = self._hot(caller, self._content_type, self._accept, body, {})
            except Exception as error:  # noqa: BLE001 - explained to log and caller
                return self._failed(caller, error, request_id, began)
            if type(answer) is bytes:
                return self._done(caller, answer, request_id, began)
        elif self._creates and not caller.limited:
            try:
                return PendingCreate(self, caller, self._order(caller, body, request_id), began)
            except Exception as error:  # noqa: BLE001 - explained to log and caller
                return self._failed(caller, error, request_id, began)
        return partial(self._later, caller, body, request_id, began)

    def late(self, session: object) -> RawAnswer:
        """Answer a request whose body did not come in time."""
        began = time.perf_counter()
        return self._failed(
            cast("Session", session), errors.RequestTimeout(), self._request_id or new_request_id(), began
        )

    def _order(self, session: Session, body: bytes, request_id: str) -> Order:
        authorise(self._route, session)
        return create_request(
            self._api.kms,
            session,
            self._content_type,
            body,
            self._head.fields.get("idempotency-key"),
            request_id,
        )

    def create(self, order: Order, tell: Callable[[list[Result] | Exception], None]) -> Share:
        """Have a DEK made."""
        return self._api.kms.creation.order((order,), tell)

    def answer_created(
        self, session: Session, results: list[Result] | Exception, request_id: str, began: float
    ) -> RawAnswer:
        """Answer a request to make a DEK; never raises."""
        try:
            return self._done(session, created(self._accept, results), request_id, began)
        except Exception as error:  # noqa: BLE001 - explained to log and caller
            return self._failed(session, error, request_id, began)

    @property
    def request_timeout(self) -> float:
        """Seconds that an answer may take."""
        return self._api.limits.request_timeout

    async def _later(self, session: Session, body: bytes, request_id: str, began: float) -> RawAnswer:
        # Runs in a task of its own, whose context ends with it.
        structlog.contextvars.bind_contextvars(**self._context(request_id))
        try:
            return self._done(session, await self._performed(session, body, request_id), request_id, began)
        except Exception as error:  # noqa: BLE001 - explained to log and caller
            return self._failed(session, error, request_id, began)

    async def _performed(self, session: Session, body: bytes, request_id: str) -> Answer:
        api, head, route = self._api, self._head, self._route
        authorise(route, session)
        idempotency_key = head.fields.get("idempotency-key")
        call = Call(
            kms=api.kms,
            hot=self._functions,
            loader=api.loader,
            rotations=api.rotations,
            audit=api.audit,
            session=session,
            request_id=request_id,
            content_type=self._content_type,
            accept=self._accept,
            body=body,
            query=parse_qs(head.query, keep_blank_values=True, errors="strict", max_num_fields=16),
            idempotency_keys=[] if idempotency_key is None else [idempotency_key],
        )
        return await perform(route, call, api.limits)

    def _context(self, request_id: str) -> dict[str, str]:
        return log_context(request_id, self._head.fields.get("traceparent", ""))

    def _done(self, session: Session, body: Answer, request_id: str, began: float) -> RawAnswer:
        self._count(session, 200, "ok", request_id, began)
        length = len(body) if isinstance(body, bytes) else sum(map(len, body))
        head = b"%b%d\r\nx-request-id: %b\r\ncache-control: no-store\r\n"
        return 200, head % (self._prefix, length, request_id.encode()), body, False

    def _failed(self, session: Session, error: Exception, request_id: str, began: float) -> RawAnswer:
        with structlog.contextvars.bound_contextvars(**self._context(request_id)):
            shown = explain(self._api, self._path, error, request_id)
        status, headers, body = problem_of(shown, request_id)
        self._count(session, status, shown.code, request_id, began)
        close = False
        lines = []
        for name, value in headers:
            if name == "Connection":
                close = True
            else:
                lines.append(f"{name.lower()}: {value}\r\n")
        lines.append(f"content-length: {len(body)}\r\n")
        lines.append(f"x-request-id: {request_id}\r\ncache-control: no-store\r\n")
        return status, "".join(lines).encode(), body, close

    def _count(self, session: Session, status: int, code: str, request_id: str, began: float) -> None:
        seconds = time.perf_counter() - began
        self._counted(self._path, status, code, session.kind, seconds)
        if self._debug:
            with structlog.contextvars.bound_contextvars(**self._context(request_id)):
                log.debug(
                    "request",
                    route=self._path,
                    status=status,
                    code=code,
                    identity=session.name,
                    seconds=seconds,
                )


class PendingCreate:
    """A request to make a DEK, which waits for the store together with others', without a task of its own."""

    __slots__ = ("_began", "_order", "_request", "_session", "_share", "_tell", "_timer")

    _share: Share
    _tell: Tell
    _timer: asyncio.TimerHandle

    def __init__(self, request: HotRequest, session: Session, order: Order, began: float) -> None:
        self._request = request
        self._session = session
        self._order = order
        self._began = began

    def begin(self, tell: Tell) -> None:
        """Begin; ``tell`` is called with what makes the answer, unless it is given up before."""
        self._tell = tell
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._request.request_timeout, self._late)
        self._share = self._request.create(self._order, self._made)

    def give_up(self) -> None:
        """Let nobody be told: the peer is gone."""
        self._timer.cancel()
        self._share.give_up()

    def _made(self, results: list[Result] | Exception) -> None:
        self._timer.cancel()
        self._answer(results)

    def _late(self) -> None:
        self._share.give_up()
        self._answer(errors.DeadlineExceeded())

    def _answer(self, results: list[Result] | Exception) -> None:
        request_id = self._order.request_id
        self._tell(partial(self._request.answer_created, self._session, results, request_id, self._began))

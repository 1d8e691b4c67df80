"""The Quart app: one dispatcher over the table of routes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import parse_qs

import structlog
from quart import Quart, Response, request
from werkzeug.exceptions import (
    HTTPException,
    InternalServerError,
    MethodNotAllowed,
    NotFound,
    RequestEntityTooLarge,
)
from werkzeug.routing import BaseConverter

from progressdb_kms.api.answering import (
    Api,
    authorise,
    deadline,
    explain,
    given_request_id,
    log_context,
    new_request_id,
    perform,
    refuse_web_pages,
)
from progressdb_kms.api.call import Answer, Call, Route
from progressdb_kms.api.longbatch import LONG_BYTES
from progressdb_kms.api.openapi import openapi_document
from progressdb_kms.api.problems import problem_of
from progressdb_kms.api.routes import ROUTES
from progressdb_kms.domain import errors
from progressdb_kms.usecases.messages import JSON, MSGPACK, encode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from progressdb_kms.usecases.encryption import Hot
    from progressdb_kms.usecases.session import Session

log = structlog.get_logger(__name__)

_UNMATCHED: Final = "unmatched"


class _AnyText(BaseConverter):
    """A part of a path that may hold anything; Werkzeug's own takes no slash at its start."""

    regex = ".+?"
    part_isolating = False


def create_app(api: Api, hot: Hot) -> Quart:
    """Build the ASGI app. It takes the caller's session from ``scope["state"]["kms.session"]``."""
    app = Quart("progressdb_kms", static_folder=None)
    # A path with // is no route: mended, it would be a redirect in HTML to whatever the Host header says.
    app.url_map.merge_slashes = False
    # Hypercorn hands on pieces as they come; Quart refuses what goes over the largest limit of all, and the
    # dispatcher what goes over the route's own.
    app.config["MAX_CONTENT_LENGTH"] = max(api.limits.body_bytes, api.limits.batch_body_bytes)
    # A thread_id in a path may hold slashes, two in a row and at its ends too.
    app.url_map.converters["any_text"] = _AnyText
    app.config["BODY_TIMEOUT"] = None  # the dispatcher's own covers the whole body
    document = openapi_document(api.limits)

    async def openapi(_call: Call) -> bytes:
        return encode(JSON, document)

    table = (*ROUTES, Route("GET", "/openapi.json", openapi, "Describe this API", None, dict))
    for route in table:
        app.add_url_rule(
            route.path.replace("<thread_id>", "<any_text:thread_id>"),
            endpoint=f"{route.method} {route.path}",
            view_func=_view(api, hot, route),
            methods=[route.method],
            provide_automatic_options=False,
            strict_slashes=True,
        )
    app.register_error_handler(HTTPException, _unmatched(api))
    return app


def _view(api: Api, hot: Hot, route: Route) -> Callable[..., Awaitable[Response]]:
    body_limit = api.body_limit(route)

    async def view(**path: str) -> Response:
        async def respond(session: Session, request_id: str) -> tuple[str, Answer]:
            accept, content_type = _negotiate(needs_type=route.takes is not None and not route.body_optional)
            async with deadline(api.limits.body_timeout, errors.RequestTimeout):
                body = await read_body(body_limit)
            headers = request.headers
            refuse_web_pages(api, session, headers.get("Origin"), headers.get("Sec-Fetch-Site"))
            authorise(route, session)
            if route.takes is None and body.strip() not in {b"", b"{}", b"\x80"}:
                raise errors.InvalidField("this route takes no body")
            call = Call(
                kms=api.kms,
                hot=hot,
                loader=api.loader,
                rotations=api.rotations,
                audit=api.audit,
                session=session,
                request_id=request_id,
                content_type=content_type,
                accept=accept,
                body=body,
                path=path,
                query=query_of_request(),
                idempotency_keys=request.headers.getlist("Idempotency-Key"),
            )
            return accept, await perform(route, call, api.limits)

        return await answered(api, route.path, respond)

    return view


def _unmatched(api: Api) -> Callable[[HTTPException], Awaitable[Response]]:
    async def handler(error: HTTPException) -> Response:
        async def respond(_session: Session, _request_id: str) -> tuple[str, Answer]:
            if isinstance(error, NotFound):
                raise errors.RouteNotFound
            if isinstance(error, MethodNotAllowed):
                raise errors.MethodNotAllowed
            if isinstance(error, RequestEntityTooLarge):
                raise errors.BodyTooLarge
            if isinstance(
                error, InternalServerError
            ):  # Quart's, for what failed outside the handlers' own net
                raise errors.InternalError
            raise errors.InvalidHeader

        response = await answered(api, _UNMATCHED, respond)
        if isinstance(error, MethodNotAllowed) and error.valid_methods:
            response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
        return response

    return handler


async def answered(
    api: Api,
    route: str,
    respond: Callable[[Session, str], Awaitable[tuple[str, Answer]]],
    explained: Callable[[errors.KmsError, str], tuple[int, list[tuple[str, str]], bytes]] = problem_of,
) -> Response:
    """Return the response to the present request, whatever happens; it is logged and counted.

    Args:
        api: What the app serves with.
        route: Its name for metrics and logs.
        respond: Gives Content-Type and body, from the caller's session and the request's id.
        explained: Gives status, headers and body of the answer to an error.
    """
    began = time.perf_counter()
    request_id = given_request_id(request.headers.get("X-Request-Id", "")) or new_request_id()
    session: Session = request.scope["state"]["kms.session"]
    code = "ok"
    context = log_context(request_id, request.headers.get("traceparent", ""))
    with structlog.contextvars.bound_contextvars(**context):
        try:
            content_type, answer = await respond(session, request_id)
            response = Response(answer, 200, content_type=content_type)
            if isinstance(answer, list):
                # Sent piece for piece, but not in chunks: how long it is is known.
                response.content_length = sum(map(len, answer))
        except Exception as error:  # noqa: BLE001 - explained to log and caller
            shown = explain(api, route, error, request_id)
            code = shown.code
            status, headers, body = explained(shown, request_id)
            response = Response(body, status, headers=dict(headers))
        response.headers["X-Request-Id"] = request_id
        # Answers hold plaintext and keys: no cache on the way may keep them.
        response.headers["Cache-Control"] = "no-store"
        seconds = time.perf_counter() - began
        log.debug(
            "request",
            route=route,
            status=response.status_code,
            code=code,
            identity=session.name,
            seconds=seconds,
        )
    api.counted(route, response.status_code, code, session.kind, seconds)
    return response


def _negotiate(*, needs_type: bool) -> tuple[str, str]:
    """Return what the answer is to be written in, and what the body is written in.

    A body without a Content-Type is JSON: some clients of the older service send none.

    Raises:
        NotAcceptable, UnsupportedMediaType: Neither JSON nor msgpack will do.
    """
    mimetype = request.mimetype
    content_type = {"": JSON, JSON: JSON, MSGPACK: MSGPACK, "application/x-msgpack": MSGPACK}.get(
        mimetype, mimetype
    )
    charset = request.mimetype_params.get("charset", "utf-8").lower()
    if needs_type and (content_type not in {JSON, MSGPACK} or charset not in {"utf-8", "utf8"}):
        raise errors.UnsupportedMediaType
    accepted = request.accept_mimetypes
    if not accepted.provided:
        return (content_type if content_type in {JSON, MSGPACK} else JSON), content_type
    first, second = (MSGPACK, JSON) if content_type == MSGPACK else (JSON, MSGPACK)
    best = accepted.best_match([first, second, "application/problem+json"])
    if best is None:
        raise errors.NotAcceptable
    return (best if best in {JSON, MSGPACK} else JSON), content_type


def query_of_request() -> dict[str, list[str]]:
    """Return the query's parameters, decoded strictly: bad bytes replaced would ask for another thing.

    Raises:
        InvalidParameter: Not UTF-8, or not of the form.
    """
    raw = request.query_string
    try:
        return parse_qs(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=16)
    except ValueError:  # UnicodeDecodeError among them
        raise errors.InvalidParameter("the query is not UTF-8 in percent-encoding") from None


async def read_body(limit: int) -> bytes:
    """Read the whole body.

    Raises:
        BodyTooLarge: It is, or says that it will be, over ``limit``.
    """
    too_large = errors.BodyTooLarge(f"this route takes at most {limit} bytes")
    length = request.content_length
    if length is not None and length > limit:
        raise too_large
    body = bytearray()
    try:
        async for part in request.body:
            if len(body) + len(part) > limit:
                raise too_large
            body += part
    except RequestEntityTooLarge:
        raise too_large from None
    # Copying 16 MiB would take longer than anybody may hold the event loop.
    return bytes(body) if len(body) <= LONG_BYTES else cast("bytes", body)

"""The page's routes: GET alone, no cookie, no script, and headers that let a browser do nothing more."""

from __future__ import annotations

from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from quart import request

from progressdb_kms.api.answering import deadline
from progressdb_kms.api.app import answered, query_of_request, read_body
from progressdb_kms.api.problems import problem_of, status_of
from progressdb_kms.domain import errors
from progressdb_kms.domain.policy import Permission
from progressdb_kms.page import panels
from progressdb_kms.page.panels import panel
from progressdb_kms.page.render import SOON, render, render_in_turns

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from quart import Quart, Response

    from progressdb_kms.api.call import Answer
    from progressdb_kms.page.sources import Sources
    from progressdb_kms.usecases.session import Session

    Query = dict[str, str]
    Page = Callable[[Sources, Session, Query], Awaitable[tuple[str, dict[str, Any]]]]

HTML: Final = "text/html; charset=utf-8"
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; frame-ancestors 'none';"
        " base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
REFRESH_RUNNING: Final = 5
REFRESH_IDLE: Final = 30
_FILES: Final = {"style.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml"}


async def overview(sources: Sources, session: Session, _query: Query) -> tuple[str, dict[str, Any]]:
    """Show everything at a glance."""
    return "overview.html", {
        "census": await panel(panels.census(sources, session)),
        "progress": await panel(panels.rotations(sources, session, 1)),
        "instances": await panel(panels.instances(sources, session)),
        "expiries": panels.expiries(sources, session),
        "may_search": session.grants().allows_some(Permission.READ),
        "store": sources.store(),
        "unready": sources.unready(),
        "soon": SOON,
    }


async def rotations(sources: Sources, session: Session, query: Query) -> tuple[str, dict[str, Any]]:
    """Show rotations; the page loads itself again."""
    progress = await panels.rotations(sources, session)
    refresh = 0
    if query.get("refresh") != "off":
        refresh = REFRESH_RUNNING if progress.running else REFRESH_IDLE
    return "rotations.html", {"progress": progress, "refresh": refresh, "seen_at": sources.watch.seen_at}


async def keys(sources: Sources, session: Session, query: Query) -> tuple[str, dict[str, Any]]:
    """Show a key with its history, or a thread's keys, or the form that asks for either."""
    grants = session.grants()
    if not grants.allows_some(Permission.READ):
        grants.require(Permission.READ)
    # People paste: a key id never has spaces around it, and a thread id may.
    key_id, thread_id = query.get("key_id", "").strip(), query.get("thread_id", "")
    values: dict[str, Any] = {"key_id": key_id, "thread_id": thread_id, "key": None, "keys": None}
    if key_id and thread_id:
        raise errors.InvalidParameter("give a key id or a thread id, not both")
    if key_id:
        values["key"] = await panels.key(sources, session, key_id)
        values["history"] = await panel(panels.history(sources, session, key_id, query.get("before")))
    elif thread_id:
        values["keys"], values["cursor"] = await panels.thread(
            sources, session, thread_id, query.get("cursor")
        )
    return "keys.html", values


async def audit(sources: Sources, session: Session, query: Query) -> tuple[str, dict[str, Any]]:
    """Show the end of the audit log."""
    values = await panels.tail(sources, session, query.get("before"))
    return "audit.html", {**values, "kept_here": sources.audit_kept}


PAGES: Final[dict[str, tuple[Page, frozenset[str]]]] = {
    "/ui/": (overview, frozenset()),
    "/ui/rotations": (rotations, frozenset({"refresh"})),
    "/ui/keys": (keys, frozenset({"key_id", "thread_id", "cursor", "before"})),
    "/ui/audit": (audit, frozenset({"before"})),
}


def add_page(app: Quart, sources: Sources) -> None:
    """Add the page to the API's app."""
    for path, (page, parameters) in PAGES.items():
        view = partial(_view, sources, path, page, parameters)
        for each in {path, path.removesuffix("/")}:  # else Werkzeug redirects, to whatever Host says
            app.add_url_rule(
                each, endpoint=f"GET {each}", view_func=view, methods=["GET"], provide_automatic_options=False
            )
    static = resources.files("progressdb_kms.page") / "static"
    for name, content_type in _FILES.items():
        view = partial(_file, sources, f"/ui/{name}", content_type, (static / name).read_bytes())
        app.add_url_rule(
            f"/ui/{name}",
            endpoint=f"GET /ui/{name}",
            view_func=view,
            methods=["GET"],
            provide_automatic_options=False,
        )


async def _view(sources: Sources, path: str, page: Page, parameters: frozenset[str]) -> Response:
    api = sources.api

    async def respond(session: Session, request_id: str) -> tuple[str, Answer]:
        await _refuse_all_but_plain_reads(sources)
        with session.request():
            async with deadline(api.limits.request_timeout, errors.DeadlineExceeded):
                grants = session.grants()
                panels.require_some(grants)
                name, values = await page(sources, session, _given(parameters))
                frame = {
                    "places": panels.places(grants),
                    "here": path,
                    "identity": session.name,
                    "now": api.kms.now(),
                    "instance": sources.instance,
                    "release": sources.release,
                    "request_id": request_id,
                }
                return HTML, await render_in_turns(name, {"refresh": 0, **frame, **values})

    return await _sealed(sources, path, respond)


async def _file(sources: Sources, path: str, content_type: str, content: bytes) -> Response:
    async def respond(_session: Session, _request_id: str) -> tuple[str, Answer]:
        await _refuse_all_but_plain_reads(sources)
        return content_type, content

    return await _sealed(sources, path, respond)


async def _sealed(
    sources: Sources, path: str, respond: Callable[[Session, str], Awaitable[tuple[str, Answer]]]
) -> Response:
    response = await answered(sources.api, path, respond, _explained)
    response.headers.update(HEADERS)
    return response


async def _refuse_all_but_plain_reads(sources: Sources) -> None:
    """Return if the request has no body, and if no other site's page made it but by a link to follow.

    Raises:
        InvalidHeader, InvalidField: Otherwise.
    """
    async with deadline(sources.api.limits.body_timeout, errors.RequestTimeout):
        body = await read_body(1024)
    if body:
        raise errors.InvalidField("this page takes no body")
    headers = request.headers
    followed = headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
    if headers.get("Sec-Fetch-Site", "none") not in {"none", "same-origin"} and not followed:
        raise errors.InvalidHeader("another site's page may link to this one, and not load it")


def _given(parameters: frozenset[str]) -> Query:
    """Return the query's parameters that have a value.

    Raises:
        InvalidParameter: One is unknown, or given more than once.
    """
    given: Query = {}
    for name, values in query_of_request().items():
        if name not in parameters or len(values) > 1:
            raise errors.InvalidParameter("a parameter of this page is unknown, or given more than once")
        if values[0]:
            given[name] = values[0]
    return given


def _explained(error: errors.KmsError, request_id: str) -> tuple[int, list[tuple[str, str]], bytes]:
    status, headers, _ = problem_of(error, request_id)
    if status_of(error) == 500:  # noqa: PLR2004 - as problem_of: what went wrong inside is in the log
        error = errors.InternalError()
    body = render("error.html", {"error": error, "status": status, "request_id": request_id})
    kept = [header for header in headers if header[0] != "Content-Type"]
    return status, [("Content-Type", HTML), *kept], body

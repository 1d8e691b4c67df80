"""From a request to its answer: what the Quart routes and the fast door have in common."""

from __future__ import annotations

import asyncio
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from random import getrandbits
from typing import TYPE_CHECKING, Any, Final

import structlog

from progressdb_kms.api.call import Answer, Call, Route
from progressdb_kms.api.loglimit import LogLimit
from progressdb_kms.api.problems import status_of
from progressdb_kms.domain import errors
from progressdb_kms.domain.errors import KmsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from progressdb_kms.ports import RotationLedger
    from progressdb_kms.ports.audit import AuditStore
    from progressdb_kms.settings import Limits
    from progressdb_kms.usecases.context import Kms
    from progressdb_kms.usecases.loading import Loader
    from progressdb_kms.usecases.session import Session

    Counted = Callable[..., None]

log = structlog.get_logger(__name__)

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class Api:
    """What the app serves with.

    Attributes:
        kms: The service.
        loader: Fetches cold keys.
        limits: Body sizes and times.
        counted: Called for each answer: route, status, code, identity_kind, seconds.
        rotations: Tells of rotations.
        audit: Holds audit records.
        lines: Keeps failed requests from flooding the log.
    """

    kms: Kms
    loader: Loader
    limits: Limits
    counted: Counted
    rotations: RotationLedger
    audit: AuditStore
    lines: LogLimit = field(default_factory=LogLimit)

    def body_limit(self, route: Route) -> int:
        """Return how many bytes a route's body may have."""
        return self.limits.batch_body_bytes if route.batch else self.limits.body_bytes


def given_request_id(given: str) -> str | None:
    """Return the caller's request id, None if it gave none that can be used."""
    return given if _REQUEST_ID.fullmatch(given) else None


def new_request_id() -> str:
    """Return a name for a request. It is no secret and opens nothing, so that a fast generator will do."""
    return getrandbits(128).to_bytes(16).hex()


def log_context(request_id: str, traceparent: str) -> dict[str, str]:
    """Return what log lines of a request carry."""
    context = {"request_id": request_id}
    if _TRACEPARENT.fullmatch(traceparent):
        context["traceparent"] = traceparent
    return context


def refuse_web_pages(api: Api, session: Session, origin: str | None, site: str | None) -> None:
    """Return if a request for the JSON API is not one that a web page made a browser send.

    A browser shows its user's certificate whichever page makes it connect, so that any page which an operator
    opens could change keys in the operator's name. Every browser says ``Origin`` with what may change
    something, and a current one ``Sec-Fetch-Site`` with everything (Fetch Metadata; ``none`` is an address
    that the user has typed); programs say neither.

    Args:
        api: Whose log tells of it, once a second for each caller.
        session: Who asks.
        origin: The field ``Origin``.
        site: The field ``Sec-Fetch-Site``.

    Raises:
        InvalidHeader: It is.
    """
    if origin is None and site in {None, "none"}:
        return
    if (left_out := api.lines.allow(("web_page_refused", session.name))) is not None:
        log.warning("web_page_refused", identity=session.name, origin=(origin or "")[:200], left_out=left_out)
    raise errors.InvalidHeader("the API answers programs, not web pages: Origin or Sec-Fetch-Site is given")


def authorise(route: Route, session: Session) -> None:
    """Return if the caller may do something on this route at all; the handler looks more closely.

    Before the body is looked at: whoever may do nothing here can't make the service parse for them. After it
    has arrived: an answer in the middle of a body costs the connection.

    Raises:
        PermissionDenied, CertificateExpired: Otherwise.
    """
    if route.permission is not None:
        grants = session.grants()
        if not grants.allows_some(route.permission):
            grants.require(route.permission)


async def perform(route: Route, call: Call, limits: Limits) -> Answer:
    """Run a route's handler, within the caller's limits and the time for it; returns the answer's body.

    Raises:
        KmsError: As the handler does, or TooManyRequests, or DeadlineExceeded.
    """
    with call.session.request() if route.permission is not None else nullcontext():
        async with deadline(limits.request_timeout, errors.DeadlineExceeded):
            return await route.handler(call)


def explain(api: Api, route: str, error: Exception, request_id: str) -> KmsError:
    """Write down why a request failed, once a second for each kind, and return what its caller may know."""
    if not isinstance(error, KmsError):
        # The last stop before the wire: nothing of the exception's text may reach the caller.
        if (left_out := api.lines.allow((route, type(error)))) is not None:
            log.error("internal_error", route=route, left_out=left_out, exc_info=error)
        return errors.InternalError()
    if isinstance(error, errors.PermissionDenied):
        api.kms.refusals.note(error, route, request_id)
        about = {"route": route, "permission": error.permission, "identity": error.identity}
        if (left_out := api.lines.allow(tuple(about.values()))) is not None:
            log.info("refused", **about, left_out=left_out)
    elif (
        status_of(error) >= 500  # noqa: PLR2004 - the classes of status codes are common knowledge
        and (left_out := api.lines.allow((route, error.code))) is not None
    ):
        log.warning("request_failed", route=route, code=error.code, detail=error.detail, left_out=left_out)
    return error


class deadline:  # noqa: N801 - used like the function asyncio.timeout
    """An ``asyncio.timeout`` that raises one of our errors."""

    def __init__(self, seconds: float, error: type[KmsError]) -> None:
        self._timeout = asyncio.timeout(seconds)
        self._error = error

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *raised: Any) -> None:  # noqa: ANN401, PYI036 - handed on as it is
        try:
            await self._timeout.__aexit__(*raised)
        except TimeoutError:
            raise self._error from None

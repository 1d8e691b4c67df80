"""HTTP/1.1 on a connection: Hypercorn's parser and streams, without its other protocols and its leaks.

Differences from Hypercorn 0.18, each of which has a test:

- only HTTP/1.0 and 1.1: no HTTP/2 preface, no h2c upgrade, no WebSocket, no CONNECT;
- a body has one framing;
- headers are counted, also when all of them arrive in one piece;
- a disconnect never waits for an app that does not read, so neither the reading nor the app's task leaks;
- an answer before the end of the request says ``Connection: close``, and the rest of the request is read
  and thrown away for a moment, so that the peer can read the answer;
- errors carry a problem document.
"""

from __future__ import annotations

import logging
from itertools import chain
from typing import TYPE_CHECKING, Any

import h11
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.events import Body, EndBody, Request, Response
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream

from progressdb_kms.domain.errors import (
    HeadersTooLarge,
    InternalError,
    InvalidHeader,
    KmsError,
    MethodNotAllowed,
)
from progressdb_kms.transport.connection import Connection, Phase
from progressdb_kms.transport.problem import problem

if TYPE_CHECKING:
    from hypercorn.typing import H11SendableEvent

log = logging.getLogger(__name__)

# Together they are how requests are smuggled (RFC 9112 6.1); h11 would take the second and go on.
_FRAMINGS = {b"content-length", b"transfer-encoding"}
# Up to this, an answer's head and body go out in one write, thus one TLS record and one packet.
JOINED_BYTES = 2**16


def http_config(header_bytes: int) -> Config:
    """Return Hypercorn's configuration: nothing from files or the environment, no access log."""
    config = Config()
    config.h11_max_incomplete_size = header_bytes
    config.include_server_header = False
    config.keep_alive_max_requests = 2**62
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    return config


class Stream(HTTPStream):
    """A request and its answer."""

    async def _send_error_response(self, status_code: int) -> None:
        headers, body = problem(status_code, InternalError())
        await self.send(Response(self.stream_id, headers, status_code))
        await self.send(Body(self.stream_id, body))
        await self.send(EndBody(self.stream_id))
        self.state = ASGIHTTPState.CLOSED


class Http1(H11Protocol):
    """Requests in, answers out, over Hypercorn's use of h11."""

    def __init__(self, *args: Any, connection: Connection) -> None:  # noqa: ANN401 - Hypercorn's arguments
        super().__init__(*args)
        self.of = connection
        self._head = b""
        self._bodiless = False

    @property
    def buffered(self) -> bool:
        """Whether the parser holds bytes of a further request."""
        return bool(self.connection.trailing_data[0])

    @property
    def request_unfinished(self) -> bool:
        """Whether the peer may still be sending the request that was answered, or another one."""
        finished = {h11.IDLE, h11.DONE, h11.MUST_CLOSE, h11.CLOSED}
        return self.connection.their_state not in finished or self.buffered

    async def handle(self, event: Event) -> None:
        """Take what came from the peer; nothing once the connection closes."""
        if isinstance(event, Closed) or self.of.phase is not Phase.CLOSING:
            await super().handle(event)

    async def stream_send(self, event: StreamEvent) -> None:
        """Send a part of the app's answer."""
        if isinstance(event, Response):
            unfinished = self.connection.their_state is h11.SEND_BODY
            if unfinished or self.of.last_answer:
                headers = [header for header in event.headers if header[0].lower() != b"connection"]
                event = Response(event.stream_id, [*headers, (b"connection", b"close")], event.status_code)
        await super().stream_send(event)

    async def _send_h11_event(self, event: H11SendableEvent) -> None:
        try:
            data = self.connection.send(event)
        except h11.LocalProtocolError:
            # After the peer's error h11 sends no more; anything else is the app's mistake, and goes to it.
            if self.connection.their_state is not h11.ERROR:
                raise
            return
        if isinstance(event, h11.Response):
            self._head = data
            return
        if len(data) <= JOINED_BYTES:
            data, self._head = self._head + data, b""
        elif self._head:
            head, self._head = self._head, b""
            await self.send(RawData(head))
        if data:  # the end of an answer of known length is no bytes
            await self.send(RawData(data))

    async def _check_protocol(self, event: h11.Request) -> None:
        """Switch to no other protocol."""

    async def _create_stream(self, request: h11.Request) -> None:
        self._bodiless = request.method == b"HEAD"
        refusal = self._refusal(request)
        if refusal is not None:
            await self._refuse(*refusal)
            await self.send(Closed())
            return
        self.stream = Stream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        await self.stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=list(request.headers),
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=request.target,
                state=self.connection_state,
            )
        )

    def _refusal(self, request: h11.Request) -> tuple[int, KmsError] | None:
        size = (
            len(request.method) + len(request.target) + sum(len(n) + len(v) + 4 for n, v in request.headers)
        )
        if size > self.config.h11_max_incomplete_size:
            return 431, HeadersTooLarge()
        if request.http_version not in {b"1.0", b"1.1"}:
            return 400, InvalidHeader("only HTTP/1.1 is spoken here")
        if request.method.upper() == b"CONNECT":
            return 405, MethodNotAllowed("CONNECT is not possible here")
        if {name for name, _ in request.headers} >= _FRAMINGS:
            return 400, InvalidHeader("a request has Content-Length or Transfer-Encoding, not both")
        return None

    async def _send_error_response(self, status_code: int) -> None:
        if status_code == 431:  # noqa: PLR2004 - h11's hint for headers over the limit
            await self._refuse(431, HeadersTooLarge())
        else:
            await self._refuse(400, InvalidHeader("the request is not valid HTTP/1.1"))

    async def _refuse(self, status: int, error: KmsError) -> None:
        headers, body = problem(status, error)
        request_id = dict(headers)[b"x-request-id"].decode()
        log.info("request refused: %s, peer %s, request %s", error.code, self.of.peer, request_id)
        date = self.config.response_headers("h11")
        await self._send_h11_event(h11.Response(status_code=status, headers=list(chain(headers, date))))
        if not self._bodiless:  # h11 refuses to send what RFC 9110 9.3.2 forbids
            await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())

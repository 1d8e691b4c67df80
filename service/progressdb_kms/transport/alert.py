"""Tells a refused TLS client why.

OpenSSL answers a bad certificate with an alert (RFC 8446 6.2): certificate_required, unknown_ca,
certificate_expired. Both event loops throw it away with the failed handshake, and then a client sees nothing
but a closed connection and can't tell a refusal from a crash.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

# The socket of the handshake that is being started in this context.
handshaking: ContextVar[socket.socket] = ContextVar("handshaking")


class AlertingObject(ssl.SSLObject):
    """A TLS connection that sends the alert of its failed handshake."""

    _alert: tuple[ssl.MemoryBIO, socket.socket] | None = None

    _sslobj: Any

    def go_direct(self) -> None:
        """Let the event loop call what the library's methods of these names do nothing but call.

        It calls them four times a request, which takes a twentieth of an encryption's CPU time.
        """
        inner: Any = self._sslobj
        vars(self).update(read=inner.read, write=inner.write, pending=inner.pending)

    def alert_through(self, outgoing: ssl.MemoryBIO, sock: socket.socket) -> None:
        """Say where OpenSSL leaves the alert, and through which socket it goes."""
        self._alert = (outgoing, sock)

    def do_handshake(self) -> None:
        """Go on with the handshake."""
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError:
            if self._alert is not None:
                outgoing, sock = self._alert
                # Past the loop's buffer, which is empty, as the peer has just answered what was in it. An
                # alert that does not fit is lost, as all of them were.
                with suppress(OSError):
                    sock.send(outgoing.read())
            raise


class AlertingContext(ssl.SSLContext):
    """A TLS context whose connections are ``AlertingObject``."""

    sslobject_class = AlertingObject

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - passed on
        """Make the TLS side of a connection, as the event loops do."""
        connection = super().wrap_bio(incoming, outgoing, *args, **kwargs)
        sock = handshaking.get(None)
        if isinstance(connection, AlertingObject):
            connection.go_direct()
            if sock is not None:
                connection.alert_through(outgoing, sock)
        return connection

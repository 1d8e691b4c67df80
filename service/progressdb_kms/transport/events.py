"""What the transport tells the metrics and the log."""

from __future__ import annotations

from typing import Protocol


class TransportEvents(Protocol):
    """Receives what happens to connections. Calls come from the event loop and must return at once."""

    def handshake_refused(self, reason: str, peer: str) -> None:
        """Report a TLS handshake that did not end in a connection.

        Args:
            reason: One of no_certificate, unknown_ca, expired, not_yet_valid, self_signed, wrong_usage,
                protocol, timeout, identity, revoked, no_crl, stale_crl, other.
            peer: The peer's address, ``host:port``.
        """

    def connection_opened(self, kind: str) -> None:
        """Report a connection; ``kind`` is tls, unix or admin."""

    def connection_closed(self, kind: str, why: str) -> None:
        """Report the end of a connection that was reported as opened.

        ``why`` is one of peer, done, idle, headers, write, request, drain, evicted, abort, error, expired,
        revoked, unknown_ca, no_crl, stale_crl.
        """

    def connection_refused(self, why: str) -> None:
        """Report a connection that was closed before it was one; ``why`` is limit, handshakes or peer_uid."""

    def reloaded(self, what: str, ok: bool, detail: str) -> None:  # noqa: FBT001 - a fact, not a switch
        """Report a reload of ``what`` (tls) and, where it failed, why; the last good one stays in use."""


class Silent:
    """Tells nobody."""

    def handshake_refused(self, reason: str, peer: str) -> None:
        """Do nothing."""

    def connection_opened(self, kind: str) -> None:
        """Do nothing."""

    def connection_closed(self, kind: str, why: str) -> None:
        """Do nothing."""

    def connection_refused(self, why: str) -> None:
        """Do nothing."""

    def reloaded(self, what: str, ok: bool, detail: str) -> None:  # noqa: FBT001 - as in TransportEvents
        """Do nothing."""

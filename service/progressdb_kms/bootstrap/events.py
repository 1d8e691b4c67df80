"""What happens to connections and files, told to metrics and log."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from progressdb_kms.api.loglimit import LogLimit

if TYPE_CHECKING:
    from progressdb_kms.observability.metrics import Metrics

log = structlog.get_logger(__name__)


class Events:
    """Tells metrics and log what the transport sees; implements its ``TransportEvents``."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lines = LogLimit()

    def handshake_refused(self, reason: str, peer: str) -> None:
        """Count and log a refused handshake, so that operators see who is kept out, and why.

        Each is counted; a line is written once a second for each reason and host, as being refused any
        number of times takes no certificate.
        """
        self._metrics.handshake_refused(reason)
        if (left_out := self._lines.allow((reason, peer.rpartition(":")[0]))) is not None:
            log.warning("handshake_refused", reason=reason, peer=peer, left_out=left_out)

    def connection_opened(self, kind: str) -> None:
        """Count it."""
        self._metrics.connection_opened(kind)

    def connection_closed(self, kind: str, why: str) -> None:
        """Count it."""
        self._metrics.connection_closed(kind, why)

    def connection_refused(self, why: str) -> None:
        """Count it."""
        self._metrics.connection_refused(why)

    def reloaded(self, what: str, ok: bool, detail: str) -> None:  # noqa: FBT001 - the port's signature
        """Count and log a reload."""
        self._metrics.reloaded(what, ok=ok)
        if ok:
            log.info("reloaded", what=what)
        else:
            log.error(
                "reload_failed",
                what=what,
                detail=detail,
                action="mend the files; the last good ones are in force",
            )

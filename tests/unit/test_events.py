"""What the transport sees reaches metrics and log."""

from __future__ import annotations

from structlog.testing import capture_logs

from progressdb_kms.bootstrap.events import Events
from progressdb_kms.observability.metrics import Metrics


def test_a_flood_of_refused_handshakes_is_a_line_a_second() -> None:
    """For each reason and host; every one of them is counted."""
    metrics = Metrics()
    events = Events(metrics)
    with capture_logs() as lines:
        for port in range(50):
            events.handshake_refused("no_certificate", f"192.0.2.1:{port}")
        events.handshake_refused("no_certificate", "[2001:db8::1]:1")
        events.handshake_refused("expired", "192.0.2.1:1")
    assert len(lines) < 50
    assert {(line["reason"], line["peer"], line["left_out"]) for line in lines} >= {
        ("no_certificate", "192.0.2.1:0", 0),
        ("no_certificate", "[2001:db8::1]:1", 0),
        ("expired", "192.0.2.1:1", 0),
    }
    assert b'kms_tls_handshake_refusals_total{reason="no_certificate"} 51.0' in metrics.render()

"""Metrics are named by Prometheus's conventions, and no label is chosen by a caller."""

from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families

from progressdb_kms.observability.metrics import Metrics

UNITS = ("_seconds", "_bytes", "_timestamp_seconds")


def filled() -> Metrics:
    """Return metrics with every kind of thing counted once."""
    metrics = Metrics()
    metrics.request("/encrypt", 200, "ok", "dns", 0.001)
    metrics.dek_uses("encrypt", 3)
    metrics.cache("miss", 2)
    metrics.uses_warning("dek")
    metrics.wrapped_key_invalid()
    metrics.round_trip("read", 3, 0.002)
    metrics.failure("read")
    metrics.handshake_refused("no_certificate")
    metrics.connection_opened("tls")
    metrics.connection_closed("tls", "idle")
    metrics.connection_refused("limit")
    metrics.reloaded("policy", ok=False)
    metrics.gauge("kms_ready", "1 while ready.", lambda: 1.0)
    metrics.labelled_gauge("kms_certificate_expiry_timestamp_seconds", "When.", "certificate").labels(
        "server"
    ).set(7)
    return metrics


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the exposition, parsed."""
    text = metrics.render().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_names_follow_the_conventions() -> None:
    """A prefix, lower case, counters end in _total, times are seconds; each has a help text."""
    text = filled().render().decode()
    for family in text_string_to_metric_families(text):
        if family.name.startswith(("process_", "python_")) or family.name.endswith("_created"):
            continue
        assert re.fullmatch(r"kms_[a-z_]+[a-z]", family.name), family.name
        assert family.documentation.endswith(".")
        if family.type == "counter":
            assert f"{family.name}_total" in text
        if family.type == "histogram":
            assert family.name.endswith(UNITS)


def test_everything_that_is_observed_is_counted() -> None:
    """Each event reaches its own series."""
    found = samples(filled())
    request = (("code", "ok"), ("identity_kind", "dns"), ("route", "/encrypt"), ("status", "200"))
    assert found["kms_requests_total", request] == 1
    assert found["kms_request_duration_seconds_count", (("route", "/encrypt"),)] == 1
    assert found["kms_dek_uses_total", (("operation", "encrypt"),)] == 3
    assert found["kms_key_cache_lookups_total", (("outcome", "miss"),)] == 2
    assert found["kms_key_uses_high_total", (("kind", "dek"),)] == 1
    assert found["kms_wrapped_key_invalid_total", ()] == 1
    assert found["kms_store_round_trip_seconds_count", (("lane", "read"),)] == 1
    assert found["kms_store_commands_total", (("lane", "read"),)] == 3
    assert found["kms_store_failures_total", (("lane", "read"),)] == 1
    assert found["kms_tls_handshake_refusals_total", (("reason", "no_certificate"),)] == 1
    assert found["kms_connections_opened_total", (("kind", "tls"),)] == 1
    assert found["kms_connections_closed_total", (("kind", "tls"), ("why", "idle"))] == 1
    assert found["kms_connections_refused_total", (("why", "limit"),)] == 1
    assert found["kms_ready", ()] == 1
    assert found["kms_certificate_expiry_timestamp_seconds", (("certificate", "server"),)] == 7


def test_a_broken_reload_shows_until_a_good_one() -> None:
    """What is in force may be older than what is on disk; an alert hangs on this."""
    metrics = filled()
    assert samples(metrics)["kms_reload_failed", (("what", "policy"),)] == 1
    metrics.reloaded("policy", ok=True)
    assert samples(metrics)["kms_reload_failed", (("what", "policy"),)] == 0
    assert samples(metrics)["kms_reloads_total", (("result", "failed"), ("what", "policy"))] == 1


def test_instances_share_nothing() -> None:
    """Two services in one process, as in tests, count apart."""
    filled()
    assert ("kms_wrapped_key_invalid_total", ()) in samples(Metrics())
    assert samples(Metrics())["kms_wrapped_key_invalid_total", ()] == 0

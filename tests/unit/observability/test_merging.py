"""Metrics of several workers as those of one service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from progressdb_kms.observability.merging import (
    RULES,
    Family,
    Rule,
    Sample,
    exposition,
    families_of,
    merge,
    sums_of,
)
from progressdb_kms.observability.metrics import ROTATION, Metrics

if TYPE_CHECKING:
    from collections.abc import Sequence


def counted(answers: int, connections: int = 0, expiry: float = 0.0) -> list[Family]:
    """Return the metrics of a worker that has answered so often."""
    metrics = Metrics()
    for _ in range(answers):
        metrics.request("/encrypt", 200, "ok", "dns", 0.001)
        metrics.round_trip("read", 1, 0.002)
    metrics.gauge("kms_connections", "Open.", lambda: connections)
    gauge = metrics.labelled_gauge("kms_certificate_expiry_timestamp_seconds", "When.", "certificate")
    gauge.labels("server").set(expiry)
    metrics.reloaded("policy", ok=answers % 2 == 0)
    return families_of(metrics.registry)


def value(families: Sequence[Family], name: str, **labels: str) -> float:
    """Return the sum of the samples with these labels, as a scrape finds them."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(exposition(families).decode())
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_each_kind_by_its_rule() -> None:
    """Counters and histograms are added up, connections too; the earliest expiry and any failure count."""
    merged = merge([counted(3, 5, 200.0), counted(4, 2, 100.0)])
    assert value(merged, "kms_requests_total", route="/encrypt") == 7
    assert value(merged, "kms_request_duration_seconds_count", route="/encrypt") == 7
    assert value(merged, "kms_request_duration_seconds_bucket", le="0.001") == 7
    assert value(merged, "kms_store_round_trip_seconds_bucket", le="+Inf") == 7
    assert value(merged, "kms_connections") == 7
    assert value(merged, "kms_certificate_expiry_timestamp_seconds") == 100.0
    assert value(merged, "kms_reload_failed", what="policy") == 1
    assert value(merged, "kms_build_info") == 1


def test_one_alone_is_as_it_was() -> None:
    """The exposition of one worker's metrics is the one that a service of one process gives."""
    metrics = Metrics()
    metrics.request("/encrypt", 200, "ok", "dns", 0.001)
    metrics.reloaded("policy", ok=True)

    def stable(text: bytes) -> list[bytes]:
        return [line for line in text.splitlines() if b"process_" not in line]

    assert stable(exposition(merge([families_of(metrics.registry)]))) == stable(metrics.render())


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_what_has_ended_stays_counted(answers: list[int]) -> None:
    """Whichever workers have ended, sums are what they were; gauges of the ended are gone."""
    parts = [counted(count, connections=1) for count in answers]
    for ended in range(len(parts)):
        left = merge([sums_of(parts[:ended]), *parts[ended:]])
        assert value(left, "kms_requests_total") == sum(answers)
        assert value(left, "kms_connections") == len(parts) - ended


def test_restarts_are_not_multiplied() -> None:
    """The counter of restarts is of the service, the same in all workers: not a sum."""
    family = Family("kms_worker_restarts", "R.", "counter", [Sample("kms_worker_restarts_total", {}, 3.0)])
    assert value(merge([[family], [family]]), "kms_worker_restarts_total") == 3
    assert sums_of([[family]]) == []


def test_every_gauge_has_a_rule() -> None:
    """Those that the metrics make by themselves, and those that are read from the store."""
    gauges = {family.name for family in counted(1) if family.type == "gauge"} | ROTATION.keys()
    assert gauges <= RULES.keys()
    assert set(RULES.values()) == set(Rule)

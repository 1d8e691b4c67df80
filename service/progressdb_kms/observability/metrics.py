"""Prometheus metrics of one instance. No label holds a key, a thread or whatever a caller chose freely."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector

from progressdb_kms import __version__
from progressdb_kms.observability.sums import LATENCY, RequestSums

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client import Metric

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


ROTATION: Final[dict[str, tuple[str, str]]] = {
    "kms_kek_active_version": ("", "KEK version that new keys are wrapped under."),
    "kms_kek_active_age_seconds": ("", "Since the active KEK version was activated."),
    "kms_kek_census": ("version", "Keys in the store by the KEK version that wraps them."),
    "kms_rotation_running": ("", "1 while a rotation is unfinished."),
    "kms_rotation_step": ("step", "1 for the present or last step of the latest rotation."),
    "kms_rotation_progress": ("what", "What the latest rotation has done, in records."),
    "kms_rotation_quarantined": ("", "Records that the latest rotation could not deal with."),
    "kms_rotation_last_success_timestamp_seconds": ("", "When a rotation last ended clean, in Unix seconds."),
}
"""Gauges of KEKs and rotations, which every instance reads from the store: name to label and help."""


class _FactsCollector:
    """Reads the gauges of ``ROTATION`` at each scrape; one that is not known yet is left out."""

    def __init__(self, read: Callable[[], Mapping[str, float | Mapping[str, float]]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        facts = self._read()
        for name, (label, text) in ROTATION.items():
            value = facts.get(name)
            if value is None:
                continue
            family = GaugeMetricFamily(name, text, labels=[label] if label else None)
            if isinstance(value, float | int):
                family.add_metric([], float(value))
            else:
                for which, amount in value.items():
                    family.add_metric([which], float(amount))
            yield family

    def describe(self) -> Iterable[Metric]:
        return []


class _CountCollector:
    """Reads a counter that is kept elsewhere at each scrape."""

    def __init__(self, name: str, text: str, value: Callable[[], float]) -> None:
        self._name, self._text, self._value = name, text, value

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._name, self._text, self._value())

    def describe(self) -> Iterable[Metric]:
        return []


class Metrics:
    """All metrics; implements the ``Observer`` port and the transport's ``TransportEvents``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        Gauge(
            "kms_build_info", "Release of the running service.", ["version"], registry=self.registry
        ).labels(__version__).set(1)
        self._sums = RequestSums()
        self.registry.register(self._sums)
        self.request = self._sums.request
        self.request_at_door = self._sums.request_at_door
        self.dek_uses = self._sums.dek_uses
        self._cache = Counter(
            "kms_key_cache_lookups",
            "Look-ups that did not end in memory.",
            ["outcome"],
            registry=self.registry,
        )
        self._uses_high = Counter(
            "kms_key_uses_high",
            "Reservations of keys past the warning threshold.",
            ["kind"],
            registry=self.registry,
        )
        self._invalid = Counter(
            "kms_wrapped_key_invalid",
            "Stored keys that did not unwrap: forged or damaged.",
            registry=self.registry,
        )
        self._refusals = Counter(
            "kms_tls_handshake_refusals", "TLS handshakes refused.", ["reason"], registry=self.registry
        )
        self._opened = Counter(
            "kms_connections_opened", "Connections accepted.", ["kind"], registry=self.registry
        )
        self._closed = Counter(
            "kms_connections_closed", "Connections ended.", ["kind", "why"], registry=self.registry
        )
        self._refused = Counter(
            "kms_connections_refused",
            "Connections refused before TLS or for a limit.",
            ["why"],
            registry=self.registry,
        )
        self._reloads = Counter(
            "kms_reloads", "Reloads of files.", ["what", "result"], registry=self.registry
        )
        self._reload_failed = Gauge(
            "kms_reload_failed",
            "1 while the files on disk are broken and the last good ones are in force.",
            ["what"],
            registry=self.registry,
        )
        commands = Counter(
            "kms_store_commands", "Commands sent to the store.", ["lane"], registry=self.registry
        )
        self._store_failures = Counter(
            "kms_store_failures",
            "Round trips to the store without an answer.",
            ["lane"],
            registry=self.registry,
        )
        round_trips = Histogram(
            "kms_store_round_trip_seconds",
            "Round trips to the store.",
            ["lane"],
            buckets=LATENCY,
            registry=self.registry,
        )
        # Looked up once: a write of a lone create would spend 5 % of its time on it.
        self._lanes = {lane: (round_trips.labels(lane), commands.labels(lane)) for lane in ("read", "write")}

        self._audit_records = Counter(
            "kms_audit_records", "Audit records made durable.", registry=self.registry
        )
        self._audit_commit = Histogram(
            "kms_audit_commit_seconds",
            "To make audit records durable.",
            buckets=LATENCY,
            registry=self.registry,
        )
        self._audit_failures = Counter(
            "kms_audit_failures", "Failures to write audit records.", ["sink"], registry=self.registry
        )
        self._audit_lost = Counter(
            "kms_audit_lost", "Audit records given up.", ["sink"], registry=self.registry
        )
        self._audit_conflicts = Counter(
            "kms_audit_conflicts",
            "Audit chains of which the store knew another history: restored, rolled back or tampered with.",
            registry=self.registry,
        )
        self._audit_trim_refused = Counter(
            "kms_audit_trim_refused",
            "Trimmings of the audit stream that were refused since its records do not hold.",
            registry=self.registry,
        )

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge that is read at each scrape."""
        gauge = Gauge(name, text, registry=self.registry)
        gauge.set_function(value)

    def read_counter(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a counter that is read at each scrape; ``name`` is without ``_total``."""
        self.registry.register(_CountCollector(name, text, value))

    def labelled_gauge(self, name: str, text: str, label: str) -> Gauge:
        """Add a gauge with one label, set by whoever made it."""
        return Gauge(name, text, [label], registry=self.registry)

    def facts(self, read: Callable[[], Mapping[str, float | Mapping[str, float]]]) -> None:
        """Add the gauges of ``ROTATION``, read at each scrape.

        Args:
            read: Gives values by name; for one with a label, values by the label's.
        """
        self.registry.register(_FactsCollector(read))

    def render(self) -> bytes:
        """Return the exposition in Prometheus's text format."""
        return generate_latest(self.registry)

    def cache(self, outcome: str, count: int = 1) -> None:
        """Count look-ups that did not end in memory."""
        self._cache.labels(outcome).inc(count)

    def uses_warning(self, kind: str) -> None:
        """Count reservations of worn keys."""
        self._uses_high.labels(kind).inc()

    def wrapped_key_invalid(self) -> None:
        """Count stored keys that did not unwrap."""
        self._invalid.inc()

    def round_trip(self, lane: str, commands: int, seconds: float) -> None:
        """Time a round trip to the store; ``lane`` is read or write."""
        taken, sent = self._lanes[lane]
        taken.observe(seconds)
        sent.inc(commands)

    def failure(self, lane: str) -> None:
        """Count a round trip to the store that got no answer."""
        self._store_failures.labels(lane).inc()

    def audit_committed(self, records: int, seconds: float) -> None:
        """Count audit records that are durable, and the time that it took."""
        self._audit_records.inc(records)
        self._audit_commit.observe(seconds)

    def audit_failed(self, sink: str) -> None:
        """Count a failure to write: store, file or stdout."""
        self._audit_failures.labels(sink).inc()

    def audit_lost(self, sink: str, records: int) -> None:
        """Count audit records that were given up."""
        self._audit_lost.labels(sink).inc(records)

    def audit_conflict(self) -> None:
        """Count a chain of which the store knew another history."""
        self._audit_conflicts.inc()

    def audit_trim_refused(self) -> None:
        """Count a trimming that was refused."""
        self._audit_trim_refused.inc()

    def handshake_refused(self, reason: str) -> None:
        """Count a refused TLS handshake."""
        self._refusals.labels(reason).inc()

    def connection_opened(self, kind: str) -> None:
        """Count an accepted connection."""
        self._opened.labels(kind).inc()

    def connection_closed(self, kind: str, why: str) -> None:
        """Count an ended connection."""
        self._closed.labels(kind, why).inc()

    def connection_refused(self, why: str) -> None:
        """Count a refused connection."""
        self._refused.labels(why).inc()

    def reloaded(self, what: str, *, ok: bool) -> None:
        """Count a reload, and remember whether the last one failed."""
        self._reloads.labels(what, "ok" if ok else "failed").inc()
        self._reload_failed.labels(what).set(0 if ok else 1)

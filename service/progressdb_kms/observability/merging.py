"""The metrics of several workers as those of one service. Pure.

Counters and histograms are added up. What becomes of a gauge says its rule; every gauge has one.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import msgspec
from prometheus_client import generate_latest
from prometheus_client.core import Metric

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from prometheus_client import CollectorRegistry


class Rule(StrEnum):
    """What becomes of the values of several workers."""

    SUM = "sum"
    MIN = "min"
    MAX = "max"


RULES: Final[dict[str, Rule]] = {
    # How much of something all have.
    "kms_connections": Rule.SUM,
    "kms_key_cache_keys": Rule.SUM,
    "kms_audit_waiting": Rule.SUM,
    "process_virtual_memory_bytes": Rule.SUM,
    "process_resident_memory_bytes": Rule.SUM,
    "process_open_fds": Rule.SUM,
    # Good only where it is good in all.
    "kms_store_reachable": Rule.MIN,
    "kms_audit_chained": Rule.MIN,
    "kms_kek_versions_loaded": Rule.MIN,
    "kms_kek_versions_usable": Rule.MIN,
    "kms_certificate_expiry_timestamp_seconds": Rule.MIN,
    "kms_revoked_certificates": Rule.MIN,
    "process_max_fds": Rule.MIN,
    "process_start_time_seconds": Rule.MIN,
    # Bad where it is bad in one.
    "kms_store_problems": Rule.MAX,
    "kms_reload_failed": Rule.MAX,
    # The same in all: of the service, of its release, or of the store.
    "kms_ready": Rule.MAX,
    "kms_workers": Rule.MAX,
    "kms_worker_restarts": Rule.MAX,
    "kms_build_info": Rule.MAX,
    "kms_kek_active_version": Rule.MAX,
    "kms_kek_active_age_seconds": Rule.MAX,
    "kms_kek_census": Rule.MAX,
    "kms_rotation_running": Rule.MAX,
    "kms_rotation_step": Rule.MAX,
    "kms_rotation_progress": Rule.MAX,
    "kms_rotation_quarantined": Rule.MAX,
    "kms_rotation_last_success_timestamp_seconds": Rule.MAX,
}
"""By name of the metric, without the ``_total`` of a counter."""

_ADDED: Final = frozenset({"counter", "histogram"})


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One value."""

    name: str
    labels: dict[str, str]
    value: float


class Family(msgspec.Struct, frozen=True, array_like=True):
    """A metric with all its values."""

    name: str
    help: str
    type: str
    samples: list[Sample]

    @property
    def added(self) -> bool:
        """Whether its values count from the start of a process, so that they are added up."""
        return self.type in _ADDED and self.name not in RULES


def families_of(registry: CollectorRegistry) -> list[Family]:
    """Return the metrics of this process."""
    return [
        Family(
            metric.name,
            metric.documentation,
            metric.type,
            [Sample(each.name, dict(each.labels), float(each.value)) for each in metric.samples],
        )
        for metric in registry.collect()
    ]


def merge(parts: Iterable[Sequence[Family]], rules: Mapping[str, Rule] = RULES) -> list[Family]:
    """Return the metrics of all parts as one, in the order in which they first come.

    Args:
        parts: Those of each worker.
        rules: What becomes of gauges.

    Raises:
        KeyError: A gauge has no rule.
    """
    heads: dict[str, Family] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for part in parts:
        for family in part:
            heads.setdefault(family.name, family)
            found = values.setdefault(family.name, {})
            for sample in family.samples:
                key = sample.name, tuple(sorted(sample.labels.items()))
                value = found.get(key)
                found[key] = sample.value if value is None else _joined(family, sample, value, rules)
    return [
        Family(name, head.help, head.type, [Sample(key[0], dict(key[1]), it) for key, it in found.items()])
        for (name, head), found in zip(heads.items(), values.values(), strict=True)
    ]


def sums_of(parts: Iterable[Sequence[Family]]) -> list[Family]:
    """Return the counters and histograms of all parts: what stays true of workers that have ended.

    Without them the sums would go back when a worker ends, which Prometheus takes for a fresh start: it would
    count all that the others have counted once more.
    """
    return merge([[family for family in part if family.added] for part in parts])


def exposition(families: Iterable[Family]) -> bytes:
    """Return metrics in Prometheus's text format."""
    return generate_latest(_Given(families))


class _Given:
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.help, family.type)
            for sample in family.samples:
                metric.add_sample(sample.name, sample.labels, sample.value)
            yield metric


def _joined(family: Family, sample: Sample, value: float, rules: Mapping[str, Rule]) -> float:
    if sample.name.endswith("_created"):
        return min(value, sample.value)
    rule: Any = Rule.SUM if family.added else rules[family.name]
    if rule is Rule.SUM:
        return value + sample.value
    return min(value, sample.value) if rule is Rule.MIN else max(value, sample.value)

"""Counts of what every request brings, summed here and only put into Prometheus's shape at a scrape.

A labelled counter of the library costs a lock and two look-ups an increment, a histogram more: together as
much as the encryption that they count. The event loop alone adds to these, and answers scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prometheus_client import Metric

LATENCY: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the buckets, in seconds."""


class RequestSums:
    """A Prometheus collector of answered requests and of uses of DEKs."""

    def __init__(self) -> None:
        self._answered: dict[tuple[str, int, str, str], int] = {}
        self._buckets: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}
        self._uses: dict[str, int] = {}
        self._at_door = 0

    def request(self, route: str, status: int, code: str, identity_kind: str, seconds: float) -> None:
        """Count an answered request."""
        labels = (route, status, code, identity_kind)
        self._answered[labels] = self._answered.get(labels, 0) + 1
        buckets = self._buckets.get(route)
        if buckets is None:
            buckets = self._buckets[route] = [0] * (len(LATENCY) + 1)
            self._seconds[route] = 0.0
        buckets[bisect_left(LATENCY, seconds)] += 1
        self._seconds[route] += seconds

    def request_at_door(self, route: str, status: int, code: str, identity_kind: str, seconds: float) -> None:
        """Count a request that the fast door answered."""
        self._at_door += 1
        self.request(route, status, code, identity_kind, seconds)

    def dek_uses(self, operation: str, count: int) -> None:
        """Count messages encrypted or decrypted."""
        self._uses[operation] = self._uses.get(operation, 0) + count

    def collect(self) -> Iterator[Metric]:
        """Yield the sums of this moment."""
        requests = CounterMetricFamily(
            "kms_requests", "Requests answered.", labels=["route", "status", "code", "identity_kind"]
        )
        for (route, status, code, kind), count in self._answered.items():
            requests.add_metric([route, str(status), code, kind], count)
        yield requests
        duration = HistogramMetricFamily(
            "kms_request_duration_seconds", "From the headers' end to the answer.", labels=["route"]
        )
        for route, counts in self._buckets.items():
            bounds = [*(str(bound) for bound in LATENCY), "+Inf"]
            duration.add_metric(
                [route], list(zip(bounds, accumulate(counts), strict=True)), self._seconds[route]
            )
        yield duration
        yield CounterMetricFamily(
            "kms_fast_door_requests", "Of the requests answered, those by the fast door.", self._at_door
        )
        uses = CounterMetricFamily("kms_dek_uses", "Messages encrypted or decrypted.", labels=["operation"])
        for operation, count in self._uses.items():
            uses.add_metric([operation], count)
        yield uses

    def describe(self) -> Iterable[Metric]:
        """Name nothing ahead: the registry would ask for the sums."""
        return []

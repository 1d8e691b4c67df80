"""Counts of what every request brings, summed here and only put into Prometheus's shape at a scrape.

A labelled counter of the library costs a lock and two look-ups an increment, a histogram more: together as
much as the encryption that they count. The event loop alone adds to these, and answers scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from itertools import accumulate, repeat
from operator import add
from typing import TYPE_CHECKING, Final, TypeAlias

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prometheus_client import Metric

LATENCY: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the buckets, in seconds."""


_Labels: TypeAlias = tuple[str, int, str, str]
"""Route, status, code, kind of identity."""


class _Answers:
    """Requests that were answered alike."""

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * (len(LATENCY) + 1)
        self.seconds = 0.0


class _Way:
    """What one of the two ways answered, the fast door or the framework."""

    def __init__(self) -> None:
        self.answers: dict[_Labels, _Answers] = {}

    def count(self, route: str, status: int, code: str, identity_kind: str, seconds: float) -> None:
        labels = (route, status, code, identity_kind)
        answers = self.answers.get(labels)
        if answers is None:
            answers = self.answers[labels] = _Answers()
        answers.buckets[bisect_left(LATENCY, seconds)] += 1
        answers.seconds += seconds


class RequestSums:
    """A Prometheus collector of answered requests and of uses of DEKs.

    Attributes:
        request: Counts an answered request: route, status, code, kind of identity, seconds.
        request_at_door: Counts one that the fast door answered, likewise.
    """

    def __init__(self) -> None:
        self._slow, self._door = _Way(), _Way()
        self.request = self._slow.count
        self.request_at_door = self._door.count
        self._uses: dict[str, int] = {}

    def dek_uses(self, operation: str, count: int) -> None:
        """Count messages encrypted or decrypted."""
        self._uses[operation] = self._uses.get(operation, 0) + count

    def collect(self) -> Iterator[Metric]:
        """Yield the sums of this moment."""
        answered: Counter[_Labels] = Counter()
        buckets: dict[str, list[int]] = {}
        seconds: dict[str, float] = {}
        for labels, answers in [*self._slow.answers.items(), *self._door.answers.items()]:
            route = labels[0]
            answered[labels] += sum(answers.buckets)
            buckets[route] = [*map(add, buckets.get(route, repeat(0)), answers.buckets)]
            seconds[route] = seconds.get(route, 0.0) + answers.seconds
        requests = CounterMetricFamily(
            "kms_requests", "Requests answered.", labels=["route", "status", "code", "identity_kind"]
        )
        for (route, status, code, kind), count in answered.items():
            requests.add_metric([route, str(status), code, kind], count)
        yield requests
        duration = HistogramMetricFamily(
            "kms_request_duration_seconds", "From the headers' end to the answer.", labels=["route"]
        )
        bounds = [*(str(bound) for bound in LATENCY), "+Inf"]
        for route, counts in buckets.items():
            duration.add_metric([route], list(zip(bounds, accumulate(counts), strict=True)), seconds[route])
        yield duration
        yield CounterMetricFamily(
            "kms_fast_door_requests",
            "Of the requests answered, those by the fast door.",
            sum(sum(answers.buckets) for answers in self._door.answers.values()),
        )
        uses = CounterMetricFamily("kms_dek_uses", "Messages encrypted or decrypted.", labels=["operation"])
        for operation, count in self._uses.items():
            uses.add_metric([operation], count)
        yield uses

    def describe(self) -> Iterable[Metric]:
        """Name nothing ahead: the registry would ask for the sums."""
        return []

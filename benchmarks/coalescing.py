"""Measure what coalescing gains: plain ``encrypt_with_dek`` of 256 bytes in many tasks or threads.

The service has one core to itself; the client and the store share the other. Runs with and without coalescing
take turns, so that noise of the machine meets both alike; medians of the runs are shown, with the lowest and
the highest rate, and the ratio of the rates.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from typing import TYPE_CHECKING

from benchmarks.bench.coalesced import Callers, Sample, connect_options, measure
from benchmarks.bench.machine import GENERATOR_CORE, pin
from benchmarks.bench.servers import service

if TYPE_CHECKING:
    from progressdb_kms.client.protocol import Encoding


def main() -> int:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one run")
    parser.add_argument("--runs", type=int, default=5, help="runs of each combination")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 64])
    options = parser.parse_args()
    kinds: list[tuple[str, Encoding]] = [("async", "json"), ("async", "msgpack"), ("sync", "json")]
    cases: list[Callers] = [(*kind, callers) for kind in kinds for callers in options.callers]
    samples: dict[tuple[Callers, bool], list[Sample]] = {}
    with service() as ready:
        pin(os.getpid(), GENERATOR_CORE)
        for _ in range(options.runs):
            for case in cases:
                for coalesce in (False, True):
                    how = connect_options(ready, case[1], coalesce=coalesce)
                    sample = measure(ready["url"], how, case, options.seconds)
                    samples.setdefault((case, coalesce), []).append(sample)
                    print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print_table(cases, samples)
    return 0


def print_table(cases: list[Callers], samples: dict[tuple[Callers, bool], list[Sample]]) -> None:
    """Print medians, alone and coalesced side by side."""
    print("| client | callers | alone, calls/s | coalesced, calls/s | ratio | CPU us | p50 us |")
    print("|---|---|---|---|---|---|---|")
    for case in cases:
        kind, encoding, callers = case
        alone, together = samples[case, False], samples[case, True]
        rates = [statistics.median(sample.per_second for sample in group) for group in (alone, together)]
        cpu = [statistics.median(sample.cpu_us for sample in group) for group in (alone, together)]
        p50 = [statistics.median(sample.p50_us for sample in group) for group in (alone, together)]
        print(
            f"| {kind}, {encoding} | {callers} | {rate(alone)} | {rate(together)} | {rates[1] / rates[0]:.2f}"
            f" | {cpu[0]:,.0f}, {cpu[1]:,.0f} | {p50[0]:,.0f}, {p50[1]:,.0f} |"
        )


def rate(group: list[Sample]) -> str:
    """Return the median rate, with the lowest and the highest."""
    rates = [sample.per_second for sample in group]
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


if __name__ == "__main__":
    sys.exit(main())

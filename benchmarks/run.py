"""Measure the service against ceilings: what the same machine does without the checks of a key service.

The service has one core to itself; the load generator (bombardier 1.2.6) and the store share the other; only
the part `workers` keeps nothing to a core. Runs of all cases are interleaved, so that noise of the machine
meets all alike; medians, the spread and ratios are printed and written to latest.json, with the conditions.
README.md beside this file says what each means.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.bench.batches import batch_cases
from benchmarks.bench.cases import Case, Figures, Scene, announced, run_in_turns
from benchmarks.bench.charts import draw_charts
from benchmarks.bench.coalesced import coalesced_cases
from benchmarks.bench.fairness import fairness_cases
from benchmarks.bench.load import handshake_cases, single_cases
from benchmarks.bench.machine import GENERATOR_CORE, conditions, pin
from benchmarks.bench.memory import measure_memory
from benchmarks.bench.report import document, print_report
from benchmarks.bench.servers import reference, service
from benchmarks.bench.starting import starting_cases
from benchmarks.bench.store import store_cases
from benchmarks.bench.tools import build_reference, find_generator, find_store_benchmark
from benchmarks.bench.workers import worker_cases, worker_services

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS: dict[str, Callable[[Scene], list[Case]]] = {
    "single": single_cases,
    "store": store_cases,
    "handshakes": handshake_cases,
    "batches": batch_cases,
    "coalesced": coalesced_cases,
    "start": starting_cases,
    "fairness": fairness_cases,
}
"""Parts by name; "workers" and "memory" beside them have services of their own."""
NAMES = (*PARTS, "workers", "memory")
NEED_GO = {"single", "handshakes", "batches", "start", "fairness", "workers"}
"""Parts that use the generator or the reference, which Go builds; the others run without it."""
QUICK = {"seconds": 0.1, "runs": 1, "keys": 500}


def main() -> int:
    """Run the chosen parts; 1 where a request failed, which spoils the figures."""
    options = read_options()
    needs_go = not NEED_GO.isdisjoint(options.only)
    if needs_go:
        # Before this process keeps to one core: Go builds with all that it has.
        find_generator()
        build_reference()
    if "store" in options.only:
        find_store_benchmark()
    found = conditions()
    began = time.monotonic()
    pin(os.getpid(), GENERATOR_CORE)
    figures = Figures()
    chosen = [make for name, make in PARTS.items() if name in options.only]
    if chosen:
        with (
            announced("load"),
            service() as ready,
            reference(ready) if needs_go else nullcontext(("", 0)) as (url, pid),
            tempfile.TemporaryDirectory() as folder,
        ):
            scene = Scene(ready, url, pid, Path(folder), options.seconds)
            run_in_turns([case for make in chosen for case in make(scene)], options.runs, figures)
    if "workers" in options.only:
        # By itself, since both cores are the workers' here.
        with (
            announced("workers"),
            service() as ready,
            worker_services(ready) as services,
            tempfile.TemporaryDirectory() as folder,
        ):
            scene = Scene(ready, "", 0, Path(folder), options.seconds)
            run_in_turns(worker_cases(scene, services), options.runs, figures)
    if "memory" in options.only and options.keys:
        with announced("memory"):
            measure_memory(figures, counts_up_to(options.keys))
    found |= {
        "load_average_after": list(os.getloadavg()),
        "seconds": round(time.monotonic() - began),
        "seconds_of_a_run": options.seconds,
        "runs": options.runs,
        "only": options.only,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "latest.json").write_text(json.dumps(document(figures, found), indent=1) + "\n")
    print_report(figures, found)
    charts = draw_charts(figures, options.charts or options.out)
    print(f"\nwrote {options.out / 'latest.json'}" + "".join(f", {path}" for path in charts))
    if figures.failed:
        print(f"{figures.failed} requests failed: the figures are not to be used", file=sys.stderr)
    return 1 if figures.failed else 0


def read_options() -> argparse.Namespace:
    """Read the command line; ``only`` becomes a list of names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(NAMES), metavar="NAME,...", help=f"of: {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=float, default=4, help="length of one run (4)")
    parser.add_argument("--runs", type=int, default=3, help="interleaved runs of each case (3)")
    parser.add_argument(
        "--keys",
        type=int,
        default=1_000_000,
        help="keys to measure memory with, after a tenth of them; 0: none",
    )
    parser.add_argument("--quick", action="store_true", help="one short run of each: does it work at all?")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder of latest.json and charts"
    )
    parser.add_argument("--charts", type=Path, help="another folder for the charts, which has to be there")
    options = parser.parse_args()
    options.only = [name for name in options.only.split(",") if name]
    for name in options.only:
        if name not in NAMES:
            parser.error(f"--only: there is no {name}; there are {', '.join(NAMES)}")
    if options.quick:
        vars(options).update(QUICK)
    return options


def counts_up_to(keys: int) -> list[int]:
    """Return the numbers of keys at which memory is measured: a tenth, and all."""
    return sorted({max(keys // 10, 1), keys})


if __name__ == "__main__":
    sys.exit(main())

"""`make bench`: that it runs, and what it says of its figures."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks.bench.cases import Case, Figures, Key, Values, run_in_turns
from benchmarks.bench.charts import LABELS, draw_charts
from benchmarks.bench.report import all_ratios, document, headline
from benchmarks.run import counts_up_to

ROOT = Path(__file__).parents[2]


@pytest.fixture
def figures() -> Figures:
    """What a whole run leaves, with two runs of each case."""
    found = Figures()

    def add(part: str, what: str, who: str, size: int, **values: float) -> None:
        for factor in (1, 3):
            found.add(
                Key(part, what, who, size), {name: value * factor / 2 for name, value in values.items()}
            )

    for operation in ("encrypt", "decrypt"):
        add("single", operation, "service", 16, per_second=1000, cpu_us=40, p99_us=30)
        add("single", operation, "reference", 16, per_second=4000, cpu_us=20, p99_us=10)
        for encoding, cpu in (("json", 5), ("msgpack", 10)):
            add("batches", f"{operation}, {encoding}", "service", 1000, per_second=9, cpu_us=cpu, p99_us=9)
            add("batches", f"{operation}, {encoding}", "floor", 1000, per_second=18, cpu_us=4)
    add("single", "create", "service", 64, per_second=300, cpu_us=100, p99_us=9)
    add("single", "create", "store", 64, per_second=600, cpu_us=10, p99_us=9)
    add("memory", "keys", "service", 1000, redis_bytes_per_key=600, payload_bytes_per_key=150, failed=0)
    return found


def test_headline_compares_with_the_ceilings(figures):
    """CPU time is the ceiling's over ours, a rate ours over the ceiling's; of batches the worst counts."""
    assert headline(figures) == {
        "encrypt_vs_go": 0.5,
        "decrypt_vs_go": 0.5,
        "create_vs_store": 0.5,
        "batch_vs_floor": 0.4,
    }


def test_more_is_better_in_every_ratio(figures):
    """Each figure that has something beside it is a ratio too, below one where the service does worse."""
    ratios = all_ratios(figures)
    assert ratios["single, encrypt, 16: p99, service vs reference"] == pytest.approx(1 / 3)
    assert ratios["single, encrypt, 16: rate, service vs reference"] == 0.25
    assert ratios["single, create, 64: rate, service vs store"] == 0.5
    assert ratios["memory, 1000 keys: ids and wrapped key, bytes vs Redis"] == 0.25
    assert "single, create, 64: CPU, service vs store" not in ratios


def test_document_has_median_spread_and_every_run(figures):
    """latest.json has what is needed to judge a figure: median, lowest, highest, and the runs themselves."""
    rows = document(figures, {})["figures"]
    row = next(row for row in rows if (row["what"], row["who"]) == ("encrypt", "service"))
    assert (row["part"], row["size"]) == ("single", 16)
    assert row["values"]["cpu_us"] == {"median": 40, "min": 20, "max": 60, "runs": [20, 60]}


def test_failed_requests_are_counted_over_all(figures):
    """One failed request anywhere shows in the sum, which ends `make bench` with an error."""
    assert figures.failed == 0
    figures.add(Key("handshakes", "encrypt", "service", 16), {"failed": 2})
    assert document(figures, {})["failed"] == 2


def test_runs_take_turns():
    """All cases are run before any is run again; what can be measured only once is not run again at all."""
    seen: list[str] = []

    def case(name: str, *, once: bool = False) -> Case:
        def run() -> Values:
            seen.append(name)
            return {"ms": 1.0}

        return Case(Key("part", name, "service", 1), run, once)

    run_in_turns([case("a"), case("b", once=True), case("c")], 2, Figures())
    assert seen == ["a", "b", "c", "a", "c"]


def test_charts_are_well_formed_and_true_to_scale(figures, tmp_path):
    """Every chart is XML; a bar that stands for four times as much is four times as long."""
    drawn = {path.name: ET.parse(path).getroot() for path in draw_charts(figures, tmp_path)}  # noqa: S314 - our own file
    assert {"requests.svg", "cpu.svg", "batches.svg", "memory.svg"} == set(drawn)
    name = "{http://www.w3.org/2000/svg}rect"
    bars = [
        float(bar.get("width", 0)) for bar in drawn["requests.svg"].iter(name) if bar.get("x") == str(LABELS)
    ]
    encrypt = bars[-2:]
    assert encrypt[1] == pytest.approx(4 * encrypt[0], abs=0.5)


def test_memory_is_measured_at_a_tenth_too():
    """The cost of a key is measured at two sizes, so that one sees whether it depends on their number."""
    assert counts_up_to(1_000_000) == [100_000, 1_000_000]
    assert counts_up_to(1) == [1]


@pytest.mark.slow
def test_quick_run_writes_the_report(tmp_path):
    """`--quick --only` measures the parts asked for (these need no Go) and writes latest.json and charts."""
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--only", "store,coalesced,memory"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "latest.json").read_text())
    assert {"conditions", "ratios", "figures", "failed"} <= set(report)
    assert {"cpu", "cores", "load_average_before", "python", "packages", "store"} <= set(report["conditions"])
    measured = {(row["part"], row["what"], row["who"], row["size"]) for row in report["figures"]}
    assert {("single", "create", "store", connections) for connections in (1, 16, 64)} <= measured
    assert ("coalesced", "encrypt, json", "coalesced", 64) in measured
    assert ("memory", "keys", "service", 500) in measured
    last = next(row for row in report["figures"] if (row["part"], row["size"]) == ("memory", 500))
    names = {"rss_mib", "redis_bytes_per_key", "backup_bytes_per_key"}
    assert all(last["values"][name]["median"] > 0 for name in names)
    assert (tmp_path / "memory.svg").exists()


def test_a_part_that_there_is_not_is_named(tmp_path):
    """A misspelt part is refused with those that there are, before anything is measured."""
    command = [sys.executable, "-m", "benchmarks.run", "--only", "singel", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no singel" in done.stderr
    assert "single" in done.stderr
    assert not list(tmp_path.iterdir())

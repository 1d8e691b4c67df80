"""Ratios, the tables that are printed, and ``latest.json``."""

from __future__ import annotations

from typing import Any

from .cases import Figures, Key

AT = 16
"""Connections of the ratios that stand for a whole operation."""
CREATE_AT = 64
"""Connections of creates."""
BATCH_AT = 1000
"""Items of those of batches."""
TITLES = {
    "single": "Single requests, by connections",
    "handshakes": "A new TLS connection for each request, by connections at a time",
    "batches": "Batches, by items: rates and CPU time are of items, latencies of batches",
    "coalesced": "Calls of many tasks on one client, by tasks: CPU time is the client's",
    "start": "Cold start",
    "fairness": "A client beside batches of 10,000 items, by its requests a second",
    "workers": "Batches with one worker and with two: rates and CPU time are of items",
    "memory": "Memory, by keys",
}
CEILINGS = {"single": ("reference", "store"), "handshakes": ("reference",), "batches": ("floor",)}
"""What the service is compared with in each part."""


def headline(figures: Figures) -> dict[str, float]:
    """Return the ratios that stand for the rest, without those that were not measured.

    One is as good as the ceiling, more is better.
    """
    found: dict[str, float | None] = {}
    for operation in ("encrypt", "decrypt"):
        ours, theirs = (Key("single", operation, who, AT) for who in ("service", "reference"))
        found[f"{operation}_vs_go"] = figures.ratio("cpu_us", theirs, ours)
    service, store = (Key("single", "create", who, CREATE_AT) for who in ("service", "store"))
    found["create_vs_store"] = figures.ratio("per_second", service, store)
    of_batches = [
        figures.ratio(
            "cpu_us", Key("batches", what, "floor", BATCH_AT), Key("batches", what, "service", BATCH_AT)
        )
        for what in ("encrypt, json", "encrypt, msgpack", "decrypt, json", "decrypt, msgpack")
    ]
    # The worst of them: a mean would hide it.
    found["batch_vs_floor"] = min((ratio for ratio in of_batches if ratio is not None), default=None)
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def all_ratios(figures: Figures) -> dict[str, float]:
    """Return a ratio for each figure that has something beside it, by a name that says of what to what.

    Of CPU time, latency and memory it is the other's over ours, of rates ours over the other's, so that more
    is better.
    """
    found: dict[str, float | None] = {}
    for key in figures.runs:
        if key.who == "service":
            for other in CEILINGS.get(key.part, ()):
                found |= _over_ceiling(figures, key, other)
        found |= _over_other(figures, key)
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def _over_ceiling(figures: Figures, key: Key, other: str) -> dict[str, float | None]:
    """Compare the service with a ceiling."""
    their = Key(key.part, key.what, other, key.size)
    label = f"{key.part}, {key.what}, {key.size}: %s, service vs {other}"
    found = {
        label % "rate": figures.ratio("per_second", key, their),
        label % "p99": figures.ratio("p99_us", their, key),
    }
    # The store's CPU time is not part of the service's: both are needed.
    if other != "store":
        found[label % "CPU"] = figures.ratio("cpu_us", their, key)
    return found


def _over_other(figures: Figures, key: Key) -> dict[str, float | None]:
    """Compare what is not compared with a ceiling: ways of calling, starts, memory."""

    def ratio(name: str, who: str, *, more: bool = False) -> float | None:
        their = Key(key.part, key.what, who, key.size)
        return figures.ratio(name, key, their) if more else figures.ratio(name, their, key)

    match key.part, key.who:
        case "coalesced", "coalesced":
            rate = ratio("per_second", "alone", more=True)
            return {f"coalesced, {key.what}: rate, coalesced vs alone": rate}
        case "fairness", who if who != "alone":
            return {f"fairness: p99, alone vs {who}": ratio("p99_us", "alone")}
        case "workers", "2 workers":
            return {
                f"workers, {key.what}: rate, 2 vs 1": ratio("per_second", "1 worker", more=True),
                f"workers, {key.what}: CPU, 1 vs 2": ratio("cpu_us", "1 worker"),
            }
        case "start", "service":
            return {
                "start: time, service vs reference": ratio("ms", "reference"),
                "start: memory, service vs reference": ratio("rss_mib", "reference"),
            }
        case "memory", "service":
            return _over_payload(figures, key)
        case _:
            return {}


def _over_payload(figures: Figures, key: Key) -> dict[str, float | None]:
    """Return the share of what has to be kept in what is kept."""
    payload = figures.median(key, "payload_bytes_per_key")
    ratios: dict[str, float | None] = {}
    for name, where in (("redis_bytes_per_key", "Redis"), ("backup_bytes_per_key", "backup")):
        kept = figures.median(key, name)
        if payload is not None and kept:
            ratios[f"memory, {key.size} keys: ids and wrapped key, bytes vs {where}"] = payload / kept
    return ratios


def document(figures: Figures, conditions: dict[str, Any]) -> dict[str, Any]:
    """Return what ``latest.json`` holds: the headline ratios, all ratios, conditions, and every run."""
    rows = []
    for key, runs in figures.runs.items():
        values = {}
        for name in figures.names(key):
            low, high = figures.spread(key, name)
            values[name] = {
                "median": figures.median(key, name),
                "min": low,
                "max": high,
                "runs": [run[name] for run in runs if name in run],
            }
        rows.append({"part": key.part, "what": key.what, "who": key.who, "size": key.size, "values": values})
    return {
        **headline(figures),
        "failed": figures.failed,
        "conditions": conditions,
        "ratios": all_ratios(figures),
        "figures": rows,
    }


def print_report(figures: Figures, conditions: dict[str, Any]) -> None:
    """Print the conditions, a table for each part, and the ratios."""
    print("\n## Conditions\n")
    for name, value in conditions.items():
        print(f"- {name}: {value}")
    for part, title in TITLES.items():
        keys = [key for key in figures.runs if key.part == part]
        if keys:
            print(f"\n## {title}\n")
            _print_table(figures, keys)
    print("\n## Ratios: 1 is as good as what stands beside, more is better\n")
    for name, ratio in (all_ratios(figures) | headline(figures)).items():
        print(f"- {name}: {ratio:.2f}")


def _print_table(figures: Figures, keys: list[Key]) -> None:
    names = list(dict.fromkeys(name for key in keys for name in figures.names(key)))
    print(f"| what | size | who | {' | '.join(names)} |")
    print(f"|---|---|---|{'---|' * len(names)}")
    for key in sorted(keys, key=lambda key: (key.what, key.size)):
        cells = [_cell(figures, key, name) for name in names]
        print(f"| {key.what} | {key.size:,} | {key.who} | {' | '.join(cells)} |")


def _cell(figures: Figures, key: Key, name: str) -> str:
    """Return the median, with the lowest and highest run in brackets where they differ."""
    value = figures.median(key, name)
    if value is None:
        return ""
    low, high = figures.spread(key, name)
    return number(value) if low == high else f"{number(value)} ({number(low)} to {number(high)})"


def number(value: float) -> str:
    """Return a number with three digits that count, whole from 100 on."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"  # noqa: PLR2004 - said above

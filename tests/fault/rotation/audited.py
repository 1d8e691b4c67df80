"""Is every acknowledged change in the audit log, and does the log verify?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.fault.rotation.history import CREATES, History, Kind, Outcome, Violation

PROMISE = "acknowledged changes are audited"
ACTIONS = {
    Kind.CREATE: "key.create",
    Kind.ROTATE_DEK: "key.rotate",
    Kind.DISABLE: "key.disable",
    Kind.ENABLE: "key.enable",
    Kind.SCHEDULE: "key.schedule-destruction",
    Kind.CANCEL: "key.cancel-destruction",
}


def check_audit(
    history: History, rotations: Iterable[str], files: Path, config: Path
) -> tuple[list[Violation], dict[str, int]]:
    """Return what is broken, and figures of the log.

    Args:
        history: What clients saw.
        rotations: The ids of all rotations.
        files: Where all processes wrote their records, besides the store's stream.
        config: A service's configuration; its store runs.
    """
    found: list[Violation] = []
    reports = {}
    # The stream's oldest records may be trimmed by now, behind a signed floor; the files have all.
    for place, paths in (("files", [files]), ("stream", [])):
        reports[place] = _verify(config, paths)
        found += [Violation("the audit log verifies", f"{place}: {each}") for each in reports[place]["found"]]
    records = [json.loads(line) for path in sorted(files.iterdir()) for line in _lines(path)]
    found += unrecorded(history, records)
    told = {each.get("request_id") for each in records if each.get("audit") == "rotation.begin"}
    found += [
        Violation(PROMISE, f"nothing tells of rotation {name}") for name in rotations if name not in told
    ]
    return found, {
        "records": len(records),
        "records in the stream": reports["stream"]["records"],
        "chains": len(reports["files"]["chains"]),
        "chains that a kill left open": sum(not chain["closed"] for chain in reports["files"]["chains"]),
        "acknowledged changes": sum(acknowledged(history).values()),
        "of these without an outcome": sum(
            (acknowledged(history) - _counts(records, frozenset({"ok"}))).values()
        ),
    }


def unrecorded(history: History, records: Iterable[Mapping[str, Any]]) -> Iterator[Violation]:
    """Give the changes that were acknowledged more often than they were announced."""
    missing = acknowledged(history) - _counts(records, frozenset({"intent"}))
    for (action, key_id), count in missing.items():
        yield Violation(PROMISE, f"{action} of {key_id}: {count} without a record")


def acknowledged(history: History) -> Counter[tuple[str, str]]:
    """Count acknowledged changes by action and key; a key is made once, however often that was answered."""
    counts = Counter(
        (ACTIONS[each.kind], each.key_id)
        for each in history.operations
        if each.kind in ACTIONS and each.outcome is Outcome.OK
    )
    made = {ACTIONS[kind] for kind in CREATES}
    return Counter({change: 1 if change[0] in made else count for change, count in counts.items()})


def _counts(records: Iterable[Mapping[str, Any]], outcomes: frozenset[str]) -> Counter[tuple[str, str]]:
    return Counter(
        (each["audit"], each["key_id"])
        for each in records
        if each.get("outcome") in outcomes and each.get("key_id")
    )


def _lines(path: Path) -> Iterator[str]:
    # What a kill tore off in the middle of a line was never acknowledged.
    yield from path.read_text().split("\n")[:-1]


def _verify(config: Path, paths: Iterable[Path]) -> dict[str, Any]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "progressdb_kms.cli", "audit", "verify", "--json"),
            *("--config", str(config), *map(str, paths)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in {0, 3}, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report

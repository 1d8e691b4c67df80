"""Adds up the JUnit reports named as arguments and prints `N passed, N failed`.

CI runs pytest several times; its last line speaks for all of them. A report that is missing is a
run that never got so far, and counts as one failure.

Exit status: 0 when tests ran and all passed, else 1.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def count(report: Path) -> tuple[int, int]:
    """Return how many tests passed and failed in one report.

    An expected failure is written as skipped and is neither; real skips never get here, since
    tests/conftest.py fails them in CI.
    """
    if not report.is_file():
        return 0, 1
    passed = failed = 0
    for suite in ET.parse(report).getroot().iter("testsuite"):  # noqa: S314 - written by our own run
        bad = int(suite.get("failures", "0")) + int(suite.get("errors", "0"))
        passed += int(suite.get("tests", "0")) - int(suite.get("skipped", "0")) - bad
        failed += bad
    return passed, failed


def main(reports: list[str]) -> int:
    """Print the total of `reports`; return the exit status."""
    counts = [count(Path(report)) for report in reports]
    passed = sum(good for good, _ in counts)
    failed = sum(bad for _, bad in counts)
    print(f"{passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

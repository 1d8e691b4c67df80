"""Rotation survives the death of the job, of services and store, at any moment, and loses nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.rotation.campaign import Campaign, report

LONG = "FAULT_RUNS" in os.environ
KILLS = max(int(os.environ.get("FAULT_RUNS", "12")), 12)
KEYS = 20_000 if LONG else 1_000

pytestmark = [
    pytest.mark.fault,
    pytest.mark.timeout(0 if LONG else 600),
    # Where the peer is gone between connect and handshake, CPython's wrap_socket leaves its new socket open.
    pytest.mark.filterwarnings("ignore:.*ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def campaign(shim: Path) -> Iterator[Campaign]:
    """Give services with keys, under traffic."""
    made = Campaign(shim, KEYS)
    yield made
    made.close()


def test_nothing_is_lost(campaign: Campaign, tmp_path: Path) -> None:
    """Killed again and again, rotations are finished, and every promise to the clients has been kept."""
    began = time.monotonic()
    campaign.run(KILLS)
    violations = campaign.finish()
    figures = report(campaign, time.monotonic() - began)
    figures["violations"] = [f"{each.promise}: {each.text}" for each in violations]
    (tmp_path / "report.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))  # noqa: T201 - the counts are a result of the test: pytest -s shows them
    assert not violations, f"{len(violations)} violations: see the report"
    assert sum(campaign.kills.values()) >= KILLS

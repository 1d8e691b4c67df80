"""Whatever befalls the store, no acknowledged key is lost, and the service goes on with it by itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.power import build_shim
from tests.fault.store.campaign import Campaign, report
from tests.fault.store.catalogue import NEED_ROOT, SCENARIOS, SHORT
from tests.fault.store.scenarios import Careless

LONG = "FAULT_RUNS" in os.environ
FAULTS = max(int(os.environ.get("FAULT_RUNS", "0")) // 10, 2)
AS_ROOT = os.geteuid() == 0
CHOSEN = [name for name in SCENARIOS if AS_ROOT or name not in NEED_ROOT] if LONG else SHORT

pytestmark = [
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.timeout(0 if LONG else 300),
    # Where the peer is gone between connect and handshake, CPython's wrap_socket leaves its new socket open.
    pytest.mark.filterwarnings("ignore:.*ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the compiled shim."""
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(params=CHOSEN)
def campaign(shim: Path, request: pytest.FixtureRequest) -> Iterator[Campaign]:
    """Give a service under traffic."""
    made = Campaign(SCENARIOS[request.param], shim)
    yield made
    made.close()


def test_nothing_is_lost(campaign: Campaign, request: pytest.FixtureRequest) -> None:
    """After each fault the service works again without a restart, and every promise has been kept."""
    campaign.run(FAULTS)
    violations = campaign.finish()
    figures = {"scenario": request.node.callspec.params["campaign"], **report(campaign, violations)}
    print(json.dumps(figures))  # noqa: T201 - the counts are a result of the test: pytest -s shows them
    assert not violations, figures["violations"][:20]


def test_a_store_that_loses_keys_is_found_out(shim: Path) -> None:
    """On a store that fsyncs once a second, a power cut loses acknowledged keys, and the campaign says so."""
    campaign = Campaign(Careless, shim)
    try:
        # A cut right after the second's fsync loses nothing; five such moments in a row do not happen.
        campaign.run(5)
        found = {each.promise for each in campaign.finish()}
    finally:
        campaign.close()
    assert "no acknowledged key is lost" in found

"""All scenarios by name."""

from __future__ import annotations

from tests.fault.store.privileged import FullDisk, NetworkCut
from tests.fault.store.replicated import Cluster, Sentinels
from tests.fault.store.scenarios import (
    ClockJumps,
    Frozen,
    Killed,
    OutOfMemory,
    Powered,
    Proxied,
    Scenario,
    SlowDisk,
    TornTail,
)

SCENARIOS: dict[str, type[Scenario]] = {
    "killed": Killed,
    "frozen": Frozen,
    "proxy": Proxied,
    "torn-tail": TornTail,
    "power-cut": Powered,
    "slow-disk": SlowDisk,
    "out-of-memory": OutOfMemory,
    "clock-jumps": ClockJumps,
    "sentinel": Sentinels,
    "cluster": Cluster,
    "full-disk": FullDisk,
    "network-cut": NetworkCut,
}
NEED_ROOT = {"full-disk", "network-cut"}
SHORT = ["killed", "frozen", "proxy", "torn-tail", "out-of-memory", "clock-jumps"]
"""The short form's: a few seconds each, and none needs more than the tests' own rights."""

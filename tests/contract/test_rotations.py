"""Rotations over the wire: who may see them, and what is shown."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.contract.dev_service import DevService
from tests.contract.wire_client import Client, assert_problem
from tests.integration.world import eventually


@pytest.fixture(scope="module")
def rotation_id(service: DevService, server: Client) -> str:
    """Rotate once, and give the rotation's name."""
    server.create("rotated")
    command = [sys.executable, "-m", "progressdb_kms.cli", "rotate", "--config", service.ready["config"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (latest, *_) = server.get("/v1/rotations").ok()["rotations"]
    return str(latest["rotation_id"])


def test_rotations_are_listed_and_shown(server: Client, operator: Client, rotation_id: str) -> None:
    """A finished rotation has its versions as strings, its times, its outcome and its counts."""
    shown = server.get(f"/v1/rotations/{rotation_id}").ok()
    assert shown in operator.get("/v1/rotations", {"limit": "1"}).ok()["rotations"]
    assert (shown["source_version"], shown["target_version"]) == ("1", "2")
    assert (shown["step"], shown["outcome"]) == ("complete", "clean")
    assert shown["started_at"] <= shown["finished_at"]
    assert shown["finished_at"].endswith("Z")
    assert shown["counts"]["rewrapped"] >= 1
    # The service reads the registry each second, and a rotation of a few keys may take no longer.
    eventually(lambda: server.get("/v1/keks").ok()["active"] == "2")


def test_who_may_see_rotations(stranger: Client, rotation_id: str) -> None:
    """Without rotation:run or key:read for all threads it is 403."""
    for path in ("/v1/rotations", f"/v1/rotations/{rotation_id}"):
        assert assert_problem(stranger.get(path), 403, "permission_denied")["permission"] == "key:read"


def test_unknown_rotations_and_parameters(server: Client) -> None:
    """An unknown id is 404; a bad limit or parameter is 400."""
    assert_problem(server.get("/v1/rotations/r_9_00000000"), 404, "rotation_not_found")
    for query in ({"limit": "0"}, {"limit": "1001"}, {"cursor": "x"}):
        assert_problem(server.get("/v1/rotations", query), 400, "invalid_parameter")

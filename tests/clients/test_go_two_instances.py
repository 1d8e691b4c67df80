"""The Go client with two services on one store, behind one address."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.client import AdminClient
from tests.clients.gocommand import MODULE, NEEDS_GO, OFFLINE, go, passed
from tests.clients.relay import Relay
from tests.integration.world import Instance, World, eventually, launch_all

pytestmark = NEEDS_GO


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Run two services."""
    made = World()
    try:
        made.store.start()
        launch_all([made.instance(name, drain={"delay": 0.5, "timeout": 10}) for name in ("a", "b")])
        yield made
    finally:
        made.close()


@pytest.fixture
def scene(world: World, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Give what the Go tests have to know, behind a relay."""
    relay = Relay([instance.port for instance in world.instances])
    pairs = {name: world.certificate(name) for name in ("server", "operator")}
    yield {
        "url": f"https://127.0.0.1:{relay.port}",
        "ca": str(world.ca_file),
        "clients": {name: {"cert": str(pair[0]), "key": str(pair[1])} for name, pair in pairs.items()},
        "stop": str(tmp_path / "stop"),
        "made": str(tmp_path / "made"),
    }
    relay.close()


def test_no_create_is_lost(world: World, scene: dict[str, Any], tmp_path: Path) -> None:
    """Through drains and kills each create is answered, and its thread has that one key and no other."""
    file = tmp_path / "ready.json"
    file.write_text(json.dumps(scene))
    # Compiled first, which may take longer than creates are waited for.
    program = tmp_path / "creates.test"
    built = go("test", "-tags", "service", "-c", "-o", str(program), ".")
    assert built.returncode == 0, built.stderr
    command = [str(program), "-test.run=WhileItRestarts", "-test.v"]
    environment = {**os.environ, **OFFLINE, "KMS_READY": str(file)}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=MODULE, env=environment, stdout=log, stderr=log)
    try:
        for instance in world.instances:
            _wait_for_creates(instance)
            instance.stop()
            instance.start()
        for instance in world.instances:
            _wait_for_creates(instance)
            instance.kill()
            instance.start()
        _wait_for_creates(world.instances[0])
    finally:
        Path(scene["stop"]).touch()
        code = process.wait(120)
    said = (tmp_path / "log").read_text()
    assert code == 0, said[-4_000:]
    assert "--- PASS" in said
    made = json.loads(Path(scene["made"]).read_text())
    assert len(made) > 100
    pair = scene["clients"]["operator"]
    with AdminClient(scene["url"], ca=scene["ca"], cert=pair["cert"], key=pair["key"], deadline=60) as admin:
        found = {thread: [key.key_id for key in admin.list_keys(thread_id=thread)] for thread in made}
    assert found == {thread: [key_id] for thread, key_id in made.items()}


def test_its_requests_are_ordinary(world: World, scene: dict[str, Any], tmp_path: Path) -> None:
    """The fast door answers this client: nothing that it sends makes a connection slow."""
    file = tmp_path / "ready.json"
    file.write_text(json.dumps(scene))

    def count(name: str) -> float:
        return sum(instance.metric(name) for instance in world.instances)

    def others() -> float:
        return count("kms_requests_total") - count("kms_fast_door_requests_total")

    before, by_door = others(), count("kms_fast_door_requests_total")
    passed(
        go("test", "-tags", "service", "-count=1", "-v", "-run", "ServiceProvider", ".", KMS_READY=str(file))
    )
    assert count("kms_fast_door_requests_total") > by_door + 30
    # Refused requests and those with a large body go the long way; none else does.
    assert others() == before


def _wait_for_creates(instance: Instance) -> None:
    """Return once this instance has answered further creates."""
    name, route = "kms_requests_total", "/create_dek_for_thread"
    before = instance.metric(name, route=route)
    eventually(lambda: instance.metric(name, route=route) > before + 20, "creates reach the instance")

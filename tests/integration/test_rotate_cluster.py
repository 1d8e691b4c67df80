"""A rotation that four processes share, on a Redis Cluster of six nodes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.rotating import Job, assert_readable, make_keys
from tests.integration.world import World
from tests.store.test_cluster import Group

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(600)]

KEYS = 1500
LEASE = 2.0


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    """Give the nodes."""
    made = Group(tmp_path / "cluster")
    yield made
    for node in made.nodes:
        node.kill()


def test_four_processes_share_a_rotation(group: Group, tmp_path: Path) -> None:
    """A leader and three workers, one of which is killed: all keys are under the new KEK, and readable."""
    world = World()
    jobs: list[Job] = []
    try:
        store = {"url": group.url, "min_replicas": 1, "command_timeout": 10}  # the nodes share two cores
        instance = world.instance("a", store=store).start()
        client = instance.client("operator")
        sealed = make_keys(client, KEYS)
        leader = Job(instance, "--max-rate", str(KEYS // 20), lease=LEASE)
        jobs.append(leader)
        leader.wait_for("step", step="activate")
        # It ends by SIGKILL at a slot of its own that it has written and not reported. To wait for a line of
        # its progress would not do: without a rate it may be through before the first. The others are slow.
        killed = Job(instance, "--worker", fault="rewrap:slot:10", lease=LEASE)
        others = [Job(instance, "--worker", "--max-rate", str(KEYS // 10), lease=LEASE) for _ in range(2)]
        jobs += [killed, *others]
        assert killed.exit_code() == -signal.SIGKILL, killed.text
        result = leader.result()
        # What the killed one had written but not yet reported is counted by nobody; verified it is.
        assert 0 < result["counts"]["rewrapped"] <= KEYS
        assert result["counts"]["verified"] == KEYS
        for worker in others:
            assert worker.result()["slots_here"] > 0
        keks = client.get("/v1/keks").ok()
        assert [(kek["version"], kek["deks"]) for kek in keks["keks"]] == [("1", 0), ("2", KEYS)]
        assert_readable(client, sealed)
        instance.stop()
    finally:
        for job in jobs:
            job.process.kill()
            job.process.wait()
        world.close()

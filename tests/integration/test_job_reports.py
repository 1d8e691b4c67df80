"""What a cluster sees of a job: its Events, and the last line of its log, which it keeps of a failed pod."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.integration.drill import Machine
from tests.integration.rotating import Job, make_keys
from tests.integration.world import Instance, World
from tests.unit.rotation.events_api import EventsApi

KEYS = 40


@pytest.fixture
def api(tmp_path: Path) -> Iterator[EventsApi]:
    """Give an API server."""
    made = EventsApi(tmp_path)
    yield made
    made.close()


@pytest.fixture
def a(new_world: Callable[..., World]) -> Iterator[Instance]:
    """Give a running service whose configuration wants events, and keys in it."""
    world = new_world()
    world.store.start()
    made = world.instance("a", rotation={"events": True}).start()
    make_keys(made.client("server"), KEYS)
    yield made
    made.stop()
    world.store.kill()


def last_line(job: Job) -> str:
    """Return the last line on standard error, which comes after all of standard output."""
    return job.errors.splitlines()[-1]


def test_a_rotation_in_a_pod(a: Instance, api: EventsApi) -> None:
    """A rotation, its interruption and its failure are Events, and the last line says what to do."""
    environment = api.environment()
    stopped = Job(a, stop="rewrap:slot:100", environment=environment)
    stopped.result(75)
    assert api.reasons == ["RotationStarted", "RotationStopped"]
    assert last_line(stopped) == "progressdb-kms: stopped: what was done is kept; run rotate again"
    Job(a, environment=environment).result()
    assert api.reasons[2:] == ["RotationStarted", "RotationCompleted"]
    assert "is at rewrap" in api.events[2]["note"]
    a.world.store.kill()
    failed = Job(a, environment=environment)
    failed.result(1)
    assert api.reasons[4:] == ["RotationFailed"]
    assert last_line(failed).endswith(
        "what was done is kept: run rotate again once this is mended (store_unavailable)"
    )


def test_what_could_not_be_rotated(a: Instance, api: EventsApi) -> None:
    """An incomplete rotation ends with a warning that names keys, and says what to do with them."""
    victim = make_keys(a.client("server"), 1)[0][0]
    name = f"kms:{{{victim[2:4]}}}:dek:{victim}"
    blob = a.world.store.ask("HGET", name, "wrapped")
    a.world.store.ask("HSET", name, "wrapped", blob[:-1] + bytes([blob[-1] ^ 1]))
    api.refuse = 0
    job = Job(a, environment=api.environment())
    job.result(3)
    assert api.reasons == ["RotationStarted", "RotationIncomplete"]
    assert api.events[-1]["type"] == "Warning"
    for said in (api.events[-1]["note"], last_line(job)):
        assert victim in said
        assert "then run rotate again" in said


def test_events_that_can_not_be_written_cost_nothing(a: Instance, api: EventsApi) -> None:
    """A role without the right to create events: the rotation is clean all the same."""
    api.refuse = 403
    job = Job(a, environment=api.environment())
    assert job.result()["outcome"] == "clean"
    assert "event_not_written" in job.errors


def test_a_backup_in_a_pod(tmp_path: Path, api: EventsApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup that was made and one that failed are Events; a failed one says that older ones are there."""
    machine = Machine(tmp_path / "one")
    machine.start_store()
    try:
        with machine.service() as (kms, _):
            kms.create_dek_for_thread("room:1")
        document = yaml.safe_load(machine.config.read_text())
        machine.config.write_text(yaml.safe_dump(document | {"rotation": {"events": True}}))
        for name, value in api.environment().items():
            monkeypatch.setenv(name, value)
        words = ("backup", "create", "--config", machine.config, "--directory")
        done = machine.kms(*words, tmp_path)
        assert done.returncode == 0, done
        (event,) = api.events
        assert (event["reason"], event["type"], event["action"]) == ("BackupCreated", "Normal", "Backup")
        assert "of 1 keys is in" in event["note"]
        failed = machine.kms(*words, tmp_path / "none")
        assert failed.returncode == 1
        assert api.reasons == ["BackupCreated", "BackupFailed"]
        assert "there is no new export, and older ones are as they were" in failed.stderr.splitlines()[-1]
    finally:
        machine.lose()

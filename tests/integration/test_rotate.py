"""The rotation job on real services and a real store."""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from tests.contract.wire_client import Client
from tests.fault import rotate_with_faults
from tests.integration.rotating import (
    Job,
    Sealed,
    assert_readable,
    floors,
    let_lock_run_out,
    make_keys,
    rotate,
    stored_versions,
)
from tests.integration.world import KEK_1, Instance, World, eventually, kek_text, write_private

KEYS = 150
LIVE = "6"
"""Seconds for which a silent instance counts as live: three heartbeats; in production there are seven."""
POINTS = [
    "begun",
    "staged",
    "registered",
    "escrowed",
    "distributed",
    "distribute:done",
    "activate:saved",
    "activated",
    *(
        point
        for step, following in (
            ("activate", "snapshot"),
            ("snapshot", "rewrap"),
            ("rewrap", "verify"),
            ("verify", "complete"),
        )
        for point in (f"{step}:opened", f"{step}:slot:200", f"{step}:done", f"{following}:saved")
    ),
]


@pytest.fixture
def world(new_world: Callable[..., World]) -> Iterator[World]:
    """Give a store with two services on it, not started."""
    made = new_world()
    made.store.start()
    made.instance("a")
    made.instance("b")
    yield made
    for instance in made.instances:
        instance.stop()
    made.store.kill()


@pytest.fixture
def a(world: World) -> Instance:
    """Give the first service, running."""
    return world.instances[0].start()


@pytest.fixture
def sealed(a: Instance) -> Sealed:
    """Give keys with messages."""
    return make_keys(a.client("server"), KEYS)


class Traffic:
    """Creates, encrypts and decrypts until it is ended; every answer must be a success."""

    def __init__(self, *instances: Instance) -> None:
        self.sealed: Sealed = []
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(2 * len(instances))
        self._work = [
            self._pool.submit(self._run, instance.client("server"))
            for instance in instances
            for _ in range(2)
        ]

    def _run(self, client: Client) -> None:
        while not self._end.is_set():
            key_id = client.create(f"t-{secrets.token_hex(8)}")["key_id"]
            message = secrets.token_bytes(20)
            ciphertext = client.encrypt(key_id, message)
            assert client.decrypt(key_id, ciphertext) == message
            self.sealed.append((key_id, message, ciphertext))
            # Callers that never pause take the time from the job, which meets more of them and nothing new.
            self._end.wait(0.01)

    def end(self) -> Sealed:
        """Stop, and return what was made."""
        self._end.set()
        for work in self._work:
            work.result()
        self._pool.shutdown()
        return self.sealed


AUDIT = [
    ("rotation.begin", "intent"),
    ("rotation.begin", "ok"),
    ("kek.stage", "intent"),
    ("kek.stage", "ok"),
    ("rotation.step", "ok"),
    ("kek.activate", "intent"),
    ("kek.activate", "ok"),
    ("rotation.step", "ok"),
    ("rotation.step", "ok"),
    ("rotation.step", "ok"),
    ("rotation.finish", "ok"),
]


def test_rotates_under_traffic(
    world: World, a: Instance, sealed: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Used throughout, two services fail no request, every key ends under the new version, all is readable.

    Each step is audited, changes as intent and outcome. The fault points of the tests mean nothing to the
    command as it is shipped.
    """
    monkeypatch.setenv(rotate_with_faults.POINT, "begun")
    monkeypatch.setenv(rotate_with_faults.LEASE, "0.1")
    b = world.instances[1].start()
    traffic = Traffic(a, b)
    job = Job(a)
    result = job.result()
    made = traffic.end()
    records = [json.loads(line) for line in job.text.splitlines() if line.startswith('{"audit"')]
    assert [(record["audit"], record["outcome"]) for record in records] == AUDIT
    assert {record["request_id"] for record in records} == {result["rotation_id"]}
    assert result["outcome"] == "clean"
    assert result["counts"]["rewrapped"] >= KEYS
    assert result["counts"]["verified"] >= KEYS
    assert result["census"].keys() == {"2"}
    assert stored_versions(world).keys() == {"2"}
    assert floors(world) == {b"2"}
    for instance in (a, b):
        assert_readable(instance.client("server"), sealed + made)
    assert made
    a.until("kms_kek_active_version", lambda value: value == 2)
    a.until("kms_rotation_last_success_timestamp_seconds", lambda value: value > 0)
    a.until("kms_kek_census", lambda value: value == 0, version="1")
    assert a.metric("kms_rotation_step", step="complete") == 1
    assert a.metric("kms_rotation_progress", what="rewrapped") >= KEYS
    assert a.metric("kms_rotation_running") == 0
    assert a.metric("kms_rotation_quarantined") == 0
    assert 0 <= a.metric("kms_kek_active_age_seconds") < 3600


def test_rotates_again_and_again(world: World, a: Instance, sealed: Sealed) -> None:
    """Each run brings one version more, and the file keeps the older ones."""
    world.kek_file.write_text(yaml.safe_dump({"master_key_hex": KEK_1}))
    assert rotate(a)["target_version"] == 2
    assert rotate(a)["target_version"] == 3
    keys = yaml.safe_load(world.kek_file.read_text())["versions"]
    assert keys.keys() == {1, 2, 3}
    assert keys[1] == KEK_1
    assert world.kek_file.stat().st_mode & 0o777 == 0o600
    assert stored_versions(world) == {"3": KEYS}
    assert_readable(a.client("server"), sealed)


def test_nothing_to_resume_and_dry_run_change_nothing(world: World, a: Instance, sealed: Sealed) -> None:
    """--resume-only without a rotation and --dry-run leave store and KEK file as they are."""
    before = world.kek_file.read_bytes()
    census = stored_versions(world)
    assert Job(a, "--resume-only").result()["outcome"] == "nothing_to_do"
    assert Job(a, "--worker").result()["outcome"] == "nothing_to_do"
    job = Job(a, "--dry-run")
    assert job.exit_code() == 0, job.text
    (plan,) = job.lines("plan")
    assert (plan["source_version"], plan["target_version"]) == (1, 2)
    assert plan["census"] == {"1": KEYS}
    assert plan["records"] == KEYS
    assert len(plan["live"]) == 1
    assert plan["resumes"] is None
    assert world.kek_file.read_bytes() == before
    assert stored_versions(world) == census
    assert not world.store.ask("KEYS", "kms:{ctl}:rotation*")


def test_waits_for_an_instance_and_lets_nobody_else_lead(world: World, a: Instance, sealed: Sealed) -> None:
    """An instance without the new version is named and waited for; a second run exits 4 meanwhile."""
    b = world.instances[1]
    own = b.folder / "kek.yaml"
    write_private(own, kek_text({1: KEK_1}))
    document = yaml.safe_load(b.config.read_text())
    document["kek"]["path"] = str(own)
    b.config.write_text(yaml.safe_dump(document))
    b.start()
    first = Job(a, "--wait", "100")

    def names_one_alone() -> bool:
        return any(len(line["missing"]) == 1 for line in first.lines("waiting"))

    eventually(names_one_alone, "one instance is named")
    second = Job(a)
    assert second.exit_code() == 4, second.text
    assert second.lines("result")[-1]["code"] == "rotation_running"
    assert stored_versions(world) == {"1": KEYS}
    write_private(own, world.kek_file.read_bytes())
    assert first.result()["outcome"] == "clean"
    assert_readable(b.client("server"), sealed)


def test_gives_up_waiting_and_goes_on_when_run_again(world: World, a: Instance, sealed: Sealed) -> None:
    """After --wait seconds the run ends with an error that names the instance; the next goes on at once."""
    own = world.root / "own-kek.yaml"
    write_private(own, kek_text({1: KEK_1}))
    world.instance("c", kek={"path": str(own)}).start()
    stopped = Job(a)
    stopped.wait_for("waiting")
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.result(75)["outcome"] == "stopped"
    job = Job(a, "--wait", "1")
    assert job.exit_code() == 1
    assert job.lines("result")[-1]["code"] == "instances_missing"
    (line,) = [line for line in job.errors.splitlines() if line.startswith("progressdb-kms:")]
    assert "is not loaded by: " in line
    assert stored_versions(world) == {"1": KEYS}
    write_private(own, world.kek_file.read_text())
    again = Job(a)
    assert again.result()["outcome"] == "clean"
    assert again.lines("start")[0]["resumes_at"] == "distribute"


@pytest.mark.slow
def test_a_frozen_instance_does_no_harm(world: World, a: Instance, sealed: Sealed) -> None:
    """Frozen throughout and woken, an instance writes nothing under the old version, and no request fails."""
    b = world.instances[1].start()
    clients = [b.client("server") for _ in range(8)]
    for client in clients:
        client.create("before")
    b.pause()
    job = Job(a, "--wait", "100", environment={"PROGRESSDB_KMS_LIVE": LIVE}, lease=15)
    assert job.result()["outcome"] == "clean"
    assert any(len(line["not_live"]) == 1 for line in job.lines("waiting"))
    with ThreadPoolExecutor(len(clients)) as pool:
        created = [pool.submit(client.create, f"woken-{n}") for n, client in enumerate(clients)]
        time.sleep(0.5)  # the requests are in the frozen process's sockets now
        b.resume()
        answers = [one.result() for one in created]
    assert {answer["kek_version"] for answer in answers} == {"2"}
    assert stored_versions(world) == {"2": KEYS + 2 * len(clients)}
    assert_readable(b.client("server"), sealed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_every_transition(world: World, a: Instance, sealed: Sealed) -> None:
    """A run that is killed at each named transition in turn is finished by the next, and loses nothing."""
    a.stop()
    for point in POINTS:
        job = Job(a, "--wait", "0", fault=point, lease=0.8)
        assert job.exit_code() == -signal.SIGKILL, (point, job.text)
        let_lock_run_out(world)
    # The last one was killed after it had finished the rotation.
    assert Job(a, "--resume-only").result()["outcome"] == "nothing_to_do"
    assert stored_versions(world) == {"2": KEYS}
    assert_readable(a.start().client("server"), sealed)
    (rotation,) = a.client("operator").get("/v1/rotations").ok()["rotations"]
    assert rotation["outcome"] == "clean"
    assert rotation["counts"]["snapshot"] == KEYS
    assert rotation["counts"]["verified"] == KEYS


def test_stops_between_slots_and_is_resumed(world: World, a: Instance, sealed: Sealed) -> None:
    """SIGTERM ends a run with 75 and gives the lock back, so that the next run goes on at once."""
    assert Job(a, stop="rewrap:slot:300").result(75)["outcome"] == "stopped"
    assert stored_versions(world).keys() == {"1", "2"}
    again = Job(a)
    assert again.result()["outcome"] == "clean"
    assert again.lines("start")[0]["resumes_at"] == "rewrap"
    assert stored_versions(world) == {"2": KEYS}


def test_the_rate_counts_records(world: World, a: Instance, sealed: Sealed) -> None:
    """Not pages, of which every slot has one: a run at as many records a second as there are ends."""
    job = Job(a, "--max-rate", str(KEYS))
    assert job.result()["counts"]["verified"] == KEYS


def test_a_worker_shares_the_work(world: World, a: Instance, sealed: Sealed) -> None:
    """A worker does slots of a running rotation, and ends with it."""
    leader = Job(a, "--max-rate", str(KEYS // 4))
    leader.wait_for("step", step="activate")
    worker = Job(a, "--worker")
    assert leader.result()["outcome"] == "clean"
    ended = worker.result()
    assert ended["outcome"] == "clean"
    assert ended["slots_here"] > 0
    assert ended["counts"]["rewrapped"] == KEYS


def test_the_pods_of_an_indexed_job(world: World, a: Instance, sealed: Sealed) -> None:
    """Index 0 leads, others wait for it, share its work and end with it; one that comes late ends at once."""
    worker = Job(a, "--indexed", environment={"JOB_COMPLETION_INDEX": "1"})
    worker.wait_for("start", role="worker")
    leader = Job(a, "--indexed", "--max-rate", str(KEYS // 2), environment={"JOB_COMPLETION_INDEX": "0"})
    assert leader.result()["outcome"] == "clean"
    assert leader.lines("start")[0]["role"] == "leader"
    ended = worker.result()
    assert ended["outcome"] == "clean"
    assert ended["slots_here"] > 0
    late = Job(a, "--indexed", environment={"JOB_COMPLETION_INDEX": "2"}).result()
    assert late["rotation_id"] == ended["rotation_id"]
    assert stored_versions(world) == {"2": KEYS}


def test_an_indexed_worker_without_a_leader(world: World, a: Instance, sealed: Sealed) -> None:
    """Where nobody leads what is under way, a worker ends with 75; where there is nothing, with 0."""
    alone = {"JOB_COMPLETION_INDEX": "1"}
    job = Job(a, "--indexed", "--join-wait", "1", environment=alone)
    assert job.result()["outcome"] == "nothing_to_do"
    assert Job(a, stop="rewrap:slot:300").result(75)["outcome"] == "stopped"
    unled = Job(a, "--indexed", "--join-wait", "1", environment=alone).result(75)
    assert "nobody has led it" in unled["detail"]


def test_a_damaged_record_is_named_and_the_rest_is_rotated(world: World, a: Instance, sealed: Sealed) -> None:
    """A record that does not unwrap is left as it was, the run ends incomplete with exit 3 and names it."""
    victim = sealed[0][0]
    name = f"kms:{{{victim[2:4]}}}:dek:{victim}"
    blob = world.store.ask("HGET", name, "wrapped")
    world.store.ask("HSET", name, "wrapped", blob[:-1] + bytes([blob[-1] ^ 1]))
    result = Job(a).result(3)
    assert result["outcome"] == "incomplete"
    (bad,) = result["quarantined"]
    assert (bad["key_id"], bad["reason"], bad["kek_version"]) == (victim, "wrapped_key_invalid", 1)
    assert result["left_behind"] == {"1": 1}
    assert stored_versions(world) == {"1": 1, "2": KEYS - 1}
    assert_readable(a.client("server"), sealed[1:])


def test_rollback_restores_the_source_version(world: World, a: Instance, sealed: Sealed) -> None:
    """After a rollback keys are under the old version, those made since are named; rotation goes on."""
    nothing = Job(a, "--rollback")
    assert nothing.exit_code() == 1
    assert "no rotation to roll back" in nothing.errors
    rotate(a)
    since = make_keys(a.client("server"), 3)
    result = Job(a, "--rollback").result(3)
    assert result["outcome"] == "rolled_back"
    assert sorted(result["needs_target"]) == sorted(key_id for key_id, _, _ in since)
    assert stored_versions(world) == {"1": KEYS, "2": 3}
    assert floors(world) == {b"1"}
    assert_readable(a.client("server"), sealed + since)
    assert a.client("server").create("after")["kek_version"] == "1"
    again = Job(a, "--rollback")
    assert again.exit_code() == 1, again.text
    final = rotate(a)
    assert final["target_version"] == 3
    assert stored_versions(world) == {"3": KEYS + 4}
    assert_readable(a.client("server"), sealed + since)


def test_rollback_where_the_new_version_is_lost(world: World, a: Instance, sealed: Sealed) -> None:
    """A half-done rotation whose new KEK is gone is rolled back without it, and resumed after kills."""
    a.stop()
    job = Job(a, fault="rewrap:slot:600", lease=0.8)
    assert job.exit_code() == -signal.SIGKILL, job.text
    assert stored_versions(world).keys() == {"1", "2"}
    world.write_keks({1: KEK_1})
    let_lock_run_out(world)
    for point in ("rollback:begun", "rollback:activated", "rollback:slot:300"):
        killed = Job(a, "--rollback", fault=point, lease=0.8)
        assert killed.exit_code() == -signal.SIGKILL, (point, killed.text)
        let_lock_run_out(world)
    forward = Job(a)
    assert forward.exit_code() == 1, forward.text
    assert "rotate --rollback" in forward.errors
    result = Job(a, "--rollback").result()
    assert result["still_under_target"] == 0
    assert result["needs_target"] == []
    assert stored_versions(world) == {"1": KEYS}
    # No key is under the lost version, so the next rotation does without it, and then it can be retired.
    assert rotate(a)["target_version"] == 3
    assert stored_versions(world) == {"3": KEYS}
    export, config = a.folder / "export", ("--config", str(a.config))
    for words in (("backup", "create", "--out", export), ("kek", "retire", "2", "--export", export)):
        command = [sys.executable, "-m", "progressdb_kms.cli", *map(str, words), *config]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
    assert_readable(a.start().client("server"), sealed)

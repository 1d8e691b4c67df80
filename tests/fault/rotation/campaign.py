"""Rotations under traffic while job, services and store are killed; whoever dies is started again."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import redis

from progressdb_kms.cli.app import run as command
from progressdb_kms.domain.rotation import ORDER, Outcome, Step
from tests.fault.power import PoweredServer
from tests.fault.rotation.audited import check_audit
from tests.fault.rotation.history import History, Violation, check_history
from tests.fault.rotation.stored import Stored, check_store, read_store
from tests.fault.rotation.traffic import FloorWatch, Recorder, Traffic, note
from tests.integration.rotating import Job
from tests.integration.world import PROMPT_STORE, Instance, World
from tests.store.servers import ALWAYS

LEASE = 1.5
LIVE = 4.0
"""Seconds; a service beats every 2."""
RESUMABLE = {
    1: frozenset({"instances_missing", "store_unavailable", "store_not_durable"}),
    75: frozenset({""}),
}
ANOTHER_LEADS = 4
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
        for step, following in itertools.pairwise(ORDER[1:])
        for point in (f"{step}:opened", f"{step}:slot:300", f"{step}:done", f"{following}:saved")
    ),
]
"""Every transition that the job names."""


def powered_world(shim: Path, options: dict[str, str] | None = None) -> tuple[World, PoweredServer]:
    """Make a world whose store's power can be cut; the store runs."""
    world = World()
    powered = PoweredServer(shim, "redis", world.root / "powered", ALWAYS | (options or {}))
    world.store = powered.server
    return world, powered


def connect(world: World) -> redis.Redis:
    """Return a connection to the store."""
    return redis.Redis(unix_socket_path=str(world.store.socket), socket_timeout=5, protocol=2)


def examine(world: World, history: History) -> tuple[list[Violation], Stored]:
    """Check a store that rests, and all that was seen before."""
    with connect(world) as client:
        stored = read_store(client, world.kek_file.read_text())
    return check_history(history) + check_store(history, stored), stored


class Campaign:
    """One run.

    Args:
        shim: The shim under the store.
        keys: Keys before the first rotation.

    Attributes:
        kills: Deaths by victim.
        points: Transitions at which the job was killed.
        history: All that was seen.
        audit_files: Where services and job write the audit log, besides the store's stream.
    """

    def __init__(self, shim: Path, keys: int) -> None:
        self.world, self.powered = powered_world(shim)
        self.history = History()
        self.kills: Counter[str] = Counter()
        self.points: Counter[str] = Counter()
        self.lost_bytes = 0
        # A cached key may serve while the store is away, though it was disabled right before (max_stale);
        # without that, "nothing succeeds after a disable" is a promise without exception.
        assert command(["audit", "keygen", "--out", str(self.world.root / "key"), "--json"]) == 0
        self.audit_files = self.world.root / "audit"
        self.audit_files.mkdir()
        audit = {
            "key_file": str(self.world.root / "key" / "audit.yaml"),
            "directory": str(self.audit_files),
            "stdout": False,
        }
        self.services = [
            self.world.instance(
                name, cache={"max_stale": 0}, log={"level": "warning"}, store=PROMPT_STORE, audit=audit
            )
            for name in "ab"
        ]
        for service in self.services:
            service.start()
        self._job: Job | None = None
        self._killed_at = 0.0
        self._recorder = Recorder(self.history, self.services)
        sealed = self._recorder.preload(keys)
        self._watch = FloorWatch(self.history, lambda: connect(self.world))
        self._traffic = Traffic(self.history, self.services, sealed, self._hasten)

    def run(self, kills: int) -> None:
        """Kill so often, each kind of victim in turn and at each named transition in turn."""
        plan = self._plan()
        while sum(self.kills.values()) < kills:
            next(plan)
            self._traffic.check()

    def finish(self) -> list[Violation]:
        """Stop the traffic, rotate until all is clean, and return what is broken."""
        self._traffic.end()
        for service in self.services:
            service.wait_ready()
        self._finish_rotation()
        with connect(self.world) as client:
            running = client.exists("kms:{ctl}:rotation")
        if running:
            note(self.history, "rotations end clean", "a rotation is still under way")
        self._watch.look()
        self._watch.end()
        self._recorder.decrypt_all()
        # Their sweep destroys keys at any time: what is read key by key has to rest.
        for service in self.services:
            service.stop()
        violations, self.stored = examine(self.world, self.history)
        found, self.audited = check_audit(
            self.history,
            [rotation["rotation_id"] for rotation in self.stored.rotations],
            self.audit_files,
            self.services[0].config,
        )
        return violations + found

    def close(self) -> None:
        """End every process."""
        self._traffic.abandon()
        self._watch.end()
        self._recorder.close()
        if self._job is not None:
            self._job.process.kill()
            self._job.process.wait()
        for service in self.services:
            service.kill()
        self.world.close()

    # What dies, and when.

    def _plan(self) -> Iterator[None]:
        points = itertools.cycle(POINTS)
        steps = itertools.cycle([str(step) for step in ORDER])
        services = itertools.cycle(self.services)
        while True:
            self._kill_job_at(next(points))
            yield
            self._kill_service(next(services), "")
            yield
            self._kill_store("", cut=True)
            yield
            self._kill_job_at(next(points))
            yield
            self._kill_job()
            yield
            step = next(steps)
            self._kill_service(next(services), step)
            yield
            self._kill_store(step, cut=random.random() < 0.5)
            yield
            self._kill_job_at(next(points))
            yield
            self._kill_store("", cut=False)
            yield

    def _kill_job_at(self, point: str) -> None:
        while True:
            self._end_job()
            self._start_job(point)
            assert self._job
            code = self._job.exit_code()
            if code == -signal.SIGKILL:
                self._job, self._killed_at = None, time.monotonic()
                self.kills["job at a transition"] += 1
                self.points[point] += 1
                return
            self._reap(code)

    def _kill_job(self) -> None:
        job = self._running_job()
        time.sleep(random.uniform(0.8, 3.0))
        while job.process.poll() is not None:
            job = self._running_job()
            time.sleep(random.uniform(0.8, 2.0))
        job.process.kill()
        if job.exit_code() == -signal.SIGKILL:
            self._killed_at = time.monotonic()
            self.kills["job at random"] += 1
            self._job = None

    def _kill_service(self, service: Instance, step: str) -> None:
        self._moment(step)
        service.kill()
        self.kills[f"service at {'a transition' if step else 'random'}"] += 1
        time.sleep(random.uniform(0.0, 0.3))
        service.launch()

    def _kill_store(self, step: str, *, cut: bool) -> None:
        self._moment(step)
        if cut:
            self.lost_bytes += self.powered.cut_power()
        else:
            self.powered.crash()
        how = "a transition" if step else "random"
        self.kills[f"store at {how}{', power cut' if cut else ''}"] += 1
        time.sleep(random.uniform(0.0, 1.5))
        self.world.store.start()

    def _moment(self, step: str) -> None:
        """Return when a job's output shows the step, the last one by its result; or at some time."""
        if not step:
            self._running_job()
            time.sleep(random.uniform(0.2, 2.0))
            return
        while True:
            job = self._running_job()
            ended = False
            while not ended:
                ended = job.process.poll() is not None
                shown = {line["step"] for line in job.lines("step")}
                shown |= {Step.COMPLETE for line in job.lines("result") if line["outcome"] == Outcome.CLEAN}
                if step in shown:
                    time.sleep(random.uniform(0.0, 0.2))
                    return
                time.sleep(0.05)

    # The job.

    def _start_job(self, point: str = "") -> None:
        # The lease of a run that was killed has to run out.
        time.sleep(max(0.0, self._killed_at + LEASE - time.monotonic()))
        service = random.choice(self.services)
        environment = {"PROGRESSDB_KMS_LIVE": str(LIVE)}
        self._job = Job(service, "--wait", "60", fault=point, lease=LEASE, environment=environment)

    def _running_job(self) -> Job:
        if self._job is not None and (code := self._job.process.poll()) is not None:
            self._reap(code)
        if self._job is None:
            self._start_job()
        assert self._job
        return self._job

    def _end_job(self) -> None:
        """Kill a run that goes on without a fault point: it is a random moment like any other."""
        if self._job is None:
            return
        self._job.process.kill()
        code = self._job.exit_code()
        if code == -signal.SIGKILL:
            self.kills["job at random"] += 1
            self._job, self._killed_at = None, time.monotonic()
        else:
            self._reap(code)

    def _reap(self, code: int) -> None:
        assert self._job
        job, self._job = self._job, None
        told = (job.lines("result") or [{}])[-1].get("code", "")
        if code not in {0, ANOTHER_LEADS} and told not in RESUMABLE.get(code, ()):
            note(self.history, "a run can be resumed", f"exit {code}: {job.text[-1500:]}")

    def _finish_rotation(self) -> None:
        """Resume what is under way, then rotate once more without any fault."""
        self._end_job()
        for arguments in (["--resume-only"], []):
            for _ in range(5):
                time.sleep(max(0.0, self._killed_at + LEASE - time.monotonic()))
                self._job = Job(self.services[0], *arguments, lease=LEASE)
                code = self._job.exit_code()
                self._reap(code)
                if code == 0:
                    break

    def _hasten(self, key_id: str) -> None:
        """Let the waiting period of a key be over: the services' sweep destroys it."""
        tag = key_id[2:4]
        try:
            with connect(self.world) as client, client.pipeline(transaction=True) as change:
                change.hset(f"kms:{{{tag}}}:dek:{key_id}", "destroy_at", "1")
                change.zadd(f"kms:{{{tag}}}:due", {key_id: 1})
                change.execute()
        except (redis.RedisError, OSError):
            return  # the store is away: the key waits as long as any other


def report(campaign: Campaign, seconds: float) -> dict[str, object]:
    """Return the figures of a run."""
    stored = campaign.stored
    return {
        "seconds": round(seconds),
        "cpus": os.cpu_count(),
        "kills": sum(campaign.kills.values()),
        "by victim": dict(sorted(campaign.kills.items())),
        "transitions of the job": f"{len(campaign.points)} of {len(POINTS)}",
        "bytes cut": campaign.lost_bytes,
        "rotations": len(stored.rotations),
        "records": len(stored.records),
        "destroyed": sum(record["state"] == b"destroyed" for record in stored.records.values()),
        "acknowledged keys": len(campaign.history.acknowledged()),
        "ciphertexts": len(campaign.history.sealed()),
        "copies": sum(len(b) for snapshot in stored.snapshots.values() for b in snapshot.buckets),
        "audit": campaign.audited,
        "operations": campaign.history.table(),
    }

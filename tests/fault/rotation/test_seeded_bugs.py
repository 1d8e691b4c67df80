"""The checker finds bugs that are seeded on purpose; without the bug the same scenario shows none."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fault.power import PoweredServer
from tests.fault.rotation.campaign import examine, powered_world
from tests.fault.rotation.history import History, Kind, Outcome
from tests.fault.rotation.seeded import PAUSE_AT, SEEDS
from tests.fault.rotation.traffic import Recorder
from tests.integration.rotating import ROOT, Job
from tests.integration.world import Instance, World, eventually
from tests.store.servers import EVERYSEC

SEEDED = "tests.fault.rotation.seeded"
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "service")])
KEYS = 20

pytestmark = [pytest.mark.fault, pytest.mark.timeout(400)]
NewWorld = Callable[..., tuple[World, PoweredServer]]


@pytest.fixture
def new_world(shim: Path) -> Iterator[NewWorld]:
    """Give what makes a world whose store's power can be cut."""
    worlds: list[World] = []

    def make(**options: str) -> tuple[World, PoweredServer]:
        made = powered_world(shim, options)
        worlds.append(made[0])
        return made

    yield make
    for world in worlds:
        for instance in world.instances:
            instance.kill()
        world.close()


@pytest.fixture
def world(new_world: NewWorld) -> World:
    """Give a world."""
    return new_world()[0]


def seeded(world: World, name: str, *seeds: str, allow_data_loss: bool = False) -> Instance:
    """Make a service with bugs, not started."""
    made = world.instance(name, cache={"max_stale": 0}, store={"allow_data_loss": allow_data_loss})
    made.module = SEEDED
    made.python = (sys.executable, {**os.environ, "PYTHONPATH": PATHS, SEEDS: ",".join(seeds)})
    return made


def promises(world: World, history: History) -> set[str]:
    """Return the promises that were found broken."""
    return {violation.promise for violation in examine(world, history)[0]}


def rotate(instance: Instance, *seeds: str, code: int = 0) -> None:
    """Run the job with bugs to its end."""
    Job(instance, module=SEEDED, environment={SEEDS: ",".join(seeds)}).result(code)


@pytest.mark.parametrize("seeds", [["pause"], ["pause", "no-compare"]], ids=["sound", "seeded"])
def test_a_rewrap_without_compare_and_set(world: World, tmp_path: Path, seeds: list[str]) -> None:
    """A key that is destroyed between the job's read and its write comes back if that does not compare."""
    a = seeded(world, "a").start()
    history = History()
    recorder = Recorder(history, [a])
    victim = recorder.preload(KEYS)[0].key_id
    environment = {SEEDS: ",".join(seeds), PAUSE_AT: f"{victim}@{tmp_path}"}
    job = Job(a, module=SEEDED, environment=environment)
    eventually((tmp_path / "paused").exists, "the job is about to rewrap the key")
    recorder.change(Kind.SCHEDULE, victim)
    record = f"kms:{{{victim[2:4]}}}:dek:{victim}"
    world.store.ask("HSET", record, "destroy_at", 1)
    world.store.ask("ZADD", f"kms:{{{victim[2:4]}}}:due", 1, victim)
    # A service sweeps when it starts.
    b = seeded(world, "b").start()
    eventually(lambda: world.store.ask("HGET", record, "state") == b"destroyed", "the key is destroyed")
    (tmp_path / "go").touch()
    assert job.exit_code() == 0, job.text
    b.stop()
    recorder.close()
    wanted = {"destroyed is destroyed"} if "no-compare" in seeds else set()
    assert promises(world, history) & {"destroyed is destroyed"} == wanted
    if not wanted:
        assert promises(world, history) == set()


@pytest.mark.parametrize("seeds", [["deaf"], ["deaf", "no-floor"]], ids=["sound", "seeded"])
def test_a_missing_floor(world: World, seeds: list[str]) -> None:
    """An instance that slept through the rotation makes keys under the old version if no floor stands."""
    a, b = seeded(world, "a").start(), seeded(world, "b", *seeds).start()
    history = History()
    recorder = Recorder(history, [a])
    recorder.preload(KEYS)
    sleepers = [Recorder(history, [b]) for _ in range(4)]
    for number, each in enumerate(sleepers):
        assert each.create(f"before:{number}").outcome is Outcome.OK
    b.pause()
    Job(a, lease=2, environment={"PROGRESSDB_KMS_LIVE": "2"}).result()
    with ThreadPoolExecutor(len(sleepers)) as pool:
        made = [pool.submit(each.create, f"woken:{number}") for number, each in enumerate(sleepers)]
        time.sleep(0.5)  # the requests are in the frozen process's sockets now
        b.resume()
        assert {each.result().outcome for each in made} == {Outcome.OK}
    for each in (recorder, *sleepers):
        each.close()
    wanted = {"no record below the floor", "census of old versions is zero"} if "no-floor" in seeds else set()
    assert promises(world, history) == wanted


@pytest.mark.parametrize("sound", [True, False], ids=["sound", "seeded"])
def test_an_ack_before_the_fsync(new_world: NewWorld, sound: bool) -> None:
    """On a store that acknowledges before it has fsynced, a power cut loses keys, and each loss is found."""
    world, powered = new_world() if sound else new_world(**EVERYSEC)
    a = seeded(world, "a", allow_data_loss=not sound).start()
    history = History()
    found: set[str] = set()
    recorder = Recorder(history, [a])
    # What the start wrote is to be on disk: without its registry the store can't be read at all.
    (log,) = (world.store.folder / "appendonlydir").glob("*.incr.aof")
    begun = log.stat().st_size
    eventually(lambda: powered.durable(log) >= begun, "the start is on disk")
    # A cut right after the second's fsync loses nothing; five such moments in a row do not happen.
    for attempt in range(2 if sound else 5):
        for number in range(60):
            recorder.create(f"room:{attempt}:{number}")
        powered.cut_power()
        world.store.start()
        found = promises(world, history)
        if found:
            break
        a.wait_ready()
    recorder.close()
    assert found == (set() if sound else {"acknowledged keys exist"})


@pytest.mark.parametrize("seeds", [[], ["no-notice"]], ids=["sound", "seeded"])
def test_a_disable_that_is_not_told(world: World, seeds: list[str]) -> None:
    """A key that one instance has disabled goes on working on another if no notice is put."""
    a, b = seeded(world, "a", *seeds).start(), seeded(world, "b").start()
    history = History()
    here, there = Recorder(history, [a]), Recorder(history, [b])
    # One that had not read the notices within the last second would ask the store, and see the change there:
    # five such moments in a row do not happen.
    for sealed in here.preload(5):
        b.warm(sealed.key_id)
        assert here.change(Kind.DISABLE, sealed.key_id).outcome is Outcome.OK
        time.sleep(1.2)  # the second within which it has to be known
        if there.decrypt(sealed).outcome is Outcome.OK:
            break
    for each in (here, there):
        each.close()
    wanted = {"nothing succeeds after a disable or destroy"} if seeds else set()
    assert promises(world, history) == wanted


@pytest.mark.parametrize("seeds", [[], ["new-id-each-time"]], ids=["sound", "seeded"])
def test_a_retry_that_makes_another_key(world: World, seeds: list[str]) -> None:
    """Two answers to one Idempotency-Key that differ are found, for creates and for DEK rotations."""
    a = seeded(world, "a", *seeds).start()
    for kind in (Kind.CREATE, Kind.ROTATE_DEK):
        history = History()
        recorder = Recorder(history, [a])
        for _ in range(2):
            assert recorder.create("room", "once", kind).outcome is Outcome.OK
        recorder.close()
        assert promises(world, history) == ({"retries agree"} if seeds else set())


@pytest.mark.parametrize(
    "seed, promise",
    [("no-census", "records and census agree"), ("no-copy", "snapshots verify"), ("", "")],
)
def test_a_rotation_that_forgets(world: World, seed: str, promise: str) -> None:
    """Records that fall out of the census or of the snapshot are found, though the job's end is clean."""
    a = seeded(world, "a").start()
    history = History()
    recorder = Recorder(history, [a])
    recorder.preload(KEYS)
    time.sleep(1.1)  # keys of the second in which a rotation begins need no copy
    job = Job(a, module=SEEDED, environment={SEEDS: seed})
    code = job.exit_code()
    recorder.close()
    found = promises(world, history)
    # Where the job itself stops, nothing was lost, and there is nothing to be found but that it did.
    assert (promise in found) if promise else (found == set() and code == 0), (code, found, job.text[-500:])

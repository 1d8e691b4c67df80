"""Rotation with a KEK file that is not right, and on a store that fails midway: said, and resumable."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.rotating import (
    Job,
    Sealed,
    assert_readable,
    let_lock_run_out,
    make_keys,
    stored_versions,
)
from tests.integration.world import (
    KEK_1,
    KEK_2,
    PROMPT_STORE,
    Instance,
    World,
    eventually,
    kek_text,
    write_private,
)
from tests.store.servers import ALWAYS

KEYS = 150
IMPATIENT = {"PROGRESSDB_KMS_PATIENCE": "1"}
DISK = 64 << 20


@pytest.fixture
def world(new_world: Callable[..., World]) -> Iterator[World]:
    """Give a store with a service on it, not started."""
    yield from _served(new_world())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Give the folder of a small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "kms-test", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a disk of its own takes root, and the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small(new_world: Callable[..., World], disk: Path) -> Iterator[World]:
    """Give a store whose data is on the small disk, with a service on it."""
    yield from _served(new_world(options=ALWAYS | {"dir": str(disk)}), store=PROMPT_STORE)


def _served(world: World, **config: Any) -> Iterator[World]:
    world.store.start()
    world.instance("a", **config)
    yield world
    for instance in world.instances:
        instance.stop()
    world.store.kill()


@pytest.fixture
def a(world: World) -> Instance:
    """Give the service, running."""
    return world.instances[0].start()


@pytest.fixture
def sealed(a: Instance) -> Sealed:
    """Give keys with messages."""
    return make_keys(a.client("server"), KEYS)


def failed(job: Job, code: str, *said: str) -> None:
    """Assert that a run ended with this error, in one line that says these things."""
    assert job.exit_code() == 1, job.text
    (line,) = [line for line in job.errors.splitlines() if line.startswith("progressdb-kms:")]
    assert line.endswith(f"({code})")
    for each in said:
        assert each in line


def stored(world: World) -> dict[bytes, bytes]:
    """Return what the store holds but for the number of its last lock, which any run raises."""
    return {key: value for key, value in world.keys().items() if key != b"kms:{ctl}:fence"}


HALF = kek_text({1: KEK_1, 2: KEK_2})[:-30]


WRONG = [
    (kek_text({1: KEK_2}), "rotation_refused", "version 1"),  # another key
    (kek_text({2: KEK_2}), "rotation_refused", "version 1"),  # without the active one
    ("", "kek_file_invalid", "write either master_key_hex"),
    (HALF, "kek_file_invalid", "line"),
]


def test_a_wrong_kek_file(world: World, a: Instance, sealed: Sealed) -> None:
    """Nothing begins, nothing is changed, the file stays as it is; with the right one all goes on."""
    good = world.kek_file.read_text()
    a.stop()
    before = stored(world)
    for text, code, said in WRONG:
        write_private(world.kek_file, text)
        failed(Job(a), code, said)
        assert world.kek_file.read_text() == text
        assert stored(world) == before
    write_private(world.kek_file, good)
    assert Job(a).result()["outcome"] == "clean"
    assert_readable(a.start().client("server"), sealed)


def broken_off(a: Instance) -> None:
    """Leave a rotation in the middle of its rewrap."""
    job = Job(a, fault="rewrap:slot:500", lease=0.5)
    assert job.exit_code() == -signal.SIGKILL, job.text
    let_lock_run_out(a.world)


def resumed(world: World, a: Instance, sealed: Sealed) -> None:
    """Assert that the rotation is finished by running it again, and that nothing is lost."""
    assert Job(a).result()["outcome"] == "clean"
    assert stored_versions(world) == {"2": KEYS}
    assert_readable(a.client("server"), sealed)


def test_out_of_memory(world: World, a: Instance, sealed: Sealed) -> None:
    """A store that takes no more writes stops the run with its reason; with memory it goes on."""
    broken_off(a)
    world.store.configure(maxmemory="1mb")
    failed(Job(a, lease=0.5, environment=IMPATIENT), "store_unavailable", "maxmemory")
    world.store.configure(maxmemory="0")
    resumed(world, a, sealed)


def test_became_a_replica(world: World, a: Instance, sealed: Sealed) -> None:
    """A store that only reads stops the run; as a primary again it goes on."""
    broken_off(a)
    world.store.ask("REPLICAOF", "127.0.0.1", "1")
    failed(Job(a, lease=0.5, environment=IMPATIENT), "store_not_durable", "replica")
    world.store.ask("REPLICAOF", "NO", "ONE")
    resumed(world, a, sealed)


def test_full_disk(small: World, disk: Path) -> None:
    """Under ``always`` the store ends when its disk is full; the run says so, and goes on later."""
    (a,) = small.instances
    sealed = make_keys(a.start().client("server"), KEYS)
    broken_off(a)
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free)
    failed(Job(a, lease=0.5, environment=IMPATIENT), "store_unavailable")
    store = small.store.process
    assert store
    eventually(lambda: store.poll() is not None, "the store has ended")
    (disk / "ballast").unlink()
    small.store.start()
    a.wait_ready()
    resumed(small, a, sealed)

"""`store.id_file`: a KEK that belongs to a store serves, rotates and backs up that store and no other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from progressdb_kms.store.redis.schema import IMPORT_KEY, SCHEMA_KEY
from tests.integration.drill import Machine
from tests.integration.world import Instance, World, eventually, write_private

ID = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def world(new_world: Callable[..., World]) -> World:
    """Run a store."""
    made = new_world()
    made.store.start()
    return made


@pytest.fixture
def empty(world: World) -> Iterator[World]:
    """Give it empty."""
    yield world
    for instance in world.instances:
        instance.stop()
    world.store.ask("FLUSHALL")


def belonging(world: World, name: str, store_id: str = ID) -> Instance:
    """Return an instance whose KEK belongs to a store."""
    path = world.root / f"{name}-id"
    write_private(path, store_id)
    return world.instance(name, store={"url": world.store.url, "id_file": str(path)})


def command(*words: str) -> str:
    """Run a command that must be refused; return the one line that says why."""
    done = subprocess.run(
        [sys.executable, "-m", "progressdb_kms.cli", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("progressdb-kms: "))


def test_an_empty_store_is_waited_for_and_never_founded(empty: World) -> None:
    """The service stays unready and says why; when the right data is there, it serves without a restart."""
    first = empty.instance("first").start()
    key_id = first.client("server").create("t:1")["key_id"]
    ciphertext = first.client("server").encrypt(key_id, b"message")
    store_id = empty.store.ask("HGET", SCHEMA_KEY, "store_id").decode()
    first.stop()
    saved = empty.keys()
    empty.store.ask("FLUSHALL")
    service = belonging(empty, "waiting", store_id).launch()
    eventually(lambda: service.probe("/livez") == 200)
    eventually(lambda: f"the store is empty, but this KEK belongs to store {store_id}" in service.reasons())
    service.wait_logged("store_not_usable")
    assert empty.keys() == {}
    for key, value in saved.items():
        empty.store.ask("RESTORE", key, 0, value)
    service.wait_ready()
    assert service.client("server").decrypt(key_id, ciphertext) == b"message"


def test_another_store_is_refused_by_all(empty: World, tmp_path: Path) -> None:
    """A store of the same KEK with another id: no service, rotation or backup works on it or changes it."""
    founder = empty.instance("founder").start()
    founder.client("server").create("t:1")
    founder.stop()
    before = empty.keys()
    other = belonging(empty, "other").launch()
    assert other.exit_code() == 1
    assert f"belongs to store {ID}" in other.err.read_text().splitlines()[-1]
    config = str(other.config)
    for words in (
        ("rotate", "--config", config),
        ("backup", "create", "--config", config, "--out", str(tmp_path / "e")),
        ("backup", "list", "--config", config),
    ):
        assert f"belongs to store {ID}" in command(*words), words
    assert empty.keys() == before


def test_a_running_service_becomes_unready_over_another_store(empty: World) -> None:
    """A store that is swapped under a running service is noticed, though its registry has the same KEK."""
    founder = empty.instance("begin").start()
    store_id = empty.store.ask("HGET", SCHEMA_KEY, "store_id").decode()
    founder.stop()
    service = belonging(empty, "swapped", store_id).start()
    empty.store.ask("HSET", SCHEMA_KEY, "store_id", ID)
    eventually(lambda: f"this is store {ID}" in service.reasons())
    empty.store.ask("HSET", SCHEMA_KEY, "store_id", store_id)
    service.wait_ready()


def test_an_import_brings_the_store_of_the_kek_back(tmp_path: Path) -> None:
    """An export of another store is refused for an empty one; the right one makes the store with its id."""
    machine = Machine(tmp_path / "one")
    machine.start_store()
    second = Machine(tmp_path / "two", machine.kek_file)
    second.start_store()
    try:
        with machine.service() as (kms, _):
            kms.create_dek_for_thread("room:1")
        store_id = str(machine.ask("HGET", SCHEMA_KEY, "store_id"), "ascii")  # type: ignore[call-overload] # bytes
        export = tmp_path / "e"
        assert machine.kms("backup", "create", "--config", machine.config, "--out", export).returncode == 0
        second.belongs_to(ID)
        refused = second.kms("backup", "import", export, "--config", second.config)
        assert refused.returncode == 1
        assert f"the export is of store {store_id}, but this KEK belongs to store {ID}" in refused.stderr
        assert second.ask("EXISTS", SCHEMA_KEY, IMPORT_KEY) == 0
        second.belongs_to(store_id)
        assert second.kms("backup", "import", export, "--config", second.config).returncode == 0
        assert second.ask("HGET", SCHEMA_KEY, "store_id") == store_id.encode()
        with second.service() as (kms, admin):
            assert len(list(admin.list_keys(limit=10))) == 1
    finally:
        machine.lose()
        second.lose()

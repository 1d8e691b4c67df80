"""KEK files of running services: checked against the registry, reloaded, never trusted when broken."""

from __future__ import annotations

import operator
from functools import partial
from pathlib import Path

import pytest

from progressdb_kms.store.redis.schema import KEKS_KEY
from tests.contract.wire_client import Client, assert_problem
from tests.integration.world import (
    KEK_1,
    KEK_2,
    KEK_3,
    Instance,
    World,
    eventually,
    kek_text,
    write_private,
)


@pytest.fixture
def server(service: Instance) -> Client:
    """Give a client that may create, encrypt, decrypt and read."""
    return service.client("server")


def test_a_second_version_is_loaded_without_restart_and_unused(
    world: World, service: Instance, server: Client
) -> None:
    """A version that the registry does not know is loaded, wraps nothing, and hurts nobody."""
    assert service.metric("kms_kek_versions_loaded") == 1
    world.write_keks({1: KEK_1, 2: KEK_2})
    service.until("kms_kek_versions_loaded", lambda count: count == 2)
    assert service.metric("kms_kek_versions_usable") == 1
    assert server.create("t:1")["kek_version"] == "1"
    assert server.get("/v1/keks").ok()["active"] == "1"
    assert service.probe("/readyz") == 200


def test_a_broken_file_keeps_the_last_good_keys_until_it_is_mended(
    world: World, service: Instance, server: Client
) -> None:
    """Whatever is wrong with the new file, keys are made and used as before, and an alert says so."""
    key_id = server.create("t:1")["key_id"]
    ciphertext = server.encrypt(key_id, b"message")
    broken = {
        "not YAML": "versions: [",
        "lacks version 1": kek_text({2: KEK_2}),
        "changes version 1": kek_text({1: KEK_3, 2: KEK_2}),
    }
    for name, text in broken.items():
        seen = service.metric("kms_reloads_total", what="kek", result="failed")
        write_private(world.kek_file, text)
        service.until("kms_reloads_total", partial(operator.lt, seen), what="kek", result="failed")
        assert service.metric("kms_reload_failed", what="kek") == 1, name
        assert server.decrypt(key_id, ciphertext) == b"message", name
        server.encrypt(server.create("t:1")["key_id"], b"message")
        assert service.probe("/readyz") == 200, name
    world.write_keks({1: KEK_1})
    service.until("kms_reload_failed", lambda failed: failed == 0, what="kek")
    assert server.decrypt(key_id, ciphertext) == b"message"


def refused(instance: Instance) -> str:
    """Wait for the end of an instance that must not start; return the one line that says why."""
    assert instance.exit_code() == 1
    lines = [line for line in instance.err.read_text().splitlines() if not line.startswith("{")]
    assert len(lines) == 1, lines
    assert KEK_1 not in lines[0]
    assert KEK_3 not in lines[0]
    return lines[0]


def test_a_file_open_to_others_is_refused_at_start(world: World, tmp_path: Path) -> None:
    """The message names the file and its mode."""
    path = tmp_path / "kek.yaml"
    write_private(path, kek_text({1: KEK_1}), 0o644)
    line = refused(world.instance("open", kek={"path": str(path)}).launch())
    assert "0644" in line
    assert str(path) in line


def test_a_kek_that_is_not_the_registered_one_is_refused_and_nothing_is_written(
    world: World, service: Instance, tmp_path: Path
) -> None:
    """The service ends with one line that names the version; the store is as it was."""
    service.client("server").create("t:1")
    service.stop()  # so that nobody else writes
    before = world.keys()
    wrong = {"another": {1: KEK_3}, "another-of-two": {1: KEK_3, 2: KEK_2}, "moved": {2: KEK_1}}
    instances = []
    for name, keks in wrong.items():
        path = tmp_path / f"{name}.yaml"
        write_private(path, kek_text(keks))
        instances.append(world.instance(name, kek={"path": str(path)}).launch())
    for instance in instances:
        assert "KEK version 1" in refused(instance), instance.folder.name
    assert world.keys() == before
    service.start()


def test_a_lost_registry_stops_new_services_and_makes_running_ones_unready(
    world: World, service: Instance, server: Client
) -> None:
    """No new service starts or makes the registry anew; the running one wraps no more keys and says why.

    What is wrapped can still be used; with the registry put back, all is well.
    """
    key_id = server.create("t:1")["key_id"]
    ciphertext = server.encrypt(key_id, b"message")
    saved = world.store.ask("HGETALL", KEKS_KEY)
    world.store.ask("DEL", KEKS_KEY)
    reasons = eventually(service.reasons)
    assert "registry" in reasons
    assert "kek" in reasons
    assert "registry" in refused(world.instance("late").launch())
    assert world.store.ask("EXISTS", KEKS_KEY) == 0
    refusal = server.post("/create_dek_for_thread", {"thread_id": "t:1"})
    problem = assert_problem(refusal, 503, "kek_unavailable")
    assert "registry" in problem["detail"]
    assert server.decrypt(key_id, ciphertext) == b"message"
    world.store.ask("HSET", KEKS_KEY, *saved)
    eventually(lambda: service.probe("/readyz") == 200)
    server.create("t:1")

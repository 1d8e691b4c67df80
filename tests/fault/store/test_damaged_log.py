"""The store's append-only file damaged where it was acknowledged: seen and reported, never passed over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.wire_client import Client
from tests.integration.test_audit import command
from tests.integration.world import Instance, World, eventually

pytestmark = [pytest.mark.fault, pytest.mark.slow]


@pytest.fixture
def world() -> Iterator[World]:
    """Run a service with an audit key that uses nothing from memory while the store is away."""
    made = World()
    made.store.start()
    assert command("audit", "keygen", "--out", made.root / "key").returncode == 0
    audit = {"key_file": str(made.root / "key" / "audit.yaml")}
    made.instance("a", cache={"max_stale": 0}, audit=audit).start()
    yield made
    made.close()


@pytest.fixture
def service(world: World) -> Instance:
    """Give the service."""
    return world.instances[0]


def log_of(world: World) -> Path:
    """Return the file that Redis appends to."""
    (path,) = (world.store.folder / "appendonlydir").glob("*.incr.aof")
    return path


def creates(client: Client) -> bool:
    """Say whether a key can be made."""
    return client.post("/create_dek_for_thread", {"thread_id": "room:1"}).status == 200


def test_records_that_are_gone_from_the_end_are_reported(world: World, service: Instance) -> None:
    """Acknowledged keys cut off: the running service's audit log does not fit, which it says and counts."""
    client = service.client("server")
    client.create("room:1")
    kept = log_of(world).stat().st_size
    lost = client.create("room:1")["key_id"]
    world.store.kill()
    os.truncate(log_of(world), kept)
    world.store.start()
    eventually(lambda: creates(client), "keys can be made")
    (conflict,) = service.logged("audit_conflict")
    assert "another history" in conflict["detail"]
    assert service.metric("kms_audit_conflicts_total") == 1
    assert world.store.ask("EXISTS", f"kms:{{{lost[2:4]}}}:dek:{lost}") == 0


def test_a_log_that_is_no_log_in_its_middle_is_not_loaded(world: World, service: Instance) -> None:
    """Redis does not start, the service answers 503 for as long, and works again with the file as it was."""
    client = service.client("server")
    for _ in range(20):
        client.create("room:1")
    world.store.kill()
    sound = log_of(world).read_bytes()
    middle = sound.index(b"\r\n*", len(sound) // 2) + 2
    log_of(world).write_bytes(sound[:middle] + b"#" * 8 + sound[middle + 8 :])
    with pytest.raises(AssertionError, match="Bad file format"):
        world.store.start()
    answer = client.post("/create_dek_for_thread", {"thread_id": "room:1"})
    assert (answer.status, int(answer.headers["retry-after"]) >= 1) == (503, True)
    log_of(world).write_bytes(sound)
    world.store.start()
    eventually(lambda: creates(client), "keys can be made")


def test_a_changed_byte_in_a_wrapped_key_is_no_other_key(world: World, service: Instance) -> None:
    """Redis loads it, for its log has no checksums; the blob's own tag refuses it, and other keys work."""
    client = service.client("server")
    hit, other = (client.create("room:1")["key_id"] for _ in range(2))
    ciphertexts = {key_id: client.encrypt(key_id, b"message") for key_id in (hit, other)}
    wrapped = world.store.ask("HGET", f"kms:{{{hit[2:4]}}}:dek:{hit}", "wrapped")
    service.stop()
    world.store.kill()
    sound = log_of(world).read_bytes()
    assert wrapped in sound
    log_of(world).write_bytes(sound.replace(wrapped, wrapped[:-1] + bytes([wrapped[-1] ^ 1])))
    world.store.start()
    service.start()
    client = service.client("server")
    answer = client.try_decrypt(hit, ciphertexts[hit])
    assert (answer.status, answer.json()["code"]) == (422, "wrapped_key_invalid")
    assert client.decrypt(other, ciphertexts[other]) == b"message"

"""Two services on one store behave as one: a key is there at once, and so is the end of its use."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from progressdb_kms.domain.keyring import KekInfo, KekState, check_value, kek_id_of
from progressdb_kms.store.redis.schema import KEKS_KEY, encode_kek
from tests.contract.wire_client import Client, assert_problem
from tests.integration.world import KEK_1, KEK_2, Instance, World, eventually, launch_all

CHANGES = pytest.mark.parametrize(
    "change, undo, code",
    [
        ("disable", ["enable"], "key_disabled"),
        ("schedule-destruction", ["cancel-destruction", "enable"], "key_pending_destruction"),
    ],
)


@pytest.fixture(scope="module")
def world(new_world: Callable[..., World]) -> World:
    """Run two services on one store."""
    made = new_world()
    made.store.start()
    launch_all([made.instance("a"), made.instance("b")])
    return made


@pytest.fixture
def a(world: World) -> Instance:
    """Give the first service."""
    return world.instances[0]


@pytest.fixture
def b(world: World) -> Instance:
    """Give the second service."""
    return world.instances[1]


@pytest.fixture
def thread_id() -> str:
    """Give a thread that no other test uses."""
    return f"thread-{secrets.token_hex(8)}"


def test_a_key_made_on_one_works_on_the_other_at_once(a: Instance, b: Instance, thread_id: str) -> None:
    """Create on A, encrypt on B, decrypt on A, without a pause."""
    one, other = a.client("server"), b.client("server")
    for _ in range(20):
        key_id = one.create(thread_id)["key_id"]
        assert one.decrypt(key_id, other.encrypt(key_id, b"message", b"aad"), b"aad") == b"message"


@CHANGES
def test_a_change_on_one_is_obeyed_by_the_other_within_a_second(
    a: Instance, b: Instance, thread_id: str, change: str, undo: list[str], code: str
) -> None:
    """A refuses at once, B after a second at most, although B held the key in memory; the way back works."""
    operator = a.client("operator")
    key_id = operator.create(thread_id)["key_id"]
    client = b.warm(key_id)
    ciphertext = client.encrypt(key_id, b"message")
    operator.post(f"/v1/keys/{key_id}/{change}").ok()
    assert_problem(operator.post("/encrypt", {"key_id": key_id, "plaintext": ""}), 409, code)
    time.sleep(1.0)
    assert_problem(client.post("/encrypt", {"key_id": key_id, "plaintext": ""}), 409, code)
    assert_problem(client.try_decrypt(key_id, ciphertext), 409, code)
    for step in undo:
        operator.post(f"/v1/keys/{key_id}/{step}").ok()
    time.sleep(1.0)
    assert client.decrypt(key_id, ciphertext) == b"message"
    client.encrypt(key_id, b"again")


@CHANGES
def test_an_instance_that_slept_through_a_change_refuses_with_its_first_answer(
    a: Instance, b: Instance, thread_id: str, change: str, undo: list[str], code: str
) -> None:
    """B is stopped with the key in memory; the request that waits for it when it wakes is refused."""
    operator = a.client("operator")
    key_id = operator.create(thread_id)["key_id"]
    client = b.warm(key_id)
    b.pause()
    try:
        operator.post(f"/v1/keys/{key_id}/{change}").ok()
        time.sleep(1.0)
        body = json.dumps({"key_id": key_id, "plaintext": ""})
        client._connection.request("POST", "/encrypt", body, {"Content-Type": "application/json"})
    finally:
        b.resume()
    response = client._connection.getresponse()
    assert (response.status, json.loads(response.read())["code"]) == (409, code)


def replay(instances: list[Instance], times: int, thread_id: str) -> list[dict[str, str]]:
    """Send one create with an Idempotency-Key `times` times at the same moment, over all instances."""
    start = threading.Barrier(times)

    def one(number: int) -> dict[str, str]:
        client = instances[number % len(instances)].client("server")
        client.get("/healthz").ok()
        start.wait()
        try:
            return client.create(thread_id, Idempotency_Key="the-key")
        finally:
            client.close()

    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(one, range(times)))


def follows(client: Client) -> bool:
    """Say whether the second KEK version is the active one."""
    return bool(client.get("/v1/keks").ok()["active"] == "2")


def activate_second_kek(world: World) -> None:
    """Do to the registry what a rotation of the KEK begins with."""

    def entry(version: int, key: str, state: KekState) -> str:
        value = check_value(bytes.fromhex(key))
        return encode_kek(KekInfo(version, kek_id_of(value), "file", str(version), value, state, 1, 1))

    world.write_keks({1: KEK_1, 2: KEK_2})
    for instance in world.instances:
        instance.until("kms_kek_versions_loaded", lambda count: count == 2)
    one, two = entry(1, KEK_1, KekState.DECRYPT_ONLY), entry(2, KEK_2, KekState.ACTIVE)
    world.store.ask("HSET", KEKS_KEY, "1", one, "2", two, "active", "2", "rev", "2")
    for instance in world.instances:
        eventually(partial(follows, instance.client("operator")), "the instance has read the registry")


def census(client: Client) -> dict[str, int]:
    """Return the number of DEKs by KEK version."""
    return {kek["version"]: kek["deks"] for kek in client.get("/v1/keks").ok()["keks"]}


def test_an_idempotency_key_means_one_key_through_restart_and_rewrap(
    world: World, a: Instance, b: Instance, thread_id: str
) -> None:
    """50 replays at once over both services, one after everything was restarted, one after a rewrap."""
    answers = replay([a, b], 50, thread_id)
    made = answers[0]
    assert all(answer == made for answer in answers)
    server = a.client("server")
    listed = server.get("/v1/keys", {"thread_id": thread_id}).ok()["keys"]
    assert [key["key_id"] for key in listed] == [made["key_id"]]
    others = [
        a.client("operator").create(thread_id, Idempotency_Key="the-key")["key_id"],
        server.create(thread_id + "x", Idempotency_Key="the-key")["key_id"],
        server.create(thread_id, Idempotency_Key="another-key")["key_id"],
        server.create(thread_id)["key_id"],
    ]
    assert len({made["key_id"], *others}) == 5
    ciphertext = server.encrypt(made["key_id"], b"message", b"aad")

    a.stop()
    b.stop()
    world.store.kill()
    world.store.start()
    launch_all([a, b])
    assert replay([a, b], 2, thread_id) == [made, made]

    activate_second_kek(world)
    server, operator = b.client("server"), a.client("operator")
    assert replay([a, b], 2, thread_id) == [made, made]
    before = census(operator)
    rewrapped = operator.post("/rewrap", {"key_id": made["key_id"]}).ok()
    assert (rewrapped["key_id"], rewrapped["kek_version"]) == (made["key_id"], "2")
    assert rewrapped["wrapped"] != made["wrapped"]
    after = census(operator)
    assert (after["1"], after["2"]) == (before["1"] - 1, before["2"] + 1)
    expected = {**made, **rewrapped}
    assert replay([a, b], 2, thread_id) == [expected, expected]
    assert server.get("/get_wrapped", {"key_id": made["key_id"]}).ok()["wrapped"] == rewrapped["wrapped"]
    for client in (server, operator):
        assert client.decrypt(made["key_id"], ciphertext, b"aad") == b"message"
    assert server.create(thread_id)["kek_version"] == "2"

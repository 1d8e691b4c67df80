"""The store dies, hangs, or is not there yet: what can be answered is, the rest says to come back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest

from tests.contract.wire_client import Client, assert_problem
from tests.integration.world import PROMPT_STORE, World, eventually, launch_all


@pytest.fixture(scope="module")
def world(new_world: Callable[..., World]) -> World:
    """Run a service that may answer from memory while the store is away, and one that soon may not."""
    made = new_world()
    made.store.start()
    patient = made.instance("patient", cache={"max_stale": 600}, store=PROMPT_STORE)
    impatient = made.instance("impatient", cache={"max_stale": 1.5}, store=PROMPT_STORE)
    launch_all([patient, impatient])
    return made


class Keys(NamedTuple):
    """A key that both services hold in memory, its ciphertext, and one that the patient one does not."""

    hot: str
    ciphertext: bytes
    cold: str


@pytest.fixture
def keys(world: World) -> Keys:
    """Make the keys."""
    patient, impatient = world.instances
    client = patient.client("server")
    hot = client.create("t:1")["key_id"]
    patient.warm(hot)
    impatient.warm(hot)
    # The other one keeps what it has made; this one has to fetch it.
    cold = impatient.client("server").create("t:1")["key_id"]
    return Keys(hot, client.encrypt(hot, b"message"), cold)


def answers(client: Client, path: str, body: dict[str, str]) -> bool:
    """Say whether this is answered with 200."""
    return client.post(path, body).status == 200


def assert_away(client: Client, path: str, body: dict[str, str]) -> None:
    """Assert that this is refused as what needs the store, and that the caller is told to come back."""
    answer = client.post(path, body)
    problem = assert_problem(answer, 503, "store_unavailable")
    assert problem["retryable"] is True
    assert int(answer.headers["retry-after"]) >= 1


def go_on_without_store(world: World, keys: Keys) -> None:
    """What is promised while the store is away, whether it is dead or hangs."""
    patient, impatient = world.instances
    client = patient.client("server")

    def stale() -> float:
        client.encrypt(keys.hot, b"more")
        assert client.decrypt(keys.hot, keys.ciphertext) == b"message"
        return patient.metric("kms_key_cache_lookups_total", outcome="stale")

    before = patient.metric("kms_key_cache_lookups_total", outcome="stale")
    eventually(lambda: stale() > before, "served although the store is away")
    assert_away(client, "/encrypt", {"key_id": keys.cold, "plaintext": ""})
    assert_away(client, "/create_dek_for_thread", {"thread_id": "t:1"})
    for instance in (patient, impatient):
        instance.until("kms_store_reachable", lambda reachable: reachable == 0)
        assert instance.probe("/readyz") == 200
        assert instance.probe("/livez") == 200
    other = impatient.client("server")
    body = {"key_id": keys.hot, "plaintext": ""}
    eventually(lambda: other.post("/encrypt", body).status == 503, "cache.max_stale is over")
    assert_away(other, "/encrypt", body)


def all_is_well_again(world: World, keys: Keys) -> None:
    """Everything works, without a restart of the services."""
    for instance in world.instances:
        client = instance.client("server")
        eventually(partial(answers, client, "/create_dek_for_thread", {"thread_id": "t:1"}))
        eventually(partial(answers, client, "/encrypt", {"key_id": keys.hot, "plaintext": ""}))
        eventually(partial(answers, client, "/encrypt", {"key_id": keys.cold, "plaintext": ""}))
        assert client.decrypt(keys.hot, keys.ciphertext) == b"message"
        instance.until("kms_store_reachable", lambda reachable: reachable == 1)
        assert instance.probe("/readyz") == 200


def test_a_store_that_dies_and_comes_back(world: World, keys: Keys) -> None:
    """Killed: keys in memory serve as long as the service may, all else is 503; back, all works again."""
    world.store.kill()
    try:
        go_on_without_store(world, keys)
    finally:
        world.store.start()
    all_is_well_again(world, keys)


def test_a_store_that_hangs_and_goes_on(world: World, keys: Keys) -> None:
    """Frozen: the same, every request within its deadline."""
    world.store.pause()
    try:
        go_on_without_store(world, keys)
    finally:
        world.store.resume()
    all_is_well_again(world, keys)


def test_a_service_that_starts_before_its_store_waits_for_it(new_world: Callable[..., World]) -> None:
    """It lives and says what it waits for, refuses what needs the store, and becomes ready by itself.

    Another one that is told to end while it waits ends with exit code 0.
    """
    world = new_world()
    service, tired = (world.instance(name, store=PROMPT_STORE).launch() for name in ("early", "tired"))
    eventually(lambda: tired.probe("/livez") == 200)
    tired.stop()
    eventually(lambda: service.probe("/livez") == 200)
    assert service.probe("/readyz") == 503
    assert "the store does not answer" in service.reasons()
    answer = service.client("server").post("/create_dek_for_thread", {"thread_id": "t:1"})
    assert answer.status == 503
    assert answer.json()["code"] in {"not_ready", "store_unavailable"}
    assert int(answer.headers["retry-after"]) >= 1
    world.store.start()
    service.wait_ready()
    client = service.client("server")
    client.encrypt(client.create("t:1")["key_id"], b"message")

"""Limits of the policy, over the wire."""

from __future__ import annotations

import threading

from tests.contract.wire_client import Client, assert_problem
from tests.integration.world import Instance, World, eventually


def test_a_rate_holds_for_all_connections_and_for_one_identity(service: Instance) -> None:
    """Beyond it a caller gets 429 and when to come again, others notice nothing; a batch counts its items."""
    key_id = service.client("server").create("t:1")["key_id"]
    body = {"key_id": key_id, "plaintext": ""}
    service.limit(operations_per_second=1, burst=40)
    service.client("server").post("/encrypt_batch", {"items": [body] * 100}).ok()
    refused = service.client("server").post("/encrypt", body)
    problem = assert_problem(refused, 429, "too_many_requests")
    assert problem["retryable"]
    assert 50 <= int(refused.headers["retry-after"]) <= 61
    service.client("server").get("/healthz").ok()
    service.client("operator").encrypt(key_id, b"message")
    service.limit()
    service.client("server").encrypt(key_id, b"message")


def test_a_cap_on_requests_under_way(world: World, service: Instance) -> None:
    """While as many wait for the store as may, a further one is refused at once; a place gets free again."""
    service.limit(concurrent=1)
    key_id = service.client("server").create("t:1")["key_id"]
    waiting: Client = service.client("server")
    ended = threading.Event()

    def create() -> None:
        # Refused only where the other one, which asks again and again, has the place at that moment.
        while waiting.post("/create_dek_for_thread", {"thread_id": "t:2"}).status == 429:
            pass
        ended.set()

    thread = threading.Thread(target=create)
    world.store.pause()
    try:
        thread.start()
        other = service.client("server")
        refused = {"code": "too_many_requests"}

        def is_refused() -> bool:
            answer = other.post("/encrypt", {"key_id": key_id, "plaintext": ""})
            return answer.status == 429 and refused.items() <= answer.json().items()

        eventually(lambda: is_refused() or ended.is_set())
        assert not ended.is_set()
    finally:
        world.store.resume()
        thread.join()
    other.encrypt(key_id, b"message")
    service.limit()

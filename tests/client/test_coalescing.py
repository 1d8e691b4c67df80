"""Calls of one moment travel as one batch, and each caller gets what a single request would have given it."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import msgspec
import pytest

from progressdb_kms.client import (
    aio_coalescing,
    blocking_coalescing,
    open_provider,
    open_sync_provider,
)
from progressdb_kms.client.aio_coalescing import CoalescingSender
from progressdb_kms.client.blocking_coalescing import SyncCoalescingSender
from progressdb_kms.client.coalescing import ALONE_BYTES
from progressdb_kms.client.endpoint import TlsFiles
from progressdb_kms.domain.errors import (
    DeadlineExceeded,
    KmsError,
)
from tests.client.crew import CREATE, Crew, encrypts, eventually, opened, paths, results
from tests.client.faults import refuse
from tests.client.harness import Facade
from tests.client.standin import BATCHES, StandIn


@pytest.fixture
def coalesce() -> bool:
    """What is tested here."""
    return True


async def test_a_lone_call_is_a_single_request(crew: Crew, standin: StandIn, key_id: str) -> None:
    """One after the other, calls go as they always have."""
    standin.seen.clear()
    for number in range(3):
        sealed = await crew.kms.encrypt_with_dek(key_id, b"m%d" % number)
        assert await crew.kms.decrypt_with_dek(key_id, sealed.ciphertext) == b"m%d" % number
    assert paths(standin) == ["/encrypt", "/decrypt"] * 3


async def test_calls_gather_while_requests_are_out(crew: Crew, standin: StandIn, key_id: str) -> None:
    """Twenty of them then travel as one, and each caller gets its own result."""
    standin.seen.clear()
    sealed = await crew.together(encrypts(key_id, 20))
    assert opened(standin, key_id, sealed) == [b"m%d" % number for number in range(20)]
    assert paths(standin) == ["/encrypt", "/encrypt", "/encrypt_batch"]
    texts = [("decrypt_with_dek", key_id, item.ciphertext, b"aad") for item in sealed]
    assert await crew.together(texts, "/decrypt") == [b"m%d" % number for number in range(20)]
    made = await crew.together([("create_dek_for_thread", f"t{number}") for number in range(20)], CREATE)
    assert [standin.keys[dek.key_id].thread_id for dek in made] == [f"t{number}" for number in range(20)]
    assert len([path for path in paths(standin) if path in BATCHES]) == 3


@pytest.mark.parametrize("kind", ["async"])
async def test_tasks_of_one_moment_are_one_batch(crew: Crew, standin: StandIn, key_id: str) -> None:
    """Not even the first of them goes ahead, since all are there before anything is sent."""
    standin.seen.clear()
    sealed = await asyncio.gather(*[crew.kms.encrypt_with_dek(*call[1:]) for call in encrypts(key_id, 64)])
    assert opened(standin, key_id, sealed) == [b"m%d" % number for number in range(64)]
    assert paths(standin) == ["/encrypt_batch"]


@pytest.mark.parametrize("held_by", ["gathering", "batch"])
async def test_a_deadline_is_each_calls_own(crew: Crew, standin: StandIn, key_id: str, held_by: str) -> None:
    """A call whose time is over raises, while it gathers or is out; the others' batch goes on."""
    gate, held = await crew.occupy(*encrypts(key_id, 1)[0])
    hurried = crew.start("encrypt_with_dek", key_id, b"hurried", deadline=1.5)
    await eventually(lambda: crew.gathered() == 1)
    began = [crew.start(*call) for call in encrypts(key_id, 3)]
    await eventually(lambda: crew.gathered() == 4)
    second = type(gate)()
    if held_by == "batch":
        standin.faults.append(second)
        gate.open()
        await eventually(lambda: second.held == 1)
    (error,) = await results([hurried])
    assert isinstance(error, DeadlineExceeded)
    assert error.detail == f"{standin.url} did not answer in time"
    assert not any(call.done() for call in began)
    gate.open()
    second.open()
    assert opened(standin, key_id, await results(began)) == [b"m0", b"m1", b"m2"]
    await results(held)
    items = [json.loads(seen.body)["items"] for seen in standin.seen if seen.path == "/encrypt_batch"]
    assert [len(batch) for batch in items] == [4 if held_by == "batch" else 3]


@pytest.mark.parametrize("kind", ["async"])
async def test_a_cancelled_call_ends_alone(crew: Crew, standin: StandIn, key_id: str) -> None:
    """Before the batch is sent it is left out, after that its result is; the others go on."""
    gate, held = await crew.occupy(*encrypts(key_id, 1)[0])
    began = await crew.gather(encrypts(key_id, 4))
    began.pop(0).cancel()
    second = type(gate)()
    standin.faults.append(second)
    gate.open()
    await eventually(lambda: second.held == 1)
    began.pop(0).cancel()
    second.open()
    assert opened(standin, key_id, await results(began)) == [b"m2", b"m3"]
    await results(held)
    assert [len(json.loads(seen.body)["items"]) for seen in standin.seen if seen.path in BATCHES] == [3]


@pytest.mark.parametrize("kind", ["async"])
async def test_a_batch_that_nobody_waits_for_is_given_up(crew: Crew, standin: StandIn, key_id: str) -> None:
    """Its request ends, and makes room for the next."""
    gate, held = await crew.occupy(*encrypts(key_id, 1)[0])
    began = await crew.gather(encrypts(key_id, 3))
    for call in held:
        call.cancel()
    await eventually(lambda: gate.held == 2 and paths(standin)[-1] == "/encrypt_batch")
    assert opened(standin, key_id, await results(began)) == [b"m0", b"m1", b"m2"]
    assert not crew.lane()._out


async def test_requests_that_hang_hold_up_nobody(
    crew: Crew, standin: StandIn, key_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has gathered for a while goes all the same."""
    for module in (aio_coalescing, blocking_coalescing):
        monkeypatch.setattr(module, "PATIENCE", 0.01)
    gate, held = await crew.occupy(*encrypts(key_id, 1)[0])
    found = await results([crew.start(*call) for call in encrypts(key_id, 4)])
    assert opened(standin, key_id, found) == [b"m0", b"m1", b"m2", b"m3"]
    assert not any(call.done() for call in held)
    gate.open()
    await results(held)


async def test_some_calls_go_alone_at_once(crew: Crew, standin: StandIn, key_id: str) -> None:
    """Large ones, those with headers, and those with an unusual Idempotency-Key wait for nobody."""
    gate, held = await crew.occupy(*encrypts(key_id, 1)[0])
    large = await crew.kms.encrypt_with_dek(key_id, b"x" * ALONE_BYTES, b"aad")
    traced = await crew.kms.encrypt_with_dek(key_id, b"m", b"aad", headers={"X-Request-Id": "mine"})
    assert opened(standin, key_id, [large, traced]) == [b"x" * ALONE_BYTES, b"m"]
    assert standin.seen[-1].headers["x-request-id"] == "mine"
    gate.open()
    await results(held)
    gate, held = await crew.occupy("create_dek_for_thread", "t")
    await crew.kms.create_dek_for_thread("t", idempotency_key="two words")
    gate.open()
    await results(held)


async def test_a_call_that_can_not_be_encoded_fails_alone(crew: Crew, standin: StandIn, key_id: str) -> None:
    """It never becomes part of a batch, nor can what it holds become another item."""
    forged: Any = msgspec.Raw(b'"x","plaintext":""},{"key_id":"y"')
    gate, held = await crew.occupy(*encrypts(key_id, 1)[0])
    began = await crew.gather(encrypts(key_id, 2))
    found = await results(
        [crew.start("encrypt_with_dek", bad, b"m") for bad in ("\ud800", object())]
        + [crew.start("create_dek_for_thread", bad) for bad in (object(),)]
    )
    assert [type(error) for error in found] == [UnicodeEncodeError, TypeError, TypeError]
    assert crew.gathered() == 2
    standin.faults.append(refuse(400, "malformed_body"))
    assert isinstance((await results([crew.start("encrypt_with_dek", forged, b"m")]))[0], KmsError)
    gate.open()
    assert opened(standin, key_id, await results(began)) == [b"m0", b"m1"]
    await results(held)


async def test_close_lets_calls_finish(crew: Crew, standin: StandIn, key_id: str) -> None:
    """What is out and what has gathered is answered, what comes later is refused, and no thread stays."""
    before = threading.enumerate()
    gate, held = await crew.occupy(*encrypts(key_id, 1)[0])
    began = await crew.gather(encrypts(key_id, 3))
    await crew.kms.close()
    (refused,) = await results([crew.start(*encrypts(key_id, 1)[0])])
    assert refused.code == "provider_closed"
    gate.open()
    assert opened(standin, key_id, await results(held + began)) == [b"m0"] * 2 + [b"m0", b"m1", b"m2"]
    await crew.close()
    # The stand-in's threads and those that pytest's loop waits in come and go.
    others = ("process_request_thread", "asyncio_")
    stayed = [thread.name for thread in threading.enumerate() if thread not in before]
    assert [name for name in stayed if not any(other in name for other in others)] == []


@pytest.mark.parametrize(
    "options,together", [({}, True), ({"coalesce": True}, True), ({"coalesce": False}, False)]
)
async def test_coalescing_is_on_unless_it_is_switched_off(
    standin: StandIn, files: TlsFiles, kind: str, options: dict[str, Any], together: bool
) -> None:
    """The option of `open_provider` and its twin says so."""
    opener = open_provider if kind == "async" else open_sync_provider
    kms = Facade(opener(standin.url, ca=files.ca, cert=files.cert, key=files.key, deadline=20, **options))
    async with kms:
        sender = kms.provider._sender  # type: ignore[union-attr] # of both kinds
        assert isinstance(sender, CoalescingSender | SyncCoalescingSender) is together
        if kind == "async":
            made = await kms.create_dek_for_thread("t")
            await asyncio.gather(*[kms.encrypt_with_dek(made.key_id, b"m") for _ in range(8)])
            assert ("/encrypt_batch" in paths(standin)) is together

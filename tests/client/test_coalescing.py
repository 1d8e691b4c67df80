"""Calls of one moment travel as one batch, and each caller gets what a single request would have given it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from progressdb_kms.client import (
    ConnectionFailed,
    CreatedDek,
    Encrypted,
    ProtocolViolation,
    aio_coalescing,
    blocking_coalescing,
    request_id_of,
)
from progressdb_kms.client.coalescing import ALONE_BYTES
from progressdb_kms.domain.errors import (
    AuthenticationFailed,
    InternalError,
    KeyNotFound,
    KmsError,
    MalformedCiphertext,
    PermissionDenied,
    StoreUnavailable,
    TooManyRequests,
)
from tests.client.crew import Crew, eventually, results
from tests.client.faults import drop, drop_after_work, plain, refuse
from tests.client.harness import Open
from tests.client.standin import BATCHES, Handler, ProblemError, StandIn

CREATE = "/create_dek_for_thread"


@pytest.fixture
def coalesce() -> bool:
    """What is tested here."""
    return True


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls gather for as long as a test holds requests."""
    for module in (aio_coalescing, blocking_coalescing):
        monkeypatch.setattr(module, "PATIENCE", 60.0)


@pytest.fixture
async def crew(open_kms: Open, standin: StandIn) -> AsyncIterator[Crew]:
    """Callers of a provider."""
    crew = Crew(open_kms(deadline=30.0), standin)
    yield crew
    await crew.close()


@pytest.fixture
async def key_id(crew: Crew) -> str:
    """A key to encrypt with."""
    made: CreatedDek = await crew.kms.create_dek_for_thread("t")
    return made.key_id


def encrypts(key_id: str, count: int) -> list[tuple[Any, ...]]:
    """Return calls that encrypt different texts."""
    return [("encrypt_with_dek", key_id, b"m%d" % number, b"aad") for number in range(count)]


def opened(standin: StandIn, key_id: str, sealed: list[Any]) -> list[Any]:
    """Return what ciphertexts hold, errors as they are."""
    return [
        standin.decrypt(key_id, item.ciphertext, b"aad")["plaintext"] if isinstance(item, Encrypted) else item
        for item in sealed
    ]


def paths(standin: StandIn) -> list[str]:
    """Return the paths of the requests that came."""
    return [request.path for request in standin.seen]


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


async def test_errors_are_each_calls_own(crew: Crew, standin: StandIn, key_id: str) -> None:
    """What is forged, cut or of an unknown key fails as it does alone, beside what opens."""
    good = (await crew.kms.encrypt_with_dek(key_id, b"m", b"aad")).ciphertext
    calls = [(key_id, good, b"aad"), (key_id, good, b"b"), (key_id, b"x" * 27), ("none", good, b"aad")]
    found = await crew.together([("decrypt_with_dek", *call) for call in calls], "/decrypt")
    assert found[0] == b"m"
    assert [type(error) for error in found[1:]] == [AuthenticationFailed, MalformedCiphertext, KeyNotFound]
    sent = standin.seen[-1].headers["x-request-id"]
    assert [request_id_of(error) for error in found[1:]] == [sent] * 3


async def test_a_missing_permission_is_named(
    crew: Crew, standin: StandIn, key_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch's answer does not say which, so that call is made again alone."""
    refused = ProblemError(403, "permission_denied", permission="key:encrypt", identity="dns:chat")
    refuse_for(standin, monkeypatch, b"m1", refused)
    found = await crew.together(encrypts(key_id, 3))
    error = found.pop(1)
    assert isinstance(error, PermissionDenied)
    assert (error.permission, error.identity) == ("key:encrypt", "dns:chat")
    assert opened(standin, key_id, found) == [b"m0", b"m2"]


def refuse_for(
    standin: StandIn, monkeypatch: pytest.MonkeyPatch, text: bytes, error: ProblemError, times: int = 99
) -> None:
    """Let the stand-in refuse one plaintext, so many times."""
    encrypt, left = standin.encrypt, [times]

    def refusing(key_id: str, plaintext: bytes, aad: bytes | None = None) -> dict[str, Any]:
        if plaintext == text and left[0]:
            left[0] -= 1
            raise error
        return encrypt(key_id, plaintext, aad)

    monkeypatch.setattr(standin, "encrypt", refusing)


async def test_an_item_is_retried_alone(
    crew: Crew, standin: StandIn, key_id: str, monkeypatch: pytest.MonkeyPatch, clock
) -> None:
    """As the single call would be: after a pause, and the others don't wait for it."""
    refuse_for(standin, monkeypatch, b"m1", ProblemError(503, "store_unavailable"), 2)
    standin.seen.clear()
    found = await crew.together(encrypts(key_id, 3))
    assert opened(standin, key_id, found) == [b"m0", b"m1", b"m2"]
    assert paths(standin) == ["/encrypt", "/encrypt", "/encrypt_batch", "/encrypt", "/encrypt"]
    assert clock.waits == [0.1, 0.2]


@pytest.mark.parametrize(
    "fault,error",
    [
        (refuse(503, "store_unavailable"), StoreUnavailable),
        (refuse(429, "too_many_requests"), TooManyRequests),
        (drop, ConnectionFailed),
    ],
    ids=["503", "429", "dropped"],
)
async def test_a_batch_that_fails_fails_each_call_by_itself(
    crew: Crew, standin: StandIn, key_id: str, fault, error
) -> None:
    """After its retries, with an exception that no other caller has."""
    gate, held = await crew.occupy(*encrypts(key_id, 1)[0])
    began = await crew.gather(encrypts(key_id, 5))
    standin.seen.clear()
    standin.always = fault
    gate.open()
    found = await results(began)
    assert [type(failure) for failure in found] == [error] * 5
    assert len({id(failure) for failure in found}) == 5
    assert len({id(failure.__traceback__) for failure in found}) == 5
    assert all(failure.detail == found[0].detail for failure in found)
    # Three tries of each, of which the first was the same for all.
    assert paths(standin)[0] == "/encrypt_batch"
    assert paths(standin).count("/encrypt") >= 5
    standin.always = None
    await results(held)


async def test_a_transient_failure_is_not_seen(crew: Crew, standin: StandIn, key_id: str) -> None:
    """A batch that meets one is made again, and creates make no second key."""
    keys = len(standin.keys)
    calls = [(f"t{number}", {"idempotency_key": f"i{number}"} if number % 2 else {}) for number in range(6)]
    gate, held = await crew.occupy("create_dek_for_thread", "first")
    began = []
    for number, (thread, options) in enumerate(calls):
        began.append(crew.start("create_dek_for_thread", thread, **options))
        await eventually(lambda count: crew.gathered(CREATE) == count, number + 1)
    standin.faults.append(drop_after_work)
    gate.open()
    made = await results(began)
    assert [standin.keys[dek.key_id].thread_id for dek in made] == [thread for thread, _ in calls]
    assert standin.by_idempotency["i1"].key_id == made[1].key_id
    assert len(standin.keys) == keys + len(await results(held)) + 6


@pytest.mark.parametrize(
    "fault",
    [
        refuse(500, "internal_error"),
        refuse(400, "malformed_body"),
        plain(403, b"no such path here"),
        plain(404, b"404 page not found"),
        plain(200, b'{"results": []}'),
        plain(200, b'{"results": [{}, {}, {}]}'),
        plain(200, b"<html>"),
    ],
    ids=["500", "400", "403", "404", "too few", "neither", "no answer"],
)
async def test_what_a_batch_can_not_do_is_done_alone(
    crew: Crew, standin: StandIn, key_id: str, fault
) -> None:
    """A failure that single calls would not have met reaches none of them."""
    gate, held = await crew.occupy(*encrypts(key_id, 1)[0])
    began = await crew.gather(encrypts(key_id, 3))
    standin.faults.append(fault)
    gate.open()
    assert opened(standin, key_id, await results(began)) == [b"m0", b"m1", b"m2"]
    await results(held)


async def test_what_alone_fails_too_fails(crew: Crew, standin: StandIn, key_id: str) -> None:
    """With the error of the single call."""
    gate, held = await crew.occupy(*encrypts(key_id, 1)[0])
    began = await crew.gather(encrypts(key_id, 3))
    standin.always = refuse(500, "internal_error")
    gate.open()
    assert [type(error) for error in await results(began)] == [InternalError] * 3
    standin.always = plain(200, b"[]")
    assert isinstance((await results([crew.start(*encrypts(key_id, 1)[0])]))[0], ProtocolViolation)
    standin.always = None
    await results(held)


async def test_a_caller_without_rights_is_told_once(crew: Crew, standin: StandIn, key_id: str) -> None:
    """A refusal of the whole batch is each call's own, and nothing is sent again."""
    gate, held = await crew.occupy(*encrypts(key_id, 1)[0])
    began = await crew.gather(encrypts(key_id, 3))
    standin.seen.clear()
    standin.faults.append(refuse(403, "permission_denied", permission="p", identity="i"))
    gate.open()
    found = await results(began)
    assert [(type(error), error.permission, error.identity) for error in found] == [
        (PermissionDenied, "p", "i")
    ] * 3
    assert len({id(error) for error in found}) == 3
    await results(held)
    assert paths(standin) == ["/encrypt_batch"]


async def test_an_older_service_is_asked_for_batches_once(crew: Crew, standin: StandIn, key_id: str) -> None:
    """It has none, so all calls go alone, and for a while nobody asks again."""
    standin.old = True
    assert opened(standin, key_id, await crew.together(encrypts(key_id, 3))) == [b"m0", b"m1", b"m2"]
    standin.seen.clear()
    found = await results([crew.start(*call) for call in encrypts(key_id, 8)])
    assert opened(standin, key_id, found) == [b"m%d" % number for number in range(8)]
    assert paths(standin) == ["/encrypt"] * 8


async def test_a_service_that_takes_fewer_items(crew: Crew, standin: StandIn, key_id: str) -> None:
    """It gets batches of what it takes, from then on."""
    standin.max_items = 3
    found = await crew.together(encrypts(key_id, 16))
    assert opened(standin, key_id, found) == [b"m%d" % number for number in range(16)]
    standin.seen.clear()
    await crew.together(encrypts(key_id, 4))
    assert "/encrypt_batch" in paths(standin)
    assert all(len(json.loads(seen.body)["items"]) <= 3 for seen in standin.seen if seen.path in BATCHES)


async def test_a_service_that_takes_fewer_bytes(crew: Crew, standin: StandIn, key_id: str) -> None:
    """Likewise, down to single calls."""

    def bounded(handler: Handler) -> bool:
        return len(handler.seen.body) < 500 or refuse(413, "body_too_large")(handler)

    standin.always = bounded
    found = await crew.together(encrypts(key_id, 16))
    assert opened(standin, key_id, found) == [b"m%d" % number for number in range(16)]


@pytest.mark.parametrize("held_by", ["gathering", "batch"])
async def test_a_deadline_is_each_calls_own(crew: Crew, standin: StandIn, key_id: str, held_by: str) -> None:
    """A call whose time is over raises, while it gathers or is out; the others' batch goes on."""
    gate, held = await crew.occupy(*encrypts(key_id, 1)[0])
    hurried = crew.start("encrypt_with_dek", key_id, b"hurried", deadline=0.4)
    await eventually(lambda: crew.gathered() == 1)
    began = [crew.start(*call) for call in encrypts(key_id, 3)]
    await eventually(lambda: crew.gathered() == 4)
    second = type(gate)()
    if held_by == "batch":
        standin.faults.append(second)
        gate.open()
        await eventually(lambda: second.held == 1)
    (error,) = await results([hurried])
    assert type(error).__name__ == "DeadlineExceeded"
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
    threads = threading.active_count()
    gate, held = await crew.occupy(*encrypts(key_id, 1)[0])
    began = await crew.gather(encrypts(key_id, 3))
    await crew.kms.close()
    (refused,) = await results([crew.start(*encrypts(key_id, 1)[0])])
    assert refused.code == "provider_closed"
    gate.open()
    assert opened(standin, key_id, await results(held + began)) == [b"m0"] * 2 + [b"m0", b"m1", b"m2"]
    await crew.close()
    assert threading.active_count() <= threads + 1

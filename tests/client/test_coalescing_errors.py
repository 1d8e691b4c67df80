"""What fails in a batch, or fails one, reaches each caller as its own single request would have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from progressdb_kms.client import (
    ConnectionFailed,
    ProtocolViolation,
    request_id_of,
)
from progressdb_kms.domain.errors import (
    AuthenticationFailed,
    InternalError,
    KeyNotFound,
    MalformedCiphertext,
    PermissionDenied,
    StoreUnavailable,
    TooManyRequests,
)
from tests.client.crew import CREATE, Crew, encrypts, eventually, opened, paths, results
from tests.client.faults import drop, drop_after_work, plain, refuse
from tests.client.standin import BATCHES, Handler, ProblemError, StandIn


@pytest.fixture
def coalesce() -> bool:
    """What is tested here."""
    return True


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


async def test_a_service_that_takes_single_items(crew: Crew, standin: StandIn, key_id: str) -> None:
    """It is sent no batches any more, and calls don't wait for one another."""
    standin.max_items = 1
    found = await crew.together(encrypts(key_id, 16))
    assert opened(standin, key_id, found) == [b"m%d" % number for number in range(16)]
    standin.seen.clear()
    found = await results([crew.start(*call) for call in encrypts(key_id, 8)])
    assert opened(standin, key_id, found) == [b"m%d" % number for number in range(8)]
    assert paths(standin) == ["/encrypt"] * 8


async def test_a_lone_call_keeps_its_request_id(crew: Crew, standin: StandIn, key_id: str) -> None:
    """Over all its tries, whether these may join others or not."""
    standin.seen.clear()
    standin.faults.extend([drop, refuse(503, "overloaded")])
    await crew.kms.encrypt_with_dek(key_id, b"m")
    assert paths(standin) == ["/encrypt"] * 3
    assert len({request.headers["x-request-id"] for request in standin.seen}) == 1

"""What is tried again, how often, how long after, and that a retry changes nothing."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.client import ConnectionFailed, ProtocolViolation, SyncKmsProvider
from progressdb_kms.client.endpoint import Endpoint, TlsFiles
from progressdb_kms.client.retry import Failure, RetryPolicy, parse_retry_after, pause_before_retry
from progressdb_kms.domain.errors import (
    DeadlineExceeded,
    InternalError,
    KeyDisabled,
    Overloaded,
    RequestTimeout,
    StoreUnavailable,
    TooManyRequests,
)
from tests.client.faults import (
    drip,
    drop,
    drop_after_work,
    hang,
    hang_and_tell,
    plain,
    raw,
    refuse,
    say_close,
)
from tests.client.harness import Clock, Facade, Open, build
from tests.client.standin import StandIn


async def test_two_retries_then_the_error(kms: Facade, standin: StandIn, clock: Clock) -> None:
    """A service that stays away is asked three times, after waits that double."""
    standin.always = refuse(503, "store_unavailable")
    with pytest.raises(StoreUnavailable) as caught:
        await kms.encrypt_with_dek("k", b"m")
    assert caught.value.detail == "detail of store_unavailable"
    assert len(standin.seen) == 3
    assert clock.waits == [0.1, 0.2]


@pytest.mark.parametrize(
    "fault",
    [
        refuse(503, "store_unavailable"),
        refuse(429, "too_many_requests"),
        plain(502, b"bad gateway"),
        plain(504, b""),
        drop,
    ],
    ids=["503", "429", "502", "504", "dropped"],
)
async def test_transient_failures_are_retried(kms: Facade, standin: StandIn, fault) -> None:
    """Once over, nobody notices them."""
    standin.faults.extend([fault, fault])
    assert (await kms.health()).status == "ok"
    assert len(standin.seen) == 3


@pytest.mark.parametrize(
    "fault,error",
    [
        (refuse(409, "key_disabled"), KeyDisabled),
        (refuse(500, "internal_error"), InternalError),
        (refuse(408, "request_timeout"), RequestTimeout),
        (refuse(503, "overloaded", retryable=False), Overloaded),
        (raw(b"HTTP/1.1 2OO never\r\n\r\n"), ProtocolViolation),
        (plain(200, b"{}"), ProtocolViolation),
    ],
    ids=["409", "500", "408", "503-not-retryable", "not-http", "not-an-answer"],
)
async def test_lasting_failures_are_not_retried(kms: Facade, standin: StandIn, fault, error) -> None:
    """What would fail again is asked once."""
    standin.always = fault
    with pytest.raises(error):
        await kms.encrypt_with_dek("k", b"m")
    assert len(standin.seen) == 1


async def test_retries_can_be_switched_off(open_kms: Open, standin: StandIn) -> None:
    """`retries=0` asks once."""
    standin.always = refuse(503, "store_unavailable")
    with pytest.raises(StoreUnavailable):
        await open_kms(retries=0).health()
    assert len(standin.seen) == 1


async def test_a_create_carries_one_idempotency_key_over_its_tries(kms: Facade, standin: StandIn) -> None:
    """A create that was carried out but not answered finds its DEK again."""
    standin.faults.append(drop_after_work)
    dek = await kms.create_dek_for_thread("t")
    assert list(standin.keys) == [dek.key_id]
    tokens = [request.headers["idempotency-key"] for request in standin.seen]
    assert len(tokens) == 2
    assert len(set(tokens)) == 1
    await kms.create_dek_for_thread("t")
    assert standin.seen[-1].headers["idempotency-key"] != tokens[0]


async def test_a_batch_create_carries_its_keys_over_its_tries(kms: Facade, standin: StandIn) -> None:
    """Each item keeps its idempotency key, which is no other item's."""
    standin.faults.append(drop_after_work)
    made = await kms.create_deks_for_threads(["t", "t", "u"])
    assert list(standin.keys) == [dek.key_id for dek in made]
    assert len(standin.by_idempotency) == 3
    assert standin.seen[0].body == standin.seen[1].body


async def test_tries_of_a_call_share_the_request_id(kms: Facade, standin: StandIn) -> None:
    """So that the service's log shows them as one call; the next call has another."""
    standin.faults.append(drop)
    await kms.health()
    await kms.health()
    first, second, other = [request.headers["x-request-id"] for request in standin.seen]
    assert first == second != other


async def test_retry_after_is_honoured(kms: Facade, standin: StandIn, clock: Clock) -> None:
    """The wait is at least what the service asks for."""
    standin.faults.append(refuse(503, "overloaded", {"Retry-After": "3"}))
    await kms.health()
    assert clock.waits == [pytest.approx(3.1)]


async def test_retry_after_beyond_the_deadline_gives_up(kms: Facade, standin: StandIn, clock: Clock) -> None:
    """A wait that the deadline does not leave room for is not begun: the error comes at once."""
    standin.always = refuse(503, "overloaded", {"Retry-After": "3"})
    with pytest.raises(Overloaded):
        await kms.health()
    assert clock.waits == [pytest.approx(3.1)]
    assert len(standin.seen) == 2


async def test_the_deadline_can_be_given_per_call(kms: Facade, standin: StandIn, clock: Clock) -> None:
    """It counts for this call alone."""
    standin.faults.append(refuse(503, "overloaded", {"Retry-After": "3"}))
    with pytest.raises(Overloaded):
        await kms.health(deadline=2)
    assert clock.waits == []
    await kms.health()


@pytest.mark.parametrize("fault", [hang, drip], ids=["silent", "dripping"])
async def test_the_deadline_ends_an_answer_that_does_not_come(
    open_kms: Open, standin: StandIn, fault
) -> None:
    """A service that is silent, or sends a byte now and then, can't hold a call; it is not asked again."""
    kms = open_kms(deadline=0.2)
    await kms.health(deadline=5)
    standin.always = fault
    with pytest.raises(DeadlineExceeded):
        await kms.health()
    assert len(standin.seen) == 2


async def test_a_call_after_a_missed_deadline_works(kms: Facade, standin: StandIn) -> None:
    """The connection that was given up is not used again."""
    await kms.health()
    standin.faults.append(hang)
    with pytest.raises(DeadlineExceeded):
        await kms.health(deadline=0.2)
    await kms.health()
    assert [request.connection for request in standin.seen] == [1, 1, 2]


async def test_a_silent_port_is_no_connection(open_kms: Open, files: TlsFiles) -> None:
    """Whoever accepts a connection and says nothing is given up after the connect timeout."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = Endpoint(f"https://127.0.0.1:{server.getsockname()[1]}", tls=files)
        with pytest.raises(ConnectionFailed, match="in time"):
            await open_kms(endpoint, connect_timeout=0.1, retries=0).health()


async def test_a_call_can_be_cancelled(standin: StandIn, files: TlsFiles, clock: Clock) -> None:
    """The next one works, on another connection."""
    async with build("async", Endpoint(standin.url, tls=files), clock) as kms:
        await kms.health()
        started = threading.Event()
        standin.faults.append(hang_and_tell(started))
        call = asyncio.create_task(kms.health())
        assert await asyncio.to_thread(started.wait, 10)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await kms.health()
    assert [request.connection for request in standin.seen] == [1, 1, 2]


def test_threads_share_a_provider(standin: StandIn, files: TlsFiles, clock: Clock) -> None:
    """Each gets its own answers, over no more connections than allowed, and none takes another's away."""
    provider = build("sync", Endpoint(standin.url, tls=files), clock, max_connections=3).provider
    assert isinstance(provider, SyncKmsProvider)

    def work(number: int) -> list[bytes]:
        dek = provider.create_dek_for_thread(f"t{number}")
        texts = [b"%d-%d" % (number, n) for n in range(5)]
        sealed = [provider.encrypt_with_dek(dek.key_id, text).ciphertext for text in texts]
        return [provider.decrypt_with_dek(dek.key_id, ciphertext) for ciphertext in sealed]

    with provider, ThreadPoolExecutor(8) as threads:
        results = list(threads.map(work, range(8)))
    assert results == [[b"%d-%d" % (number, n) for n in range(5)] for number in range(8)]
    assert len(standin.connections) <= 3
    assert clock.waits == []


async def test_calls_wait_for_a_free_connection(standin: StandIn, files: TlsFiles, clock: Clock) -> None:
    """Beyond max_connections a call waits, and its deadline counts."""
    async with build("async", Endpoint(standin.url, tls=files), clock, max_connections=1) as kms:
        await kms.health()
        standin.faults.append(hang)
        calls = (kms.health(deadline=0.2) for _ in range(2))
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [DeadlineExceeded] * 2
    assert len(standin.seen) == 2


def test_a_thread_waits_for_a_free_connection(standin: StandIn, files: TlsFiles, clock: Clock) -> None:
    """Beyond max_connections a call waits, and the error of its deadline says so."""
    provider = build("sync", Endpoint(standin.url, tls=files), clock, max_connections=1).provider
    assert isinstance(provider, SyncKmsProvider)
    started = threading.Event()
    standin.faults.append(hang_and_tell(started))
    with provider, ThreadPoolExecutor(1) as threads:
        held = threads.submit(provider.health)
        assert started.wait(10)
        with pytest.raises(DeadlineExceeded, match="max_connections"):
            provider.health(deadline=0.1)
        standin.stopping.set()
        assert held.result().status == "ok"


async def test_a_connection_is_kept(kms: Facade, standin: StandIn) -> None:
    """Calls one after another travel over one connection."""
    for _ in range(3):
        await kms.health()
    assert len(standin.connections) == 1


async def test_a_connection_that_the_service_closed_is_replaced(kms: Facade, standin: StandIn) -> None:
    """Closed while idle, it costs the caller nothing."""
    await kms.health()
    standin.close_connections()
    await kms.health()
    assert len(standin.connections) == 2


async def test_connection_close_is_honoured(kms: Facade, standin: StandIn, clock: Clock) -> None:
    """After an answer with `Connection: close` the next call opens a new one, without a failed try."""
    standin.faults.append(say_close)
    await kms.health()
    await kms.health()
    assert len(standin.seen) == len(standin.connections) == 2
    assert clock.waits == []


async def test_an_answer_cut_off_is_retried(kms: Facade, standin: StandIn) -> None:
    """An answer that ends before its length is a broken connection, not an answer."""
    standin.faults.append(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"))
    await kms.health()
    assert len(standin.seen) == 2


async def test_nobody_listens(open_kms: Open, clock: Clock, tmp_path) -> None:
    """A refused connection is retried, then named, on TCP and on a Unix socket alike."""
    for endpoint in (Endpoint("http://127.0.0.1:1"), Endpoint("http://localhost", uds=str(tmp_path / "s"))):
        clock.waits.clear()
        with pytest.raises(ConnectionFailed, match="no connection to"):
            await open_kms(endpoint).health()
        assert len(clock.waits) == 2


async def test_too_large_an_answer_is_refused(kms: Facade, standin: StandIn, monkeypatch) -> None:
    """An answer may not fill the memory."""
    monkeypatch.setattr("progressdb_kms.client.network.MAX_ANSWER_BYTES", 1000)
    standin.faults.append(plain(200, b" " * 1001))
    with pytest.raises(ProtocolViolation, match="larger"):
        await kms.health()


# decisions

TRANSIENT = Failure(TooManyRequests(), status=429)


@given(tries=st.integers(1, 9), random=st.floats(0, 1), remaining=st.floats(0.001, 100))
def test_a_pause_is_within_its_bounds(tries: int, random: float, remaining: float) -> None:
    """Never more than the doubled base, the cap, or the time that is left."""
    policy = RetryPolicy(retries=5, base=0.1, cap=1.0)
    pause = pause_before_retry(policy, TRANSIENT, tries, remaining, lambda: random)
    if tries > policy.retries:
        assert pause is None
    elif pause is not None:
        assert 0 <= pause <= min(1.0, 0.1 * 2 ** (tries - 1))
        assert pause < remaining


def test_jitter_is_full() -> None:
    """The wait spreads over all from zero to the bound."""
    waits = [pause_before_retry(RetryPolicy(), TRANSIENT, 1, 9, float(r).__float__) for r in (0.0, 0.5, 1.0)]
    assert waits == [0.0, 0.05, 0.1]


@pytest.mark.parametrize(
    "value,date,seconds",
    [
        (None, None, None),
        ("7", None, 7.0),
        ("9" * 40, None, float("inf")),
        ("soon", None, None),
        ("-1", None, None),
        ("Thu, 01 Jan 2026 00:00:09 GMT", "Thu, 01 Jan 2026 00:00:04 GMT", 5.0),
        ("Thu, 01 Jan 2026 00:00:00 GMT", "Thu, 01 Jan 2026 00:00:04 GMT", 0.0),
        ("Thu, 01 Jan 2026 00:00:09 GMT", None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value, date, seconds) -> None:
    """A date is read against the answer's own Date, and nonsense is as good as nothing."""
    assert parse_retry_after(value, date) == seconds

"""Batches: how they are split, and what becomes of the other items when one request fails."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.client import ConnectionFailed, CreatedDek, Encrypted, ProtocolViolation, plans
from progressdb_kms.client.protocol import body_size, split
from progressdb_kms.domain.errors import (
    BatchTooLarge,
    BodyTooLarge,
    DeadlineExceeded,
    PermissionDenied,
    StoreUnavailable,
)
from tests.client.faults import drop, hang, plain, refuse
from tests.client.harness import Facade, Open
from tests.client.standin import BATCHES, StandIn

ITEMS = st.lists(
    st.fixed_dictionaries(
        {"key_id": st.text(max_size=20), "plaintext": st.binary(max_size=60)},
        optional={"aad": st.binary(max_size=20)},
    ),
    max_size=30,
)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of two items."""
    monkeypatch.setattr(plans, "MAX_BATCH_ITEMS", 2)


async def test_large_batches_travel_in_parts(kms: Facade, standin: StandIn, small_batches) -> None:
    """Five items are three requests, and the results are in order."""
    made = await kms.create_deks_for_threads([f"t{n}" for n in range(5)])
    assert [standin.keys[dek.key_id].thread_id for dek in made] == [f"t{n}" for n in range(5)]
    sealed = await kms.encrypt_many([(dek.key_id, b"m%d" % n, None) for n, dek in enumerate(made)])
    opened = await kms.decrypt_many(
        [(dek.key_id, item.ciphertext, None) for dek, item in zip(made, sealed, strict=True)]
    )
    assert opened == [b"m0", b"m1", b"m2", b"m3", b"m4"]
    assert len(standin.seen) == 9


async def test_a_failed_part_fails_its_items_alone(kms: Facade, standin: StandIn, small_batches) -> None:
    """What the other requests made is not lost with it."""
    standin.faults.extend([lambda _: True, refuse(403, "permission_denied", permission="p", identity="i")])
    results = await kms.create_deks_for_threads(["a", "b", "c", "d", "e"])
    assert [type(result) for result in results] == [
        CreatedDek,
        CreatedDek,
        PermissionDenied,
        PermissionDenied,
        CreatedDek,
    ]


@pytest.mark.parametrize("fault,error,requests", [(drop, ConnectionFailed, 4), (hang, DeadlineExceeded, 2)])
async def test_an_outage_ends_the_batch(
    open_kms: Open, standin: StandIn, small_batches, fault, error, requests: int
) -> None:
    """After a failed connection or a missed deadline nothing more is sent; what was made is returned."""
    kms = open_kms(deadline=0.5 if fault is hang else 5)
    await kms.health(deadline=5)
    standin.seen.clear()
    standin.faults.append(lambda _: True)
    standin.always = fault
    results = await kms.create_deks_for_threads(["a", "b", "c", "d", "e", "f"])
    assert [type(result) for result in results] == [CreatedDek] * 2 + [error] * 4
    assert len(standin.seen) == requests


async def test_a_deadline_is_for_the_whole_batch(kms: Facade, standin: StandIn, small_batches) -> None:
    """Given to the call, it is not begun anew by each request."""
    results = await kms.create_deks_for_threads(["a", "b", "c"], deadline=0)
    assert [type(result) for result in results] == [DeadlineExceeded] * 3
    assert standin.seen == []


async def test_a_service_that_takes_less_is_given_less(kms: Facade, standin: StandIn) -> None:
    """A service set to smaller batches gets them, in order."""
    standin.max_items = 3
    made = await kms.create_deks_for_threads([f"t{n}" for n in range(8)])
    assert [standin.keys[dek.key_id].thread_id for dek in made] == [f"t{n}" for n in range(8)]


@pytest.mark.parametrize("code,error", [("batch_too_large", BatchTooLarge), ("body_too_large", BodyTooLarge)])
async def test_an_item_too_large_fails_alone(kms: Facade, standin: StandIn, code: str, error) -> None:
    """The halving ends at one item."""
    dek = await kms.create_dek_for_thread("t")

    def too_large(handler) -> bool:
        return b"QUFB" not in handler.seen.body or refuse(413, code)(handler)

    standin.always = too_large
    items = [(dek.key_id, text, None) for text in (b"1", b"2", b"AAAAAA", b"4")]
    results = await kms.encrypt_many(items)
    assert [type(result) for result in results] == [Encrypted, Encrypted, error, Encrypted]


async def test_a_batch_is_retried_as_any_call(kms: Facade, standin: StandIn) -> None:
    """A transient failure of a whole request is not seen."""
    standin.faults.append(refuse(503, "store_unavailable"))
    (made,) = await kms.create_deks_for_threads(["t"])
    assert isinstance(made, CreatedDek)


async def test_a_failing_store_fails_each_item(kms: Facade, standin: StandIn) -> None:
    """Once the retries are used up, each item says so."""
    standin.always = refuse(503, "store_unavailable")
    results = await kms.create_deks_for_threads(["t", "u"])
    assert [type(result) for result in results] == [StoreUnavailable] * 2
    assert len(standin.seen) == 3


@pytest.mark.parametrize("body", [b'{"results": []}', b'{"results": [{}, {}]}', b"[]", b'{"results": 3}'])
async def test_results_that_do_not_fit_are_a_violation(kms: Facade, standin: StandIn, body: bytes) -> None:
    """Too few results, or one that is neither result nor error, are never taken for success."""
    standin.always = plain(200, body)
    calls = (
        kms.create_deks_for_threads(["t", "u"]),
        kms.encrypt_many([("k", b"", None)] * 2),
        kms.decrypt_many([("k", b"", None)] * 2),
    )
    for call in calls:
        assert [type(result) for result in await call] == [ProtocolViolation] * 2


async def test_as_many_keys_as_threads(kms: Facade) -> None:
    """A list of idempotency keys that does not fit is wrong use."""
    with pytest.raises(ValueError, match="as many"):
        await kms.create_deks_for_threads(["a", "b"], idempotency_keys=["1"])


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@given(items=ITEMS)
def test_parts_are_whole_and_within_their_bounds(encoding, items) -> None:
    """Splitting loses nothing, keeps the order, and no part is larger than said, but for a single item."""
    encode = {"json": msgspec.json.encode, "msgpack": msgspec.msgpack.encode}[encoding]
    parts = split(items, encoding, 7, 400)
    assert [item for part in parts for item in part] == items
    for part in parts:
        assert 1 <= len(part) <= 7
        assert len(part) == 1 or len(encode(part)) <= 400
        for item in part:
            assert len(encode(item)) <= body_size(item, encoding)


async def test_an_older_service_has_no_batches(kms: Facade, standin: StandIn) -> None:
    """Batch methods then ask item by item, with the same results and the same idempotency keys."""
    standin.old = True
    one, bad = await kms.create_deks_for_threads(["t", ""], idempotency_keys=["i", "j"])
    assert standin.by_idempotency["i"].key_id == one.key_id
    assert not isinstance(bad, CreatedDek)
    sealed, missing = await kms.encrypt_many([(one.key_id, b"m", b"a"), ("none", b"m", None)])
    assert not isinstance(missing, Encrypted)
    opened = await kms.decrypt_many([(one.key_id, sealed.ciphertext, b"a")])
    assert opened == [b"m"]
    assert [request.path for request in standin.seen if request.path in BATCHES] == [
        "/create_dek_batch",
        "/encrypt_batch",
        "/decrypt_batch",
    ]


async def test_an_older_service_that_goes_away_ends_the_batch(kms: Facade, standin: StandIn) -> None:
    """Item by item, too, an outage costs one failure."""
    standin.old = True
    standin.faults.extend([lambda _: True, lambda _: True])
    standin.always = drop
    results = await kms.create_deks_for_threads(["a", "b", "c"])
    assert [type(result) for result in results] == [CreatedDek, ConnectionFailed, ConnectionFailed]
    assert len(standin.seen) == 5

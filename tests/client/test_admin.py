"""The administrative calls."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from progressdb_kms.client import AdminClient, ProtocolViolation
from progressdb_kms.client.endpoint import TlsFiles
from progressdb_kms.domain.errors import InvalidTransition, KeyNotFound, StoreUnavailable
from tests.client.faults import plain, refuse
from tests.client.standin import StandIn


@pytest.fixture
def admin(standin: StandIn, files: TlsFiles) -> Iterator[AdminClient]:
    """A client with a certificate."""
    with AdminClient(standin.url, ca=files.ca, cert=files.cert, key=files.key) as client:
        yield client


@pytest.fixture
def key_id(standin: StandIn) -> str:
    """A key of thread `t`."""
    return str(standin.create("t", None)["key_id"])


def test_listing_follows_the_cursor(admin: AdminClient, standin: StandIn) -> None:
    """All pages are read, one at a time, as far as the caller asks."""
    made = [standin.create("t", None)["key_id"] for _ in range(5)]
    assert [key.key_id for key in admin.list_keys()] == made
    assert len(standin.seen) == 3
    assert next(iter(admin.list_keys())).key_id == made[0]
    assert len(standin.seen) == 4


def test_listing_filters(admin: AdminClient, standin: StandIn) -> None:
    """Thread, state and page size are handed over, quoted as they must be."""
    standin.create("t", None)
    odd = standin.create("a b&c=ä", None)["key_id"]
    admin.disable(odd)
    found = list(admin.list_keys(thread_id="a b&c=ä", state="disabled", limit=1))
    assert [key.key_id for key in found] == [odd]
    assert standin.seen[-1].query == {"thread_id": "a b&c=ä", "state": "disabled", "limit": "1"}


def test_a_cursor_that_stands_still_ends_the_listing(admin: AdminClient, standin: StandIn) -> None:
    """It would never end."""
    standin.always = plain(200, b'{"keys": [], "cursor": "x"}')
    with pytest.raises(ProtocolViolation, match="cursor"):
        list(admin.list_keys())


def test_a_key_is_shown(admin: AdminClient, key_id: str) -> None:
    """With its metadata, times as they came."""
    key = admin.get_key(key_id)
    assert (key.key_id, key.thread_id, key.version, key.state) == (key_id, "t", 1, "enabled")
    assert (key.kek_id, key.kek_version, key.uses) == ("kek_1", 1, 3)
    assert key.created_at == "2026-01-01T00:00:00Z"
    assert key.destroy_at is None


def test_versions_may_be_strings(admin: AdminClient, standin: StandIn, key_id: str) -> None:
    """As they are on the older routes."""
    shown = standin.info(standin.keys[key_id]) | {"kek_version": "7", "version": "2"}
    standin.always = plain(200, msgspec.json.encode(shown))
    key = admin.get_key(key_id)
    assert (key.kek_version, key.version) == (7, 2)


def test_states_change(admin: AdminClient, key_id: str) -> None:
    """Each change answers the key as it is then."""
    assert admin.disable(key_id).state == "disabled"
    assert admin.enable(key_id).state == "enabled"
    pending = admin.schedule_destruction(key_id, waiting_days=7)
    assert (pending.state, pending.destroy_at) == ("pending_destruction", "2026-01-07T00:00:00Z")
    with pytest.raises(InvalidTransition):
        admin.enable(key_id)
    assert admin.cancel_destruction(key_id).state == "disabled"
    assert admin.schedule_destruction(key_id).destroy_at == "2026-01-30T00:00:00Z"


def test_ids_are_quoted(admin: AdminClient, standin: StandIn) -> None:
    """An id can't become another path."""
    with pytest.raises(KeyNotFound):
        admin.disable("../../keks?x=1")
    assert standin.seen[0].path == "/v1/keys/..%2F..%2Fkeks%3Fx%3D1/disable"


def test_rewrap_and_keks(admin: AdminClient, key_id: str) -> None:
    """The new wrap and the census; members that this release does not know are ignored."""
    assert admin.rewrap(key_id).kek_version == "2"
    census = admin.keks()
    assert census.active == 1
    assert [(kek.version, kek.state, kek.deks, kek.loaded) for kek in census.keks] == [(1, "active", 2, True)]


def test_audit_records(admin: AdminClient, standin: StandIn) -> None:
    """Page by page, each with the line as it was written; a damaged one is not hidden."""
    line = '{"audit":"key.disable","at":1.5,"outcome":"ok","key_id":"k","chain":"c","seq":2,"new":1}'
    standin.always = plain(200, msgspec.json.encode({"records": [line, "{"], "cursor": None}))
    first, second = admin.audit(key_id="k", since="2026-01-01T00:00:00Z")
    assert (first.action, first.key_id, first.seq, first.line) == ("key.disable", "k", 2, line)
    assert (second.action, second.line) == ("unreadable", "{")
    query = {"key_id": "k", "since": "2026-01-01T00:00:00Z", "limit": "1000"}
    assert standin.seen[-1].query == query
    standin.always = plain(200, b'{"records": [], "cursor": "1-1"}')
    with pytest.raises(ProtocolViolation, match="cursor"):
        list(admin.audit())
    assert standin.seen[-1].query == {"limit": "1000", "cursor": "1-1"}


def test_openapi(admin: AdminClient, standin: StandIn) -> None:
    """The document, or an error if it is none."""
    assert admin.openapi() == {"openapi": "3.1.0"}
    standin.always = plain(200, b"[]")
    with pytest.raises(ProtocolViolation, match="openapi"):
        admin.openapi()


def test_administration_retries_as_providers_do(admin: AdminClient, standin: StandIn, key_id: str) -> None:
    """State changes may be repeated, so they are."""
    standin.faults.append(refuse(503, "store_unavailable", {"Retry-After": "0"}))
    assert admin.disable(key_id).state == "disabled"
    standin.always = refuse(503, "store_unavailable", {"Retry-After": "99"})
    with pytest.raises(StoreUnavailable):
        admin.disable(key_id)

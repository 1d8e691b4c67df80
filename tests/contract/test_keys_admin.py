"""Administration: listing, states and their transitions, the KEK census, and the OpenAPI document."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema_rs
import pytest
from schemathesis.openapi import from_dict

from tests.contract.wire_client import Client, assert_item_error, assert_problem, b64, unb64

UNKNOWN = "k_" + "A" * 28
ROUTES = {
    "/create_dek_for_thread": {"post"},
    "/encrypt": {"post"},
    "/decrypt": {"post"},
    "/get_wrapped": {"get"},
    "/rewrap": {"post"},
    "/healthz": {"get"},
    "/encrypt_batch": {"post"},
    "/decrypt_batch": {"post"},
    "/create_dek_batch": {"post"},
    "/v1/keys": {"get"},
    "/v1/keys/{key_id}": {"get"},
    "/v1/keys/{key_id}/disable": {"post"},
    "/v1/keys/{key_id}/enable": {"post"},
    "/v1/keys/{key_id}/schedule-destruction": {"post"},
    "/v1/keys/{key_id}/cancel-destruction": {"post"},
    "/v1/keks": {"get"},
    "/openapi.json": {"get"},
}


def pages(client: Client, **params: str) -> Iterator[list[dict[str, Any]]]:
    """Follow the cursor to the end of a list."""
    cursor: str | None = None
    for _ in range(10_000):
        page = client.get("/v1/keys", params | ({"cursor": cursor} if cursor else {})).ok()
        yield page["keys"]
        cursor = page["cursor"]
        if not cursor:
            return
    raise AssertionError("the list never ends")


def listed(client: Client, **params: str) -> dict[str, dict[str, Any]]:
    """Return the whole list by key id; duplicates are allowed."""
    return {key["key_id"]: key for key in itertools.chain.from_iterable(pages(client, **params))}


def state(client: Client, key_id: str) -> str:
    """Return a key's state."""
    found = client.get(f"/v1/keys/{key_id}").ok()["state"]
    assert isinstance(found, str)
    return found


def change(client: Client, key_id: str, verb: str) -> Any:
    """Ask for a state change, which must succeed, and return its answer."""
    return client.post(f"/v1/keys/{key_id}/{verb}").ok()


# reading


def test_a_key_is_shown_with_its_metadata_and_nothing_secret(server: Client, thread_id: str) -> None:
    """GET /v1/keys/{id} names thread, version, KEK and state; the wrapped blob is not among them."""
    made = server.create(thread_id)
    shown = server.get(f"/v1/keys/{made['key_id']}").ok()
    expected = {"key_id": made["key_id"], "thread_id": thread_id, "state": "enabled"}
    expected |= {"kek_id": made["kek_id"], "kek_version": made["kek_version"]}
    assert expected.items() <= shown.items()
    assert made["wrapped"] not in str(shown)
    assert {"created_at", "created_by"} <= shown.keys()


def test_an_unknown_key_is_404(operator: Client) -> None:
    """Reading or changing a key that is not there is 404 key_not_found."""
    assert_problem(operator.get(f"/v1/keys/{UNKNOWN}"), 404, "key_not_found")
    for verb in ("disable", "enable", "schedule-destruction", "cancel-destruction"):
        assert_problem(operator.post(f"/v1/keys/{UNKNOWN}/{verb}"), 404, "key_not_found")


def test_a_threads_keys_are_listed(server: Client, thread_id: str) -> None:
    """The filter by thread finds all its keys and no others."""
    made = {server.create(thread_id)["key_id"] for _ in range(3)}
    server.create(thread_id + "-other")
    assert set(listed(server, thread_id=thread_id)) == made
    assert listed(server, thread_id=thread_id + "-nobody") == {}


def test_the_list_is_the_records(server: Client, key_id: str, thread_id: str) -> None:
    """An entry of the list is what GET of that key gives."""
    assert listed(server, thread_id=thread_id)[key_id] == server.get(f"/v1/keys/{key_id}").ok()


def test_limit_and_cursor_page_through_a_thread(server: Client, thread_id: str) -> None:
    """Pages hold at most `limit` keys and together hold every key."""
    made = {server.create(thread_id)["key_id"] for _ in range(7)}
    found = list(pages(server, thread_id=thread_id, limit="2"))
    assert all(len(page) <= 2 for page in found)
    assert {key["key_id"] for page in found for key in page} == made


def test_limit_and_cursor_page_through_everything(server: Client, thread_id: str) -> None:
    """Without a filter the pages hold every key there is, whatever its slot."""
    items = [{"thread_id": f"{thread_id}-{n}"} for n in range(40)]
    made = {item["key_id"] for item in server.post("/create_dek_batch", {"items": items}).ok()["results"]}
    found = list(pages(server, limit="100"))
    assert all(len(page) <= 100 for page in found)
    assert made <= {key["key_id"] for page in found for key in page}


def test_the_state_filter(server: Client, operator: Client, thread_id: str) -> None:
    """The filter by state finds the keys in that state, alone and with the thread's filter."""
    on, off = (server.create(thread_id)["key_id"] for _ in range(2))
    change(operator, off, "disable")
    assert set(listed(server, thread_id=thread_id, state="disabled")) == {off}
    assert set(listed(server, thread_id=thread_id, state="enabled")) == {on}
    disabled = listed(server, state="disabled", limit="1000")
    assert off in disabled
    assert on not in disabled
    assert {key["state"] for key in disabled.values()} == {"disabled"}


# states


def test_disable_and_enable_take_effect_at_once(server: Client, operator: Client, key_id: str) -> None:
    """The very next call after a change sees it, on a key that was in use a moment before."""
    ciphertext = server.encrypt(key_id, b"m")
    assert server.decrypt(key_id, ciphertext) == b"m"
    change(operator, key_id, "disable")
    assert_problem(server.try_decrypt(key_id, ciphertext), 409, "key_disabled")
    assert_problem(server.post("/encrypt", {"key_id": key_id, "plaintext": ""}), 409, "key_disabled")
    (item,) = server.post(
        "/decrypt_batch", {"items": [{"key_id": key_id, "ciphertext": b64(ciphertext)}]}
    ).ok()["results"]
    assert_item_error(item, "key_disabled")
    assert state(server, key_id) == "disabled"
    change(operator, key_id, "enable")
    assert server.decrypt(key_id, ciphertext) == b"m"
    server.encrypt(key_id, b"m")
    assert state(server, key_id) == "enabled"


def test_destruction_is_scheduled_and_cancelled(server: Client, operator: Client, key_id: str) -> None:
    """A key waiting for destruction serves nobody; cancelling makes it usable again by way of enable."""
    ciphertext = server.encrypt(key_id, b"m")
    change(operator, key_id, "schedule-destruction")
    assert state(server, key_id) == "pending_destruction"
    assert_problem(server.try_decrypt(key_id, ciphertext), 409, "key_pending_destruction")
    body = {"key_id": key_id, "plaintext": ""}
    assert_problem(server.post("/encrypt", body), 409, "key_pending_destruction")
    change(operator, key_id, "cancel-destruction")
    assert state(server, key_id) in {"disabled", "enabled"}
    change(operator, key_id, "enable")
    assert server.decrypt(key_id, ciphertext) == b"m"


@pytest.mark.parametrize("days, expected", [(7, 7), (30, 30), (None, 30)], ids=str)
def test_the_waiting_period_is_the_callers(
    operator: Client, key_id: str, days: int | None, expected: int
) -> None:
    """A destruction waits for the days asked for, thirty where none are, and the record says until when."""
    body = None if days is None else {"waiting_days": days}
    shown = operator.post(f"/v1/keys/{key_id}/schedule-destruction", body).ok()
    due, since = (dt.datetime.fromisoformat(shown[name]) for name in ("destroy_at", "changed_at"))
    assert due - since == dt.timedelta(days=expected)
    assert "destroy_at" not in change(operator, key_id, "cancel-destruction")


@pytest.mark.parametrize("days", [6, 31, 0, -7, 7.5, "7", True, 10**30], ids=str)
def test_a_waiting_period_outside_7_to_30_days_is_400(operator: Client, key_id: str, days: object) -> None:
    """Anything else is refused and schedules nothing."""
    answer = operator.post(f"/v1/keys/{key_id}/schedule-destruction", {"waiting_days": days})
    assert_problem(answer, 400, "invalid_field")
    assert state(operator, key_id) == "enabled"


@pytest.mark.parametrize(
    "verbs",
    [
        ("disable", "disable"),
        ("enable",),
        ("disable", "enable", "enable"),
        ("schedule-destruction", "schedule-destruction"),
        ("schedule-destruction", "cancel-destruction", "cancel-destruction"),
    ],
    ids="+".join,
)
def test_repeating_a_change_is_200(
    server: Client, operator: Client, thread_id: str, verbs: tuple[str, ...]
) -> None:
    """A change that is already made succeeds and answers the same state."""
    key_id = server.create(thread_id)["key_id"]
    seen = []
    for verb in verbs:
        change(operator, key_id, verb)
        seen.append(state(server, key_id))
    before = seen[-2] if len(seen) > 1 else "enabled"
    assert seen[-1] == before


@pytest.mark.parametrize(
    "verbs, wrong",
    [
        (("schedule-destruction",), "enable"),
        (("schedule-destruction",), "disable"),
    ],
    ids=["enable-pending", "disable-pending"],
)
def test_a_wrong_transition_is_409(
    server: Client, operator: Client, thread_id: str, verbs: tuple[str, ...], wrong: str
) -> None:
    """A change that the present state does not allow is refused and changes nothing."""
    key_id = server.create(thread_id)["key_id"]
    for verb in verbs:
        change(operator, key_id, verb)
    before = state(server, key_id)
    assert_problem(operator.post(f"/v1/keys/{key_id}/{wrong}"), 409, "invalid_transition")
    assert state(server, key_id) == before


def test_a_server_may_not_change_states(
    open_client: Callable[[str], Client], server: Client, key_id: str
) -> None:
    """Create, encrypt, decrypt and read don't include administration, over TLS or the Unix socket."""
    for name, verb in itertools.product(("server", "unix"), ("disable", "enable", "schedule-destruction")):
        assert_problem(open_client(name).post(f"/v1/keys/{key_id}/{verb}"), 403, "permission_denied")
    assert state(server, key_id) == "enabled"


# KEKs


def test_the_census_counts_keys_by_kek_version(server: Client, operator: Client, thread_id: str) -> None:
    """GET /v1/keks gives each version once, one of them active, and its census grows with each key."""

    def census() -> dict[str, int]:
        answer = operator.get("/v1/keks").ok()
        assert [kek["version"] for kek in answer["keks"] if kek["state"] == "active"] == [answer["active"]]
        assert all(kek["loaded"] and kek["kek_id"] for kek in answer["keks"])
        return {kek["version"]: kek["deks"] for kek in answer["keks"]}

    before = census()
    items = [{"thread_id": f"{thread_id}-{n}"} for n in range(20)]
    made = server.post("/create_dek_batch", {"items": items}).ok()["results"]
    version = made[0]["kek_version"]
    assert census()[version] == before[version] + 20


# OpenAPI


def test_openapi_is_valid_and_names_every_route(operator: Client) -> None:
    """The document is OpenAPI 3.1, its schemas are valid, and its paths are the routes."""
    document = operator.get("/openapi.json").ok()
    assert document["openapi"].startswith("3.1.")
    from_dict(document).validate()
    schemas = document["components"]["schemas"]
    assert schemas
    for schema in schemas.values():
        jsonschema_rs.meta.validate(schema | {"$schema": "https://json-schema.org/draft/2020-12/schema"})
    methods = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}
    described = {path: methods & set(item) for path, item in document["paths"].items()}
    for path, verbs in ROUTES.items():
        assert described.get(path) == verbs, path


def test_every_described_operation_exists(operator: Client) -> None:
    """No path in the document is a route that the service lacks."""
    paths = operator.get("/openapi.json").ok()["paths"]
    for path, item in paths.items():
        for method in ("get", "post"):
            if method in item:
                answer = operator.request(method.upper(), path.replace("{key_id}", UNKNOWN))
                if answer.status != 200:
                    assert answer.json()["code"] not in {"route_not_found", "method_not_allowed"}


def test_a_wrapped_blob_is_read_by_its_own_route_alone(server: Client, key_id: str) -> None:
    """get_wrapped gives it, the lists do not."""
    wrapped = server.get("/get_wrapped", {"key_id": key_id}).ok()["wrapped"]
    assert len(unb64(wrapped)) == 64
    assert wrapped.encode() not in server.get("/v1/keys", {"limit": "1000"}).body

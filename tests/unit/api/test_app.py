"""The HTTP API over the memory store, by Quart's test client, without a socket."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import quart.typing
import structlog

from progressdb_kms.api.answering import Api
from progressdb_kms.api.app import create_app
from progressdb_kms.api.call import Route
from progressdb_kms.api.problems import PROBLEM_JSON
from progressdb_kms.api.routes import ROUTES
from progressdb_kms.domain.identity import Identity, IdentityKind
from progressdb_kms.settings import Limits
from progressdb_kms.usecases.encryption import Hot
from progressdb_kms.usecases.session import Session
from tests.unit.helpers import World

LIMITS = Limits(body_bytes=2048, batch_body_bytes=8192)
SHORT = Limits(body_timeout=0.1, request_timeout=0.1)
NOBODY = "k_" + "A" * 28
SECRET = "5EC2E7-must-not-travel"
HANDLED = re.compile(r"<\w+>")


class Caller:
    """Sends requests as one identity and looks at what every answer must have."""

    def __init__(self, client: quart.typing.TestClientProtocol, session: Session) -> None:
        self.client = client
        self.session = session

    async def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
        """Send a body, JSON unless it is bytes, and return status, headers and decoded body."""
        if body is not None and not isinstance(body, bytes):
            body = msgspec.json.encode(body)
            headers.setdefault("Content-Type", "application/json")
        response = await self.client.open(  # type: ignore[call-arg]  # the protocol asks for a json that has a default
            path,
            method=method,
            data=body,
            headers={name.replace("_", "-"): value for name, value in headers.items()},
            scope_base={"state": {"kms.session": self.session}},
        )
        raw = await response.get_data(as_text=False)
        assert isinstance(raw, bytes)
        assert response.headers["Cache-Control"] == "no-store"
        assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", response.headers["X-Request-Id"])
        kind = response.headers["Content-Type"]
        if kind == "application/msgpack":
            return response.status_code, response.headers, msgspec.msgpack.decode(raw)
        answer = msgspec.json.decode(raw)
        if response.status_code >= 400:
            assert kind == PROBLEM_JSON
            assert answer["type"] == f"urn:progressdb-kms:error:{answer['code']}"
            assert answer["status"] == response.status_code
            assert answer["request_id"] == response.headers["X-Request-Id"]
            assert {"title", "detail", "retryable"} <= set(answer)
        return response.status_code, response.headers, answer

    async def ok(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """Send, expect 200, return the answer."""
        status, _, answer = await self.send(method, path, body, **headers)
        assert status == 200, answer
        return answer

    async def refused(
        self, status: int, code: str, method: str, path: str, body: Any = None, **headers: str
    ) -> Any:
        """Send, expect this problem, return it."""
        got, _, answer = await self.send(method, path, body, **headers)
        assert (got, answer.get("code")) == (status, code)
        return answer


class Service:
    """The app over one world, and what it counted."""

    def __init__(self, world: World, limits: Limits = LIMITS) -> None:
        self.world = world
        self.counted: list[dict[str, Any]] = []
        self.app = create_app(
            Api(
                world.kms,
                world.loader,
                limits,
                self._count,
                world.store.rotation_ledger,
                world.store.audit,
            ),
            Hot(world.kms),
        )

    def _count(self, route: str, status: int, code: str, identity_kind: str, seconds: float) -> None:
        self.counted.append(
            {
                "route": route,
                "status": status,
                "code": code,
                "identity_kind": identity_kind,
                "seconds": seconds,
            }
        )

    def __call__(self, name: str = "server") -> Caller:
        """Return a caller."""
        return Caller(self.app.test_client(), self.world.session(name))


@pytest.fixture
async def service(world: World) -> AsyncIterator[Service]:
    """The API in this process."""
    service = Service(world)
    async with service.app.test_app():
        yield service


async def made(service: Service, thread_id: str = "room:1") -> str:
    """Make a key over the API."""
    return str((await service().ok("POST", "/create_dek_for_thread", {"thread_id": thread_id}))["key_id"])


async def test_a_round_trip_has_the_wire_contracts_shapes(service: Service) -> None:
    """Names, base64 and strings as the existing client expects them."""
    key = await service().ok("POST", "/create_dek_for_thread", {"thread_id": "room:1"})
    assert set(key) == {"key_id", "wrapped", "kek_id", "kek_version", "key_version"}
    assert len(base64.b64decode(key["wrapped"])) == 64
    assert (key["kek_version"], key["key_version"]) == ("1", "1")
    sealed = await service().ok("POST", "/encrypt", {"key_id": key["key_id"], "plaintext": "aGk="})
    assert set(sealed) == {"ciphertext", "key_version"}
    body = {"key_id": key["key_id"], "ciphertext": sealed["ciphertext"]}
    assert await service().ok("POST", "/decrypt", body) == {"plaintext": "aGk="}
    shown = await service().ok("GET", f"/get_wrapped?key_id={key['key_id']}")
    assert shown == {name: key[name] for name in ("wrapped", "kek_id", "kek_version")}
    same = await service("operator").ok("POST", "/rewrap", {"key_id": key["key_id"]})
    assert same == {"key_id": key["key_id"]} | shown
    assert await service("stranger").ok("GET", "/healthz") == {"status": "ok"}


async def test_msgpack_carries_raw_bytes(service: Service) -> None:
    """By Content-Type and Accept, each alone; errors stay problem+json."""
    key_id = await made(service)
    body = msgspec.msgpack.encode({"key_id": key_id, "plaintext": b"hi"})
    packed = {"Content_Type": "application/msgpack"}
    sealed = await service().ok("POST", "/encrypt", body, **packed)
    assert isinstance(sealed["ciphertext"], bytes)
    sealed = await service().ok("POST", "/encrypt", body, **packed, Accept="application/json")
    assert isinstance(sealed["ciphertext"], str)
    body = msgspec.msgpack.encode(
        {"items": [{"key_id": key_id, "ciphertext": base64.b64decode(sealed["ciphertext"])}]}
    )
    alias = {"Content_Type": "application/x-msgpack", "Accept": "application/msgpack"}
    assert await service().ok("POST", "/decrypt_batch", body, **alias) == {"results": [{"plaintext": b"hi"}]}
    await service().refused(400, "malformed_body", "POST", "/encrypt", b"\xc1", **packed)


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"Content_Type": "application/json; charset=utf-8"}, 200),
        ({"Content_Type": "application/json; charset=latin-1"}, 415),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Accept": "*/*"}, 200),
        ({"Accept": "application/*;q=0.1"}, 200),
        ({"Accept": "application/problem+json"}, 200),
        ({"Accept": "text/html"}, 406),
        ({"Accept": "application/json;q=0"}, 406),
    ],
)
async def test_negotiation(service: Service, headers: dict[str, str], status: int) -> None:
    """JSON is the default; what is neither JSON nor msgpack is refused."""
    body = msgspec.json.encode({"thread_id": "room:1"})
    got, _, answer = await service().send("POST", "/create_dek_for_thread", body, **headers)
    assert got == status
    assert answer.get("code") == {200: None, 406: "not_acceptable", 415: "unsupported_media_type"}[status]


@pytest.mark.parametrize(
    "given, taken", [("a.B-9_:x", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False)]
)
async def test_request_ids(service: Service, given: str, taken: bool) -> None:
    """A plain one is kept, anything else replaced, on success and failure alike."""
    for path in ("/healthz", "/nowhere"):
        _, headers, _ = await service().send("GET", path, X_Request_Id=given)
        assert (headers["X-Request-Id"] == given) is taken


@pytest.mark.parametrize("given, taken", [("00-" + "a" * 32 + "-" + "b" * 16 + "-01", True), ("junk", False)])
async def test_traceparent_reaches_the_logs_context(
    service: Service, monkeypatch: pytest.MonkeyPatch, given: str, taken: bool
) -> None:
    """A W3C trace context is bound for every line of the request, anything else is not."""
    import structlog  # noqa: PLC0415 - only to look at what the app has bound

    bound: list[dict[str, Any]] = []
    honest = service.world.store.get

    async def looking(key_ids: Any) -> Any:
        bound.append(structlog.contextvars.get_contextvars())
        return await honest(key_ids)

    monkeypatch.setattr(service.world.store, "get", looking)
    await service().send("GET", f"/v1/keys/{NOBODY}", traceparent=given, X_Request_Id="r1")
    assert bound[0]["request_id"] == "r1"
    assert bound[0].get("traceparent") == (given if taken else None)


async def test_unknown_routes_and_methods(service: Service) -> None:
    """404 and 405 are problems, and 405 says what is allowed; no path is mended by a redirect."""
    await service().refused(404, "route_not_found", "GET", "/nowhere")
    await service().refused(404, "route_not_found", "GET", "/v1/keys/")
    await service().refused(404, "route_not_found", "GET", "/v1//keys")
    await service().refused(404, "route_not_found", "POST", "/encrypt/", {})
    status, headers, _ = await service().send("GET", "/encrypt")
    assert (status, headers["Allow"]) == (405, "POST")
    status, headers, _ = await service().send("OPTIONS", "/v1/keys")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "route", [route for route in ROUTES if route.permission], ids=lambda r: f"{r.method} {r.path}"
)
async def test_who_has_no_grant_is_refused_before_the_body_is_read(service: Service, route: Any) -> None:
    """403 names permission and identity, is audited, and nothing is parsed or fetched for a stranger."""
    path = HANDLED.sub(NOBODY, route.path)
    body = b"{not json" if route.method == "POST" else None
    answer = await service("stranger").refused(403, "permission_denied", route.method, path, body)
    assert (answer["permission"], answer["identity"]) == (route.permission, "dns:stranger")
    assert not service.world.store.calls
    await service.world.kms.refusals.write()
    (event,) = service.world.trail.events
    assert (event.action, event.identity, event.detail) == (
        "refused",
        "dns:stranger",
        f"{route.permission} {route.path} count=1",
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"Origin": "https://elsewhere.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "same-origin"},
    ],
)
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_web_pages_are_refused(service: Service, route: Route, fields: dict[str, str]) -> None:
    """A page that an operator opens can't use the operator's certificate, and it is refused unseen."""
    path = re.sub(HANDLED, await made(service), route.path)
    before = service.world.store.calls.copy()
    with structlog.testing.capture_logs() as logs:
        await service("operator").refused(400, "invalid_header", route.method, path, b"{}", **fields)
    assert service.world.store.calls == before
    assert [line["event"] for line in logs if line["log_level"] == "warning"] == ["web_page_refused"]


async def test_an_address_typed_into_a_browser_is_answered(service: Service) -> None:
    """The user's own wish, which no page can make."""
    await service("operator").ok("GET", "/v1/keys", Sec_Fetch_Site="none")


async def test_an_expired_certificate_is_refused(service: Service) -> None:
    """On a connection that was good before."""
    identity = Identity(IdentityKind.DNS, "server", not_after=service.world.now() - 1)
    session = Session(identity, service.world.book, service.world.now)
    await Caller(service.app.test_client(), session).refused(403, "certificate_expired", "GET", "/v1/keys")


@pytest.mark.parametrize(
    "path, body, status, code",
    [
        ("/encrypt", b"{", 400, "malformed_body"),
        ("/encrypt", b'{"key_id":"k","plaintext":"","plaintext":""}', 400, "duplicate_field"),
        ("/encrypt", {"key_id": NOBODY, "plaintext": "", SECRET: SECRET}, 400, "invalid_field"),
        ("/encrypt", {"key_id": NOBODY, "plaintext": SECRET}, 400, "invalid_field"),
        ("/encrypt", {"key_id": SECRET, "plaintext": ""}, 404, "key_not_found"),
        ("/decrypt", {"key_id": NOBODY, "ciphertext": ""}, 404, "key_not_found"),
        ("/create_dek_for_thread", {"thread_id": SECRET + "\x00"}, 400, "invalid_thread_id"),
        ("/create_dek_for_thread", {"thread_id": SECRET * 20}, 400, "invalid_thread_id"),
        ("/create_dek_for_thread", {"thread_id": 7}, 400, "invalid_field"),
        ("/rewrap", {"key_id": NOBODY, "new_kek_hex": SECRET}, 400, "kek_not_accepted"),
        ("/rewrap", {"key_id": NOBODY, "new_kek_hex": None}, 400, "kek_not_accepted"),
        ("/rewrap", b'{"key_id":"k","new_kek_hex":' + b"1" * 1900 + b"}", 400, "kek_not_accepted"),
        ("/encrypt_batch", {"items": SECRET}, 400, "invalid_field"),
        ("/encrypt_batch", b'{"items":[' + b"1" * 5000 + b"]}", 200, None),
        ("/encrypt_batch", b'{"items":["\xff"]}', 400, "malformed_body"),
        (f"/v1/keys/{NOBODY}/schedule-destruction", {"waiting_days": 6}, 404, "key_not_found"),
        (f"/v1/keys/{NOBODY}/schedule-destruction", {"waiting_days": "7"}, 400, "invalid_field"),
        (f"/v1/keys/{NOBODY}/disable", {"reason": SECRET}, 400, "invalid_field"),
        (f"/v1/keys/{SECRET}/disable", None, 404, "key_not_found"),
    ],
)
async def test_bad_bodies(service: Service, path: str, body: Any, status: int, code: str | None) -> None:
    """Each with its code, never a 500, and never what was sent."""
    got, _, answer = await service("operator").send("POST", path, body)
    assert (got, answer.get("code")) == (status, code)
    assert SECRET not in str(answer)
    assert SECRET not in str(service.world.trail.events)


@pytest.mark.parametrize(
    "path, code",
    [
        ("/get_wrapped", "invalid_parameter"),
        ("/get_wrapped?key_id=a&key_id=b", "invalid_parameter"),
        (f"/get_wrapped?{SECRET}=1", "invalid_parameter"),
        (f"/v1/keys/{NOBODY}?x=1", "invalid_parameter"),
        ("/v1/keks?x=1", "invalid_parameter"),
        ("/v1/keys?limit=0", "invalid_parameter"),
        ("/v1/keys?limit=1001", "invalid_parameter"),
        ("/v1/keys?limit=000001000000", "invalid_parameter"),
        ("/v1/keys?limit=000001" + "9" * 5000, "invalid_parameter"),
        ("/v1/keys?limit=-1", "invalid_parameter"),
        ("/v1/keys?limit=%D9%A1", "invalid_parameter"),
        ("/v1/keys?limit=1e2", "invalid_parameter"),
        (f"/v1/keys?state={SECRET}", "invalid_parameter"),
        (f"/v1/keys?cursor={SECRET}", "invalid_parameter"),
        ("/v1/keys?thread_id=", "invalid_thread_id"),
        ("/v1/keys?thread_id=%00", "invalid_thread_id"),
    ],
)
async def test_bad_parameters(service: Service, path: str, code: str) -> None:
    """Unknown, doubled, out of range, not numbers: 400, and not repeated."""
    answer = await service("operator").refused(400, code, "GET", path)
    assert SECRET not in str(answer)


async def test_idempotency_keys(service: Service) -> None:
    """One header at most, visible ASCII; in a batch an empty one is refused and a null one is none."""
    path, body = "/create_dek_for_thread", {"thread_id": "room:1"}
    one = await service().ok("POST", path, body, Idempotency_Key="a")
    assert await service().ok("POST", path, body, Idempotency_Key="a") == one
    assert (await service().ok("POST", path, body, Idempotency_Key="b"))["key_id"] != one["key_id"]
    await service().refused(400, "invalid_header", "POST", path, body, Idempotency_Key="a b")
    items = [{"thread_id": "room:1", "idempotency_key": key} for key in ("a", "", None, "a b")]
    results = (await service().ok("POST", "/create_dek_batch", {"items": items}))["results"]
    assert results[0] == one
    assert [result.get("error", {}).get("code") for result in results] == [
        None,
        "invalid_header",
        None,
        "invalid_header",
    ]


async def test_two_idempotency_keys_are_refused(service: Service) -> None:
    """Neither is chosen."""
    response = await service.app.test_client().post(
        "/create_dek_for_thread",
        json={"thread_id": "t"},
        headers=[("Idempotency-Key", "a"), ("Idempotency-Key", "b")],
        scope_base={"state": {"kms.session": service.world.session()}},
    )
    assert response.status_code == 400
    assert (await response.get_json())["code"] == "invalid_header"


@pytest.mark.parametrize("path, limit", [("/encrypt", 2048), ("/encrypt_batch", 8192)])
async def test_body_limits_are_the_routes_own(service: Service, path: str, limit: int) -> None:
    """A byte over is 413 and ends the connection, said at once or found on the way."""
    for size, status in ((limit, 400), (limit + 1, 413), (100_000, 413)):
        got, headers, answer = await service().send("POST", path, b" " * size)
        assert got == status
        assert headers.get("Connection") == ("close" if status == 413 else None)
        assert status == 400 or str(limit) in answer["detail"]


async def test_a_body_that_does_not_come_is_a_timeout(world: World) -> None:
    """Half a body is waited for so long, and then refused and the connection closed."""
    client = Service(world, SHORT).app.test_client()
    scope = {"state": {"kms.session": world.session()}}
    async with client.request("/encrypt", method="POST", scope_base=scope) as half:
        await half.send(b'{"key')
        assert b"request_timeout" in await half.receive()
    response = await half.as_response()
    assert response.status_code == 408
    assert response.headers["Connection"] == "close"


async def test_a_store_that_hangs_is_a_deadline(world: World) -> None:
    """The answer does not wait for ever: 503 with Retry-After."""
    world.store.gate = asyncio.Event()
    status, headers, answer = await Service(world, SHORT)().send("GET", f"/v1/keys/{NOBODY}")
    assert (status, answer["code"], headers["Retry-After"]) == (503, "deadline_exceeded", "1")
    assert answer["retryable"]


async def test_an_away_store_is_503(service: Service) -> None:
    """With Retry-After, so that clients come back."""
    service.world.store.down = True
    status, headers, answer = await service().send("POST", "/create_dek_for_thread", {"thread_id": "t"})
    assert (status, answer["code"], headers["Retry-After"]) == (503, "store_unavailable", "1")


async def test_a_bug_leaks_nothing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected exception's text stays here; the caller gets a request id."""

    async def broken(_key_ids: Any) -> Any:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(service.world.store, "get", broken)
    answer = await service().refused(500, "internal_error", "GET", f"/v1/keys/{NOBODY}")
    assert SECRET not in str(answer)
    assert not answer["retryable"]
    assert service.counted[-1]["code"] == "internal_error"


async def test_a_refusal_that_cannot_be_noted_is_an_internal_error(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails while a problem is being answered is a problem too, and no fault of the caller's."""

    def broken(*_: Any) -> None:
        raise BrokenPipeError(SECRET)

    monkeypatch.setattr("progressdb_kms.usecases.refusals.RefusalLog.note", broken)
    answer = await service("stranger").refused(500, "internal_error", "GET", "/v1/keys")
    assert SECRET not in str(answer)


async def test_keys_are_shown_without_their_blob(service: Service) -> None:
    """Metadata only, times in RFC 3339, versions as strings."""
    key_id = await made(service)
    shown = await service().ok("GET", f"/v1/keys/{key_id}")
    assert shown == {
        "key_id": key_id,
        "thread_id": "room:1",
        "version": "1",
        "state": "enabled",
        "kek_id": shown["kek_id"],
        "kek_version": "1",
        "created_at": "2023-11-14T22:13:20Z",
        "created_by": "dns:server",
        "changed_at": "2023-11-14T22:13:20Z",
        "uses": 0,
    }
    later = await service("operator").ok(
        "POST", f"/v1/keys/{key_id}/schedule-destruction", {"waiting_days": 7}
    )
    assert (later["state"], later["destroy_at"]) == ("pending_destruction", "2023-11-21T22:13:20Z")
    again = await service("operator").ok("POST", f"/v1/keys/{key_id}/schedule-destruction")
    assert again == later
    cancelled = await service("operator").ok("POST", f"/v1/keys/{key_id}/cancel-destruction", b"{}")
    assert cancelled["state"] == "disabled"
    assert (await service("operator").ok("POST", f"/v1/keys/{key_id}/enable"))["state"] == "enabled"


async def test_lists_go_on_by_cursor(service: Service) -> None:
    """Every key is found once at least, page by page, and filters hold."""
    keys = {await made(service) for _ in range(5)}
    found: set[str] = set()
    cursor = ""
    while True:
        page = await service().ok("GET", f"/v1/keys?limit=2{cursor}")
        found |= {key["key_id"] for key in page["keys"]}
        if page["cursor"] is None:
            break
        cursor = f"&cursor={page['cursor']}"
    assert found == keys
    assert (await service().ok("GET", "/v1/keys?state=disabled"))["keys"] == []
    assert len((await service().ok("GET", "/v1/keys?thread_id=room:1&limit=1000"))["keys"]) == 5


async def test_keks_are_shown_with_their_census(service: Service) -> None:
    """Versions, states, how many keys each wraps, whether it is loaded here."""
    await made(service)
    shown = await service("operator").ok("GET", "/v1/keks")
    assert shown["active"] == "1"
    (kek,) = shown["keks"]
    assert (kek["version"], kek["state"], kek["deks"], kek["loaded"]) == ("1", "active", 1, True)
    assert set(kek) == {
        "version",
        "kek_id",
        "state",
        "source",
        "deks",
        "wraps",
        "created_at",
        "activated_at",
        "loaded",
    }


async def test_answers_are_counted_by_route_and_code(service: Service) -> None:
    """Unmatched paths have one name, so that no caller can make metrics grow."""
    await service().send("GET", "/healthz")
    await service().send("GET", "/anything/a/caller/likes")
    await service("stranger").send("GET", f"/v1/keys/{NOBODY}")
    seen = [
        (fields["route"], fields["status"], fields["code"], fields["identity_kind"])
        for fields in service.counted
    ]
    assert seen == [
        ("/healthz", 200, "ok", "dns"),
        ("unmatched", 404, "route_not_found", "dns"),
        ("/v1/keys/<key_id>", 403, "permission_denied", "dns"),
    ]
    assert all(fields["seconds"] >= 0 for fields in service.counted)

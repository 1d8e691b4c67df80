"""The fast door against the slow way: whatever is sent, in whatever pieces, both give the same answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contract.wire_client import Connect, RawConnection, b64, tls_connect, tls_context
from tests.integration.world import Instance, World, launch_all, without_delay

HOST = "Host: localhost"
JSON = "Content-Type: application/json"
MSGPACK = "Content-Type: application/msgpack"
LAST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
LIMITS = {
    # A sender that cuts its requests into single bytes may be held up for long on a busy machine.
    "header_timeout": 5,
    "body_timeout": 5,
    "idle_timeout": 2,
    "plaintext_bytes": 4096,
    "body_bytes": 8192,
    "batch_body_bytes": 1 << 20,
}
RANDOM = {"ciphertext"}
# They are answered before their body has been looked at; whether it has arrived by then decides if the
# connection can be kept.
EARLY = {"encrypt, any text", "encrypt as text", "encrypt far too much"}


@pytest.fixture(scope="module")
def world(new_world: Callable[..., World]) -> World:
    """Run two services on one store, of which one has its door closed."""
    made = new_world()
    made.store.start()
    # One test waits for it.
    store = {"command_timeout": 2.0}
    launch_all(
        [
            made.instance("on", limits=LIMITS, store=store),
            made.instance("off", limits=LIMITS, store=store, fast_door=False),
        ]
    )
    return made


@pytest.fixture(scope="module")
def material(world: World) -> dict[str, Any]:
    """Give keys and a ciphertext that both instances know."""
    client = world.instances[0].client("server")
    key_id = client.create("room:1")["key_id"]
    other = client.create("room:2")["key_id"]
    disabled = client.create("room:3")["key_id"]
    world.instances[0].client("operator").post(f"/v1/keys/{disabled}/disable").ok()
    sealed = client.encrypt(key_id, b"message", b"aad")
    return {"key_id": key_id, "other": other, "disabled": disabled, "sealed": sealed}


def request(line: str, body: bytes | None, *fields: str) -> bytes:
    """Return a request."""
    lines = [f"{line} HTTP/1.1", HOST, *fields]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (body or b"")


def requests(material: dict[str, Any]) -> dict[str, bytes]:
    """Return requests for the hot routes: good ones, and each way in which they can be bad."""
    key_id, other = material["key_id"], material["other"]
    sealed = material["sealed"]

    def post(path: str, value: object, *fields: str) -> bytes:
        return request(f"POST {path}", json.dumps(value).encode(), JSON, *fields)

    def packed(path: str, value: object, *fields: str) -> bytes:
        return request(f"POST {path}", msgspec.msgpack.encode(value), MSGPACK, *fields)

    plain = {"key_id": key_id, "plaintext": b64(b"hello")}
    good = {"key_id": key_id, "ciphertext": b64(sealed), "aad": b64(b"aad")}
    items = [plain, {"key_id": other, "plaintext": ""}, {"key_id": "k_none", "plaintext": ""}, {"key_id": 1}]
    sealed_items = [good, good | {"aad": ""}, {"key_id": key_id}]
    return {
        "encrypt": post("/encrypt", plain),
        "encrypt, named": post("/encrypt", plain, "X-Request-Id: mine", "traceparent: 00-x"),
        "encrypt, badly named": post("/encrypt", plain, "X-Request-Id: a b"),
        "encrypt, kept alive": post("/encrypt", plain, "Connection: keep-alive", "Accept: */*"),
        "encrypt in msgpack": packed("/encrypt", {"key_id": key_id, "plaintext": b"hello"}),
        "encrypt, answered in msgpack": post("/encrypt", plain, "Accept: application/msgpack"),
        "encrypt, any text": post("/encrypt", plain, "Accept: text/*"),
        "encrypt, JSON preferred": post(
            "/encrypt", plain, "Accept: application/msgpack;q=0.5, application/json"
        ),
        "encrypt without a type": request("POST /encrypt", json.dumps(plain).encode()),
        "encrypt as text": request("POST /encrypt", json.dumps(plain).encode(), "Content-Type: text/plain"),
        "encrypt in UTF-8": request(
            "POST /encrypt", json.dumps(plain).encode(), "Content-Type: application/json; charset=utf-8"
        ),
        "encrypt, no such key": post("/encrypt", plain | {"key_id": "k_none"}),
        "encrypt, disabled": post("/encrypt", plain | {"key_id": material["disabled"]}),
        "encrypt, unknown field": post("/encrypt", plain | {"x": 1}),
        "encrypt, no JSON": request("POST /encrypt", b"{", JSON),
        "encrypt nothing": request("POST /encrypt", b"", JSON),
        "encrypt, a field twice": request(
            "POST /encrypt", b'{"key_id":"a","key_id":"a","plaintext":""}', JSON
        ),
        "encrypt too much": post("/encrypt", plain | {"plaintext": b64(bytes(4097))}),
        "encrypt far too much": post("/encrypt", plain | {"plaintext": b64(bytes(9000))}),
        "encrypt with a query": post("/encrypt?x=1", plain),
        "encrypt by GET": request("GET /encrypt", None),
        "decrypt": post("/decrypt", good),
        "decrypt, wrong AAD": post("/decrypt", good | {"aad": ""}),
        "decrypt, malformed": post("/decrypt", good | {"ciphertext": b64(b"x")}),
        "encrypt many": post("/encrypt_batch", {"items": items}),
        "encrypt many in msgpack": packed(
            "/encrypt_batch", {"items": [{"key_id": key_id, "plaintext": b"x"}] * 50}
        ),
        "encrypt a long batch": post("/encrypt_batch", {"items": [plain] * 2000}),
        "encrypt no batch": post("/encrypt_batch", {"items": 1}),
        "decrypt many": post("/decrypt_batch", {"items": sealed_items}),
        "create": post("/create_dek_for_thread", {"thread_id": "room:4"}, "Idempotency-Key: one"),
        "create, bad key": post("/create_dek_for_thread", {"thread_id": "room:4"}, "Idempotency-Key:"),
        "create, two keys": post(
            "/create_dek_for_thread", {"thread_id": "room:4"}, "Idempotency-Key: a", "Idempotency-Key: b"
        ),
        "create many": post(
            "/create_dek_batch",
            {"items": [{"thread_id": "room:5", "idempotency_key": "two"}, {"thread_id": ""}]},
        ),
        "wrapped": request(f"GET /get_wrapped?key_id={key_id}", None),
        "wrapped, none": request("GET /get_wrapped?key_id=k_none", None),
        "wrapped, of what": request("GET /get_wrapped", None),
        "wrapped, twice": request("GET /get_wrapped?key_id=a&key_id=b", None),
        "wrapped, otherwise": request("GET /get_wrapped?x=1", None),
        "wrapped, escaped": request("GET /get_wrapped?key_id=%6b_none", None),
        "rewrap, not granted": post("/rewrap", {"key_id": key_id}),
        "health": request("GET /healthz", None),
        "health with a query": request("GET /healthz?x=1", None),
        "nowhere": request("GET /nowhere", None),
        "a key": request(f"GET /v1/keys/{key_id}", None),
    }


START = b"POST /encrypt HTTP/1.1\r\nHost: x\r\n"
ODD = {
    "CL and TE": START + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "TE": START + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "two lengths": START + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "twice the length": START + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "odd length": START + b"Content-Length: +2\r\n\r\n{}",
    "zeros": START + b"Content-Length: 002\r\n\r\n{}",
    "folded": START + b"Content-Length:\r\n 2\r\n\r\n{}",
    "bare LF": b"POST /encrypt HTTP/1.1\nHost: x\nContent-Length: 2\n\n{}",
    "no host": b"POST /encrypt HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
    "two hosts": START + b"Host: y\r\nContent-Length: 2\r\n\r\n{}",
    "absolute form": b"POST https://x/encrypt HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
    "CONNECT": b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "upgrade": START + b"Connection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n{}",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "expect": START + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    "header flood": START + b"" + b"X-A: b\r\n" * 4000 + b"\r\n",
    "one long header": START + b"X: " + b"a" * 20000 + b"\r\n\r\n",
    "half a head": START + b"Conte",
    "half a body": START + b"Content-Length: 20\r\n\r\n{",
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00",
    "empty line first": b"\r\nPOST /encrypt HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
}


def connecting(instance: Instance) -> Connect:
    """Return what connects as a server."""
    cert, key = instance.world.certificate("server")
    context = tls_context(instance.world.ca_file, cert, key)
    return without_delay(tls_connect("localhost", instance.port, context))


def converse(instance: Instance, pieces: list[bytes]) -> bytes:
    """Send the pieces, each for itself, and return all that comes until the server closes."""
    line = connecting(instance)()
    received = b""
    with line:
        try:
            for piece in pieces:
                line.sendall(piece)
                time.sleep(0.001)
            while data := line.recv(1 << 20):
                received += data
        except OSError:
            pass  # it has answered and closed
    return received


def answers(received: bytes) -> list[tuple[str, list[tuple[str, str]], Any]]:
    """Take answers apart, with what differs from one to the next by its nature left out."""
    found = []
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        fields = [tuple(line.split(": ", 1)) for line in lines]
        named = {name.lower(): value for name, value in fields}
        if status.startswith("HTTP/1.1 100"):
            received = rest
            continue
        length = int(named["content-length"])
        body, received = rest[:length], rest[length:]
        request_id = named["x-request-id"]
        given = "mine" if request_id == "mine" else "ID"
        shown = [
            (name, "" if name == "date" else given if name == "x-request-id" else value)
            for name, value in fields
        ]
        decode = msgspec.msgpack.decode if named["content-type"].endswith("msgpack") else msgspec.json.decode
        found.append((status, shown, blanked(decode(body))))
    return found


def blanked(value: Any) -> Any:
    """Return a document without its random parts."""
    if isinstance(value, dict):
        return {
            name: len(part) if name in RANDOM else "ID" if name == "request_id" else blanked(part)
            for name, part in value.items()
        }
    return [blanked(part) for part in value] if isinstance(value, list) else value


def both(world: World, pieces: list[bytes]) -> list[tuple[str, list[tuple[str, str]], Any]]:
    """Send the same to both, see that they answer alike, and return the answers."""
    with ThreadPoolExecutor(2) as pool:
        on, off = pool.map(lambda instance: answers(converse(instance, pieces)), world.instances)
    assert on == off
    return on


def test_each_request_gets_the_same_answer(world: World, material: dict[str, Any]) -> None:
    """Byte for byte but for date, request id and nonces; and it is the door that answers what is ordinary."""
    known = requests(material)
    with ThreadPoolExecutor(4) as pool:
        made = dict(zip(known, pool.map(lambda raw: both(world, [raw, LAST]), known.values()), strict=True))
    assert all(len(found) == 2 or found[0][0].startswith("HTTP/1.1 413") for found in made.values()), made
    statuses = {name: found[0][0].split()[1] for name, found in made.items()}
    assert statuses["encrypt"] == statuses["decrypt"] == statuses["create"] == statuses["wrapped"] == "200"
    assert statuses["rewrap, not granted"] == "403"


def test_the_door_answers_the_ordinary(world: World, material: dict[str, Any]) -> None:
    """One connection, all hot routes and errors too: all are the door's, until one is not ordinary."""
    ordinary = [
        *("encrypt", "encrypt, named", "encrypt, kept alive", "encrypt in msgpack", "encrypt, no such key"),
        *("encrypt, no JSON", "encrypt without a type", "decrypt", "decrypt, wrong AAD", "encrypt many"),
        *("encrypt a long batch", "decrypt many", "create", "create many", "wrapped", "rewrap, not granted"),
        "health",
    ]
    known = requests(material)
    for instance, share in zip(world.instances, (1, 0), strict=True):
        before = instance.metric("kms_fast_door_requests_total")
        with RawConnection(connecting(instance)) as line:
            for name in [*ordinary, "a key", *ordinary]:
                line.send(known[name])
                line.must_answer("POST")
        assert instance.metric("kms_fast_door_requests_total") == before + share * len(ordinary)


def test_refusals_that_say_when_to_come_again(world: World) -> None:
    """429 and 503 have the same fields, in the same order, at the door."""
    create = request("POST /create_dek_for_thread", b'{"thread_id":"t"}', JSON)
    for instance in world.instances:
        instance.limit(operations_per_second=1, burst=1)
    try:
        # What trickles in between two requests lets a second one in, and leaves a debt of nearly a second.
        found = both(world, [*[request("GET /get_wrapped?key_id=k_none", None)] * 3, create])
        assert [status for status, _, _ in found][2:] == ["HTTP/1.1 429 "] * 2
    finally:
        for instance in world.instances:
            instance.limit()
    world.store.pause()
    try:
        # Which words an instance has for it depends on what it has noticed: only the fields are compared.
        shown = [answers(converse(instance, [create])) for instance in world.instances]
        assert [[status for status, _, _ in found] for found in shown] == [["HTTP/1.1 503 "]] * 2
        names = [[name for name, _ in fields] for ((_, fields, _),) in shown]
        assert names[0] == names[1]
        assert "retry-after" in names[0]
    finally:
        world.store.resume()


def test_http_1_0(world: World) -> None:
    """It is answered, and the connection closes."""
    for fields in ("", "Connection: keep-alive\r\n"):
        found = both(world, [f"GET /healthz HTTP/1.0\r\nHost: localhost\r\n{fields}\r\n".encode()])
        assert [status for status, _, _ in found] == ["HTTP/1.1 200 "]
    assert len(both(world, [b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n" + LAST])) == 1


@pytest.mark.parametrize("name", ODD)
def test_the_odd_get_the_same_verdict(world: World, material: dict[str, Any], name: str) -> None:
    """As a first request, after an ordinary one, and right behind one in the same piece."""
    ordinary = requests(material)["encrypt"]
    streams = [[ODD[name], LAST], [ordinary, ODD[name], LAST], [ordinary + ODD[name] + LAST]]
    if name.startswith("half"):
        streams = [stream[:-1] for stream in streams[:2]] + [[ordinary + ODD[name]]]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda stream: both(world, stream), streams))


def test_a_hot_request_behind_a_slow_one_keeps_its_place(world: World, material: dict[str, Any]) -> None:
    """A create that waits for the disk, then reads from memory: the answers come in order."""
    known = requests(material)
    names = ["create", "decrypt", "a key", "decrypt", "create many", "health"]
    for stream in ([known[name] for name in names], [b"".join(known[name] for name in names)]):
        found = both(world, [*stream, LAST])
        assert [status.split()[1] for status, _, _ in found] == ["200"] * 7
        assert [min(body) for _, _, body in found] == [
            *("kek_id", "plaintext", "changed_at", "plaintext", "results", "status", "status")
        ]


def test_a_pipeline_is_the_doors(world: World, material: dict[str, Any]) -> None:
    """A hundred requests in one piece, keys from memory or not: all are answered by it, in order."""
    known = requests(material)
    names = ["encrypt", "decrypt", "wrapped", "encrypt, no such key", "health"] * 20
    before = world.instances[0].metric("kms_fast_door_requests_total")
    found = both(world, [b"".join(known[name] for name in names)])
    assert [status.split()[1] for status, _, _ in found] == ["200", "200", "200", "404", "200"] * 20
    assert world.instances[0].metric("kms_fast_door_requests_total") == before + len(names)


def test_the_last_request_is_the_doors(world: World, material: dict[str, Any]) -> None:
    """Whoever makes a connection for each request is served by it too, and gets its connection closed."""
    known = requests(material)
    names = ["encrypt", "encrypt, no JSON", "create", "wrapped", "health", "encrypt a long batch"]
    before = world.instances[0].metric("kms_fast_door_requests_total")
    for name in names:
        raw = known[name].replace(b"\r\n", b"\r\nConnection: Close\r\n", 1)
        for stream in ([raw], [known["decrypt"] + raw], [raw[:30], raw[30:]]):
            *_, (_, fields, _) = both(world, stream)
            assert ("Connection", "close") in fields
    assert world.instances[0].metric("kms_fast_door_requests_total") == before + 4 * len(names)


def test_what_follows_the_last_request_is_not_the_doors(world: World, material: dict[str, Any]) -> None:
    """In one piece with it: the other parser says what that means."""
    raw = requests(material)["encrypt"].replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    before = world.instances[0].metric("kms_fast_door_requests_total")
    for more in (raw, b"\r\n", START):
        both(world, [raw + more])
    assert world.instances[0].metric("kms_fast_door_requests_total") == before


def test_a_byte_at_a_time(world: World, material: dict[str, Any]) -> None:
    """Requests in the smallest pieces are answered, alike and by the door."""
    raw = requests(material)["encrypt"] + requests(material)["wrapped"]
    before = world.instances[0].metric("kms_fast_door_requests_total")
    assert len(both(world, [raw[i : i + 1] for i in range(len(raw))])) == 2
    assert world.instances[0].metric("kms_fast_door_requests_total") == before + 2


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_stream_in_any_pieces(world: World, material: dict[str, Any], data: st.DataObject) -> None:
    """Mixed requests, cut at random places: the same answers in the same order."""
    known = requests(material)
    names = data.draw(st.lists(st.sampled_from(sorted(known.keys() - EARLY)), min_size=1, max_size=5))
    stream = b"".join(known[name] for name in names) + LAST
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=8)))
    both(world, [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)])

"""Nothing secret leaves the process but in the answers that carry it; nobody gets at its memory."""

from __future__ import annotations

import base64
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.domain.envelope import parse_blob, unwrap, wrap_aad
from progressdb_kms.store.redis.schema import record_key
from tests.contract.wire_client import Answer, b64, unb64
from tests.integration.unprivileged import unprivileged_python
from tests.integration.world import KEK_1, KEK_2, KEK_3, Instance, World, kek_text, write_private

USER = os.geteuid() or 65534
"""Runs the service: the tests' own user, or nobody where that is root."""

PLAINTEXT = b"the plaintext that nobody may see: tangerine"
AAD = b"the associated data that nobody may see: walnut"


@pytest.fixture(scope="module")
def python() -> Iterator[tuple[str, dict[str, str]]]:
    """Give an interpreter and an environment for the service's user."""
    with unprivileged_python(USER) as found:
        yield found


@pytest.fixture(scope="module")
def service(python: tuple[str, dict[str, str]], new_world: Callable[..., World]) -> Instance:
    """Run a service without any privilege, that logs all it ever logs."""
    world = new_world(owner=USER)
    world.store.start()
    service = world.instance("a", user=USER, log={"level": "debug"})
    service.python = python
    return service.start()


def forms(secret: bytes) -> dict[str, bytes]:
    """Return how a secret could show in text: raw, hex, and base64 wherever in a longer string it stands."""
    found = {
        "raw": secret,
        "repr": repr(secret)[2:-1].encode(),
        "hex": secret.hex().encode(),
        "HEX": secret.hex().upper().encode(),
    }
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + secret)
        # The first and last characters depend on the neighbours.
        inner = encoded[4:-4]
        found[f"base64+{shift}"] = inner
        found[f"base64url+{shift}"] = inner.replace(b"+", b"-").replace(b"/", b"_")
    return found


def test_the_search_finds_a_secret_in_each_form() -> None:
    """Were one there, it would be found: the test of the test."""
    secret = AESGCM.generate_key(256)
    texts = [secret, secret.hex().encode(), base64.b64encode(b"ab" + secret + b"c"), repr(secret).encode()]
    assert all(any(form in text for form in forms(secret).values()) for text in texts)


def drive(service: Instance) -> tuple[list[Answer], dict[str, bytes]]:
    """Use every route and run into errors; return the answers with an error, and the secrets by name."""
    world = service.world
    server, operator, stranger = (service.client(name) for name in ("server", "operator", "stranger"))
    made = server.create("t:1", Idempotency_Key="an-idempotency-key")
    key_id = made["key_id"]
    blob = unb64(made["wrapped"])
    secrets = {
        "KEK 1": bytes.fromhex(KEK_1),
        "KEK 2": bytes.fromhex(KEK_2),
        "KEK 3": bytes.fromhex(KEK_3),
        "plaintext": PLAINTEXT,
        "AAD": AAD,
        "wrapped DEK": blob,
        "wrapped DEK's key part": parse_blob(blob).body[12:44],
        "DEK": unwrap(AESGCM(bytes.fromhex(KEK_1)), parse_blob(blob).body, wrap_aad(key_id, "t:1")),
    }
    sealed = server.encrypt(key_id, PLAINTEXT, AAD)
    assert server.decrypt(key_id, sealed, AAD) == PLAINTEXT
    item = {"key_id": key_id, "plaintext": b64(PLAINTEXT), "aad": b64(AAD)}
    opened = {"key_id": key_id, "ciphertext": b64(sealed), "aad": b64(AAD)}
    server.post("/encrypt_batch", {"items": [item, item]}).ok()
    server.post("/decrypt_batch", {"items": [opened, {**opened, "aad": ""}]}).ok()
    server.post("/create_dek_batch", {"items": [{"thread_id": "t:2"}]}).ok()
    server.post_msgpack("/encrypt", {"key_id": key_id, "plaintext": PLAINTEXT, "aad": AAD})
    server.get("/get_wrapped", {"key_id": key_id}).ok()
    operator.post("/rewrap", {"key_id": key_id}).ok()
    for path in ("/v1/keys", f"/v1/keys/{key_id}", "/v1/keks"):
        operator.get(path).ok()
    errors = [
        stranger.post("/encrypt", item),
        server.try_decrypt(key_id, sealed, b"not it"),
        server.try_decrypt(key_id, sealed[:-1] + bytes([sealed[-1] ^ 1]), AAD),
        server.post("/encrypt", {**item, "plaintext": PLAINTEXT.decode()}),
        server.post("/encrypt", {**item, PLAINTEXT.decode(): AAD.decode()}),
        server.post("/encrypt", {**item, "key_id": PLAINTEXT.decode()}),
        server.post_raw("/encrypt", PLAINTEXT),
        server.post_raw("/encrypt", b'{"plaintext": "' + PLAINTEXT + b'", "key_id": 1}', "text/plain"),
        server.post("/create_dek_for_thread", {"thread_id": PLAINTEXT.decode() + "\n"}),
        server.get("/" + b64(PLAINTEXT)),
        server.get("/v1/keys", {"cursor": b64(PLAINTEXT)}),
        server.get("/v1/keys", {PLAINTEXT.decode(): AAD.decode()}),
        operator.post("/rewrap", {"key_id": key_id, "new_kek_hex": KEK_2}),
    ]
    # A record with another key's blob: the service can't unwrap it and says so loudly, but not what it is.
    other = server.create("t:1")["key_id"]
    forged = server.create("t:1")["key_id"]
    world.store.ask("HSET", record_key(forged[2:4], forged), "wrapped", blob)
    errors.append(server.get("/v1/keys/" + other + "/" + b64(blob)))
    operator.post(f"/v1/keys/{forged}/disable").ok()
    operator.post(f"/v1/keys/{forged}/enable").ok()
    errors.append(server.post("/encrypt", {**item, "key_id": forged}))
    # A KEK file that breaks while the service runs.
    seen = service.metric("kms_reloads_total", what="kek", result="failed")
    write_private(world.kek_file, kek_text({1: KEK_3, 2: KEK_2}) + "]")
    os.chown(world.kek_file, USER, -1)
    service.until("kms_reloads_total", lambda count: count > seen, what="kek", result="failed")
    assert {answer.status for answer in errors} >= {400, 403, 404, 422}
    assert all(400 <= answer.status < 500 for answer in errors), [answer.status for answer in errors]
    return errors, secrets


def test_nothing_secret_is_in_logs_metrics_errors_or_the_process_list(service: Instance) -> None:
    """After every route and many errors at log level debug: no KEK, DEK, wrapped DEK, plaintext or AAD."""
    errors, secrets = drive(service)
    places = {
        "stdout": service.out.read_bytes(),
        "stderr": service.err.read_bytes(),
        "metrics": service.admin("/metrics").body,
        "readyz": service.admin("/readyz").body,
        "cmdline": Path(f"/proc/{service.pid}/cmdline").read_bytes(),
    }
    places |= {
        f"error {number}": answer.body + repr(answer.headers).encode() for number, answer in enumerate(errors)
    }
    if os.geteuid() == 0:  # others may not even read it, since the process is not dumpable
        places["environ"] = Path(f"/proc/{service.pid}/environ").read_bytes()
    assert b'"level": "debug"' in places["stderr"]
    assert b"wrapped_key_invalid" in places["stderr"]
    assert b'"audit":"key.create"' in places["stdout"]
    found = [
        f"{name} as {form} in {place}"
        for name, secret in secrets.items()
        for form, text in forms(secret).items()
        for place, content in places.items()
        if text in content
    ]
    assert found == []


def test_the_service_needs_no_privilege(service: Instance) -> None:
    """It serves without root and without a capability; certificates are loaded, keys are made."""
    status = Path(f"/proc/{service.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert set(fields["Uid"].split()) == {str(USER)}
    assert int(fields["CapEff"], 16) == 0
    client = service.client("server")
    client.encrypt(client.create("t:1")["key_id"], b"message")


def test_the_process_leaves_no_core_and_opens_its_memory_to_nobody(
    service: Instance, python: tuple[str, dict[str, str]]
) -> None:
    """No core dump, and not even a process of the same user may read the memory."""
    (limit,) = [
        line
        for line in Path(f"/proc/{service.pid}/limits").read_text().splitlines()
        if line.startswith("Max core file size")
    ]
    assert limit.split()[4:6] == ["0", "0"]
    # The kernel gives the files of a process that is not dumpable to root.
    assert Path(f"/proc/{service.pid}/mem").stat().st_uid == 0
    interpreter, environment = python
    probe = subprocess.run(
        [interpreter, "-c", "import sys; open(sys.argv[1], 'rb')", f"/proc/{service.pid}/mem"],
        user=USER,
        group=USER,
        extra_groups=[],
        env=environment,
        cwd="/",
        capture_output=True,
        check=False,
    )
    assert b"PermissionError" in probe.stderr

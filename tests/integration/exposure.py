"""Uses every route and provokes every error, and keeps all answers that are no success."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import yaml
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.domain.envelope import parse_blob, unwrap, wrap_aad
from progressdb_kms.domain.keys import ALL_TAGS
from progressdb_kms.store.redis.schema import record_key
from tests.contract.wire_client import JSON, Answer, RawConnection, b64, unb64
from tests.integration.world import (
    KEK_1,
    KEK_2,
    KEK_3,
    POLICY,
    Instance,
    eventually,
    kek_text,
    write_private,
)

PLAINTEXT = b"the plaintext that nobody may see: tangerine"
AAD = b"the associated data that nobody may see: walnut"
LIMITS = {
    "body_timeout": 1,
    "request_timeout": 2,
    "batch_items": 100,
    "plaintext_bytes": 2048,
    "body_bytes": 8192,
}
"""Of a service that this is done to: small enough to be run into."""


class Exposure:
    """One drive over a service.

    Args:
        service: Runs, with `LIMITS` and a chained audit log.
        plain: Another one on the same store, whose audit log has no key.
        command: Runs a command of the package on the service's configuration.

    Attributes:
        secrets: What must be found nowhere, by name.
        answers: All that were no success.
        routes: Those that have answered 200, as ``METHOD /path/<name>``.
        codes: Error codes that were answered, of batch items too.
    """

    def __init__(
        self, service: Instance, plain: Instance, command: Callable[..., CompletedProcess[bytes]]
    ) -> None:
        self.service = service
        self._plain = plain
        self._command = command
        self.answers: list[Answer] = []
        self.routes: set[str] = set()
        self.codes: set[str] = set()
        self._store = service.world.store
        self._server = service.client("server")
        self._operator = service.client("operator")
        made = self._server.create("t:1", Idempotency_Key="an-idempotency-key")
        self.key_id = made["key_id"]
        self._blob = unb64(made["wrapped"])
        body = parse_blob(self._blob).body
        self.secrets = {
            "KEK 1": bytes.fromhex(KEK_1),
            "KEK 2": bytes.fromhex(KEK_2),
            "KEK 3": bytes.fromhex(KEK_3),
            "plaintext": PLAINTEXT,
            "AAD": AAD,
            "wrapped DEK": self._blob,
            "wrapped DEK's key part": body[12:44],
            "DEK": unwrap(AESGCM(bytes.fromhex(KEK_1)), body, wrap_aad(self.key_id, "t:1")),
        }
        self.item = {"key_id": self.key_id, "plaintext": b64(PLAINTEXT), "aad": b64(AAD)}
        self.sealed = self._server.encrypt(self.key_id, PLAINTEXT, AAD)
        self.opened = {"key_id": self.key_id, "ciphertext": b64(self.sealed), "aad": b64(AAD)}

    def add_keks(self) -> None:
        """Look for the keys that the KEK file holds by now, too."""
        versions = yaml.safe_load(self.service.world.kek_file.read_text())["versions"]
        for version, text in versions.items():
            self.secrets[f"KEK {version} of the file"] = bytes.fromhex(text)

    # Routes.

    def use_every_route(self, rotation_id: str) -> None:
        """Have each route of the table answer a success."""
        thread = "/v1/threads/t:9"
        key = "/v1/keys/<key_id>"
        self._server.create("t:9")
        posts: list[tuple[str, object]] = [
            ("/create_dek_for_thread", {"thread_id": "t:2"}),
            ("/encrypt", self.item),
            ("/decrypt", self.opened),
            ("/create_dek_batch", {"items": [{"thread_id": "t:2"}]}),
            ("/encrypt_batch", {"items": [self.item, self.item]}),
            ("/decrypt_batch", {"items": [self.opened, {**self.opened, "aad": ""}]}),
            ("/rewrap", {"key_id": self.key_id}),
        ]
        for path, body in posts:
            self._succeed(f"POST {path}", self._operator.post(path, body))
            self._server.post_msgpack(path, body)
        self._server.post_msgpack("/encrypt", {"key_id": self.key_id, "plaintext": PLAINTEXT, "aad": AAD})
        rotated = self._operator.post(f"{thread}/rotate-dek")
        self._succeed("POST /v1/threads/<thread_id>/rotate-dek", rotated)
        self._succeed("GET /get_wrapped", self._server.get("/get_wrapped", {"key_id": self.key_id}))
        for path in ("/healthz", "/v1/keys", "/v1/keks", "/v1/rotations", "/v1/backups", "/v1/audit"):
            self._succeed(f"GET {path}", self._operator.get(path))
        shown = self._operator.get(f"/v1/rotations/{rotation_id}")
        self._succeed("GET /v1/rotations/<rotation_id>", shown)
        self._succeed(f"GET {key}", self._operator.get(f"/v1/keys/{self.key_id}"))
        other = self._server.create("t:3")["key_id"]
        for change in ("disable", "enable", "schedule-destruction", "cancel-destruction"):
            self._succeed(f"POST {key}/{change}", self._operator.post(f"/v1/keys/{other}/{change}"))

    def _succeed(self, route: str, answer: Answer) -> None:
        # A result of a batch may be an error.
        self._note_items(answer.ok())
        self.routes.add(route)

    # Errors.

    def _failed(self, answer: Answer) -> Answer:
        """Keep an answer; its code counts where it is one of ours."""
        self.answers.append(answer)
        with contextlib.suppress(ValueError, AssertionError):
            body = answer.json()
            self.codes.add(body.get("code", ""))
            self._note_items(body)
        return answer

    def _note_items(self, body: dict[str, Any]) -> None:
        for result in body.get("results", []):
            if "error" in result:
                self.codes.add(result["error"]["code"])

    def _expect(self, code: str, answer: Callable[[], Answer]) -> None:
        """Ask until this error is answered."""
        eventually(lambda: (self._failed(answer()), code in self.codes)[1], code)

    def provoke_bad_requests(self) -> None:
        """What a caller does wrong, with secrets in every place that it can fill."""
        server, operator, text = self._server, self._operator, PLAINTEXT.decode()
        stranger = self.service.client("stranger")
        for answer in (
            stranger.post("/encrypt", self.item),
            server.try_decrypt(self.key_id, self.sealed, b"not it"),
            server.try_decrypt(self.key_id, self.sealed[:-1] + bytes([self.sealed[-1] ^ 1]), AAD),
            server.try_decrypt(self.key_id, PLAINTEXT[:5], AAD),
            server.post("/encrypt", {**self.item, "plaintext": text}),
            server.post("/encrypt", {**self.item, text: AAD.decode()}),
            server.post("/encrypt", {**self.item, "key_id": text}),
            server.post("/encrypt", {**self.item, "key_id": "k_" + self.key_id[2:4] + "0" * 28}),
            server.post("/encrypt", {**self.item, "plaintext": b64(PLAINTEXT * 60)}),
            server.post("/encrypt", {**self.item, "plaintext": b64(PLAINTEXT * 400)}),
            server.post("/encrypt_batch", {"items": [self.item] * 101}),
            server.post_raw("/encrypt", PLAINTEXT),
            server.post_raw(
                "/encrypt", b'{"plaintext": "' + PLAINTEXT + b'", "plaintext": "' + PLAINTEXT + b'"}'
            ),
            server.post_raw(
                "/encrypt", json.dumps(self.item).encode()[:-1] + f', "aad": "{b64(AAD)}"}}'.encode()
            ),
            server.post_raw("/encrypt", b'{"plaintext": "' + PLAINTEXT + b'", "key_id": 1}', "text/plain"),
            server.post("/encrypt", self.item, Accept="text/html"),
            server.post("/create_dek_for_thread", {"thread_id": text + "\n"}),
            server.post("/create_dek_for_thread", {"thread_id": "t:1"}, Idempotency_Key=text + "\x80"),
            server.get("/healthz", X_Long=b64(PLAINTEXT) * 400),
            server.get("/" + b64(PLAINTEXT)),
            server.request("DELETE", "/encrypt", json.dumps(self.item).encode(), {"Content-Type": JSON}),
            server.get("/v1/keys", {"cursor": b64(PLAINTEXT)}),
            server.get("/v1/keys", {text: AAD.decode()}),
            operator.get("/v1/rotations/r_9_00000000"),
            operator.post("/rewrap", {"key_id": self.key_id, "new_kek_hex": KEK_2}),
        ):
            assert answer.status >= 400, answer
            self._failed(answer)
        with RawConnection(server.connect) as raw:
            body = json.dumps(self.item).encode()
            head = f"POST /encrypt HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON}\r\n"
            raw.send(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body[:-5])
            self._failed(raw.must_answer("POST"))

    def provoke_states(self) -> None:
        """Keys that may not be used, or not so."""
        server, operator = self._server, self._operator
        ids = [key["key_id"] for key in (server.create(f"t:{number}") for number in range(10, 16))]
        disabled, waiting, destroyed, exhausted, forged, unknown = ids
        operator.post(f"/v1/keys/{disabled}/disable").ok()
        operator.post(f"/v1/keys/{waiting}/schedule-destruction").ok()
        operator.post(f"/v1/keys/{destroyed}/schedule-destruction").ok()
        self._failed(operator.post(f"/v1/keys/{waiting}/disable"))
        self._store.ask("HSET", self._record(destroyed), "destroy_at", "1")
        self._store.ask("ZADD", f"kms:{{{destroyed[2:4]}}}:due", "1", destroyed)
        done = self._command("keys", "destroy-due")
        assert done.returncode == 0, done.stderr
        # Another key's blob: the service can't unwrap it and says so loudly, but not what it is.
        self._store.ask("HSET", self._record(forged), "wrapped", self._blob)
        self._store.ask("HSET", self._record(exhausted), "uses", str(2**32))
        mine = self._store.ask("HGET", self._record(unknown), "wrapped")
        other = mine[:1] + (9).to_bytes(3, "big") + mine[4:]
        self._store.ask("HSET", self._record(unknown), "wrapped", other, "kek_version", "9")
        for key_id in (forged, exhausted, unknown):
            operator.post(f"/v1/keys/{key_id}/disable").ok()
            operator.post(f"/v1/keys/{key_id}/enable").ok()
        self._failed(server.get(f"/v1/keys/{waiting}/" + b64(self._blob)))
        for code, key_id in (
            ("key_disabled", disabled),
            ("key_pending_destruction", waiting),
            ("key_destroyed", destroyed),
            ("key_exhausted", exhausted),
            ("wrapped_key_invalid", forged),
            ("kek_unavailable", unknown),
        ):
            self._expect(code, lambda: server.post("/encrypt", {**self.item, "key_id": key_id}))  # noqa: B023 - called before it changes
        once = {"Idempotency_Key": "once"}
        claimed = server.create("t:16", **once)["key_id"]
        self._store.ask("HSET", self._record(claimed), "thread_id", PLAINTEXT)
        self._expect(
            "internal_error", lambda: server.post("/create_dek_for_thread", {"thread_id": "t:16"}, **once)
        )
        old = server.create("t:20")["key_id"]
        operator.post("/v1/threads/t:20/rotate-dek").ok()
        self._expect("key_decrypt_only", lambda: server.post("/encrypt", {**self.item, "key_id": old}))

    def provoke_limits(self) -> None:
        """The caller's own limit."""
        service = self.service
        seen = service.metric("kms_reloads_total", what="policy")
        limits = [{"identities": ["dns:server"], "operations_per_second": 1, "burst": 1}]
        self._replace(service.policy, json.dumps({**POLICY, "limits": limits}))
        service.until("kms_reloads_total", lambda count: count > seen, what="policy")
        self._expect("too_many_requests", lambda: self._server.post("/encrypt", self.item))
        self._replace(service.policy, json.dumps(POLICY))
        service.until("kms_reloads_total", lambda count: count > seen + 1, what="policy")

    def provoke_reloads(self) -> None:
        """A KEK file that breaks while the service runs, with a key in it."""
        service = self.service
        seen = service.metric("kms_reloads_total", what="kek", result="failed")
        whole = service.world.kek_file.read_text()
        self._replace(service.world.kek_file, kek_text({1: KEK_3, 2: KEK_2}) + "]")
        service.until("kms_reloads_total", lambda count: count > seen, what="kek", result="failed")
        self._replace(service.world.kek_file, kek_text({1: KEK_3, 2: KEK_2}))
        service.until("kms_reloads_total", lambda count: count > seen + 1, what="kek", result="failed")
        self._replace(service.world.kek_file, whole)

    def provoke_outages(self) -> None:
        """A store that is silent, away, not durable, or full of what does not belong there."""
        server, operator, store = self._server, self._operator, self._store
        create = {"thread_id": "t:30"}
        for tag in ALL_TAGS:
            store.ask("HSET", f"kms:{{{tag}}}:ctl", "floor", "8")
        self._expect("stale_kek", lambda: server.post("/create_dek_for_thread", create))
        for tag in ALL_TAGS:
            store.ask("HSET", f"kms:{{{tag}}}:ctl", "floor", "2")
        # With a chained log a change fails at the log already.
        plain = self._plain.client("server")
        store.ask("CONFIG", "SET", "appendfsync", "everysec")
        eventually(lambda: self._failed(server.post("/create_dek_for_thread", create)).status == 503)
        self._expect("store_not_durable", lambda: plain.post("/create_dek_for_thread", create))
        store.ask("CONFIG", "SET", "appendfsync", "always")
        eventually(lambda: server.post("/create_dek_for_thread", create).status == 200)
        store.ask("RENAME", "kms:{ctl}:audit", "kept")
        store.ask("SET", "kms:{ctl}:audit", PLAINTEXT)
        change = f"/v1/keys/{self.key_id}/disable"
        self._expect("audit_unavailable", lambda: operator.post(change))
        store.ask("RENAME", "kept", "kms:{ctl}:audit")
        eventually(lambda: operator.post("/create_dek_for_thread", create).status == 200)
        store.pause()
        try:
            self._expect("deadline_exceeded", lambda: server.post("/create_dek_for_thread", create))
        finally:
            store.resume()
        eventually(lambda: operator.post("/create_dek_for_thread", create).status == 200)
        store.kill()
        self._failed(server.post("/create_dek_for_thread", create))
        self._expect("store_unavailable", lambda: plain.post("/create_dek_for_thread", create))
        store.start()
        eventually(lambda: operator.post("/create_dek_for_thread", create).status == 200)

    @staticmethod
    def _record(key_id: str) -> str:
        return record_key(key_id[2:4], key_id)

    def _replace(self, path: Path, text: str) -> None:
        write_private(path, text)
        if self.service.user is not None:
            os.chown(path, self.service.user, -1)

"""A stand-in for the transit engine of Vault and OpenBao, by their documents, over real HTTP.

What it does as they do: batches with an error per item and 400 for the whole answer, versions of keys,
``associated_data``, 403 for a token that it does not know, 503 while it is sealed, login by Kubernetes with
a lease.
"""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM


class Refusal(Exception):
    """An answer without data."""

    def __init__(self, status: int, *errors: str) -> None:
        super().__init__(status)
        self.status = status
        self.errors = errors


class Transit:
    """The engine.

    Attributes:
        keys: Versions of keys by name, from 1.
        min_decryption: By name, ``min_decryption_version``: what is older does not decrypt.
        tokens: Tokens that it knows.
        calls: Paths that were called.
        sealed: Whether it answers 503.
        binds_aad: Whether it knows ``associated_data``; releases of Vault before 1.13 leave it out silently.
        lease: Seconds that a login is said to last.
        garbled: Answers with this instead.
    """

    def __init__(self) -> None:
        self.keys: dict[str, list[bytes]] = {}
        self.min_decryption: dict[str, int] = {}
        self.tokens = {"root"}
        self.jwts = {"jwt-of-the-pod": "kms"}
        self.calls: list[str] = []
        self.sealed = False
        self.binds_aad = True
        self.lease = 3600
        self.garbled: bytes | None = None
        self.address = ""

    def add_key(self, name: str) -> None:
        """Make a key, or a further version of it."""
        self.keys.setdefault(name, []).append(os.urandom(32))

    def answer(self, path: str, token: str | None, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Answer a POST."""
        self.calls.append(path)
        if self.sealed:
            raise Refusal(503, "Vault is sealed")
        match path.split("/"):
            case ["", "v1", "auth", "kubernetes", "login"]:
                if self.jwts.get(body["jwt"]) != body["role"]:
                    raise Refusal(403, "permission denied")
                fresh = f"t{len(self.calls)}"
                self.tokens.add(fresh)
                return 200, {"auth": {"client_token": fresh, "lease_duration": self.lease}}
            case ["", "v1", "transit", verb, name]:
                if token not in self.tokens:
                    raise Refusal(403, "permission denied")
                results = [self._item(verb, name, item, body) for item in body["batch_input"]]
                return 400 if any("error" in item for item in results) else 200, {
                    "data": {"batch_results": results}
                }
            case _:
                raise Refusal(404)

    def _item(self, verb: str, name: str, item: dict[str, str], body: dict[str, Any]) -> dict[str, Any]:
        if name not in self.keys:
            raise Refusal(400, "encryption key not found")
        aad = base64.b64decode(item["associated_data"]) if self.binds_aad else b""
        if verb == "encrypt":
            version = body["key_version"]
            if version > len(self.keys[name]):
                return {"error": "requested version for encryption is higher than the latest key version"}
            nonce = os.urandom(12)
            sealed = nonce + AESGCM(self.keys[name][version - 1]).encrypt(
                nonce, base64.b64decode(item["plaintext"], validate=True), aad
            )
            return {
                "ciphertext": f"vault:v{version}:{base64.b64encode(sealed).decode()}",
                "key_version": version,
            }
        prefix, version, text = item["ciphertext"].split(":")
        assert prefix == "vault"
        sealed = base64.b64decode(text, validate=True)
        if int(version[1:]) > len(self.keys[name]):
            return {"error": "invalid ciphertext: version is too new"}
        if int(version[1:]) < self.min_decryption.get(name, 1):
            return {"error": "ciphertext or signature version is disallowed by policy (too old)"}
        try:
            opened = AESGCM(self.keys[name][int(version[1:]) - 1]).decrypt(sealed[:12], sealed[12:], aad)
        except (InvalidTag, ValueError):
            return {"error": "invalid ciphertext: unable to decrypt"}
        return {"plaintext": base64.b64encode(opened).decode()}


@contextmanager
def serving_transit() -> Iterator[Transit]:
    """Serve an engine on a loopback port."""
    transit = Transit()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Else each answer waits for the client's delayed acknowledgement of its head.
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                status, answer = transit.answer(self.path, self.headers["X-Vault-Token"], body)
            except Refusal as refusal:
                status, answer = refusal.status, {"errors": list(refusal.errors)}
            content = transit.garbled if transit.garbled is not None else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    transit.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield transit
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

"""Keys of a transit engine: HashiCorp Vault or OpenBao, over their HTTP API.

``encrypt`` and ``decrypt`` are called with whole batches, with the AAD, and under the version of the key
that its name holds: the engine's own rotation changes nothing here. A body is what stands behind
``vault:v<version>:``, decoded.
"""

from __future__ import annotations

import base64
import binascii
import json
import ssl
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import httpcore

from progressdb_kms.domain.envelope import BODY_BYTES
from progressdb_kms.domain.errors import KekFileInvalid, KekUnavailable, KekUnreachable
from progressdb_kms.domain.keys import DEK_BYTES
from progressdb_kms.files import read_private

if TYPE_CHECKING:
    from collections.abc import Sequence

    from progressdb_kms.settings.kek import Vault

_OK: Final = 200
_BAD_REQUEST: Final = 400
_FORBIDDEN: Final = frozenset({401, 403})
_NOT_FOUND: Final = 404
_MAX_ANSWER: Final = 2**20
_LOGIN_EARLY: Final = 0.8
"""Share of a login's lease after which a new one is asked for."""
_LOGIN_PAUSE: Final = 5.0
"""Seconds for which a token that is refused is not replaced by another."""
_ERRORS: Final = (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError)


class VaultKeeper:
    """A ``Keeper`` over one transit engine.

    Args:
        settings: Where it is, and how this service logs in.
    """

    kind = "vault"
    threads = 4
    chunk = 256

    def __init__(self, settings: Vault) -> None:
        self._settings = settings
        self._token = b""
        self._token_at = self._token_until = 0.0
        self._lock = threading.Lock()
        try:
            context = ssl.create_default_context(cafile=settings.ca)
        except OSError as error:
            raise KekFileInvalid(
                f"can't read kek.vault.ca {settings.ca}: {error.strerror or error}"
            ) from None
        self._pool = httpcore.ConnectionPool(ssl_context=context, max_connections=self.threads)
        # With the keeper, not at the process's end, when a call may still be under way.
        weakref.finalize(self, self._pool.close).atexit = False

    def __repr__(self) -> str:
        return f"VaultKeeper(address={self._settings.address!r}, mount={self._settings.mount!r})"

    def wrap(self, key: str, deks: Sequence[bytes], aads: Sequence[bytes]) -> list[bytes]:
        """Wrap DEKs in one call.

        Raises:
            KekUnavailable, KekUnreachable: As ``Keeper.wrap``.
        """
        name, version = _parts(key)
        items = [
            {"plaintext": _text(dek), "associated_data": _text(aad)}
            for dek, aad in zip(deks, aads, strict=True)
        ]
        results = self._batch("encrypt", name, {"batch_input": items, "key_version": version})
        head = f"vault:v{version}:"
        bodies = []
        for result in _results(results, len(deks)):
            ciphertext = result.get("ciphertext")
            body = _decoded(ciphertext, head)
            if body is None or len(body) != BODY_BYTES:
                raise KekUnavailable(
                    f"the transit key {name} does not encrypt under its version {version}: is it of type"
                    " aes256-gcm96, with that version, and above min_encryption_version?"
                )
            bodies.append(body)
        return bodies

    def unwrap(self, key: str, bodies: Sequence[bytes], aads: Sequence[bytes]) -> list[bytes | None]:
        """Unwrap DEKs in one call.

        Raises:
            KekUnavailable, KekUnreachable: As ``Keeper.unwrap``.
        """
        name, version = _parts(key)
        # Nothing of another length is sent: one huge body out of the store would be the whole batch's end.
        sent = [number for number, body in enumerate(bodies) if len(body) == BODY_BYTES]
        opened: list[bytes | None] = [None] * len(bodies)
        if not sent:
            return opened
        items = [
            {
                "ciphertext": f"vault:v{version}:{_text(bodies[number])}",
                "associated_data": _text(aads[number]),
            }
            for number in sent
        ]
        results = self._batch("decrypt", name, {"batch_input": items})
        for number, result in zip(sent, _results(results, len(sent)), strict=True):
            dek = None if result.get("error") else _decoded(result.get("plaintext"), "")
            opened[number] = dek if dek is not None and len(dek) == DEK_BYTES else None
        return opened

    def _batch(self, verb: str, name: str, body: dict[str, Any]) -> object:
        path = f"{self._settings.mount}/{verb}/{quote(name, safe='')}"
        content = json.dumps(body).encode()
        token = self._login()
        status, answer = self._call(path, content, token)
        if status in _FORBIDDEN:
            status, answer = self._call(path, content, self._login(refused=token))
        results = _member(_member(answer, "data"), "batch_results")
        # 400 is said of a batch in which one item failed, too, and then its results come along.
        if status == _OK or (status == _BAD_REQUEST and isinstance(results, list)):
            return results
        # What the answer says is not passed on: nobody promises that it repeats nothing of the request.
        if status in {_BAD_REQUEST, _NOT_FOUND}:
            raise KekUnavailable(
                f"the transit engine {self._settings.mount} answers {status} to {verb}/{name}: is there such"
                " a key, of type aes256-gcm96 and not derived?"
            )
        raise KekUnreachable(
            f"the transit engine at {self._settings.address} answers {status} to {verb}/{name}"
            + (": its policy must let this service update it" if status in _FORBIDDEN else "")
        )

    def _login(self, refused: bytes = b"") -> bytes:
        """Return a token, a new one in place of one that was refused, if that is not quite new itself."""
        settings = self._settings
        if settings.token_file is not None:
            return _read(settings.token_file)
        with self._lock:
            now = time.monotonic()
            # What is refused because of a policy is refused with a new token, too: no login for each request.
            renew = refused == self._token and now - self._token_at > _LOGIN_PAUSE
            if not self._token or renew or now >= self._token_until:
                assert settings.kubernetes is not None  # noqa: S101 - the settings demand one of the two
                jwt = _read(settings.kubernetes.jwt_file).decode("utf-8", "replace")
                body = json.dumps({"role": settings.kubernetes.role, "jwt": jwt}).encode()
                status, answer = self._call(f"auth/{settings.kubernetes.mount}/login", body, b"")
                auth = _member(answer, "auth")
                token, lease = _member(auth, "client_token"), _member(auth, "lease_duration")
                if status != _OK or not isinstance(token, str):
                    raise KekUnreachable(
                        f"the login at {settings.address} by auth/{settings.kubernetes.mount} with the role"
                        f" {settings.kubernetes.role} is refused: {status}"
                    )
                self._token, self._token_at = token.encode(), now
                seconds = lease if isinstance(lease, int) and lease > 0 else 0
                # A token without a lease does not expire; it is renewed all the same.
                self._token_until = now + _LOGIN_EARLY * (seconds or 3600)
            return self._token

    def _call(self, path: str, content: bytes, token: bytes) -> tuple[int, object]:
        settings = self._settings
        headers: list[tuple[bytes | str, bytes | str]] = [
            ("Content-Type", "application/json"),
            ("Accept", "application/json"),
            ("X-Vault-Request", "true"),
        ]
        if token:
            headers.append(("X-Vault-Token", token))
        if settings.namespace:
            headers.append(("X-Vault-Namespace", settings.namespace))
        seconds = settings.timeout
        timeouts = dict.fromkeys(("connect", "read", "write", "pool"), seconds)
        failure = ""
        try:
            with self._pool.stream(
                "POST",
                f"{settings.address.rstrip('/')}/v1/{path}",
                headers=headers,
                content=content,
                extensions={"timeout": timeouts},
            ) as response:
                received = b""
                for part in response.iter_stream():
                    received += part
                    if len(received) > _MAX_ANSWER:
                        raise KekUnreachable(f"{settings.address} answers more than it should")
                return response.status, _json(received)
        except _ERRORS as error:
            failure = type(error).__name__
        # Outside the handler, so that no error of the library, which may hold the request, is this one's
        # context.
        raise KekUnreachable(f"{settings.address} does not answer: {failure}")


def _parts(key: str) -> tuple[str, int]:
    name, _, version = key.partition("@")
    return name, int(version)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decoded(value: object, head: str) -> bytes | None:
    if not isinstance(value, str) or not value.startswith(head):
        return None
    try:
        return base64.b64decode(value[len(head) :], validate=True)
    except binascii.Error:
        return None


def _results(results: object, count: int) -> list[dict[str, Any]]:
    if (
        not isinstance(results, list)
        or len(results) != count
        or not all(isinstance(item, dict) for item in results)
    ):
        raise KekUnreachable("the transit engine's answer is not what its documents say")
    return results


def _member(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None


def _json(data: bytes) -> object:
    try:
        found: object = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found


def _read(path: Path) -> bytes:
    try:
        return read_private(path, error=KekFileInvalid).strip()
    except KekFileInvalid as error:
        raise KekUnreachable(error.detail) from None

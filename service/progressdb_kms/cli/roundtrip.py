"""``roundtrip``: does the service do its work for this certificate, and refuse whoever has none?"""

from __future__ import annotations

import os
import secrets
import socket
import ssl
from dataclasses import asdict, dataclass
from typing import Final
from urllib.parse import urlsplit

import click

from progressdb_kms.cli.connection import Connection, connection_options
from progressdb_kms.cli.output import json_option, print_json
from progressdb_kms.client.endpoint import Endpoint, TlsFiles, resolve
from progressdb_kms.client.tls import build_context
from progressdb_kms.domain.errors import KmsError

_TIMEOUT: Final = 10.0
_HTTPS: Final = 443


@dataclass(frozen=True, slots=True)
class _Check:
    """One thing that was tried.

    Attributes:
        check: Its name.
        ok: Whether it went as it has to.
        detail: What was seen, or what to do.
    """

    check: str
    ok: bool
    detail: str


@click.command()
@click.option(
    "--thread-prefix",
    default="",
    help="Prefix of the thread id that is used, where the policy allows only some (room:).",
)
@connection_options
@json_option
def roundtrip(thread_prefix: str, connection: Connection, *, as_json: bool) -> int:
    """Make a key, encrypt and decrypt under it, and see that a caller without a certificate is refused.

    Exits 0 only if all of it held. The certificate needs key:create, key:encrypt and key:decrypt. The key
    stays: each run leaves one.
    """
    endpoint = resolve(connection.url, TlsFiles(connection.ca, connection.cert, connection.key), os.environ)
    if endpoint.tls is None:
        raise click.UsageError("give an https:// address: only there are certificates to be seen at work")
    checks = [*_work(connection, f"{thread_prefix}roundtrip:{secrets.token_hex(8)}"), _refusal(endpoint)]
    if as_json:
        print_json({"ok": all(check.ok for check in checks), "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            click.echo(f"{'OK  ' if check.ok else 'FAIL'}  {check.check}: {check.detail}")
    return 0 if all(check.ok for check in checks) else 1


def _work(connection: Connection, thread_id: str) -> list[_Check]:
    """Use a new key as a server does; ends at the first thing that fails."""
    message, aad = secrets.token_bytes(256), thread_id.encode()
    done: list[_Check] = []
    step = "create"
    try:
        with connection.provider() as kms:
            dek = kms.create_dek_for_thread(thread_id)
            done.append(_Check(step, ok=True, detail=f"key {dek.key_id} for thread {thread_id}"))
            step = "encrypt"
            sealed = kms.encrypt_with_dek(dek.key_id, message, aad).ciphertext
            hidden = message not in sealed
            done.append(
                _Check(
                    step,
                    ok=hidden,
                    detail=f"{len(message)} bytes into {len(sealed)}" if hidden else "in the clear",
                )
            )
            step = "decrypt"
            same = kms.decrypt_with_dek(dek.key_id, sealed, aad) == message
            done.append(
                _Check(step, ok=same, detail="the same message" if same else "another message came back")
            )
    except KmsError as error:
        done.append(_Check(step, ok=False, detail=f"{error.detail} ({error.code})"))
    return done


def _refusal(endpoint: Endpoint) -> _Check:
    """Call without a certificate, with the service's CA checked as ever."""
    name = "refusal without a certificate"
    parts = urlsplit(endpoint.url)
    host, port = parts.hostname or "", parts.port or _HTTPS
    context = build_context(TlsFiles(ca=endpoint.tls.ca if endpoint.tls else None))
    try:
        connected = socket.create_connection((host, port), timeout=_TIMEOUT)
    except OSError as error:
        return _Check(name, ok=False, detail=f"no connection: {error.strerror or type(error).__name__}")
    try:
        # In TLS 1.3 the service judges after the client has finished: a refusal comes with the first read.
        with connected, context.wrap_socket(connected, server_hostname=host) as tls:
            tls.sendall(f"GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            if tls.recv(1):
                return _Check(name, ok=False, detail="it was let in: this must not be; check tls.client_ca")
    except ssl.SSLCertVerificationError as error:
        return _Check(name, ok=False, detail=f"the service's certificate: {error.verify_message}")
    except TimeoutError:
        return _Check(name, ok=False, detail=f"no answer within {_TIMEOUT:.0f} s")
    except ssl.SSLError as error:
        return _Check(name, ok=True, detail=(error.reason or "TLS alert").lower().replace("_", " "))
    except ConnectionError:
        pass
    return _Check(name, ok=True, detail="the connection was closed")

"""`roundtrip` against a real service, and against one that lets everybody in."""

from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.cli.helpers import Dev
from tests.store.servers import free_port
from tests.transport.pki import Ca


def options(dev: Dev, client: str = "server") -> list[str]:
    """Return the options that lead to the service."""
    files = dev.ready["clients"][client]
    return [
        *("--endpoint", dev.ready["url"], "--ca", dev.ready["ca"]),
        *("--cert", files["cert"], "--key", files["key"]),
    ]


def test_all_holds(kms: Command, dev: Dev) -> None:
    """A key is made and used, and a caller without a certificate is refused: one line each, exit 0."""
    outcome = kms("roundtrip", *options(dev), "--thread-prefix", "room:")
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert [line[:4] for line in lines] == ["OK  "] * 4
    assert "thread room:roundtrip:" in lines[0]
    assert "certificate required" in lines[3] or "closed" in lines[3]


def test_by_the_environment_and_in_json(kms: Command, dev: Dev, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's environment variables are enough."""
    words = options(dev)
    for name, value in zip(words[::2], words[1::2], strict=True):
        monkeypatch.setenv(f"PROGRESSDB_KMS_{name.removeprefix('--').upper()}", value)
    outcome = kms("roundtrip", "--json")
    assert outcome.code == 0
    assert outcome.json["ok"]
    names = [check["check"] for check in outcome.json["checks"]]
    assert names == ["create", "encrypt", "decrypt", "refusal without a certificate"]


def test_a_caller_without_grants_fails(kms: Command, dev: Dev) -> None:
    """Where the policy refuses, the line says what is missing, and the exit code is 1."""
    outcome = kms("roundtrip", *options(dev, "stranger"))
    assert outcome.code == 1
    assert "FAIL  create: " in outcome.out
    assert "key:create" in outcome.out
    assert "OK    refusal" in outcome.out


@pytest.fixture
def lax(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Run a server with TLS that asks nobody for a certificate; give its address and CA."""
    ca = Ca()
    cert, key = ca.server().write(tmp_path, "lax")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET  # noqa: N815 - the base class's names

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    path = tmp_path / "ca.crt"
    path.write_bytes(ca.pem)
    yield f"https://localhost:{server.server_address[1]}", path
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_service_that_lets_everybody_in_fails(kms: Command, lax: tuple[str, Path]) -> None:
    """An answer to a caller without a certificate is a failure, whatever else holds."""
    url, ca = lax
    outcome = kms("roundtrip", "--endpoint", url, "--ca", ca)
    assert outcome.code == 1
    assert "FAIL  refusal without a certificate: it was let in" in outcome.out


def test_nobody_there_is_no_refusal(kms: Command, dev: Dev, tmp_path: Path) -> None:
    """A port where nobody listens, and a service of another CA, prove no refusal."""
    words = options(dev)
    words[1] = f"https://localhost:{free_port()}"
    outcome = kms("roundtrip", *words)
    assert outcome.code == 1
    assert "FAIL  refusal without a certificate: no connection" in outcome.out
    (tmp_path / "other.crt").write_bytes(Ca("other").pem)
    words = options(dev)
    words[3] = str(tmp_path / "other.crt")
    outcome = kms("roundtrip", *words)
    assert outcome.code == 1
    assert "FAIL  refusal without a certificate: the service's certificate" in outcome.out


def test_only_over_tls(kms: Command, dev: Dev) -> None:
    """A Unix socket has no certificates: wrong usage."""
    outcome = kms("roundtrip", "--endpoint", f"unix://{dev.ready['unix']}")
    assert outcome.code == 2
    assert "https://" in outcome.err

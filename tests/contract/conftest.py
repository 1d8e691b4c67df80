"""The running service that the contract tests speak to, and ways to speak to it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.contract.dev_service import MAX_CONNECTIONS, STALL, DevService, start_dev
from tests.contract.wire_client import Client, RawConnection


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevService]:
    """Run one development service for all tests; its exit code after SIGTERM must be 0."""
    root = tmp_path_factory.mktemp("dev")
    running = start_dev(root / "state", root / "service.log")
    try:
        yield running
    finally:
        code = running.stop()
    assert code == 0, running.log_text()[-4000:]


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevService]:
    """Run a service with short limits, JSON logs and a narrow grant, edited into what `dev` made."""
    root = tmp_path_factory.mktemp("tuned")
    first = start_dev(root / "state", root / "first.log")
    assert first.stop() == 0, first.log_text()[-4000:]
    config = Path(first.ready["config"])
    settings = yaml.safe_load(config.read_text())
    settings.setdefault("limits", {}).update(
        header_timeout=STALL, body_timeout=STALL, idle_timeout=2 * STALL, max_connections=MAX_CONNECTIONS
    )
    settings["log"]["format"] = "json"
    config.write_text(yaml.safe_dump(settings))
    policy = config.parent / settings["policy"]
    rules = yaml.safe_load(policy.read_text())
    permissions = ["key:create", "key:encrypt", "key:decrypt", "key:read", "key:admin"]
    rules["rules"].append(
        {"identities": ["dns:narrow"], "permissions": permissions, "thread_prefixes": ["room:"]}
    )
    policy.write_text(yaml.safe_dump(rules))
    running = start_dev(root / "state", root / "second.log")
    try:
        yield running
    finally:
        code = running.stop()
    assert code == 0, running.log_text()[-4000:]
    assert "Traceback" not in running.log_text()


@pytest.fixture(scope="session")
def open_client(service: DevService) -> Iterator[Callable[[str], Client]]:
    """Give what opens more clients, all closed at the end."""
    clients: list[Client] = []

    def make(name: str) -> Client:
        clients.append(service.client(name))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture(scope="session")
def server(open_client: Callable[[str], Client]) -> Client:
    """Give the client of a server: may create, encrypt, decrypt and read."""
    return open_client("server")


@pytest.fixture(scope="session")
def operator(open_client: Callable[[str], Client]) -> Client:
    """Give the client that may do everything."""
    return open_client("operator")


@pytest.fixture(scope="session")
def stranger(open_client: Callable[[str], Client]) -> Client:
    """Give the client with a valid certificate and no grant."""
    return open_client("stranger")


@pytest.fixture(scope="session")
def admin(open_client: Callable[[str], Client]) -> Client:
    """Give the client of the plain probe port."""
    return open_client("admin")


@pytest.fixture(params=["server", "unix"], ids=["mtls", "unix"])
def wire(request: pytest.FixtureRequest, open_client: Callable[[str], Client]) -> Iterator[Client]:
    """Give a server's client, once over mutual TLS and once over the Unix socket."""
    client = open_client(request.param)
    yield client
    client.close()


@pytest.fixture
def raw(service: DevService) -> Iterator[Callable[[], RawConnection]]:
    """Give what opens raw connections with the server's certificate, all closed at the end."""
    opened: list[RawConnection] = []

    def make() -> RawConnection:
        opened.append(RawConnection(service.tls("server")))
        return opened[-1]

    yield make
    for connection in opened:
        connection.socket.close()


@pytest.fixture
def thread_id() -> str:
    """Give a thread that no other test uses."""
    return f"thread-{secrets.token_hex(12)}"


@pytest.fixture
def key_id(server: Client, thread_id: str) -> str:
    """Give a fresh, enabled key."""
    return server.create(thread_id)["key_id"]

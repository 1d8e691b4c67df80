"""The stand-in service over TLS and a Unix socket, and clients of both kinds for it."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.client import CreatedDek, aio_coalescing, blocking_coalescing
from progressdb_kms.client.endpoint import Endpoint, TlsFiles
from tests.client.crew import Crew
from tests.client.harness import KINDS, Clock, Facade, Open, build
from tests.client.pki import Authority, Pair
from tests.client.standin import Running, StandIn, server_context


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The CA of service and clients."""
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def service_pair(authority: Authority) -> Pair:
    """The service's certificate."""
    return authority.issue("localhost", server=True)


@pytest.fixture(scope="session")
def client_pair(authority: Authority) -> Pair:
    """A client's certificate."""
    return authority.issue("chat")


@pytest.fixture(scope="session")
def files(authority: Authority, client_pair: Pair) -> TlsFiles:
    """What a client needs."""
    return TlsFiles(authority.cert, client_pair.cert, client_pair.key)


@pytest.fixture
def standin(authority: Authority, service_pair: Pair) -> Iterator[StandIn]:
    """A stand-in service over mutual TLS."""
    with Running(StandIn(tls=server_context(service_pair, authority.cert))) as running:
        yield running


@pytest.fixture
def unix_standin() -> Iterator[StandIn]:
    """A stand-in service on a Unix socket, in a folder whose path is short enough for one."""
    with (
        tempfile.TemporaryDirectory(prefix="kms") as folder,
        Running(StandIn(), Path(folder) / "s") as running,
    ):
        yield running


@pytest.fixture
def clock() -> Clock:
    """A clock that waits move."""
    return Clock()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Both kinds of provider."""
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["single", "coalescing"])
def coalesce(request: pytest.FixtureRequest) -> bool:
    """Calls that travel alone, and together."""
    return bool(request.param)


@pytest.fixture
async def open_kms(
    kind: str, coalesce: bool, standin: StandIn, files: TlsFiles, clock: Clock
) -> AsyncIterator[Open]:
    """Give what opens providers for the stand-in, all closed at the end."""
    opened: list[Facade] = []

    def make(endpoint: Endpoint | None = None, **options: Any) -> Facade:
        at = endpoint or Endpoint(standin.url, tls=files)
        opened.append(build(kind, at, clock, **{"coalesce": coalesce, **options}))
        return opened[-1]

    yield make
    for kms in opened:
        await kms.close()


@pytest.fixture
def kms(open_kms: Open) -> Facade:
    """A provider for the stand-in."""
    return open_kms()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls gather for as long as a test holds requests."""
    for module in (aio_coalescing, blocking_coalescing):
        monkeypatch.setattr(module, "PATIENCE", 60.0)


@pytest.fixture
async def crew(open_kms: Open, standin: StandIn, patient: None) -> AsyncIterator[Crew]:
    """Callers of a provider; for modules whose fixture `coalesce` is True."""
    crew = Crew(open_kms(deadline=30.0), standin)
    yield crew
    await crew.close()


@pytest.fixture
async def key_id(crew: Crew) -> str:
    """A key to encrypt with."""
    made: CreatedDek = await crew.kms.create_dek_for_thread("t")
    return made.key_id

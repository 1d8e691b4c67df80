"""A real KMS with a durable store, and the example's server on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.client import AdminClient
from tests.client.devservice import running
from tests.examples.chat import Chat, kms_environment, options


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make test-examples ARGS=--full` run the long form."""
    parser.addoption("--full", action="store_true", help="100,000 messages, killed 50 times")


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Run a KMS; gives what its ready file says."""
    with running(tmp_path_factory.mktemp("kms")) as found:
        yield found


@pytest.fixture(scope="session")
def operator(ready: dict[str, Any]) -> Iterator[AdminClient]:
    """Give an operator's client of the KMS."""
    with AdminClient(**options(ready, "operator")) as admin:
        yield admin


@pytest.fixture
def new_chat(tmp_path: Path, ready: dict[str, Any]) -> Iterator[Callable[..., Chat]]:
    """Give what starts a chat server; all of a test have one database unless told otherwise."""
    made: list[Chat] = []

    def make(database: Path = tmp_path / "chat.db", **environment: str) -> Chat:
        made.append(Chat(tmp_path, database, kms_environment(ready) | environment))
        return made[-1].start()

    yield make
    for each in made:
        each.kill()


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory, ready: dict[str, Any]) -> Iterator[Chat]:
    """Give a running chat server; each test of a module has threads of its own in it."""
    folder = tmp_path_factory.mktemp("chat")
    made = Chat(folder, folder / "chat.db", kms_environment(ready)).start()
    yield made
    made.kill()

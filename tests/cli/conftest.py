"""A running dev instance, and commands that are run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from progressdb_kms.cli.app import run
from tests.cli.helpers import Dev, start_dev


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its output as JSON."""
        return json.loads(self.out)


Command = Callable[..., Outcome]


@pytest.fixture
def kms(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command with these words, without any of our variables in the environment."""
    for name in ("ENDPOINT", "MODE", "CA", "CERT", "KEY", "TRACEBACK"):
        monkeypatch.delenv(f"PROGRESSDB_KMS_{name}", raising=False)

    def call(*words: object) -> Outcome:
        capfd.readouterr()
        code = run([str(word) for word in words])
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    """One dev instance for all tests of a worker."""
    running = start_dev(tmp_path_factory.mktemp("shared") / "dev")
    yield running
    assert running.stop() == 0, running.output

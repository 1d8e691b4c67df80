"""What `pip install progressdb-kms` gives a server of someone else's, on each Python that there is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.client.devservice import running
from tests.packaging.test_wheel import ROOT, build

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(600)]

CONSUMER = ROOT / "tests" / "packaging" / "consumer.py"
UV = Path(sys.executable).with_name("uv")
# Named one by one: a package more than these is one that every server which calls the service has to carry.
INSTALLED = {
    *(
        "anyio",
        "certifi",
        "h11",
        "httpcore",
        "idna",
        "msgspec",
        "progressdb-kms",
        "sniffio",
        "typing-extensions",
    )
}


def _pythons() -> list[str]:
    """Return the supported Pythons that this machine has; `.ci/run` names those that it has not."""
    found = [
        subprocess.run(
            [ROOT / "scripts" / "find-python", version], check=False, capture_output=True, text=True
        )
        for version in ("3.11", "3.12", "3.13")
    ]
    return [each.stdout.strip() for each in found if each.returncode == 0]


class Consumer:
    """An environment with the wheel and what it asks for, and nothing else."""

    def __init__(self, python: str, folder: Path, wheel: Path) -> None:
        self.folder = folder
        self.python = folder / "env" / "bin" / "python"
        self._uv("venv", "--python", python, str(folder / "env"))
        self._uv(
            "pip", "install", "--no-deps", "--require-hashes", "-r", str(ROOT / "requirements" / "client.txt")
        )
        self._uv("pip", "install", "--no-deps", str(wheel))
        self._uv("pip", "check")

    def _uv(self, *arguments: str) -> str:
        command = [str(UV), "--quiet", *arguments]
        if arguments[0] == "pip":
            command[4:4] = ["--python", str(self.python)]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=self.folder).stdout

    def packages(self) -> set[str]:
        """Return the names of what is installed."""
        return {each["name"] for each in json.loads(self._uv("pip", "list", "--format", "json"))}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run its Python, away from the source tree; warnings are errors."""
        return subprocess.run(
            [self.python, "-I", "-W", "error", *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd=self.folder,
            timeout=100,
        )

    def check_types(self, program: Path) -> subprocess.CompletedProcess[str]:
        """Check a program's types against what is installed here, and no other setting than strictness."""
        arguments = ["--strict", "--config-file", "", "--cache-dir", str(self.folder / "cache")]
        return subprocess.run(
            [sys.executable, "-m", "mypy", *arguments, "--python-executable", str(self.python), str(program)],
            check=False,
            capture_output=True,
            text=True,
            cwd=self.folder,
            timeout=300,
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this tree."""
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The ready file of a running development service."""
    with running(tmp_path_factory.mktemp("dev")) as ready:
        yield ready


@pytest.fixture(scope="module", params=_pythons(), ids=lambda path: Path(path).name)
def consumer(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Consumer:
    """An environment of each Python."""
    return Consumer(request.param, tmp_path_factory.mktemp("consumer"), wheel)


def test_pythons_are_there() -> None:
    """At least the Python of this run is tested."""
    assert any(re.search(rf"3\.{sys.version_info.minor}$", python) for python in _pythons())


def test_nothing_of_the_server_comes_along(consumer: Consumer) -> None:
    """The client brings what it needs and no package more."""
    assert consumer.packages() <= INSTALLED


def test_a_server_uses_it(consumer: Consumer, ready: dict[str, Any]) -> None:
    """Both providers, over mutual TLS, with a real service; without a warning."""
    pair = ready["clients"]["server"]
    done = consumer.run(str(CONSUMER), ready["url"], ready["ca"], pair["cert"], pair["key"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_its_types_are_seen(consumer: Consumer, tmp_path: Path) -> None:
    """A strict check of that server passes, and one that confuses str and bytes does not."""
    done = consumer.check_types(CONSUMER)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.py"
    wrong.write_text(CONSUMER.read_text().replace('b"hello", aad', '"hello", aad'))
    done = consumer.check_types(wrong)
    assert done.returncode == 1
    assert "[arg-type]" in done.stdout

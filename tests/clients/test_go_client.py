"""The Go client: its own tests, and what it does with the real service."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.client.devservice import running
from tests.clients.gocommand import MODULE, NEEDS_GO, declared_in, go, passed

ROOT = MODULE.parents[1]

pytestmark = NEEDS_GO


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the ready file of a running development service says."""
    with running(tmp_path_factory.mktemp("dev")) as found:
        yield {name: found[name] for name in ("url", "unix", "ca", "clients")}


def test_code_is_in_order() -> None:
    """The code is formatted and vetted, with the tests against a service, and needs no other module."""
    formatted = subprocess.run(["gofmt", "-l", "."], cwd=MODULE, check=True, capture_output=True, text=True)
    assert formatted.stdout == ""
    vetted = go("vet", "-tags", "service", "./...")
    assert (vetted.returncode, vetted.stdout, vetted.stderr) == (0, "", "")
    assert "require" not in (MODULE / "go.mod").read_text()


def test_own_tests() -> None:
    """Retries, deadlines, cut connections, huge answers and renewed files, without a data race."""
    names = [path.name for path in MODULE.glob("*_test.go") if path.name != "service_test.go"]
    expected = declared_in(*names)
    assert expected
    assert passed(go("test", "-count=1", "-v", "./...")) >= expected


def test_against_the_service(ready: dict[str, Any], tmp_path: Path) -> None:
    """Each method does what it says with the real service, over mutual TLS and over a Unix socket."""
    file = tmp_path / "ready.json"
    file.write_text(json.dumps(ready))
    expected = declared_in("service_test.go") - {"TestServiceCreatesWhileItRestarts"}
    done = go(
        "test",
        "-tags",
        "service",
        "-count=1",
        "-v",
        "-run",
        f"^({'|'.join(expected)})$",
        ".",
        KMS_READY=str(file),
    )
    assert passed(done) == expected


def test_a_program_of_another_module(ready: dict[str, Any], tmp_path: Path) -> None:
    """What docs/go-client.md says makes the client part of another module, and its first program runs."""
    text = (ROOT / "docs" / "go-client.md").read_text()
    (program,) = re.findall(r"```go\n(package main\n.*?)```", text, re.DOTALL)
    (lines,) = re.findall(r"```\n(require .*?)```", text, re.DOTALL)
    (tmp_path / "main.go").write_text(program)
    (tmp_path / "go.mod").write_text("module chat\n\ngo 1.22\n\n" + lines.replace("PATH", str(MODULE)))
    pair = ready["clients"]["server"]
    done = go(
        "run",
        ".",
        cwd=tmp_path,
        PROGRESSDB_KMS_ENDPOINT=ready["url"],
        PROGRESSDB_KMS_CA=ready["ca"],
        PROGRESSDB_KMS_CERT=pair["cert"],
        PROGRESSDB_KMS_KEY=pair["key"],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")


def test_every_code_has_a_name() -> None:
    """The codes of docs/errors.md and those that the client names are the same."""
    source = (MODULE / "errors.go").read_text()
    service, own = source.split("// Codes of the client itself.")
    documented = re.findall(r"^\| \d+ \| `(\w+)`", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert len(documented) > 30
    assert re.findall(r'= Code\("(\w+)"\)', service) == documented
    assert not set(re.findall(r'= Code\("(\w+)"\)', own)) & set(documented)

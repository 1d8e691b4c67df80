"""What every command has in common: one line for an error, its exit code, and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from progressdb_kms import __version__
from progressdb_kms.cli import app, missing
from tests.cli.conftest import Command


def execute(*words: str, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, after `code`."""
    program = f"{code}\nimport sys\nfrom progressdb_kms.cli import main\nmain()"
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": "", **environment}
    )


def test_help_lists_every_command(kms: Command) -> None:
    """The help names all commands; each has a line of help and its own page."""
    listed = kms("--help")
    assert listed.code == 0
    for name in app._COMMANDS:
        assert f"\n  {name} " in listed.out
        assert kms(name, "--help").code == 0


def test_no_command_shows_the_help(kms: Command) -> None:
    """Without a command the help goes to standard error, with the code of wrong usage."""
    outcome = kms()
    assert (outcome.code, outcome.out) == (2, "")
    assert "Commands:" in outcome.err


@pytest.mark.parametrize(
    "words",
    [
        ["frobnicate"],
        ["keys", "frobnicate"],
        ["keys", "show"],
        ["keys", "list", "--state", "odd"],
        ["keys", "schedule-destruction", "k", "--waiting-days", "6"],
        ["dev", "--dir", "x", "--port", "65536"],
        ["encrypt", "--key-id", "k", "--aad", "a", "--aad-file", "/dev/null"],
        ["encrypt", "--key-id", "k", "--raw", "--json"],
        ["pki", "issue", "--dir", "x"],
        ["decrypt", "--key-id", "k", "--in", "/none"],
        ["audit", "keygen"],
        ["audit", "verify"],
        ["audit", "verify", "/none"],
        ["audit", "verify", "/dev/null"],
        ["audit", "verify", "--config", "c", "--partial"],
        ["rotate", "--config", "c", "--indexed"],
        ["rotate", "--config", "c", "--indexed", "--worker"],
    ],
)
def test_wrong_usage_is_one_line_and_code_2(kms: Command, words: list[str]) -> None:
    """The line says what is wrong and where the help is."""
    outcome = kms(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("progressdb-kms: ")
    assert "--help)" in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["serve", "--config", "{tmp}/none.yaml"], "can't read the configuration"),
        (["keys", "list"], "PROGRESSDB_KMS_ENDPOINT"),
        (["keys", "list", "--url", "http://localhost"], "in the clear"),
        (["keys", "list", "--url", "unix://{tmp}/none.sock"], "none.sock"),
        (["keys", "list", "--dev-dir", "{tmp}"], "no dev instance runs"),
        (["keys", "list", "--dev-dir", "{tmp}/odd"], "not JSON"),
        (["pki", "issue", "--dir", "{tmp}", "chat"], "ca.crt"),
        (["kek", "init", "--file", "{tmp}"], "exists already"),
        (["decrypt", "--key-id", "k", "--in", "{tmp}/text"], "not base64"),
        (["pki", "init", "--dir", "/proc/x"], "/proc/x"),
    ],
)
def test_an_error_is_one_line_and_code_1(
    kms: Command, tmp_path: Path, words: list[str], message: str
) -> None:
    """The line says what to mend, and standard output stays empty."""
    (tmp_path / "text").write_text("héllo")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/ready.json").write_text("{")
    outcome = kms(*(word.format(tmp=tmp_path) for word in words))
    assert (outcome.code, outcome.out) == (1, "")
    assert message in outcome.err
    assert outcome.err.startswith("progressdb-kms: ")
    assert outcome.err.count("\n") == 1


def test_a_traceback_only_when_asked_for(kms: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PROGRESSDB_KMS_TRACEBACK=1 the line follows a traceback."""
    monkeypatch.setenv("PROGRESSDB_KMS_TRACEBACK", "1")
    outcome = kms("serve", "--config", "/none")
    assert outcome.code == 1
    assert outcome.err.startswith("Traceback")
    assert "\nprogressdb-kms: can't read" in outcome.err


def test_a_bug_does_not_show_what_was_processed(kms: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected exception's text could hold a secret: only its type is printed."""

    @click.command()
    def version() -> None:
        raise LookupError("the secret")

    monkeypatch.setattr("progressdb_kms.cli.version.version", version)
    outcome = kms("version")
    assert outcome.code == 1
    assert "LookupError" in outcome.err
    assert "secret" not in outcome.err


def test_ctrl_c_says_nothing(kms: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted command exits 130, as shells expect."""

    @click.command()
    def version() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("progressdb_kms.cli.version.version", version)
    outcome = kms("version")
    assert (outcome.code, outcome.out, outcome.err.strip()) == (130, "", "")


def test_a_closed_pipe_says_nothing() -> None:
    """A reader that has seen enough, like head, makes neither a line nor a traceback."""
    process = subprocess.Popen(
        [sys.executable, "-m", "progressdb_kms.cli", "openapi"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate()
    assert (process.returncode, err) == (1, b"")


@pytest.mark.parametrize("words", [[], ["--help"], ["serve", "--config", "x"], ["version"]])
@pytest.mark.parametrize("package", ["click", "hypercorn"])
def test_without_the_extra_one_line_says_what_to_install(words: list[str], package: str) -> None:
    """Where a package of the server extra is missing, every command says so and exits 2."""
    if words == ["version"] and package == "hypercorn":
        package = "rich"
    done = execute(*words, code=f"import sys; sys.modules[{package!r}] = None")
    assert (done.returncode, done.stdout) == (2, "")
    assert "progressdb-kms[server]" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_extra_is_named() -> None:
    """Where the package of another extra is missing, that extra is what to install."""
    words = ["backup", "fetch", "--s3", "s3://bucket/x", "--out", "f"]
    done = execute(*words, code="import sys; sys.modules['boto3'] = None")
    assert done.returncode == 2
    assert "progressdb-kms[s3]" in done.stderr


def test_a_missing_module_of_our_own_is_a_bug() -> None:
    """No package to install would mend that, so it is not called a missing extra."""
    with pytest.raises(ModuleNotFoundError):
        missing(ModuleNotFoundError("x", name="progressdb_kms.none"))


def test_version(kms: Command) -> None:
    """The version, for people and as JSON."""
    assert kms("version").out.startswith(f"progressdb-kms  {__version__}\n")
    assert kms("version", "--json").json["progressdb-kms"] == __version__


def test_openapi(kms: Command) -> None:
    """The document is JSON and names the routes."""
    document = kms("openapi").json
    assert document["openapi"].startswith("3.1")
    assert "/encrypt" in document["paths"]


def test_module_can_be_run() -> None:
    """`python -m progressdb_kms.cli` is the command."""
    done = subprocess.run(
        [sys.executable, "-m", "progressdb_kms.cli", "version", "--json"], capture_output=True, check=True
    )
    assert json.loads(done.stdout)["progressdb-kms"] == __version__

"""No command prints a key or a message, whether it succeeds or fails, not even with a traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.cli.app import app
from progressdb_kms.domain.envelope import parse_blob, unwrap, wrap_aad
from progressdb_kms.domain.errors import OperatorError, by_code
from tests.contract.wire_client import unb64
from tests.integration.leaks import leaks
from tests.integration.world import KEK_1, KEK_2, Instance, World, kek_text, write_private
from tests.keepers.transit import Transit, serving_transit
from tests.older_service import OlderService

pytestmark = [pytest.mark.slow, pytest.mark.timeout(800)]

MESSAGE = b"the message that nobody may see: tangerine"
TOKEN = "the-token-of-the-transit-engine"
PASSWORD = "the-password-that-nobody-may-see"
NOT_RUN = {
    "dev": "it is serve, with files that it makes",
    "serve": "tests/integration/test_secrets.py; here only where it refuses",
    "backup fetch": "it copies a file that holds nothing but wrapped keys",
    "redis-tls-reload": "it runs for as long as its server does and knows no key",
}
"""Commands that are not run to a success here, and why."""
NOT_PROVOKED = {
    "operator_error": "the root of the others",
    "rotation_running": "it names the other run's process; tests/integration/test_rotate_trouble.py",
    "fenced": "likewise",
}
"""Codes that no command meets here, and why."""


def commands(group: click.Command = app, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Give the names of all commands."""
    if not isinstance(group, click.Group):
        yield " ".join(path)
        return
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        yield from commands(command, (*path, name))


class Desk:
    """Runs commands and keeps all that they print.

    Attributes:
        transit: Where a KEK may be kept.
        printed: By command line.
        done: Names of the commands that succeeded.
        codes: Codes that commands have named.
    """

    def __init__(self, service: Instance, transit: Transit) -> None:
        self.service = service
        self.transit = transit
        self.printed: dict[str, bytes] = {}
        self.done: set[str] = set()
        self.codes: set[str] = set()
        cert, key = service.world.certificate("operator")
        where = ("--endpoint", f"https://localhost:{service.port}", "--ca", service.world.ca_file)
        self.call: tuple[object, ...] = (*where, "--cert", cert, "--key", key)
        self.config = ("--config", service.config)
        self._names = sorted(commands(), key=len, reverse=True)

    def run(self, *words: object, code: int = 0) -> str:
        """Run a command, which must end with this code, and return what it printed on standard output."""
        environment = {**os.environ, "PROGRESSDB_KMS_TRACEBACK": "1", "KUBECONFIG": "/nonexistent"}
        done = subprocess.run(
            [sys.executable, "-m", "progressdb_kms.cli", *map(str, words)],
            capture_output=True,
            env=environment,
            timeout=100,
            check=False,
        )
        line = " ".join(map(str, words))
        self.printed[line] = done.stdout + done.stderr
        # Not the output itself: it is what may hold a secret.
        assert done.returncode == code, (line, done.returncode, done.stderr[-300:])
        self.codes |= set(re.findall(r"\(([a-z_]+)\)$", done.stderr.decode(), re.MULTILINE))
        if code == 0:
            self.done.add(next(name for name in self._names if line.startswith(name)))
        return done.stdout.decode()

    def config_with(self, name: str, **sections: Any) -> Path:
        """Return a configuration that differs from the service's in these sections."""
        document = json.loads(self.service.config.read_text())
        for section, values in sections.items():
            changed = {**document.get(section, {}), **values} if isinstance(values, dict) else values
            document[section] = changed
        path = self.service.folder / f"config-{name}.yaml"
        path.write_text(json.dumps(document))
        return path


@pytest.fixture(scope="module")
def desk(new_world: Callable[..., World], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A service with an audit key and recovery keys, and a desk beside it."""
    world = new_world()
    world.store.start()
    keys = tmp_path_factory.mktemp("keys")
    with serving_transit() as transit:
        write_private(keys / "token", TOKEN)
        transit.tokens = {TOKEN}
        yield open_desk(world, keys, transit)


def open_desk(world: World, keys: Path, transit: Transit) -> Desk:
    """Start the service and make the keys that it needs."""
    made = Desk(
        world.instance(
            "a",
            audit={"key_file": str(keys / "audit" / "audit.yaml")},
            escrow={"recipients": [str(keys / "recovery" / "recovery.pub")]},
            kek={"vault": {"address": transit.address, "token_file": str(keys / "token")}},
        ),
        transit,
    )
    made.run("audit", "keygen", "--out", keys / "audit")
    made.run("kek", "escrow", "keygen", "--out", keys / "recovery")
    made.service.start()
    return made


def succeed(desk: Desk, folder: Path) -> dict[str, bytes]:
    """Run every command to a success; return the secrets by name."""
    call, config = desk.call, desk.config
    keys = Path(json.loads(desk.service.config.read_text())["audit"]["key_file"]).parents[1]
    message, sealed, opened = (folder / name for name in ("message", "sealed", "opened"))
    message.write_bytes(MESSAGE)
    desk.run("version")
    desk.run("openapi")
    desk.run("pki", "init", "--dir", folder / "pki")
    desk.run("pki", "issue", "somebody", "--dir", folder / "pki")
    desk.run("kek", "init", "--file", folder / "kek.yaml")
    desk.run("doctor", *config)
    key_id = json.loads(desk.run("keys", "create", "t:1", *call, "--json"))["key_id"]
    blob = unb64(desk.service.client("server").get("/get_wrapped", {"key_id": key_id}).ok()["wrapped"])
    desk.run("encrypt", "--key-id", key_id, "--in", message, "--out", sealed, *call)
    desk.run("decrypt", "--key-id", key_id, "--in", sealed, "--out", opened, *call)
    assert opened.read_bytes() == MESSAGE
    for change in ("disable", "enable", "schedule-destruction", "cancel-destruction", "enable", "show"):
        desk.run("keys", change, key_id, *call)
    desk.run("keys", "rotate", "t:1", *call)
    desk.run("keys", "list", *call)
    desk.run("kek", "status", *call)
    desk.run("roundtrip", *call)
    desk.run("rotate", *config)
    (rotation,) = json.loads(desk.run("rotations", "list", *call, "--json"))
    desk.run("rotations", "show", rotation["rotation_id"], *call)
    desk.run("backup", "create", *config, "--out", folder / "export")
    desk.run("backup", "export", rotation["rotation_id"], *config, "--out", folder / "snapshot")
    desk.run("backup", "list", *config)
    desk.run("backup", "show", rotation["rotation_id"], *config)
    desk.run("backup", "verify", folder / "export", *config)
    desk.run("restore", *config, "--file", folder / "export")
    desk.run("backup", "import", folder / "export", *config, "--merge")
    desk.run("backup", "purge", rotation["rotation_id"], *config, "--force")
    desk.run("kek", "escrow", "list", *config)
    recovery = keys / "recovery" / "recovery.key"
    desk.run("kek", "escrow", "recover", *config, "--recovery-key", recovery, "--out", folder / "recovered")
    desk.run("kek", "retire", "1", *config, "--export", folder / "export")
    desk.run("keys", "destroy-due", *config)
    older = OlderService()
    moving, master = folder / "moving.jsonl", folder / "master"
    older_id = older.create("t:older")
    moving.write_bytes(b"".join(older.lines()))
    write_private(master, older.master.hex())
    desk.run("migrate", moving, *config, "--master-key-file", master, "--report", folder / "report")
    desk.run("audit", "show", *call)
    desk.run("audit", "verify", *config)
    desk.run("audit", "export", *config, "--out", folder / "audit.jsonl")
    versions = yaml.safe_load(desk.service.world.kek_file.read_text())["versions"]
    body = parse_blob(blob).body
    return {
        **{f"KEK {version}": bytes.fromhex(text) for version, text in versions.items()},
        "DEK": unwrap(AESGCM(bytes.fromhex(KEK_1)), body, wrap_aad(key_id, "t:1")),
        "wrapped DEK": blob,
        "message": MESSAGE,
        "token": TOKEN.encode(),
        "audit key": bytes.fromhex((keys / "audit" / "audit.yaml").read_text().split()[1]),
        "recovery key": recovery.read_bytes().splitlines()[1],
        "the older service's master key": older.master,
        "its DEK": older.dek(older_id),
    }


def fail(desk: Desk, folder: Path) -> dict[str, bytes]:
    """Let commands meet the errors that operators make, with secrets in the wrong places."""

    def rotate_with(name: str, **sections: Any) -> None:
        desk.run("rotate", "--config", desk.config_with(name, **sections), code=1)

    broken = folder / "broken.yaml"
    write_private(broken, kek_text({1: KEK_1, 2: KEK_2}) + "]")
    rotate_with("broken-kek", kek={"path": str(broken)})
    swapped = folder / "swapped.yaml"
    write_private(swapped, kek_text({1: KEK_1, 2: KEK_2}))
    rotate_with("swapped-kek", kek={"path": str(swapped)})
    rotate_with("unknown-field", store={"url": f"redis://kms:{PASSWORD}@localhost:1", "pasword": PASSWORD})
    rotate_with("no-store", store={"url": f"redis://kms:{PASSWORD}@localhost:1", "connect_timeout": 0.1})
    rotate_with("audit-key", audit={"key_file": str(swapped)})
    desk.run("doctor", "--config", desk.config_with("all", kek={"path": str(broken)}), code=1)
    policy = folder / "policy.yaml"
    policy.write_text(json.dumps({"rules": [{"identities": [PASSWORD], "permissions": [PASSWORD]}]}))
    desk.run("serve", "--config", desk.config_with("policy", policy=str(policy)), code=1)
    desk.run("serve", "--config", desk.config_with("tls", tls={"key": str(swapped)}), code=1)
    cut = folder / "cut"
    cut.write_bytes((folder / "export").read_bytes()[:-1])
    desk.run("backup", "verify", cut, *desk.config, code=1)
    desk.run("kek", "retire", "2", *desk.config, "--export", folder / "export", code=1)
    provision = folder / "provision.yaml"
    provision.write_text(json.dumps({"namespace": "kms", "audit": {"secret": "r-audit"}}))
    desk.run("provision", "--config", provision, code=1)
    desk.transit.add_key("kms")
    desk.run("kek", "add", *desk.config, KEK_2, code=1)
    desk.run("kek", "add", *desk.config, f"pkcs11:{KEK_2}", code=1)
    known, desk.transit.tokens = desk.transit.tokens, set()
    desk.run("kek", "add", *desk.config, "vault:other@1", code=1)
    desk.transit.tokens = known
    desk.run("kek", "add", *desk.config, "vault:kms@1")
    desk.service.pause()
    try:
        desk.run("rotate", *desk.config, "--wait", "0", code=1)
    finally:
        desk.service.resume()
    desk.service.stop()
    desk.run("serve", "--config", desk.config_with("swapped", kek={"path": str(swapped)}), code=1)
    desk.service.world.store.ask("DEL", "kms:{ctl}:keks")
    desk.run("rotate", *desk.config, code=1)
    return {"KEK 2 of another": bytes.fromhex(KEK_2), "password": PASSWORD.encode()}


def test_no_command_prints_a_secret(desk: Desk, tmp_path: Path) -> None:
    """Every command was run and every error of operators was met: a new one fails this until it is, too."""
    secrets = succeed(desk, tmp_path) | fail(desk, tmp_path)
    expected = {name for name in commands() if name not in NOT_RUN} - {"provision"}
    assert desk.done == expected
    codes = {code for code, error in by_code().items() if issubclass(error, OperatorError)}
    assert desk.codes >= codes - set(NOT_PROVOKED), codes - desk.codes
    assert any(b"Traceback" in text for text in desk.printed.values())
    assert leaks(secrets, desk.printed) == []

"""SoftHSM2: a PKCS#11 token in software, in a directory of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

MODULE = Path("/usr/lib/softhsm/libsofthsm2.so")
TOKEN = "kms"
PIN = "5ec2e7-1234"


@dataclass(frozen=True)
class SoftHsm:
    """One token.

    Attributes:
        conf: What ``SOFTHSM2_CONF`` must name.
        pin_file: The user's PIN.
        module: The library.
    """

    conf: Path
    pin_file: Path
    module: Path = MODULE

    def section(self) -> dict[str, object]:
        """Return the configuration's section ``kek.pkcs11``."""
        return {"module": str(self.module), "token": TOKEN, "pin_file": str(self.pin_file)}

    def delete(self, label: str) -> None:
        """Take a key off the token, in another process."""
        script = (
            "import pkcs11, sys; token = pkcs11.lib(sys.argv[1]).get_token(token_label=sys.argv[2])\n"
            "with token.open(user_pin=sys.argv[3], rw=True) as session:\n"
            "    session.get_key(label=sys.argv[4]).destroy()\n"
        )
        self._python(script, label)

    def generate(self, label: str, bits: int = 256) -> None:
        """Make a key on the token, in another process."""
        script = (
            "import pkcs11, sys; token = pkcs11.lib(sys.argv[1]).get_token(token_label=sys.argv[2])\n"
            "with token.open(user_pin=sys.argv[3], rw=True) as session:\n"
            f"    session.generate_key(pkcs11.KeyType.AES, {bits}, label=sys.argv[4], store=True)\n"
        )
        self._python(script, label)

    def _python(self, script: str, label: str) -> None:
        environment = os.environ | {"SOFTHSM2_CONF": str(self.conf)}
        subprocess.run(
            [sys.executable, "-c", script, str(self.module), TOKEN, PIN, label], check=True, env=environment
        )


def make_token(directory: Path) -> SoftHsm:
    """Make a token in ``directory``, whose keys survive the processes that use it."""
    if not MODULE.exists():
        pytest.skip("needs SoftHSM2: apt install softhsm2")
    tokens = directory / "tokens"
    tokens.mkdir(parents=True)
    conf = directory / "softhsm2.conf"
    conf.write_text(f"directories.tokendir = {tokens}\nobjectstore.backend = file\nlog.level = ERROR\n")
    pin_file = directory / "pin"
    pin_file.touch(0o600)
    pin_file.write_text(PIN + "\n")
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", TOKEN, "--pin", PIN, "--so-pin", "so-" + PIN],
        check=True,
        capture_output=True,
        env={"SOFTHSM2_CONF": str(conf), "PATH": "/usr/bin:/bin"},
    )
    return SoftHsm(conf, pin_file)


def slow_module(directory: Path) -> Path:
    """Compile a library in front of SoftHSM2 whose calls hang while the file of ``HOLD_FILE`` exists."""
    out = directory / "slow_token.so"
    source = Path(__file__).with_name("slow_token.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", out, source, "-ldl"], check=True)
    return out

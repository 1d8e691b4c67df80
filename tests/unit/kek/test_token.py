"""What can go wrong with a PKCS#11 token: it is told for what it is, and holds up nobody."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from progressdb_kms.domain.errors import KekFileInvalid, KekUnavailable
from progressdb_kms.kek.pkcs11 import Pkcs11Keeper
from tests.keepers.files import private
from tests.keepers.softhsm import PIN, TOKEN, SoftHsm, slow_module

DEK = bytes.fromhex("5ec2e7" * 10 + "5ec2")


def keeper_of(hsm: SoftHsm, pin_file: Path | None = None, token: str = TOKEN) -> Pkcs11Keeper:
    """Return a keeper over the token."""
    return Pkcs11Keeper(hsm.module, token, pin_file or hsm.pin_file)


def test_token_keys_that_will_not_do(hsm: SoftHsm) -> None:
    """None of the name, two of it, a short one, one that was there until now."""
    keeper = keeper_of(hsm)
    with pytest.raises(KekUnavailable, match="has no secret key 'nobody'"):
        keeper.wrap("nobody", [DEK], [b""])
    hsm.generate("short", 128)
    with pytest.raises(KekUnavailable, match="no AES key of 256 bits"):
        keeper.wrap("short", [DEK], [b""])
    hsm.generate("twin")
    hsm.generate("twin")
    with pytest.raises(KekUnavailable, match="several"):
        keeper.wrap("twin", [DEK], [b""])
    with pytest.raises(KekFileInvalid, match="already"):
        keeper.generate("twin")
    hsm.generate("lost")
    keeper.wrap("lost", [DEK], [b""])
    hsm.delete("lost")
    with pytest.raises(KekUnavailable, match="has no secret key 'lost'"):
        keeper.wrap("lost", [DEK], [b""])


def test_a_made_key_never_leaves_the_token(hsm: SoftHsm) -> None:
    """It is sensitive, can't be read out, and wraps no other key."""
    keeper_of(hsm).generate("made")
    script = (
        "import pkcs11, sys; from pkcs11 import Attribute as A\n"
        "token = pkcs11.lib(sys.argv[1]).get_token(token_label=sys.argv[2])\n"
        "with token.open(user_pin=sys.argv[3]) as session:\n"
        "    key = session.get_key(label='made')\n"
        "    print(*[key[a] for a in (A.SENSITIVE, A.EXTRACTABLE, A.WRAP, A.UNWRAP, A.ENCRYPT, A.DECRYPT)])\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script, hsm.module, TOKEN, PIN], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == ["True", "False", "False", "False", "True", "True"]


IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from progressdb_kms.domain.errors import KmsError
from progressdb_kms.kek.pkcs11 import Pkcs11Keeper
keeper = Pkcs11Keeper(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
for _ in range(20):
    try:
        keeper.wrap("any", [bytes(32)], [b""])
    except KmsError as error:
        print(type(error).__name__, error.detail)
"""


@pytest.mark.parametrize(
    "trouble, message",
    [
        ("pin", "refuses the PIN.*PinIncorrect"),
        ("no pin", "the PKCS#11 token's PIN: .*chmod 600"),
        ("token", "no PKCS#11 token has the label"),
        ("module", "library .* can't be used"),
    ],
)
def test_a_token_that_can_not_be_used(hsm: SoftHsm, tmp_path: Path, trouble: str, message: str) -> None:
    """Each is told for what it is, without the PIN; a wrong PIN is tried once, so that it locks nothing."""
    pin = private(tmp_path / "pin", "wrong-1234" if trouble == "pin" else PIN)
    if trouble == "no pin":
        pin.chmod(0o644)
    arguments = [
        "/nowhere.so" if trouble == "module" else str(hsm.module),
        "nobody" if trouble == "token" else TOKEN,
        str(pin),
    ]
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, *arguments], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 20
    assert all(line.startswith("KekUnreachable") for line in lines)
    assert re.search(message, lines[0])
    assert PIN not in done.stdout + done.stderr
    assert "wrong-1234" not in done.stdout + done.stderr
    if trouble == "pin":
        assert sum("PinIncorrect" in line for line in lines) == 1
    # Not locked: a wrong PIN three times would have done it on many a token.
    keeper_of(hsm).generate(f"after {trouble}")


HANGING = """
import asyncio, sys, time
from pathlib import Path
from progressdb_kms.domain.errors import KekUnreachable
from progressdb_kms.kek.hidden import HiddenKeks
from progressdb_kms.kek.keyfile import KeyName
from progressdb_kms.kek.pkcs11 import Pkcs11Keeper

async def main():
    hold, name = Path(sys.argv[4]), KeyName("pkcs11", "hanging")
    keks = HiddenKeks(Pkcs11Keeper(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])), 0.3)
    value = await keks.check_value(name)
    assert await keks.matches(name, value)
    (body,) = await keks.wrap(name, [bytes(32)], [b""])
    hold.touch()
    for _ in range(3):
        try:
            await keks.unwrap(name, [body], [b""])
        except KekUnreachable as error:
            print(error.detail)
    assert await keks.matches(name, value)  # what was known still is
    hold.unlink()
    while True:
        try:
            assert await keks.unwrap(name, [body], [b""]) == [bytes(32)]
            break
        except KekUnreachable:
            pass
    print("answers again")
    hold.touch()
    try:
        await keks.unwrap(name, [body], [b""])
    except KekUnreachable:
        print("ends")

asyncio.run(main())
"""


def test_a_token_that_hangs_holds_up_nobody(hsm: SoftHsm, tmp_path: Path) -> None:
    """Calls end with an error, the loop goes on, it recovers with the token, and the process can end."""
    keeper_of(hsm).generate("hanging")
    hold = tmp_path / "hold"
    environment = os.environ | {"HOLD_FILE": str(hold), "HOLD_MODULE": str(hsm.module)}
    arguments = [str(slow_module(tmp_path)), TOKEN, str(hsm.pin_file), str(hold)]
    done = subprocess.run(
        [sys.executable, "-c", HANGING, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,  # only a failure gets there
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *["pkcs11 has not answered for 0.3 s"] * 3,
        "answers again",
        "ends",
    ]
    assert hold.exists()

"""What can go wrong where keys are kept: each trouble is told for what it is, and shows nothing secret."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from progressdb_kms.domain.errors import KekFileInvalid, KekUnavailable, KekUnreachable, WrappedKeyInvalid
from progressdb_kms.kek import hidden, vault
from progressdb_kms.kek.aws import AwsKeeper
from progressdb_kms.kek.hidden import HiddenKeks
from progressdb_kms.kek.keyfile import KeyName, parse_key_name
from progressdb_kms.kek.pkcs11 import Pkcs11Keeper
from progressdb_kms.kek.threads import Threads
from progressdb_kms.kek.vault import VaultKeeper
from progressdb_kms.settings.kek import Vault, VaultKubernetes
from tests.keepers.aws import AwsKms
from tests.keepers.softhsm import PIN, TOKEN, SoftHsm, slow_module
from tests.keepers.transit import Transit

DEK = bytes.fromhex("5ec2e7" * 10 + "5ec2")


def private(path: Path, text: str) -> Path:
    """Write a file that only its owner may read."""
    path.touch(0o600)
    path.write_text(text)
    return path


@pytest.fixture
def engine(transit: Transit) -> Transit:
    """An engine in order, with the key ``k``."""
    transit.sealed = False
    transit.binds_aad = True
    transit.garbled = None
    transit.lease = 3600
    transit.tokens = {"root"}
    transit.keys.setdefault("k", [os.urandom(32)])
    return transit


@pytest.fixture
def keeper(engine: Transit, tmp_path: Path) -> VaultKeeper:
    """Its keeper, which logs in by a token."""
    return VaultKeeper(Vault(address=engine.address, token_file=private(tmp_path / "token", "root\n")))


@pytest.mark.parametrize(
    "text",
    [
        *("", "pkcs11:", "pkcs11:\n", "pkcs11:" + "a" * 256, "pkcs11:" + "5e" * 32, "PKCS11:x", "gcp:x"),
        *("vault:k", "vault:k@0", "vault:k@x", "vault:../k@1"),
        *("aws:alias/x", "aws:arn:aws:kms:eu-central-1:123456789012:alias/x"),
    ],
)
def test_a_name_that_is_none_is_refused(text: str) -> None:
    """It is not repeated: it may be a key that was put there by mistake."""
    with pytest.raises(KekFileInvalid) as caught:
        parse_key_name(text)
    assert len(text) < 12 or text.partition(":")[2] not in str(caught.value)


# The transit engine.


@pytest.mark.parametrize(
    "trouble, error, message",
    [
        ("sealed", KekUnreachable, "503"),
        ("no key", KekUnavailable, "400.*is there such a key"),
        ("no version", KekUnavailable, "version 9"),
        ("no token", KekUnreachable, "403.*policy"),
        ("garbled", KekUnreachable, "not what its documents say"),
        ("too long", KekUnreachable, "more than it should"),
        ("other number", KekUnreachable, "not what its documents say"),
    ],
)
def test_transit_troubles(
    engine: Transit, keeper: VaultKeeper, trouble: str, error: type[Exception], message: str
) -> None:
    """Each is told apart, in both directions, and neither key nor token is in the message."""
    body = keeper.wrap("k@1", [DEK], [b"aad"])[0]
    key = "k@1"
    match trouble:
        case "sealed":
            engine.sealed = True
        case "no key":
            key = "none@1"
        case "no version":
            key = "k@9"
        case "no token":
            engine.tokens = set()
        case "garbled":
            engine.garbled = b'{"data": {"batch_results": "' + base64.b64encode(DEK) + b'"}}'
        case "too long":
            engine.garbled = b" " * 2**21
        case _:
            engine.garbled = b'{"data": {"batch_results": []}}'
    with pytest.raises(error, match=message) as caught:
        keeper.wrap(key, [DEK], [b"aad"])
    if trouble != "no version":  # which to unwrap under is only one that did not wrap this
        with pytest.raises(error, match=message):
            keeper.unwrap(key, [body], [b"aad"])
    for secret in (base64.b64encode(DEK).decode(), DEK.hex(), "root"):
        assert secret not in repr(caught.value) + repr(caught.value.__context__) + repr(keeper)


def test_a_transit_engine_that_is_not_there(tmp_path: Path) -> None:
    """Nobody listens, or the token can't be read: both say so."""
    token = private(tmp_path / "token", "root")
    keeper = VaultKeeper(Vault(address="http://127.0.0.1:1", token_file=token))
    with pytest.raises(KekUnreachable, match="does not answer: ConnectError"):
        keeper.wrap("k@1", [DEK], [b""])
    token.chmod(0o644)
    with pytest.raises(KekUnreachable, match="chmod 600"):
        keeper.wrap("k@1", [DEK], [b""])


def test_one_bad_item_is_not_the_batchs_end(engine: Transit, keeper: VaultKeeper) -> None:
    """The engine answers 400 to all of it, with results."""
    bodies = keeper.wrap("k@1", [DEK, DEK], [b"1", b"2"])
    assert keeper.unwrap("k@1", bodies, [b"1", b"1"]) == [DEK, None]


def test_a_token_is_read_for_each_call(engine: Transit, keeper: VaultKeeper, tmp_path: Path) -> None:
    """An agent renews it in its file."""
    keeper.wrap("k@1", [DEK], [b""])
    engine.tokens = {"next"}
    private(tmp_path / "token", "next")
    keeper.wrap("k@1", [DEK], [b""])


def test_login_by_service_account(engine: Transit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One login serves until its lease ends, or until its token is refused; a refused login says so."""
    jwt = private(tmp_path / "jwt", "jwt-of-the-pod")
    settings = Vault(address=engine.address, kubernetes=VaultKubernetes(role="kms", jwt_file=jwt))
    keeper = VaultKeeper(settings)

    def logins() -> int:
        return sum(path.endswith("/login") for path in engine.calls)

    before = logins()
    for _ in range(3):
        keeper.wrap("k@1", [DEK], [b""])
    assert logins() == before + 1
    engine.tokens = {"root"}
    for _ in range(3):
        with pytest.raises(KekUnreachable, match="403"):
            keeper.wrap("k@1", [DEK], [b""])
    assert logins() == before + 1  # a policy refuses a new token as well: no login for each request
    monkeypatch.setattr(vault, "_LOGIN_PAUSE", 0.0)
    keeper.wrap("k@1", [DEK], [b""])
    assert logins() == before + 2
    engine.lease = -1
    engine.tokens = {"root"}
    keeper.wrap("k@1", [DEK], [b""])
    private(jwt, "another")
    engine.tokens = {"root"}
    with pytest.raises(KekUnreachable, match=r"login.*role kms is refused: 403") as caught:
        keeper.wrap("k@1", [DEK], [b""])
    assert "another" not in str(caught.value)


async def test_an_engine_that_binds_no_aad_is_refused(engine: Transit, keeper: VaultKeeper) -> None:
    """It would open a record that was moved onto another key: no canary is taken for good."""
    engine.binds_aad = False
    keks, name = HiddenKeks(keeper, 10), KeyName("vault", "k@1")
    with pytest.raises(KekUnavailable, match="does not bind"):
        await keks.matches(name, await keks.check_value(name))


# AWS KMS.


async def test_aws_troubles(aws: AwsKms) -> None:
    """A key that is not there or disabled is one trouble, an answer that does not come another."""
    keeper = AwsKeeper(aws.address, 5)
    arn = aws.make_key()
    body = keeper.wrap(arn, [DEK], [b"aad"])[0]
    for code, error in (
        ("DisabledException", KekUnavailable),
        ("AccessDeniedException", KekUnreachable),
        ("ExpiredTokenException", KekUnreachable),
    ):
        aws.refuse = code
        try:
            with pytest.raises(error, match=code):
                keeper.wrap(arn, [DEK], [b"aad"])
            with pytest.raises(error, match=code):
                keeper.unwrap(arn, [body], [b"aad"])
        finally:
            aws.refuse = ""
    with pytest.raises(KekUnavailable, match="NotFoundException"):
        keeper.wrap(arn[:-4] + "0000", [DEK], [b"aad"])
    aws.away = True
    try:
        with pytest.raises(KekUnreachable) as caught:
            keeper.unwrap(arn, [body], [b"aad"])
    finally:
        aws.away = False
    assert base64.b64encode(body).decode() not in repr(caught.value) + repr(caught.value.__context__)
    assert keeper.unwrap(arn, [body], [b"aad"]) == [DEK]


# The PKCS#11 token.


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


# What is known of a key while its place is away, and when that is looked at again.


async def until(condition: Callable[[], object]) -> None:
    """Wait for something; only a failure takes long."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_what_is_known_stands_while_the_place_is_away(engine: Transit, keeper: VaultKeeper) -> None:
    """A key that was the right one still is; nothing is said of one that was never seen."""
    keks, fresh = HiddenKeks(keeper, 10), HiddenKeks(keeper, 10)
    name = KeyName("vault", "k@1")
    value = await keks.check_value(name)
    assert await keks.matches(name, value)
    engine.sealed = True
    assert await keks.matches(name, value)
    for _ in range(5):
        with pytest.raises(KekUnreachable, match="503"):
            await fresh.matches(name, value)
    before = len(engine.calls)
    with pytest.raises(KekUnreachable, match="503"):
        await fresh.matches(name, value)
    assert len(engine.calls) == before


async def test_a_key_that_was_replaced_is_noticed(
    engine: Transit, keeper: VaultKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the same name and version: it is looked at again in the background."""
    keks, name = HiddenKeks(keeper, 10), KeyName("vault", "k@1")
    value = await keks.check_value(name)
    assert await keks.matches(name, value)
    before = len(engine.calls)
    assert await keks.matches(name, value)
    assert len(engine.calls) == before
    engine.keys["k"] = [os.urandom(32)]
    monkeypatch.setattr(hidden, "RECHECK", 0.0)
    assert await keks.matches(name, value)
    for _ in range(1000):
        if not await keks.matches(name, value):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it was not noticed")


async def test_a_failed_look_changes_nothing(
    engine: Transit, keeper: VaultKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is logged; the key is still the right one."""
    keks, name = HiddenKeks(keeper, 10), KeyName("vault", "k@1")
    value = await keks.check_value(name)
    assert await keks.matches(name, value)
    monkeypatch.setattr(hidden, "RECHECK", 0.0)
    engine.sealed = True
    with capture_logs() as logs:
        assert await keks.matches(name, value)
        await until(lambda: logs)
    assert logs[0]["event"] == "kek_not_checked"
    assert await keks.matches(name, value)


async def test_errors_of_one_item_are_its_own(engine: Transit, keeper: VaultKeeper) -> None:
    """Also in a batch of several calls."""
    keks, name = HiddenKeks(keeper, 10), KeyName("vault", "k@1")
    deks = [os.urandom(32) for _ in range(2 * keeper.chunk + 1)]
    aads = [b"%d" % number for number in range(len(deks))]
    bodies = await keks.wrap(name, deks, aads)
    aads[keeper.chunk] = b"other"
    opened = await keks.unwrap(name, bodies, aads)
    assert [number for number, key in enumerate(opened) if isinstance(key, WrappedKeyInvalid)] == [
        keeper.chunk
    ]


async def test_a_call_that_is_given_up_is_never_made() -> None:
    """What still waits for a thread when its time is over is dropped."""
    threads, made = Threads("test", 1), []
    blocking = asyncio.create_task(threads.call(lambda: time.sleep(0.5), 10))
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await threads.call(lambda: made.append("late"), 0.05)
    await blocking
    await threads.call(lambda: made.append("next"), 10)
    assert made == ["next"]

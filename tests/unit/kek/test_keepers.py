"""What can go wrong with services that keep keys: each trouble is told for what it is, without a secret."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from progressdb_kms.domain.errors import KekFileInvalid, KekUnavailable, KekUnreachable
from progressdb_kms.kek import vault
from progressdb_kms.kek.aws import AwsKeeper
from progressdb_kms.kek.hidden import HiddenKeks
from progressdb_kms.kek.keyfile import KeyName, parse_key_name
from progressdb_kms.kek.vault import VaultKeeper
from progressdb_kms.settings.kek import Vault, VaultKubernetes
from tests.keepers.aws import AwsKms
from tests.keepers.files import private
from tests.keepers.transit import Transit

DEK = bytes.fromhex("5ec2e7" * 10 + "5ec2")


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

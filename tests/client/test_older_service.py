"""The older service: no optional fields, plain-text errors, plain HTTP on a loopback address."""

from __future__ import annotations

import re

import pytest

from progressdb_kms.client import EndpointInvalid, open_provider, open_sync_provider
from progressdb_kms.domain.errors import AuthenticationFailed, KeyNotFound
from tests.client.faults import plain
from tests.client.harness import Facade
from tests.client.standin import Running, StandIn


@pytest.fixture
async def kms(kind: str, standin: StandIn, kms: Facade) -> Facade:
    """A provider for a service of the older kind."""
    standin.old = True
    return kms


async def test_optional_fields_may_be_missing(kms: Facade, standin: StandIn) -> None:
    """A create gives key_id and wrapped, an encrypt the ciphertext; the rest is empty."""
    dek = await kms.create_dek_for_thread("t")
    assert (dek.kek_id, dek.kek_version, dek.key_version) == ("", "", "")
    assert dek.wrapped.startswith(b"wrapped-")
    sealed = await kms.encrypt_with_dek(dek.key_id, b"m", b"a")
    assert sealed.key_version == ""
    assert await kms.decrypt_with_dek(dek.key_id, sealed.ciphertext, b"a") == b"m"
    assert (await kms.get_wrapped(dek.key_id)).wrapped == dek.wrapped


async def test_its_errors_are_text(kms: Facade) -> None:
    """They become the same classes as far as they can be told apart."""
    dek = await kms.create_dek_for_thread("t")
    with pytest.raises(KeyNotFound):
        await kms.encrypt_with_dek("none", b"m")
    with pytest.raises(AuthenticationFailed):
        await kms.decrypt_with_dek(dek.key_id, b"x" * 28)


@pytest.mark.parametrize("body", [b"ok", b"", b'{"status": 1}', b'{"healthy": true}'])
async def test_any_healthy_answer_is_healthy(kms: Facade, standin: StandIn, body: bytes) -> None:
    """Status 200 is all that health asks for."""
    standin.faults.append(plain(200, body))
    assert await kms.health()


async def test_plain_http_has_to_be_asked_for(kind: str) -> None:
    """It is refused with what to do, unless allowed by name."""
    opener = open_provider if kind == "async" else open_sync_provider
    with Running(StandIn(old=True), scheme="http") as service:
        with pytest.raises(EndpointInvalid, match=re.escape("use https://")):
            opener(service.url)
        async with Facade(opener(service.url, allow_plain_http=True)) as kms:
            assert await kms.health()

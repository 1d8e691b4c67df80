"""The provider without a service."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import progressdb_kms
from progressdb_kms.client import open_provider, open_sync_provider
from progressdb_kms.client.embedded import EmbeddedProvider, SyncEmbeddedProvider
from progressdb_kms.domain.errors import AuthenticationFailed, InvalidHeader, KmsError, WrappedKeyInvalid
from tests.client.harness import Facade
from tests.client.provider_suite import ProviderSuite, new_thread


@pytest.fixture
async def kms(kind: str) -> AsyncIterator[Facade]:
    """An embedded provider."""
    async with Facade(EmbeddedProvider() if kind == "async" else SyncEmbeddedProvider()) as kms:
        yield kms


class TestEmbedded(ProviderSuite):
    """The provider's promises, kept without a service."""

    @pytest.fixture
    async def kms(self, kind: str) -> AsyncIterator[Facade]:
        """An embedded provider, opened as users do."""
        opener = open_provider if kind == "async" else open_sync_provider
        async with Facade(opener("embedded:")) as kms:
            yield kms


async def test_unnamed_deks(kms: Facade) -> None:
    """`create_dek` makes a DEK of no thread, which `encrypt` and `decrypt` use by its id."""
    one, wrapped = await kms.create_dek()
    other, _ = await kms.create_dek()
    assert one != other
    assert wrapped == (await kms.get_wrapped(one)).wrapped
    sealed = await kms.encrypt(one, b"m", b"aad")
    assert await kms.decrypt(one, sealed.ciphertext, b"aad") == b"m"
    assert await kms.decrypt_with_dek(one, sealed.ciphertext, b"aad") == b"m"
    with pytest.raises(AuthenticationFailed):
        await kms.decrypt(other, sealed.ciphertext, b"aad")


async def test_own_deks_are_wrapped(kms: Facade) -> None:
    """A caller's own DEK comes back; each wrap differs; any change of one bit is noticed."""
    dek = os.urandom(32)
    wrapped = await kms.wrap_dek(dek)
    assert await kms.unwrap_dek(wrapped) == dek
    assert await kms.wrap_dek(dek) != wrapped
    for at in range(4, len(wrapped)):
        forged = wrapped[:at] + bytes([wrapped[at] ^ 1]) + wrapped[at + 1 :]
        with pytest.raises(WrappedKeyInvalid):
            await kms.unwrap_dek(forged)
    with pytest.raises(WrappedKeyInvalid):
        await kms.unwrap_dek(b"")


async def test_a_stored_dek_stays_inside(kms: Facade) -> None:
    """What `create_dek` wrapped can't be had raw by `unwrap_dek`."""
    _, wrapped = await kms.create_dek()
    with pytest.raises(WrappedKeyInvalid):
        await kms.unwrap_dek(wrapped)


async def test_wrong_use_of_wraps(kms: Facade) -> None:
    """A DEK is 32 bytes, and bytes."""
    with pytest.raises(ValueError, match="32 bytes"):
        await kms.wrap_dek(b"short")
    with pytest.raises(TypeError, match="must be bytes"):
        await kms.wrap_dek("0" * 32)
    with pytest.raises(TypeError, match="must be bytes"):
        await kms.unwrap_dek("0" * 64)


async def test_a_master_key_outlives_the_provider() -> None:
    """Wraps of one provider open in another with the same key, and in no other."""
    key, dek = os.urandom(32), os.urandom(32)
    async with EmbeddedProvider(key) as one, EmbeddedProvider(key) as again, EmbeddedProvider() as other:
        wrapped = await one.wrap_dek(dek)
        assert await again.unwrap_dek(wrapped) == dek
        with pytest.raises(WrappedKeyInvalid):
            await other.unwrap_dek(wrapped)


async def test_a_bad_master_key_is_refused_without_showing_it() -> None:
    """It has 32 bytes."""
    with pytest.raises(KmsError) as caught:
        EmbeddedProvider(b"SECRET")
    assert "SECRET" not in str(caught.value)


async def test_many_tasks_share_a_provider() -> None:
    """The first calls may come all at once."""
    async with EmbeddedProvider() as kms:
        deks = await asyncio.gather(*(kms.create_dek_for_thread("t") for _ in range(50)))
        assert sorted(int(dek.key_version) for dek in deks) == list(range(1, 51))
        sealed = await asyncio.gather(*(kms.encrypt_with_dek(deks[0].key_id, b"%d" % n) for n in range(50)))
        opened = await kms.decrypt_many([(deks[0].key_id, item.ciphertext, None) for item in sealed])
        assert opened == [b"%d" % n for n in range(50)]


async def test_uses_are_counted(kms: Facade) -> None:
    """Each encryption counts towards the limit of its key, though nothing runs in the background."""
    dek = await kms.create_dek_for_thread("t")
    for _ in range(3):
        await kms.encrypt_with_dek(dek.key_id, b"m")
    await kms.encrypt_many([(dek.key_id, b"m", None)] * 4)
    assert isinstance(kms.provider, EmbeddedProvider | SyncEmbeddedProvider)
    (record,) = await kms.provider._embedded._store.get([dek.key_id])
    assert record is not None
    assert record.uses == 7


async def test_an_empty_idempotency_key_is_refused(kms: Facade) -> None:
    """It is none, and taking it for none would make a second DEK on a retry."""
    with pytest.raises(InvalidHeader):
        await kms.create_dek_for_thread(new_thread(), idempotency_key="")
    (result,) = await kms.create_deks_for_threads([new_thread()], idempotency_keys=[""])
    assert isinstance(result, InvalidHeader)


def test_it_says_what_it_is_for(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody takes it for a service."""
    with caplog.at_level(logging.WARNING, "progressdb_kms.client"):
        open_sync_provider("embedded:").close()
    assert "development and tests" in caplog.text


def test_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """PROGRESSDB_KMS_MODE=embedded needs nothing else."""
    monkeypatch.setenv("PROGRESSDB_KMS_MODE", "embedded")
    with open_sync_provider() as kms:
        assert isinstance(kms, SyncEmbeddedProvider)
        assert kms.health().status == "ok"


def run_without(packages: tuple[str, ...], program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter that lacks packages."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({packages!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", block + program],
        env={"PYTHONPATH": str(Path(progressdb_kms.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_missing_package_is_named() -> None:
    """With the base wheel alone, the error says what to install."""
    program = "from progressdb_kms.client import open_provider\nopen_provider('embedded:')\n"
    done = run_without(("cryptography",), program)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.endswith("needs the package cryptography; install progressdb-kms[embedded]")
    assert "EndpointInvalid" in last


def test_it_needs_no_server() -> None:
    """A fresh interpreter runs it without the packages of a server."""
    program = (
        "from progressdb_kms.client import open_sync_provider\n"
        "with open_sync_provider('embedded:') as kms:\n"
        "    dek = kms.create_dek_for_thread('t')\n"
        "    sealed = kms.encrypt_with_dek(dek.key_id, b'm')\n"
        "    print(kms.decrypt_with_dek(dek.key_id, sealed.ciphertext).decode())\n"
    )
    server = ("quart", "hypercorn", "redis", "yaml", "click", "rich", "uvloop", "prometheus_client")
    done = run_without(server, program)
    assert (done.returncode, done.stdout) == (0, "m\n"), done.stderr

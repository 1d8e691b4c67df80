"""The provider's promises, kept by the real service in development mode."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.client import AdminClient, CreatedDek, TransportError
from progressdb_kms.client.protocol import Encoding
from progressdb_kms.domain.errors import InvalidTransition, KeyDisabled, KeyNotFound, PermissionDenied
from tests.client.devservice import running
from tests.client.harness import Facade
from tests.client.provider_suite import TRANSPORTS, UNKNOWN_KEY, ProviderSuite, connect, new_thread


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The ready file of a running development service."""
    with running(tmp_path_factory.mktemp("dev")) as ready:
        yield ready


class TestRealService(ProviderSuite):
    """Over both transports, in both encodings, with both kinds of provider, coalescing or not."""

    @pytest.fixture(params=["json", "msgpack"])
    def encoding(self, request: pytest.FixtureRequest) -> Encoding:
        """Each encoding."""
        encoding: Encoding = request.param
        return encoding

    @pytest.fixture(params=TRANSPORTS)
    async def kms(
        self,
        request: pytest.FixtureRequest,
        ready: dict[str, Any],
        kind: str,
        coalesce: bool,
        encoding: Encoding,
    ) -> AsyncIterator[Facade]:
        """A remote provider."""
        async with connect(ready, kind, request.param, encoding=encoding, coalesce=coalesce) as kms:
            yield kms


@pytest.fixture
def admin(ready: dict[str, Any]) -> Iterator[AdminClient]:
    """The operator's client."""
    pair = ready["clients"]["operator"]
    with AdminClient(ready["url"], ca=ready["ca"], cert=pair["cert"], key=pair["key"], deadline=20) as client:
        yield client


async def test_a_stranger_is_told_what_is_missing(ready: dict[str, Any], kind: str) -> None:
    """A valid certificate without a grant: the permission and the identity are named."""
    async with connect(ready, kind, "tls", client="stranger") as kms:
        with pytest.raises(PermissionDenied) as caught:
            await kms.create_dek_for_thread(new_thread())
        assert caught.value.permission == "key:create"
        assert "stranger" in caught.value.identity
        results = await kms.create_deks_for_threads([new_thread()] * 2)
        assert [type(result) for result in results] == [PermissionDenied] * 2


async def test_without_a_certificate(ready: dict[str, Any], kind: str) -> None:
    """The service closes the connection, by an alert or without; the error says what to give."""
    nobody = ready | {"clients": {"nobody": {"cert": None, "key": None}}}
    async with connect(nobody, kind, "tls", client="nobody") as kms:
        with pytest.raises(TransportError, match="give cert and key"):
            await kms.health()


async def test_large_batches(ready: dict[str, Any], kind: str) -> None:
    """A batch over the service's 16 MiB goes through in parts."""
    async with connect(ready, kind, "tls") as kms:
        dek = await kms.create_dek_for_thread(new_thread())
        items = [(dek.key_id, bytes([n]) * 1_000_000, None) for n in range(14)]
        sealed = await kms.encrypt_many(items)
        opened = await kms.decrypt_many([(dek.key_id, item.ciphertext, None) for item in sealed])
        assert opened == [plaintext for _, plaintext, _ in items]


async def test_many_creates_at_once(ready: dict[str, Any]) -> None:
    """A thousand keys in one request are a thousand keys."""
    async with connect(ready, "async", "unix", encoding="msgpack") as kms:
        made = await kms.create_deks_for_threads([f"{new_thread()}-{n}" for n in range(1_000)])
        assert {repr(dek) for dek in made if not isinstance(dek, CreatedDek)} == set()
        assert len({dek.key_id for dek in made}) == 1_000


async def test_states_reach_the_provider(ready: dict[str, Any], kind: str, admin: AdminClient) -> None:
    """A key that an operator disables does not encrypt, and does again once it is enabled."""
    async with connect(ready, kind, "tls") as kms:
        thread = new_thread()
        dek = await kms.create_dek_for_thread(thread)
        shown = admin.get_key(dek.key_id)
        assert (shown.thread_id, shown.version, shown.state) == (thread, 1, "enabled")
        assert str(shown.kek_version) == dek.kek_version
        assert admin.disable(dek.key_id).state == "disabled"
        with pytest.raises(KeyDisabled):
            await kms.encrypt_with_dek(dek.key_id, b"m")
        assert admin.enable(dek.key_id).state == "enabled"
        await kms.encrypt_with_dek(dek.key_id, b"m")
        pending = admin.schedule_destruction(dek.key_id, waiting_days=7)
        assert pending.state == "pending_destruction"
        assert pending.destroy_at is not None
        with pytest.raises(InvalidTransition):
            admin.enable(dek.key_id)
        assert admin.cancel_destruction(dek.key_id).state == "disabled"


async def test_listing_and_keks(ready: dict[str, Any], admin: AdminClient) -> None:
    """A thread's keys are listed over pages; the census names the active KEK."""
    async with connect(ready, "async", "unix") as kms:
        thread = new_thread()
        made = [await kms.create_dek_for_thread(thread) for _ in range(5)]
    listed = list(admin.list_keys(thread_id=thread, limit=2))
    assert {key.key_id for key in listed} == {dek.key_id for dek in made}
    census = admin.keks()
    active = next(kek for kek in census.keks if kek.version == census.active)
    assert (active.state, active.loaded, active.kek_id) == ("active", True, made[0].kek_id)
    assert active.deks >= 5
    assert admin.rewrap(made[0].key_id).wrapped == made[0].wrapped
    assert admin.openapi()["openapi"].startswith("3.1")
    with pytest.raises(KeyNotFound):
        admin.get_key(UNKNOWN_KEY)


def test_the_ready_file_is_enough(ready: dict[str, Any]) -> None:
    """It names what `connect` needs, and the files are there."""
    assert Path(ready["ca"]).exists()
    assert set(ready["clients"]) == {"server", "operator", "chat", "stranger"}

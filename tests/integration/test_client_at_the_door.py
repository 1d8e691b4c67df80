"""The client's requests are ordinary ones: all go by the fast door, or each costs many times as much."""

from __future__ import annotations

import pytest

from progressdb_kms.client.protocol import Encoding
from progressdb_kms.domain.errors import AuthenticationFailed, KeyNotFound
from tests.client.provider_suite import UNKNOWN_KEY, connect, new_thread
from tests.integration.world import Instance, World


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_all_requests_are_the_doors(
    world: World, service: Instance, kind: str, encoding: Encoding
) -> None:
    """Creates, messages, batches, refusals, health: none goes the long way, which ends the door for good."""
    cert, key = world.certificate("server")
    ready = {
        "url": f"https://localhost:{service.port}",
        "ca": world.ca_file,
        "clients": {"server": {"cert": cert, "key": key}},
    }

    def others() -> float:
        return service.metric("kms_requests_total") - service.metric("kms_fast_door_requests_total")

    before, by_door = others(), service.metric("kms_fast_door_requests_total")
    async with connect(ready, kind, "tls", encoding=encoding) as kms:
        await kms.health()
        dek = await kms.create_dek_for_thread(new_thread())
        sealed = await kms.encrypt_with_dek(dek.key_id, b"hello", b"aad")
        assert await kms.decrypt_with_dek(dek.key_id, sealed.ciphertext, b"aad") == b"hello"
        with pytest.raises(AuthenticationFailed):
            await kms.decrypt_with_dek(dek.key_id, sealed.ciphertext, b"moved")
        with pytest.raises(KeyNotFound):
            await kms.get_wrapped(UNKNOWN_KEY)
        assert (await kms.get_wrapped(dek.key_id)).wrapped == dek.wrapped
        await kms.create_deks_for_threads([new_thread()] * 2)
        many = await kms.encrypt_many([(dek.key_id, b"m", None)] * 300)
        assert await kms.decrypt_many([(dek.key_id, item.ciphertext, None) for item in many]) == [b"m"] * 300
    assert service.metric("kms_fast_door_requests_total") == by_door + 10
    assert others() == before

"""What every provider promises, whatever stands behind it: the stand-in, the real service, or nothing.

A test module subclasses ``ProviderSuite`` and gives a fixture ``kms``: a ``Facade`` over a provider that may
create, encrypt and decrypt. ``connect`` makes one from the ready file of a running service.
"""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from progressdb_kms.client import CreatedDek, Encrypted, open_provider, open_sync_provider
from progressdb_kms.client.protocol import Encoding
from progressdb_kms.domain.errors import (
    AuthenticationFailed,
    InvalidThreadId,
    KeyNotFound,
    KmsError,
    MalformedCiphertext,
)
from tests.client.harness import Facade

TRANSPORTS = ["tls", "unix"]
UNKNOWN_KEY = "k_" + "A" * 28


def connect(
    ready: dict[str, Any],
    kind: str,
    transport: str,
    *,
    client: str = "server",
    encoding: Encoding = "json",
    coalesce: bool = True,
) -> Facade:
    """Return a provider for the service that `ready` (a ready file's content) describes.

    Args:
        ready: With `url`, `unix`, `ca` and `clients`.
        kind: `async` or `sync`.
        transport: `tls` or `unix`.
        client: Whose certificate to use.
        encoding: Of the bodies.
        coalesce: Whether calls of the same moment travel as one batch.
    """
    opener = open_provider if kind == "async" else open_sync_provider
    # Generous: what is tested here is not speed, and several suites may share a core.
    options: dict[str, Any] = {"encoding": encoding, "coalesce": coalesce, "deadline": 20}
    if transport == "unix":
        return Facade(opener(f"unix://{ready['unix']}", **options))
    pair = ready["clients"][client]
    return Facade(opener(ready["url"], ca=ready["ca"], cert=pair["cert"], key=pair["key"], **options))


def new_thread() -> str:
    """Return a thread id that no other test uses."""
    return f"thread-{uuid.uuid4()}"


class ProviderSuite:
    """The promises."""

    async def test_round_trip(self, kms: Facade) -> None:
        """What is encrypted with a new DEK decrypts to the same bytes."""
        dek = await kms.create_dek_for_thread(new_thread())
        sealed = await kms.encrypt_with_dek(dek.key_id, b"\x00message\xff")
        assert isinstance(dek, CreatedDek)
        assert isinstance(sealed, Encrypted)
        assert len(sealed.ciphertext) == 12 + 9 + 16
        assert await kms.decrypt_with_dek(dek.key_id, sealed.ciphertext) == b"\x00message\xff"

    async def test_an_empty_plaintext_is_a_plaintext(self, kms: Facade) -> None:
        """Nothing encrypts to nonce and tag, and comes back."""
        dek = await kms.create_dek_for_thread(new_thread())
        sealed = await kms.encrypt_with_dek(dek.key_id, b"")
        assert len(sealed.ciphertext) == 28
        assert await kms.decrypt_with_dek(dek.key_id, sealed.ciphertext) == b""

    async def test_versions_count_a_threads_keys(self, kms: Facade) -> None:
        """Each create makes a new key of the thread's next version, which encryptions name."""
        thread = new_thread()
        deks = [await kms.create_dek_for_thread(thread) for _ in range(2)]
        assert [dek.key_version for dek in deks] == ["1", "2"]
        assert len({dek.key_id for dek in deks}) == 2
        assert (await kms.encrypt_with_dek(deks[1].key_id, b"m")).key_version == "2"

    async def test_an_idempotency_key_gives_one_dek(self, kms: Facade) -> None:
        """The same key for the same thread is the same DEK; another key is another."""
        thread, token = new_thread(), uuid.uuid4().hex
        one = await kms.create_dek_for_thread(thread, idempotency_key=token)
        again = await kms.create_dek_for_thread(thread, idempotency_key=token)
        other = await kms.create_dek_for_thread(thread, idempotency_key=uuid.uuid4().hex)
        assert again == one
        assert other.key_id != one.key_id

    async def test_aad_is_bound(self, kms: Facade) -> None:
        """The AAD of the encryption decrypts; a wrong, missing or added one does not."""
        dek = await kms.create_dek_for_thread(new_thread())
        bound = (await kms.encrypt_with_dek(dek.key_id, b"m", b"aad")).ciphertext
        free = (await kms.encrypt_with_dek(dek.key_id, b"m")).ciphertext
        assert await kms.decrypt_with_dek(dek.key_id, bound, b"aad") == b"m"
        assert await kms.decrypt_with_dek(dek.key_id, free, b"") == b"m"
        for ciphertext, aad in ((bound, b"other"), (bound, None), (free, b"aad")):
            with pytest.raises(AuthenticationFailed):
                await kms.decrypt_with_dek(dek.key_id, ciphertext, aad)

    async def test_a_ciphertext_belongs_to_its_key(self, kms: Facade) -> None:
        """Under another key of the same thread it is forged."""
        thread = new_thread()
        one, other = [await kms.create_dek_for_thread(thread) for _ in range(2)]
        sealed = await kms.encrypt_with_dek(one.key_id, b"m")
        with pytest.raises(AuthenticationFailed):
            await kms.decrypt_with_dek(other.key_id, sealed.ciphertext)

    async def test_a_cut_ciphertext_is_malformed(self, kms: Facade) -> None:
        """Too short for nonce and tag is another error than forged."""
        dek = await kms.create_dek_for_thread(new_thread())
        with pytest.raises(MalformedCiphertext):
            await kms.decrypt_with_dek(dek.key_id, b"x" * 27)

    async def test_an_unknown_key_is_not_found(self, kms: Facade) -> None:
        """Every method that takes a key says so."""
        with pytest.raises(KeyNotFound):
            await kms.encrypt_with_dek(UNKNOWN_KEY, b"m")
        with pytest.raises(KeyNotFound):
            await kms.decrypt_with_dek(UNKNOWN_KEY, b"x" * 28)
        with pytest.raises(KeyNotFound):
            await kms.get_wrapped(UNKNOWN_KEY)

    async def test_an_invalid_thread_is_refused(self, kms: Facade) -> None:
        """An empty thread id is an error of its own class."""
        with pytest.raises(InvalidThreadId):
            await kms.create_dek_for_thread("")

    async def test_get_wrapped_gives_what_create_gave(self, kms: Facade) -> None:
        """The stored blob is the one that the create answered."""
        dek = await kms.create_dek_for_thread(new_thread())
        wrapped = await kms.get_wrapped(dek.key_id)
        assert (wrapped.wrapped, wrapped.kek_id, wrapped.kek_version) == (
            dek.wrapped,
            dek.kek_id,
            dek.kek_version,
        )

    async def test_batches_keep_order_and_errors(self, kms: Facade) -> None:
        """Batches give a result or an error for each item, in order, and never all or nothing."""
        threads = [new_thread(), "", new_thread()]
        one, bad, two = await kms.create_deks_for_threads(threads)
        assert isinstance(bad, InvalidThreadId)
        items = [(one.key_id, b"1", None), (UNKNOWN_KEY, b"2", None), (two.key_id, b"3", b"aad")]
        first, missing, third = await kms.encrypt_many(items)
        assert isinstance(missing, KeyNotFound)
        sealed = [
            (one.key_id, first.ciphertext, None),
            (two.key_id, third.ciphertext, None),
            (two.key_id, third.ciphertext, b"aad"),
        ]
        opened = await kms.decrypt_many(sealed)
        assert opened[0] == b"1"
        assert isinstance(opened[1], AuthenticationFailed)
        assert opened[2] == b"3"

    async def test_empty_batches(self, kms: Facade) -> None:
        """No items, no results."""
        assert await kms.create_deks_for_threads([]) == []
        assert await kms.encrypt_many([]) == []
        assert await kms.decrypt_many([]) == []

    async def test_batch_creates_are_idempotent(self, kms: Facade) -> None:
        """Each item has its own idempotency key, and it is the same as a single create's."""
        thread, token = new_thread(), uuid.uuid4().hex
        (one,) = await kms.create_deks_for_threads([thread], idempotency_keys=[token])
        assert await kms.create_dek_for_thread(thread, idempotency_key=token) == one

    async def test_text_is_not_bytes(self, kms: Facade) -> None:
        """A str is refused at once: it could pass for base64."""
        for call in (kms.encrypt_with_dek, kms.decrypt_with_dek):
            with pytest.raises(TypeError, match="must be bytes"):
                await call(UNKNOWN_KEY, "dGV4dA==")
        with pytest.raises(TypeError, match="must be bytes"):
            await kms.encrypt_with_dek(UNKNOWN_KEY, b"", "aad")
        with pytest.raises(TypeError, match="sequence"):
            await kms.create_deks_for_threads("thread")

    async def test_health(self, kms: Facade) -> None:
        """A provider that works is healthy."""
        assert (await kms.health()).status == "ok"

    async def test_nothing_secret_in_repr_or_errors(self, kms: Facade) -> None:
        """Neither what is returned nor what is raised shows a wrapped key, a plaintext or a ciphertext."""
        dek = await kms.create_dek_for_thread(new_thread())
        sealed = await kms.encrypt_with_dek(dek.key_id, b"top secret")
        wrapped = await kms.get_wrapped(dek.key_id)
        shown = repr((dek, sealed, wrapped))
        for secret in (dek.wrapped, sealed.ciphertext, b"top secret"):
            assert repr(secret)[2:-1] not in shown
        with pytest.raises(KmsError) as caught:
            await kms.decrypt_with_dek(dek.key_id, sealed.ciphertext, b"top secret aad")
        assert "secret" not in str(caught.value)

    async def test_after_close_nothing_goes(self, kms: Facade) -> None:
        """A closed provider says that it is closed, and closing it again does no harm."""
        await kms.health()
        await kms.close()
        await kms.close()
        with pytest.raises(KmsError, match="closed"):
            await kms.health()

"""Providers over a ``Sender``: the seam between what a method asks and how the asking travels.

A sender gets each call before it is encoded, so one that wraps another can let calls of the same moment
travel as one batch; the embedded provider's sender answers them in the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from progressdb_kms.client import plans
from progressdb_kms.client.exchange import Options, adrive, drive
from progressdb_kms.client.plans import DecryptItem, EncryptItem, Plan
from progressdb_kms.client.protocol import Call, Encoding
from progressdb_kms.client.provider import Headers, KmsProvider, SyncKmsProvider
from progressdb_kms.client.types import CreatedDek, Encrypted, Health, Wrapped
from progressdb_kms.domain.errors import KmsError

T = TypeVar("T")


class AsyncSender(Protocol):
    """Carries calls; raises ``KmsError``."""

    async def send(self, call: Call[T], options: Options) -> T:
        """Make a call and return its answer."""

    async def close(self) -> None:
        """Take no more calls."""


class SyncSender(Protocol):
    """Carries calls; raises ``KmsError``."""

    def send(self, call: Call[T], options: Options) -> T:
        """Make a call and return its answer."""

    def close(self) -> None:
        """Take no more calls."""


def _options(deadline: float | None, headers: Headers | None) -> Callable[[], Options]:
    """Return what gives each request of one method call its options: a deadline is for all of them."""
    expires = None if deadline is None else time.monotonic() + deadline

    def now() -> Options:
        return Options(None if expires is None else max(0.0, expires - time.monotonic()), headers or {})

    return now


class SenderProvider(KmsProvider):
    """A ``KmsProvider`` over a sender.

    Args:
        sender: Carries the calls.
        encoding: Of the bodies, by which batches are measured.
    """

    def __init__(self, sender: AsyncSender, encoding: Encoding = "json") -> None:
        self._sender = sender
        self._encoding = encoding

    async def _run(self, plan: Plan[T], deadline: float | None, headers: Headers | None) -> T:
        options = _options(deadline, headers)

        async def perform(call: Call[Any]) -> object:
            return await self._sender.send(call, options())

        return await adrive(plan, perform)

    async def create_dek_for_thread(  # noqa: D102 - as KmsProvider
        self,
        thread_id: str,
        *,
        idempotency_key: str | None = None,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> CreatedDek:
        return await self._run(plans.create(thread_id, idempotency_key), deadline, headers)

    async def rotate_dek(  # noqa: D102 - as KmsProvider
        self,
        thread_id: str,
        *,
        idempotency_key: str | None = None,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> CreatedDek:
        return await self._run(plans.rotate_dek(thread_id, idempotency_key), deadline, headers)

    async def encrypt_with_dek(  # noqa: D102 - as KmsProvider
        self,
        key_id: str,
        plaintext: bytes,
        aad: bytes | None = None,
        *,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> Encrypted:
        return await self._run(plans.encrypt(key_id, plaintext, aad), deadline, headers)

    async def decrypt_with_dek(  # noqa: D102 - as KmsProvider
        self,
        key_id: str,
        ciphertext: bytes,
        aad: bytes | None = None,
        *,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> bytes:
        return await self._run(plans.decrypt(key_id, ciphertext, aad), deadline, headers)

    async def create_deks_for_threads(  # noqa: D102 - as KmsProvider
        self,
        thread_ids: Sequence[str],
        *,
        idempotency_keys: Sequence[str] | None = None,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> list[CreatedDek | KmsError]:
        plan = plans.create_many(thread_ids, idempotency_keys, self._encoding)
        return await self._run(plan, deadline, headers)

    async def encrypt_many(  # noqa: D102 - as KmsProvider
        self, items: Sequence[EncryptItem], *, deadline: float | None = None, headers: Headers | None = None
    ) -> list[Encrypted | KmsError]:
        return await self._run(plans.encrypt_many(items, self._encoding), deadline, headers)

    async def decrypt_many(  # noqa: D102 - as KmsProvider
        self, items: Sequence[DecryptItem], *, deadline: float | None = None, headers: Headers | None = None
    ) -> list[bytes | KmsError]:
        return await self._run(plans.decrypt_many(items, self._encoding), deadline, headers)

    async def get_wrapped(  # noqa: D102 - as KmsProvider
        self, key_id: str, *, deadline: float | None = None, headers: Headers | None = None
    ) -> Wrapped:
        return await self._run(plans.get_wrapped(key_id), deadline, headers)

    async def health(  # noqa: D102 - as KmsProvider
        self, *, deadline: float | None = None, headers: Headers | None = None
    ) -> Health:
        return await self._run(plans.health(), deadline, headers)

    async def close(self) -> None:  # noqa: D102 - as KmsProvider
        await self._sender.close()


class SyncSenderProvider(SyncKmsProvider):
    """A ``SyncKmsProvider`` over a sender; see ``SenderProvider``."""

    def __init__(self, sender: SyncSender, encoding: Encoding = "json") -> None:
        self._sender = sender
        self._encoding = encoding

    def _run(self, plan: Plan[T], deadline: float | None, headers: Headers | None) -> T:
        options = _options(deadline, headers)
        return drive(plan, lambda call: self._sender.send(call, options()))

    def create_dek_for_thread(  # noqa: D102 - as KmsProvider
        self,
        thread_id: str,
        *,
        idempotency_key: str | None = None,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> CreatedDek:
        return self._run(plans.create(thread_id, idempotency_key), deadline, headers)

    def rotate_dek(  # noqa: D102 - as KmsProvider
        self,
        thread_id: str,
        *,
        idempotency_key: str | None = None,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> CreatedDek:
        return self._run(plans.rotate_dek(thread_id, idempotency_key), deadline, headers)

    def encrypt_with_dek(  # noqa: D102 - as KmsProvider
        self,
        key_id: str,
        plaintext: bytes,
        aad: bytes | None = None,
        *,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> Encrypted:
        return self._run(plans.encrypt(key_id, plaintext, aad), deadline, headers)

    def decrypt_with_dek(  # noqa: D102 - as KmsProvider
        self,
        key_id: str,
        ciphertext: bytes,
        aad: bytes | None = None,
        *,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> bytes:
        return self._run(plans.decrypt(key_id, ciphertext, aad), deadline, headers)

    def create_deks_for_threads(  # noqa: D102 - as KmsProvider
        self,
        thread_ids: Sequence[str],
        *,
        idempotency_keys: Sequence[str] | None = None,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> list[CreatedDek | KmsError]:
        plan = plans.create_many(thread_ids, idempotency_keys, self._encoding)
        return self._run(plan, deadline, headers)

    def encrypt_many(  # noqa: D102 - as KmsProvider
        self, items: Sequence[EncryptItem], *, deadline: float | None = None, headers: Headers | None = None
    ) -> list[Encrypted | KmsError]:
        return self._run(plans.encrypt_many(items, self._encoding), deadline, headers)

    def decrypt_many(  # noqa: D102 - as KmsProvider
        self, items: Sequence[DecryptItem], *, deadline: float | None = None, headers: Headers | None = None
    ) -> list[bytes | KmsError]:
        return self._run(plans.decrypt_many(items, self._encoding), deadline, headers)

    def get_wrapped(  # noqa: D102 - as KmsProvider
        self, key_id: str, *, deadline: float | None = None, headers: Headers | None = None
    ) -> Wrapped:
        return self._run(plans.get_wrapped(key_id), deadline, headers)

    def health(  # noqa: D102 - as KmsProvider
        self, *, deadline: float | None = None, headers: Headers | None = None
    ) -> Health:
        return self._run(plans.health(), deadline, headers)

    def close(self) -> None:  # noqa: D102 - as KmsProvider
        self._sender.close()

"""The interface that servers program against: asynchronous, and its synchronous twin.

All methods raise ``KmsError`` (see ``client.errors`` and ``domain.errors``), and all may raise
PermissionDenied, the TransportErrors, DeadlineExceeded, the other ServiceErrors once retries are used up,
and ProviderClosed. ``deadline`` is in seconds, over all tries of the call; None is the provider's own.
``headers`` travel with the request: ``traceparent`` (W3C Trace Context), ``X-Request-Id``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from progressdb_kms.client.plans import DecryptItem, EncryptItem
from progressdb_kms.client.types import CreatedDek, Encrypted, Health, Wrapped
from progressdb_kms.domain.errors import KmsError

Headers = Mapping[str, str]


class KmsProvider(ABC):
    """Makes DEKs, and encrypts and decrypts with them. Raw DEKs never come out.

    Use as an async context manager, or call ``close``.
    """

    @abstractmethod
    async def create_dek_for_thread(
        self,
        thread_id: str,
        *,
        idempotency_key: str | None = None,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> CreatedDek:
        """Make a DEK for a thread; durable when this returns. A further call makes a further DEK.

        Args:
            thread_id: 1 to 256 bytes of UTF-8 without control characters.
            idempotency_key: The same key, thread and caller give the same DEK, now and later: pass one that
                you have stored if a crash of your own must not leave a DEK that nobody knows. 1 to 255
                visible ASCII characters. Without one the client's own retries are still safe; towards an
                older service, which does not know these keys, a retry may leave an unused DEK.
            deadline: See the module.
            headers: See the module.

        Raises:
            InvalidThreadId: The service does not take this thread_id.
        """

    @abstractmethod
    async def rotate_dek(
        self,
        thread_id: str,
        *,
        idempotency_key: str | None = None,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> CreatedDek:
        """Make a thread's next DEK; those that were enabled only decrypt from then on.

        Args:
            thread_id: As for ``create_dek_for_thread``.
            idempotency_key: The same key, thread and caller rotate once and find the same DEK again.
            deadline: See the module.
            headers: See the module.

        Raises:
            InvalidThreadId: The service does not take this thread_id.
            RouteNotFound: An older service, which can't rotate a thread's DEK.
        """

    @abstractmethod
    async def encrypt_with_dek(
        self,
        key_id: str,
        plaintext: bytes,
        aad: bytes | None = None,
        *,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> Encrypted:
        """Encrypt a message with AES-256-GCM (SP 800-38D) under a DEK.

        Args:
            key_id: From ``create_dek_for_thread``.
            plaintext: Up to 1 MiB; empty is fine.
            aad: Bound to the ciphertext and needed to decrypt it; None is the same as empty.
            deadline: See the module.
            headers: See the module.

        Raises:
            KeyNotFound: No such key.
            StateConflict: The key is disabled, decrypt_only, destroyed, about to be, or used up.
            PlaintextTooLarge: Over the service's limit.
        """

    @abstractmethod
    async def decrypt_with_dek(
        self,
        key_id: str,
        ciphertext: bytes,
        aad: bytes | None = None,
        *,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> bytes:
        """Return the plaintext of what ``encrypt_with_dek`` made.

        Args:
            key_id: The DEK that it was encrypted under.
            ciphertext: ``nonce(12) | ciphertext | tag(16)``.
            aad: The same as at encryption.
            deadline: See the module.
            headers: See the module.

        Raises:
            AuthenticationFailed: Another key, another AAD, or changed on the way.
            MalformedCiphertext: Too short to be one.
            KeyNotFound: No such key.
            StateConflict: The key is disabled, destroyed, or about to be.
        """

    @abstractmethod
    async def create_deks_for_threads(
        self,
        thread_ids: Sequence[str],
        *,
        idempotency_keys: Sequence[str] | None = None,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> list[CreatedDek | KmsError]:
        """Make many DEKs in few requests; a result or an error for each, in order.

        Batch methods raise only what is wrong with the call itself; a request that fails gives its error to
        each of its items. At most 10,000 items and 12 MiB go into one request. The provider's own deadline
        holds for each request, one given here for all of them.

        Args:
            thread_ids: As for ``create_dek_for_thread``.
            idempotency_keys: One for each thread, in order.
            deadline: See above.
            headers: See the module.
        """

    @abstractmethod
    async def encrypt_many(
        self, items: Sequence[EncryptItem], *, deadline: float | None = None, headers: Headers | None = None
    ) -> list[Encrypted | KmsError]:
        """Encrypt many messages, under any keys; as ``create_deks_for_threads``.

        Args:
            items: ``(key_id, plaintext, aad)`` each.
            deadline: As for ``create_deks_for_threads``.
            headers: See the module.
        """

    @abstractmethod
    async def decrypt_many(
        self, items: Sequence[DecryptItem], *, deadline: float | None = None, headers: Headers | None = None
    ) -> list[bytes | KmsError]:
        """Decrypt many messages, under any keys; as ``create_deks_for_threads``.

        Args:
            items: ``(key_id, ciphertext, aad)`` each.
            deadline: As for ``create_deks_for_threads``.
            headers: See the module.
        """

    @abstractmethod
    async def get_wrapped(
        self, key_id: str, *, deadline: float | None = None, headers: Headers | None = None
    ) -> Wrapped:
        """Return a DEK as it is stored, wrapped under the KEK.

        Raises:
            KeyNotFound: No such key.
        """

    @abstractmethod
    async def health(self, *, deadline: float | None = None, headers: Headers | None = None) -> Health:
        """Return if the service is serving; raise what any call would raise if not."""

    @abstractmethod
    async def close(self) -> None:
        """Close idle connections and take no more calls; those under way finish. May be repeated."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class SyncKmsProvider(ABC):
    """``KmsProvider`` without an event loop: the same methods, arguments, results and errors.

    Safe to use from many threads. Use as a context manager, or call ``close``.
    """

    @abstractmethod
    def create_dek_for_thread(
        self,
        thread_id: str,
        *,
        idempotency_key: str | None = None,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> CreatedDek:
        """As ``KmsProvider.create_dek_for_thread``."""

    @abstractmethod
    def rotate_dek(
        self,
        thread_id: str,
        *,
        idempotency_key: str | None = None,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> CreatedDek:
        """As ``KmsProvider.rotate_dek``."""

    @abstractmethod
    def encrypt_with_dek(
        self,
        key_id: str,
        plaintext: bytes,
        aad: bytes | None = None,
        *,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> Encrypted:
        """As ``KmsProvider.encrypt_with_dek``."""

    @abstractmethod
    def decrypt_with_dek(
        self,
        key_id: str,
        ciphertext: bytes,
        aad: bytes | None = None,
        *,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> bytes:
        """As ``KmsProvider.decrypt_with_dek``."""

    @abstractmethod
    def create_deks_for_threads(
        self,
        thread_ids: Sequence[str],
        *,
        idempotency_keys: Sequence[str] | None = None,
        deadline: float | None = None,
        headers: Headers | None = None,
    ) -> list[CreatedDek | KmsError]:
        """As ``KmsProvider.create_deks_for_threads``."""

    @abstractmethod
    def encrypt_many(
        self, items: Sequence[EncryptItem], *, deadline: float | None = None, headers: Headers | None = None
    ) -> list[Encrypted | KmsError]:
        """As ``KmsProvider.encrypt_many``."""

    @abstractmethod
    def decrypt_many(
        self, items: Sequence[DecryptItem], *, deadline: float | None = None, headers: Headers | None = None
    ) -> list[bytes | KmsError]:
        """As ``KmsProvider.decrypt_many``."""

    @abstractmethod
    def get_wrapped(
        self, key_id: str, *, deadline: float | None = None, headers: Headers | None = None
    ) -> Wrapped:
        """As ``KmsProvider.get_wrapped``."""

    @abstractmethod
    def health(self, *, deadline: float | None = None, headers: Headers | None = None) -> Health:
        """As ``KmsProvider.health``."""

    @abstractmethod
    def close(self) -> None:
        """As ``KmsProvider.close``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

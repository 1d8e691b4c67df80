"""The providers over ``EmbeddedSender``, with the generic methods that only they have."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Coroutine
from typing import Any, TypeVar

from progressdb_kms.client.embedded.sender import EmbeddedSender
from progressdb_kms.client.exchange import Options
from progressdb_kms.client.protocol import Call, binary
from progressdb_kms.client.senders import SenderProvider, SyncSenderProvider
from progressdb_kms.client.types import Encrypted
from progressdb_kms.domain.keys import DEK_BYTES

T = TypeVar("T")


def _raw_dek(dek: bytes) -> bytes:
    if len(binary("dek", dek)) != DEK_BYTES:
        raise ValueError(f"a DEK is {DEK_BYTES} bytes")
    return bytes(dek)


def _unnamed_thread() -> str:
    return f"unnamed-{uuid.uuid4()}"


class EmbeddedProvider(SenderProvider):
    """A ``KmsProvider`` that needs no service, with the generic methods besides.

    Args:
        master_key: The KEK, 32 bytes, for who wants ``unwrap_dek`` to work in a later process; None makes a
            random one. Keys made by ``create_dek`` and ``create_dek_for_thread`` end with the provider.
    """

    def __init__(self, master_key: bytes | None = None) -> None:
        self._embedded = EmbeddedSender(master_key)
        super().__init__(self._embedded, "msgpack")

    async def create_dek(self) -> tuple[str, bytes]:
        """Make a DEK that belongs to no thread, and return its id and the wrapped DEK."""
        dek = await self.create_dek_for_thread(_unnamed_thread())
        return dek.key_id, dek.wrapped

    async def encrypt(self, dek_id: str, plaintext: bytes, aad: bytes | None = None) -> Encrypted:
        """Do what ``encrypt_with_dek`` does, for an id of ``create_dek``."""
        return await self.encrypt_with_dek(dek_id, plaintext, aad)

    async def decrypt(self, dek_id: str, ciphertext: bytes, aad: bytes | None = None) -> bytes:
        """Do what ``decrypt_with_dek`` does, for an id of ``create_dek``."""
        return await self.decrypt_with_dek(dek_id, ciphertext, aad)

    async def wrap_dek(self, dek: bytes) -> bytes:
        """Wrap a raw DEK that the caller holds (32 bytes) under the KEK; the provider does not keep it.

        Raises:
            ValueError: It is not 32 bytes.
        """
        return await self._embedded.wrap(_raw_dek(dek))

    async def unwrap_dek(self, wrapped: bytes) -> bytes:
        """Return the raw DEK that ``wrap_dek`` wrapped. What ``create_dek`` made stays inside.

        Raises:
            WrappedKeyInvalid: Made under another KEK, or by another method, or changed since.
            KekUnavailable: Made under a KEK version that this provider does not have.
        """
        return await self._embedded.unwrap(binary("wrapped", wrapped))


class _LoopThread:
    """An event loop of its own, so that the caller's thread needs none and may have one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and return its result."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="embedded-kms", daemon=True
                )
                self._thread.start()
            loop = self._loop
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    def stop(self) -> None:
        """End the thread."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


class _SyncSender:
    def __init__(self, sender: EmbeddedSender) -> None:
        self._sender = sender
        self.thread = _LoopThread()

    def send(self, call: Call[T], options: Options) -> T:
        """Answer a call."""
        return self.thread.run(self._sender.send(call, options))

    def close(self) -> None:
        """Forget all keys, and end the thread."""
        self.thread.run(self._sender.close())
        self.thread.stop()


class SyncEmbeddedProvider(SyncSenderProvider):
    """``EmbeddedProvider`` without an event loop of the caller's; it has a thread for one.

    Args:
        master_key: As for ``EmbeddedProvider``.
    """

    def __init__(self, master_key: bytes | None = None) -> None:
        self._embedded = EmbeddedSender(master_key)
        self._sync = _SyncSender(self._embedded)
        super().__init__(self._sync, "msgpack")

    def create_dek(self) -> tuple[str, bytes]:
        """As ``EmbeddedProvider.create_dek``."""
        dek = self.create_dek_for_thread(_unnamed_thread())
        return dek.key_id, dek.wrapped

    def encrypt(self, dek_id: str, plaintext: bytes, aad: bytes | None = None) -> Encrypted:
        """As ``EmbeddedProvider.encrypt``."""
        return self.encrypt_with_dek(dek_id, plaintext, aad)

    def decrypt(self, dek_id: str, ciphertext: bytes, aad: bytes | None = None) -> bytes:
        """As ``EmbeddedProvider.decrypt``."""
        return self.decrypt_with_dek(dek_id, ciphertext, aad)

    def wrap_dek(self, dek: bytes) -> bytes:
        """As ``EmbeddedProvider.wrap_dek``."""
        return self._sync.thread.run(self._embedded.wrap(_raw_dek(dek)))

    def unwrap_dek(self, wrapped: bytes) -> bytes:
        """As ``EmbeddedProvider.unwrap_dek``."""
        return self._sync.thread.run(self._embedded.unwrap(binary("wrapped", wrapped)))

"""Answers calls by the use cases themselves, over a store in memory."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar
from urllib.parse import unquote

import msgspec

from progressdb_kms.client.errors import ProviderClosed
from progressdb_kms.client.exchange import Options
from progressdb_kms.client.protocol import THREADS, Call, binary
from progressdb_kms.domain.envelope import NONCE_BYTES, parse_blob, wrap_aad
from progressdb_kms.domain.errors import KmsError
from progressdb_kms.domain.identity import Identity, IdentityKind
from progressdb_kms.domain.keyring import KEK_BYTES, KekInfo, Keyring
from progressdb_kms.domain.policy import parse_policy
from progressdb_kms.ports import AuditEvent
from progressdb_kms.store.memory import MemoryStore
from progressdb_kms.usecases import lifecycle
from progressdb_kms.usecases.batches import BatchReader
from progressdb_kms.usecases.context import Kms, boottime
from progressdb_kms.usecases.creation import Wanted, create_deks
from progressdb_kms.usecases.dekrotation import rotate_dek
from progressdb_kms.usecases.encryption import Hot, failed
from progressdb_kms.usecases.keks import KekBook
from progressdb_kms.usecases.keycache import DekCache
from progressdb_kms.usecases.loading import Loader
from progressdb_kms.usecases.messages import (
    MSGPACK,
    CreatedDek,
    CreateItem,
    CreateRequest,
    Reader,
    Results,
    WrappedDek,
    encode,
)
from progressdb_kms.usecases.session import PolicyBook, Session

T = TypeVar("T")

_PERMISSIONS: Final = ["key:create", "key:encrypt", "key:decrypt", "key:read", "key:admin"]
_UNNAMED: Final = ("", "")
"""Names that a wrap of a caller's own DEK binds. No stored record has an empty key_id, so neither kind of
blob can pass for the other."""
_CREATE: Final = Reader(CreateRequest)
_CREATE_BATCH: Final = BatchReader(CreateItem)

_log: Final = logging.getLogger("progressdb_kms.client")


class MemoryKek:
    """A ``ports.KekSource`` with one version, which this process holds.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._keyring = Keyring({1: key})

    def versions(self) -> frozenset[int]:
        """Return the one version."""
        return self._keyring.versions

    def kind(self, version: int) -> str:  # noqa: ARG002 - the port's signature
        """Return ``memory``."""
        return "memory"

    def source_key(self, version: int) -> str:
        """Return the version's name: its number."""
        return str(version)

    async def check_value(self, version: int) -> str:
        """Return ``domain.keyring.check_value`` of the version."""
        return self._keyring.check_value(version)

    async def matches(self, version: int, check_value: str) -> bool:
        """Say whether the key has this check value."""
        return hmac.compare_digest(self._keyring.check_value(version), check_value)

    async def wrap(self, version: int, deks: Sequence[bytes], aads: Sequence[bytes]) -> list[bytes]:
        """Wrap raw DEKs, each under a fresh random nonce, and return the bodies."""
        return self._keyring.wrap_all(version, deks, aads, os.urandom(NONCE_BYTES * len(deks)))

    async def unwrap(
        self, version: int, bodies: Sequence[bytes], aads: Sequence[bytes]
    ) -> list[bytes | KmsError]:
        """Return the raw DEKs; WrappedKeyInvalid in the place of one that does not unwrap."""
        return self._keyring.unwrap_all(version, bodies, aads)

    async def seal(self, kek: KekInfo, label: bytes, digest: bytes) -> bytes:
        """Return ``Keyring.seal`` of a version.

        Raises:
            KekUnavailable: Not loaded.
        """
        return self._keyring.seal(kek.version, label, digest)


class _Silent:
    """Audit log and observer of a provider that has neither."""

    durable = False

    async def record(self, events: Sequence[AuditEvent]) -> None:
        """Write nothing."""

    def dek_uses(self, operation: str, count: int) -> None:
        """Count nothing."""

    def cache(self, outcome: str, count: int = 1) -> None:
        """Count nothing."""

    def uses_warning(self, kind: str) -> None:
        """Count nothing."""

    def wrapped_key_invalid(self) -> None:
        """Count nothing."""


class EmbeddedSender:
    """Answers calls in the process.

    Belongs to the event loop that first uses it. It runs nothing in the background: without reads of change
    notices the key cache vouches for nothing, so that each call asks the store, which is no further away.

    Args:
        master_key: The KEK, 32 bytes; None makes a random one.
    """

    def __init__(self, master_key: bytes | None = None) -> None:
        key = os.urandom(KEK_BYTES) if master_key is None else binary("master_key", master_key)
        store, silent = MemoryStore(), _Silent()
        identity = Identity(IdentityKind.UID, str(os.getuid()))
        policy = parse_policy({"rules": [{"identities": [str(identity)], "permissions": _PERMISSIONS}]})
        self._store = store
        self._keks = KekBook(source=MemoryKek(key), registry=store, observer=silent)
        self._kms = Kms(
            store=store,
            keks=self._keks,
            cache=DekCache(max_keys=1, ttl=1, max_stale=0, clock=boottime),
            audit=silent,
            observer=silent,
            backups=store.backups,
            ledger=store.rotation_ledger,
            policies=PolicyBook(policy, "embedded"),
        )
        self._session = Session(identity, self._kms.policies, time.time)
        self._loader = Loader(self._kms)
        hot = Hot(self._kms)
        self._hot = {
            "/encrypt": hot.encrypt,
            "/decrypt": hot.decrypt,
            "/encrypt_batch": hot.encrypt_batch,
            "/decrypt_batch": hot.decrypt_batch,
        }
        self._routes: Mapping[str, Callable[[Call[Any], bytes], Awaitable[bytes]]] = {
            **dict.fromkeys(self._hot, self._run_hot),
            "/create_dek_for_thread": self._create,
            "/create_dek_batch": self._create_batch,
            "/get_wrapped": self._get_wrapped,
            "/healthz": self._health,
        }
        self._starting = asyncio.Lock()
        self._started = False
        self._closed = False
        _log.warning("embedded KMS: keys are held in this process's memory only; for development and tests")

    async def send(self, call: Call[T], options: Options) -> T:  # noqa: ARG002 - nothing here takes long
        """Answer a call.

        Raises:
            KmsError: As a service would answer.
            ProviderClosed: After ``close``.
        """
        await self.start()
        route = self._rotate if call.path.startswith(THREADS) else self._routes[call.path]
        answer = await route(call, msgspec.msgpack.encode(call.body))
        if call.answer is bytes:
            return answer  # type: ignore[return-value] # T is bytes here, which a checker can't see
        return msgspec.msgpack.decode(answer, type=call.answer)

    async def start(self) -> None:
        """Make the KEK registry, once.

        Raises:
            ProviderClosed: After ``close``.
        """
        if self._closed:
            raise ProviderClosed
        async with self._starting:
            if not self._started:
                await self._keks.start(time.time())
                self._started = True

    async def close(self) -> None:
        """Forget all keys."""
        self._closed = True
        await self._kms.creation.settle()
        await self._store.close()

    async def wrap(self, dek: bytes) -> bytes:
        """Wrap a caller's own DEK."""
        await self.start()
        _, _, (blob,) = await self._keks.wrap([dek], [_UNNAMED])
        return blob

    async def unwrap(self, wrapped: bytes) -> bytes:
        """Unwrap what ``wrap`` made."""
        await self.start()
        blob = parse_blob(wrapped)
        (dek,) = await self._keks.unwrap(blob.kek_version, [blob.body], [wrap_aad(*_UNNAMED)])
        if isinstance(dek, KmsError):
            raise dek
        return dek

    async def _run_hot(self, call: Call[Any], body: bytes) -> bytes:
        hot = self._hot[call.path]
        answer = await self._loader.answer(hot, self._session, MSGPACK, MSGPACK, body)
        # A service counts uses in the background; here there is none.
        await self._store.reserve_uses(self._kms.cache.take_owed())
        return answer

    async def _create(self, call: Call[Any], body: bytes) -> bytes:
        request = _CREATE.read(MSGPACK, body)
        wanted = Wanted(request.thread_id, call.idempotency_key)
        (result,) = await create_deks(self._kms, self._session, [wanted], "")
        if isinstance(result, KmsError):
            raise result
        return encode(MSGPACK, CreatedDek.of(result))

    async def _rotate(self, call: Call[Any], _: bytes) -> bytes:
        thread_id = unquote(call.path.removeprefix(THREADS).rpartition("/")[0])
        record = await rotate_dek(self._kms, self._session, thread_id, call.idempotency_key, "")
        return encode(MSGPACK, CreatedDek.of(record))

    async def _create_batch(self, _: Call[Any], body: bytes) -> bytes:
        wanted = [
            item if isinstance(item, KmsError) else Wanted(item.thread_id, item.once)
            for item in _CREATE_BATCH.read(MSGPACK, body, self._kms.bounds.batch_items)
        ]
        results = await create_deks(self._kms, self._session, wanted, "")
        return encode(
            MSGPACK,
            Results(
                [failed(each) if isinstance(each, KmsError) else CreatedDek.of(each) for each in results]
            ),
        )

    async def _get_wrapped(self, call: Call[Any], _: bytes) -> bytes:
        record = await lifecycle.get_wrapped(self._kms, self._session, call.query["key_id"])
        return encode(MSGPACK, WrappedDek(record.wrapped, record.kek_id, str(record.kek_version)))

    async def _health(self, _: Call[Any], __: bytes) -> bytes:
        return b'{"status": "ok"}'

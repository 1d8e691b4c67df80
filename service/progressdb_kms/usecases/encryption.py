"""The hot functions: encrypt and decrypt, one or many, out of what is in memory.

Each is ``(session, content_type, accept, body, loaded) -> bytes | Miss``: pure over the key cache, no await,
no I/O. Where a key is not in memory it returns a ``Miss`` that says what to fetch; whoever called fetches it
(``usecases.loading``) and calls again with what was fetched. Routes and any other door share these.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple

from progressdb_kms.domain.envelope import NONCE_BYTES, open_sealed, seal
from progressdb_kms.domain.errors import KeyExhausted, KmsError, PermissionDenied, PlaintextTooLarge
from progressdb_kms.domain.keys import MAY_DECRYPT, MAY_ENCRYPT, refusal
from progressdb_kms.domain.policy import Permission
from progressdb_kms.usecases.batches import BatchReader
from progressdb_kms.usecases.keycache import CachedDek
from progressdb_kms.usecases.messages import (
    Decrypted,
    DecryptItem,
    Encrypted,
    EncryptItem,
    Failed,
    ItemError,
    Reader,
    Results,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from progressdb_kms.domain.policy import Grants
    from progressdb_kms.usecases.context import Kms
    from progressdb_kms.usecases.session import Session

ENCRYPT: Final = Reader(EncryptItem)
DECRYPT: Final = Reader(DecryptItem)
ENCRYPT_BATCH: Final = BatchReader(EncryptItem)
DECRYPT_BATCH: Final = BatchReader(DecryptItem)


class Miss(NamedTuple):
    """What a hot function lacks.

    Attributes:
        load: Keys that are not in memory.
        reserve: Keys whose uses must be reserved first, and how many uses this request makes.
    """

    load: frozenset[str]
    reserve: Mapping[str, int]


Loaded = dict[str, CachedDek | KmsError]
"""What was fetched for one request: a key, or why it can't be had."""


def failed(error: KmsError) -> Failed:
    """Return an item's place in a batch's results for its error."""
    return Failed(ItemError(error.code, error.detail, error.retryable))


class Hot:
    """The hot functions over one ``Kms``."""

    __slots__ = ("_calls", "_count", "_kms", "_limit", "_lookup", "_random")

    def __init__(self, kms: Kms) -> None:
        self._kms = kms
        self._limit = kms.bounds.plaintext_bytes
        self._calls = kms.calls
        self._lookup = kms.cache.lookup
        self._random = kms.random
        self._count = kms.observer.dek_uses

    def encrypt(
        self, session: Session, content_type: str, accept: str, body: bytes, loaded: Loaded
    ) -> bytes | Miss:
        """Encrypt one message.

        Raises:
            RequestError: The body, the key's state, or the caller's grants do not allow it.
            ServiceError: The key can't be had now.
        """
        grants = session.grants()
        if not grants.allows_some(Permission.ENCRYPT):
            grants.require(Permission.ENCRYPT)
        item = ENCRYPT.read(content_type, body)
        key = loaded.get(item.key_id) or self._lookup(item.key_id)
        if key is None:
            return Miss(frozenset({item.key_id}), {})
        key = self._may_encrypt(grants, key, item)
        if key.uses_left < 1:
            return Miss(frozenset(), {item.key_id: 1})
        key.spend(1)
        sealed = seal(key.cipher, self._random(NONCE_BYTES), item.plaintext, item.aad or None)
        self._count("encrypt", 1)
        if self._calls.wanted:
            self._calls.note("encrypt", session.name, [(key.key_id, key.thread_id)])
        return encode(accept, Encrypted(sealed, key.version))

    def decrypt(
        self, session: Session, content_type: str, accept: str, body: bytes, loaded: Loaded
    ) -> bytes | Miss:
        """Decrypt one message.

        Raises:
            RequestError: The body, the key's state, or the caller's grants do not allow it, or the ciphertext
                is malformed or does not authenticate.
            ServiceError: The key can't be had now.
        """
        grants = session.grants()
        if not grants.allows_some(Permission.DECRYPT):
            grants.require(Permission.DECRYPT)
        item = DECRYPT.read(content_type, body)
        key = loaded.get(item.key_id) or self._lookup(item.key_id)
        if key is None:
            return Miss(frozenset({item.key_id}), {})
        key = self._may_decrypt(grants, key)
        plaintext = open_sealed(key.cipher, item.ciphertext, item.aad or None)
        self._count("decrypt", 1)
        if self._calls.wanted:
            self._calls.note("decrypt", session.name, [(key.key_id, key.thread_id)])
        return encode(accept, Decrypted(plaintext))

    def encrypt_batch(
        self, session: Session, content_type: str, accept: str, body: bytes, loaded: Loaded
    ) -> bytes | Miss:
        """Encrypt many messages; an item's error stands in its place.

        Raises:
            RequestError: The batch as a whole is not of the right form, or nothing of it may be granted.
        """
        grants = session.grants()
        if not grants.allows_some(Permission.ENCRYPT):
            grants.require(Permission.ENCRYPT)
        items = ENCRYPT_BATCH.read(content_type, body, self._kms.bounds.batch_items)
        results = self.encrypt_items(session, items, loaded)
        if isinstance(results, Miss):
            return results
        session.charge(len(items) - 1)
        return encode(accept, Results(results))

    def encrypt_items(
        self, session: Session, items: Sequence[EncryptItem | KmsError], loaded: Loaded
    ) -> list[Encrypted | Failed] | Miss:
        """Encrypt the items of a batch, or of a part of one.

        Raises:
            CertificateExpired: The caller's.
        """
        grants = session.grants()
        keys = self._keys(items, loaded)
        if isinstance(keys, Miss):
            return keys
        wanted = Counter(item.key_id for item in items if isinstance(item, EncryptItem))
        short = {
            key_id: count
            for key_id, count in wanted.items()
            if isinstance(key := keys[key_id], CachedDek)
            and key.uses_left < count
            and not key.exhausted
            # Uses are reserved for those who may spend them: nobody else can wear a key out.
            and key.state in MAY_ENCRYPT
            and grants.allows(Permission.ENCRYPT, key.thread_id)
        }
        if short:
            return Miss(frozenset(), short)
        nonces = self._kms.random(NONCE_BYTES * len(items))
        results: list[Encrypted | Failed] = []
        done: list[tuple[str, str]] = []
        for number, item in enumerate(items):
            if isinstance(item, KmsError):
                results.append(failed(item))
                continue
            try:
                key = self._may_encrypt(grants, keys[item.key_id], item)
                key.spend(1)
                nonce = nonces[NONCE_BYTES * number : NONCE_BYTES * (number + 1)]
                results.append(
                    Encrypted(seal(key.cipher, nonce, item.plaintext, item.aad or None), key.version)
                )
                done.append((key.key_id, key.thread_id))
            except KmsError as error:
                results.append(self._failed(error, "/encrypt_batch"))
        self._kms.observer.dek_uses("encrypt", len(done))
        if self._calls.wanted:
            self._calls.note("encrypt", session.name, done)
        return results

    def decrypt_batch(
        self, session: Session, content_type: str, accept: str, body: bytes, loaded: Loaded
    ) -> bytes | Miss:
        """Decrypt many messages; an item's error stands in its place.

        Raises:
            RequestError: The batch as a whole is not of the right form, or nothing of it may be granted.
        """
        grants = session.grants()
        if not grants.allows_some(Permission.DECRYPT):
            grants.require(Permission.DECRYPT)
        items = DECRYPT_BATCH.read(content_type, body, self._kms.bounds.batch_items)
        results = self.decrypt_items(session, items, loaded)
        if isinstance(results, Miss):
            return results
        session.charge(len(items) - 1)
        return encode(accept, Results(results))

    def decrypt_items(
        self, session: Session, items: Sequence[DecryptItem | KmsError], loaded: Loaded
    ) -> list[Decrypted | Failed] | Miss:
        """Decrypt the items of a batch, or of a part of one.

        Raises:
            CertificateExpired: The caller's.
        """
        grants = session.grants()
        keys = self._keys(items, loaded)
        if isinstance(keys, Miss):
            return keys
        results: list[Decrypted | Failed] = []
        done: list[tuple[str, str]] = []
        for item in items:
            if isinstance(item, KmsError):
                results.append(failed(item))
                continue
            try:
                key = self._may_decrypt(grants, keys[item.key_id])
                results.append(Decrypted(open_sealed(key.cipher, item.ciphertext, item.aad or None)))
                done.append((key.key_id, key.thread_id))
            except KmsError as error:
                results.append(self._failed(error, "/decrypt_batch"))
        self._kms.observer.dek_uses("decrypt", len(done))
        if self._calls.wanted:
            self._calls.note("decrypt", session.name, done)
        return results

    def _failed(self, error: KmsError, route: str) -> Failed:
        if isinstance(error, PermissionDenied):
            self._kms.refusals.note(error, route)
        return failed(error)

    def _keys(self, items: Iterable[EncryptItem | DecryptItem | KmsError], loaded: Loaded) -> Loaded | Miss:
        keys: Loaded = {}
        missing = set()
        for key_id in {item.key_id for item in items if not isinstance(item, KmsError)}:
            key = loaded.get(key_id) or self._kms.cache.lookup(key_id)
            if key is None:
                missing.add(key_id)
            else:
                keys[key_id] = key
        return Miss(frozenset(missing), {}) if missing else keys

    def _may_encrypt(self, grants: Grants, key: CachedDek | KmsError, item: EncryptItem) -> CachedDek:
        if isinstance(key, KmsError):
            raise key
        grants.require(Permission.ENCRYPT, key.thread_id)
        if key.state not in MAY_ENCRYPT:
            raise refusal(key.state)
        if key.exhausted:
            raise KeyExhausted
        if len(item.plaintext) > self._limit:
            raise PlaintextTooLarge(
                f"a plaintext has at most {self._limit} bytes, this one has {len(item.plaintext)}"
            )
        return key

    @staticmethod
    def _may_decrypt(grants: Grants, key: CachedDek | KmsError) -> CachedDek:
        if isinstance(key, KmsError):
            raise key
        grants.require(Permission.DECRYPT, key.thread_id)
        if key.state not in MAY_DECRYPT:
            raise refusal(key.state)
        return key

"""The hot functions: encrypt and decrypt, one or many, out of what is in memory.

Each is ``(session, content_type, accept, body, loaded) -> bytes | Miss``: pure over the key cache, no await,
no I/O. Where a key is not in memory it returns a ``Miss`` that says what to fetch; whoever called fetches it
(``usecases.loading``) and calls again with what was fetched. Routes and any other door share these.
"""

from __future__ import annotations

from collections import Counter
from operator import attrgetter
from struct import Struct as Layout
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from cryptography.exceptions import InvalidTag

from progressdb_kms.domain.envelope import (
    MESSAGE_OVERHEAD,
    NONCE,
    NONCE_BYTES,
    SEALED,
    open_sealed,
    seal,
    too_short,
)
from progressdb_kms.domain.errors import (
    AuthenticationFailed,
    KeyExhausted,
    KmsError,
    PermissionDenied,
    PlaintextTooLarge,
)
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
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from msgspec import Struct

    from progressdb_kms.domain.policy import Grants
    from progressdb_kms.usecases.context import Kms
    from progressdb_kms.usecases.session import Session

ENCRYPT: Final = Reader(EncryptItem)
DECRYPT: Final = Reader(DecryptItem)
ENCRYPT_BATCH: Final = BatchReader(EncryptItem)
DECRYPT_BATCH: Final = BatchReader(DecryptItem)

# Looked up once, as in transport.connection.
_TO_ENCRYPT: Final = Permission.ENCRYPT
_TO_DECRYPT: Final = Permission.DECRYPT

_KEY_ID: Final = attrgetter("key_id")
_NONCES: Final = Layout(f"{NONCE_BYTES}s")

Item = TypeVar("Item", EncryptItem, DecryptItem)
Result = TypeVar("Result", Encrypted, Decrypted)


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
        if not grants.allows_some(_TO_ENCRYPT):
            grants.require(_TO_ENCRYPT)
        item = ENCRYPT.read(content_type, body)
        key = loaded.get(item.key_id) or self._lookup(item.key_id)
        if key is None:
            return Miss(frozenset({item.key_id}), {})
        key = _may_encrypt(grants, key)
        if len(item.plaintext) > self._limit:
            raise self._too_large(item)
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
        if not grants.allows_some(_TO_DECRYPT):
            grants.require(_TO_DECRYPT)
        item = DECRYPT.read(content_type, body)
        key = loaded.get(item.key_id) or self._lookup(item.key_id)
        if key is None:
            return Miss(frozenset({item.key_id}), {})
        key = _may_decrypt(grants, key)
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
        if not grants.allows_some(_TO_ENCRYPT):
            grants.require(_TO_ENCRYPT)
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
        readable = items if ENCRYPT_BATCH.has_read(items) else _readable(items)
        wanted = Counter(map(_KEY_ID, readable))
        keys = self._keys(wanted, loaded)
        if isinstance(keys, Miss):
            return keys
        allowed, refused = _judged(keys, grants, _may_encrypt)
        short = {
            # Uses are reserved for those who may spend them: nobody else can wear a key out.
            key_id: wanted[key_id]
            for key_id, key in allowed.items()
            if key.uses_left < wanted[key_id]
        }
        if short:
            return Miss(frozenset(), short)
        for key_id, key in allowed.items():
            # All before the first, so that what goes wrong in between can't leave uses uncounted.
            key.spend(wanted[key_id])
        # What is the same for all items is looked up once: the rest is what an item costs.
        uses = {key_id: (key.cipher.encrypt, key.version) for key_id, key in allowed.items()}
        limit = self._limit
        nonces = _NONCES.iter_unpack(self._kms.random(NONCE_BYTES * len(readable)))
        results: list[Encrypted | Failed] = []
        for item, (nonce,) in zip(readable, nonces, strict=True):
            if (use := uses.get(item.key_id)) is None:
                results.append(self._failed(refused[item.key_id], "/encrypt_batch"))
            elif len(plaintext := item.plaintext) > limit:
                allowed[item.key_id].spend(-1)
                results.append(failed(self._too_large(item)))
            else:
                results.append(Encrypted(nonce + use[0](nonce, plaintext, item.aad or None), use[1]))
        results = _in_place(items, results)
        self._note("encrypt", session, allowed, items, results)
        return results

    def decrypt_batch(
        self, session: Session, content_type: str, accept: str, body: bytes, loaded: Loaded
    ) -> bytes | Miss:
        """Decrypt many messages; an item's error stands in its place.

        Raises:
            RequestError: The batch as a whole is not of the right form, or nothing of it may be granted.
        """
        grants = session.grants()
        if not grants.allows_some(_TO_DECRYPT):
            grants.require(_TO_DECRYPT)
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
        readable = items if DECRYPT_BATCH.has_read(items) else _readable(items)
        keys = self._keys(set(map(_KEY_ID, readable)), loaded)
        if isinstance(keys, Miss):
            return keys
        allowed, refused = _judged(keys, grants, _may_decrypt)
        opens = {key_id: key.cipher.decrypt for key_id, key in allowed.items()}
        results: list[Decrypted | Failed] = []
        for item in readable:
            if (decrypt := opens.get(item.key_id)) is None:
                results.append(self._failed(refused[item.key_id], "/decrypt_batch"))
                continue
            sealed = item.ciphertext
            if len(sealed) < MESSAGE_OVERHEAD:
                results.append(failed(too_short()))
                continue
            try:
                results.append(Decrypted(decrypt(sealed[NONCE], sealed[SEALED], item.aad or None)))
            except InvalidTag:
                results.append(failed(AuthenticationFailed()))
        results = _in_place(items, results)
        self._note("decrypt", session, allowed, items, results)
        return results

    def _note(
        self,
        operation: str,
        session: Session,
        keys: Mapping[str, CachedDek],
        items: Sequence[EncryptItem | DecryptItem | KmsError],
        results: Sequence[Struct],
    ) -> None:
        """Count what was done, and note it where calls are audited."""
        self._kms.observer.dek_uses(operation, len(results) - list(map(type, results)).count(Failed))
        if self._calls.wanted:
            done = [
                (item.key_id, keys[item.key_id].thread_id)
                for item, result in zip(items, results, strict=True)
                if not isinstance(item, KmsError) and type(result) is not Failed
            ]
            self._calls.note(operation, session.name, done)

    def _failed(self, error: KmsError, route: str) -> Failed:
        if isinstance(error, PermissionDenied):
            self._kms.refusals.note(error, route)
        return failed(error)

    def _keys(self, key_ids: Iterable[str], loaded: Loaded) -> Loaded | Miss:
        keys: Loaded = {}
        missing = set()
        for key_id in key_ids:
            key = loaded.get(key_id) or self._kms.cache.lookup(key_id)
            if key is None:
                missing.add(key_id)
            else:
                keys[key_id] = key
        return Miss(frozenset(missing), {}) if missing else keys

    def _too_large(self, item: EncryptItem) -> PlaintextTooLarge:
        return PlaintextTooLarge(
            f"a plaintext has at most {self._limit} bytes, this one has {len(item.plaintext)}"
        )


def _may_encrypt(grants: Grants, key: CachedDek | KmsError) -> CachedDek:
    if isinstance(key, KmsError):
        raise key
    grants.require(_TO_ENCRYPT, key.thread_id)
    if key.state not in MAY_ENCRYPT:
        raise refusal(key.state)
    if key.exhausted:
        raise KeyExhausted
    return key


def _may_decrypt(grants: Grants, key: CachedDek | KmsError) -> CachedDek:
    if isinstance(key, KmsError):
        raise key
    grants.require(_TO_DECRYPT, key.thread_id)
    if key.state not in MAY_DECRYPT:
        raise refusal(key.state)
    return key


def _readable(items: Iterable[Item | KmsError]) -> list[Item]:
    return [item for item in items if not isinstance(item, KmsError)]


def _in_place(items: Sequence[Item | KmsError], results: list[Result | Failed]) -> list[Result | Failed]:
    """Put the errors of items that could not be read where these stand among the results of the others."""
    if len(results) == len(items):
        return results
    others = iter(results)
    return [failed(item) if isinstance(item, KmsError) else next(others) for item in items]


def _judged(
    keys: Loaded, grants: Grants, may: Callable[[Grants, CachedDek | KmsError], CachedDek]
) -> tuple[dict[str, CachedDek], dict[str, KmsError]]:
    """Tell the keys that may be used from those that may not, with why; once each, as no item changes it."""
    allowed: dict[str, CachedDek] = {}
    refused: dict[str, KmsError] = {}
    for key_id, key in keys.items():
        try:
            allowed[key_id] = may(grants, key)
        except KmsError as error:
            # With its traceback it would hold this frame, which holds it.
            refused[key_id] = error.with_traceback(None)
    return allowed, refused

"""What each provider method asks and makes of the answers: generators of calls, for async and sync alike.

A plan yields a ``Call`` and is sent its answer, or thrown the ``KmsError`` that it ended in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import msgspec

from progressdb_kms.client.errors import ProtocolViolation, TransportError
from progressdb_kms.client.protocol import (
    Call,
    Encoding,
    ItemError,
    binary,
    item_error,
    new_idempotency_key,
    split,
    thread_path,
)
from progressdb_kms.client.types import CreatedDek, Encrypted, Health, Wrapped
from progressdb_kms.domain.errors import (
    BatchTooLarge,
    BodyTooLarge,
    DeadlineExceeded,
    KmsError,
    RouteNotFound,
)

T = TypeVar("T")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
Plan = Generator[Call[Any], Any, T]

EncryptItem = tuple[str, bytes, bytes | None]
DecryptItem = tuple[str, bytes, bytes | None]

MAX_BATCH_ITEMS: Final = 10_000
MAX_BATCH_BYTES: Final = 12 * 2**20
"""A batch's body may have 16 MiB; the rest is room for what ``body_size`` does not foresee."""


@dataclass(frozen=True, slots=True)
class Plaintext:
    """The answer to a decrypt."""

    plaintext: bytes

    def __repr__(self) -> str:
        return "Plaintext(<hidden>)"


class _CreateItem(msgspec.Struct):
    error: ItemError | None = None
    key_id: str | None = None
    wrapped: bytes | None = None
    kek_id: str = ""
    kek_version: str = ""
    key_version: str = ""

    def __repr__(self) -> str:
        return f"_CreateItem(key_id={self.key_id!r})"

    def take(self) -> CreatedDek | None:
        if self.key_id is None or self.wrapped is None:
            return None
        return CreatedDek(self.key_id, self.wrapped, self.kek_id, self.kek_version, self.key_version)


class _EncryptItem(msgspec.Struct):
    error: ItemError | None = None
    ciphertext: bytes | None = None
    key_version: str = ""

    def __repr__(self) -> str:
        return f"_EncryptItem(key_version={self.key_version!r})"

    def take(self) -> Encrypted | None:
        return None if self.ciphertext is None else Encrypted(self.ciphertext, self.key_version)


class _DecryptItem(msgspec.Struct):
    error: ItemError | None = None
    plaintext: bytes | None = None

    def __repr__(self) -> str:
        return "_DecryptItem(plaintext=<hidden>)"

    def take(self) -> bytes | None:
        return self.plaintext


class CreateResults(msgspec.Struct):
    """The answer to a batch of creates."""

    results: list[_CreateItem]


class EncryptResults(msgspec.Struct):
    """The answer to a batch of encryptions."""

    results: list[_EncryptItem]


class DecryptResults(msgspec.Struct):
    """The answer to a batch of decryptions."""

    results: list[_DecryptItem]


class _Item(Protocol[R_co]):
    error: ItemError | None

    def take(self) -> R_co | None: ...


def _ask(call: Call[T]) -> Plan[T]:
    answer: T = yield call
    return answer


def create(thread_id: str, idempotency_key: str | None) -> Plan[CreatedDek]:
    """Ask for one new DEK. Without a key of the caller's one is made, so that a retry makes no second DEK."""
    key = idempotency_key if idempotency_key is not None else new_idempotency_key()
    body = {"thread_id": thread_id}
    call = Call("POST", "/create_dek_for_thread", CreatedDek, body, idempotency_key=key)
    return (yield from _ask(call))


def rotate_dek(thread_id: str, idempotency_key: str | None) -> Plan[CreatedDek]:
    """Ask for a thread's next DEK; without a key of the caller's as ``create``."""
    key = idempotency_key if idempotency_key is not None else new_idempotency_key()
    call = Call("POST", thread_path(thread_id, "rotate-dek"), CreatedDek, idempotency_key=key)
    return (yield from _ask(call))


def encrypt(key_id: str, plaintext: bytes, aad: bytes | None) -> Plan[Encrypted]:
    """Ask for one encryption."""
    body = _encrypt_body((key_id, plaintext, aad))
    return (yield from _ask(Call("POST", "/encrypt", Encrypted, body)))


def decrypt(key_id: str, ciphertext: bytes, aad: bytes | None) -> Plan[bytes]:
    """Ask for one decryption."""
    body = _decrypt_body((key_id, ciphertext, aad))
    answer = yield from _ask(Call("POST", "/decrypt", Plaintext, body))
    return answer.plaintext


def get_wrapped(key_id: str) -> Plan[Wrapped]:
    """Ask for a DEK as it is stored."""
    return (yield from _ask(Call("GET", "/get_wrapped", Wrapped, query={"key_id": key_id})))


def health() -> Plan[Health]:
    """Ask whether the service serves. What it says beyond status 200 may be anything, or nothing."""
    body = yield from _ask(Call("GET", "/healthz", bytes))
    try:
        return msgspec.json.decode(body, type=Health)
    except msgspec.MsgspecError:
        return Health()


def create_many(
    thread_ids: Sequence[str], idempotency_keys: Sequence[str] | None, encoding: Encoding
) -> Plan[list[CreatedDek | KmsError]]:
    """Ask for many new DEKs."""
    if isinstance(thread_ids, str):
        raise TypeError("thread_ids must be a sequence of thread ids, not one of them")
    if idempotency_keys is None:
        idempotency_keys = [new_idempotency_key() for _ in thread_ids]
    elif len(idempotency_keys) != len(thread_ids):
        raise ValueError("there must be as many idempotency_keys as thread_ids")
    items = [
        {"thread_id": thread_id, "idempotency_key": key}
        for thread_id, key in zip(thread_ids, idempotency_keys, strict=True)
    ]

    def single(item: Mapping[str, Any]) -> Plan[CreatedDek]:
        return create(item["thread_id"], item["idempotency_key"])

    return (yield from _batch("/create_dek_batch", CreateResults, items, single, encoding))


def encrypt_many(items: Sequence[EncryptItem], encoding: Encoding) -> Plan[list[Encrypted | KmsError]]:
    """Ask for many encryptions."""

    def single(item: Mapping[str, Any]) -> Plan[Encrypted]:
        return encrypt(item["key_id"], item["plaintext"], item.get("aad"))

    bodies = [_encrypt_body(item) for item in items]
    return (yield from _batch("/encrypt_batch", EncryptResults, bodies, single, encoding))


def decrypt_many(items: Sequence[DecryptItem], encoding: Encoding) -> Plan[list[bytes | KmsError]]:
    """Ask for many decryptions."""

    def single(item: Mapping[str, Any]) -> Plan[bytes]:
        return decrypt(item["key_id"], item["ciphertext"], item.get("aad"))

    bodies = [_decrypt_body(item) for item in items]
    return (yield from _batch("/decrypt_batch", DecryptResults, bodies, single, encoding))


def _encrypt_body(item: EncryptItem) -> dict[str, Any]:
    key_id, plaintext, aad = item
    return _with_aad({"key_id": key_id, "plaintext": binary("plaintext", plaintext)}, aad)


def _decrypt_body(item: DecryptItem) -> dict[str, Any]:
    key_id, ciphertext, aad = item
    return _with_aad({"key_id": key_id, "ciphertext": binary("ciphertext", ciphertext)}, aad)


def _with_aad(body: dict[str, Any], aad: bytes | None) -> dict[str, Any]:
    if aad is not None:
        body["aad"] = binary("aad", aad)
    return body


def _batch(
    path: str,
    answer: type[Any],
    items: Sequence[Mapping[str, Any]],
    single: Callable[[Mapping[str, Any]], Plan[R]],
    encoding: Encoding,
) -> Plan[list[R | KmsError]]:
    """Send items in as few requests as may be, and return one result or error for each, in order.

    A request that fails as a whole gives its error to each of its items: what earlier requests made is
    worth more than one exception. After a failure of the connection or the deadline nothing more is sent,
    so that an outage costs one failure's time and not one for each request.
    """
    found: list[R | KmsError] = []
    parts = deque(split(items, encoding, MAX_BATCH_ITEMS, MAX_BATCH_BYTES))
    while parts:
        part = parts.popleft()
        try:
            reply = yield Call("POST", path, answer, {"items": part})
        except RouteNotFound:
            # An older service has no batch routes.
            found += yield from _one_by_one(items[len(found) :], single)
            return found
        except (TransportError, DeadlineExceeded) as error:
            return found + [error] * (len(items) - len(found))
        except KmsError as error:
            if isinstance(error, BatchTooLarge | BodyTooLarge) and len(part) > 1:
                # The service has been set to take less than the usual limits.
                half = len(part) // 2
                parts.extendleft((part[half:], part[:half]))
            else:
                found += [error] * len(part)
        else:
            found += _results(path, reply.results, len(part))
    return found


def _results(path: str, results: Sequence[_Item[R]], expected: int) -> list[R | KmsError]:
    if len(results) != expected:
        return [ProtocolViolation(f"{path} answered {len(results)} results to {expected} items")] * expected
    return [_result(path, result) for result in results]


def _result(path: str, result: _Item[R]) -> R | KmsError:
    if result.error is not None:
        return item_error(result.error)
    value = result.take()
    return (
        ProtocolViolation(f"{path} answered an item with neither result nor error")
        if value is None
        else value
    )


def _one_by_one(
    items: Sequence[Mapping[str, Any]], single: Callable[[Mapping[str, Any]], Plan[R]]
) -> Plan[list[R | KmsError]]:
    found: list[R | KmsError] = []
    for item in items:
        try:
            found.append((yield from single(item)))
        except (TransportError, DeadlineExceeded) as error:
            return found + [error] * (len(items) - len(found))
        except KmsError as error:
            found.append(error)
    return found

"""Bodies of the hot routes, and how they are read and written: JSON with base64, or msgpack with raw bytes.

Reading is strict: unknown fields, wrong types, bad base64 (RFC 4648 section 4, padded) and fields given twice
are refused. What is refused is never echoed, for it may be a secret in the wrong place.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar, cast

import msgspec
from msgspec import UNSET, Struct, UnsetType

from progressdb_kms.domain.errors import (
    BatchTooLarge,
    DuplicateField,
    InvalidField,
    KmsError,
    MalformedBody,
    UnsupportedMediaType,
)
from progressdb_kms.domain.keys import DekRecord

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"


class EncryptItem(Struct, frozen=True, forbid_unknown_fields=True):
    """A message to encrypt; absent, null and empty AAD are the same."""

    key_id: str
    plaintext: bytes
    aad: bytes | UnsetType | None = UNSET

    def __repr__(self) -> str:
        return f"EncryptItem(key_id={self.key_id!r}, plaintext=<hidden>)"


class DecryptItem(Struct, frozen=True, forbid_unknown_fields=True):
    """A ciphertext to decrypt, with the AAD that it was encrypted with."""

    key_id: str
    ciphertext: bytes
    aad: bytes | UnsetType | None = UNSET

    def __repr__(self) -> str:
        return f"DecryptItem(key_id={self.key_id!r})"


class CreateItem(Struct, frozen=True, forbid_unknown_fields=True):
    """A thread that wants a data key; the same idempotency key gives the same one each time."""

    thread_id: str
    idempotency_key: str | UnsetType | None = UNSET

    @property
    def once(self) -> str | None:
        """The idempotency key, None where there is none.

        An empty one is given, and refused: taken for none, each retry of its caller would make another DEK.
        """
        return None if self.idempotency_key is UNSET else self.idempotency_key


class CreateRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """A thread that wants a data key."""

    thread_id: str


class RewrapRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """``new_kek_hex`` is known so that it can be refused by name: a KEK never travels."""

    key_id: str
    new_kek_hex: msgspec.Raw | UnsetType = UNSET


class Encrypted(Struct, frozen=True):
    """``nonce(12) | ciphertext | tag(16)``, and the number of the key in its thread."""

    ciphertext: bytes
    key_version: str

    def __repr__(self) -> str:
        return f"Encrypted(key_version={self.key_version!r})"


class Decrypted(Struct, frozen=True):
    """A plaintext."""

    plaintext: bytes

    def __repr__(self) -> str:
        return "Decrypted(plaintext=<hidden>)"


class CreatedDek(Struct, frozen=True):
    """A data key that can no longer be lost."""

    key_id: str
    wrapped: bytes
    kek_id: str
    kek_version: str
    key_version: str

    def __repr__(self) -> str:
        return f"CreatedDek(key_id={self.key_id!r}, wrapped=<hidden>)"

    @classmethod
    def of(cls, record: DekRecord) -> CreatedDek:
        """Return a stored key as its maker is told of it."""
        return cls(record.key_id, record.wrapped, record.kek_id, str(record.kek_version), str(record.version))


class WrappedDek(Struct, frozen=True):
    """A data key as it is stored."""

    wrapped: bytes
    kek_id: str
    kek_version: str

    def __repr__(self) -> str:
        return "WrappedDek(wrapped=<hidden>)"


class RewrappedDek(Struct, frozen=True):
    """A data key as it is stored from now on."""

    key_id: str
    wrapped: bytes
    kek_id: str
    kek_version: str

    def __repr__(self) -> str:
        return f"RewrappedDek(key_id={self.key_id!r}, wrapped=<hidden>)"


class ItemError(Struct, frozen=True):
    """What went wrong with one item."""

    code: str
    detail: str
    retryable: bool


class Failed(Struct, frozen=True):
    """An item's place in a batch's results when it failed."""

    error: ItemError


class Results(Struct, frozen=True):
    """Results of a batch, in the order of its items."""

    results: list[Any]


T = TypeVar("T", bound=Struct)


class _Batch(Struct, Generic[T], frozen=True, forbid_unknown_fields=True):
    items: list[T]


class _RawBatch(Struct, frozen=True, forbid_unknown_fields=True):
    items: list[msgspec.Raw]


_ENCODERS: Final[dict[str, Callable[[Any], bytes]]] = {
    JSON: msgspec.json.Encoder().encode,
    MSGPACK: msgspec.msgpack.Encoder().encode,
}
_JSON_RAW_BATCH: Final = msgspec.json.Decoder(_RawBatch)
_MSGPACK_RAW_BATCH: Final = msgspec.msgpack.Decoder(_RawBatch)
_MAP16: Final = 0xDE
_MAP32: Final = 0xDF


def encode(content_type: str, message: object) -> bytes:
    """Write an answer as JSON or msgpack."""
    return _ENCODERS[content_type](message)


class Reader(Generic[T]):
    """Reads one kind of body.

    Args:
        model: The Struct to read into; those of its fields that have no default are strings or byte strings.
    """

    __slots__ = ("_json", "_msgpack", "_optional", "_required")

    def __init__(self, model: type[T]) -> None:
        self._json = msgspec.json.Decoder(model)
        self._msgpack = msgspec.msgpack.Decoder(model)
        optional = [field.name for field in msgspec.structs.fields(model) if field.default is UNSET]
        self._required = len(model.__struct_fields__) - len(optional)
        self._optional = tuple(operator.attrgetter(name) for name in optional)

    def present(self, message: T) -> int:
        """Return how many fields ``message`` was given."""
        return self._required + sum(get(message) is not UNSET for get in self._optional)

    def quotes(self, message: T) -> int:
        """Return how many quotes ``message`` takes in JSON without escapes: two a name, two a string."""
        count = 4 * self._required
        for get in self._optional:
            value = get(message)
            if value is not UNSET:
                count += 4 if isinstance(value, str | bytes) else 2
        return count

    def read(self, content_type: str, body: bytes | msgspec.Raw) -> T:
        """Read a body.

        Raises:
            MalformedBody: Not well-formed.
            DuplicateField: A field is given twice.
            InvalidField: A field is missing, unknown, of the wrong type, or not valid base64.
            UnsupportedMediaType: Neither JSON nor msgpack.
        """
        try:
            if content_type == JSON:
                message = self._json.decode(body)
                raw = bytes(body)
                if b"\\" in raw or raw.count(b'"') != self.quotes(message):
                    _refuse_json_duplicates(raw)
                return message
            if content_type == MSGPACK:
                message = self._msgpack.decode(body)
                if _declared(body) != self.present(message):
                    raise DuplicateField
                return message
        except msgspec.MsgspecError as error:
            raise _translated(error) from None
        except (ValueError, RecursionError):
            raise MalformedBody from None
        raise UnsupportedMediaType


class BatchReader(Generic[T]):
    """Reads ``{"items": [...]}``: one bad item is an error in its place, not the end of the batch.

    Args:
        model: The Struct of an item.
    """

    __slots__ = ("_item", "_json")

    def __init__(self, model: type[T]) -> None:
        self._item = Reader(model)
        self._json = msgspec.json.Decoder(_Batch[model])  # type: ignore[valid-type]  # a model that is known at run time

    def read(self, content_type: str, body: bytes, limit: int) -> list[T | KmsError]:
        """Read a batch of at most ``limit`` items, in order.

        Raises:
            BatchTooLarge: More items, whatever they are.
            MalformedBody, DuplicateField, InvalidField: The batch itself is not of the right form.
            UnsupportedMediaType: Neither JSON nor msgpack.
        """
        if content_type == JSON:
            # The whole batch in one pass; the slow way only where that finds something to look at.
            try:
                batch = self._json.decode(body)
            except msgspec.ValidationError:
                return self._each(JSON, body, _JSON_RAW_BATCH, limit)
            except (msgspec.DecodeError, ValueError, RecursionError):
                raise MalformedBody from None
            _within(limit, len(batch.items))
            if b"\\" in body or body.count(b'"') != 2 + sum(map(self._item.quotes, batch.items)):
                return self._each(JSON, body, _JSON_RAW_BATCH, limit)
            return cast("list[T | KmsError]", batch.items)
        if content_type == MSGPACK:
            return self._each(MSGPACK, body, _MSGPACK_RAW_BATCH, limit)
        raise UnsupportedMediaType

    def begin(self, content_type: str, body: bytes, limit: int) -> Sequence[T | KmsError | msgspec.Raw]:
        """Read a batch as ``read`` does, but leave to ``item`` what would take long for all of it at once."""
        if content_type == MSGPACK:
            return self._raw(MSGPACK, body, _MSGPACK_RAW_BATCH, limit)
        return self.read(content_type, body, limit)

    def item(self, content_type: str, item: T | KmsError | msgspec.Raw) -> T | KmsError:
        """Read an item that ``begin`` left, or return it as it is."""
        if not isinstance(item, msgspec.Raw):
            return item
        try:
            return self._item.read(content_type, item)
        except KmsError as error:
            return error

    def _each(
        self,
        content_type: str,
        body: bytes,
        decoder: msgspec.json.Decoder[_RawBatch] | msgspec.msgpack.Decoder[_RawBatch],
        limit: int,
    ) -> list[T | KmsError]:
        return [self.item(content_type, item) for item in self._raw(content_type, body, decoder, limit)]

    @staticmethod
    def _raw(
        content_type: str,
        body: bytes,
        decoder: msgspec.json.Decoder[_RawBatch] | msgspec.msgpack.Decoder[_RawBatch],
        limit: int,
    ) -> list[msgspec.Raw]:
        try:
            raw = decoder.decode(body)
            # Before anything is done for each: millions of tiny bad items fit into a body.
            _within(limit, len(raw.items))
            names = _declared(body) if content_type == MSGPACK else _json_names(body)
        except msgspec.MsgspecError as error:
            raise _translated(error) from None
        except (ValueError, RecursionError):
            raise MalformedBody from None
        if names != 1:
            raise DuplicateField
        return raw.items


def _within(limit: int, items: int) -> None:
    if items > limit:
        raise BatchTooLarge(f"a batch has at most {limit} items, this one has {items}")


def _translated(error: msgspec.MsgspecError) -> KmsError:
    """Return our error for one of msgspec's, without the field's name that its text may quote."""
    if not isinstance(error, msgspec.ValidationError):
        return MalformedBody()
    text = str(error)
    # The name could hold anything, even what looks like the end of the message: nothing of this one is kept.
    return InvalidField("the body has an unknown field" if "unknown field" in text else text)


def _declared(body: bytes | msgspec.Raw) -> int:
    """Return how many fields a msgpack map's header declares.

    The decoder has taken each of them for a known field, so that a count above the number of distinct fields
    means that one came twice.
    """
    head = bytes(memoryview(body)[:5])
    if head[0] == _MAP16:
        return int.from_bytes(head[1:3], "big")
    if head[0] == _MAP32:
        return int.from_bytes(head[1:5], "big")
    return head[0] & 0x0F  # fixmap


def _refuse_json_duplicates(body: bytes) -> None:
    """Look closely at an item whose quotes don't add up.

    Without a backslash in the body each quote begins or ends a string, and each string is a field's name or
    its value. A field given twice brings at least two quotes more than the decoded message accounts for, and
    nothing brings fewer, so an equal count proves that there is none; an unequal one brings us here.
    """

    def check(pairs: list[tuple[str, object]]) -> None:
        if len({name for name, _ in pairs}) != len(pairs):
            raise DuplicateField

    # Numbers stay text: Python refuses to convert one of thousands of digits.
    json.loads(body, object_pairs_hook=check, parse_int=str)


def _json_names(body: bytes) -> int:
    """Count the fields of a JSON object, doubles included."""
    found = 0

    def count(pairs: list[tuple[str, object]]) -> None:
        nonlocal found
        found = len(pairs)  # the outermost object is the last one to be finished

    json.loads(body, object_pairs_hook=count, parse_int=str)
    return found

"""Bodies of the hot routes, and how they are read and written: JSON with base64, or msgpack with raw bytes.

Reading is strict: unknown fields, wrong types, bad base64 (RFC 4648 section 4, padded) and fields given twice
are refused. What is refused is never echoed, for it may be a secret in the wrong place.
"""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType

from progressdb_kms.domain.errors import (
    DuplicateField,
    InvalidField,
    KmsError,
    MalformedBody,
    UnsupportedMediaType,
)
from progressdb_kms.domain.keys import DekRecord

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"


# gc=False: what holds nothing but strings can't be part of a cycle, and the garbage collector, which would
# otherwise run every few hundred items of a batch, need not count it.
class EncryptItem(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A message to encrypt; absent, null and empty AAD are the same."""

    key_id: str
    plaintext: bytes
    aad: bytes | UnsetType | None = UNSET

    def __repr__(self) -> str:
        return f"EncryptItem(key_id={self.key_id!r}, plaintext=<hidden>)"


class DecryptItem(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
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


class Encrypted(Struct, frozen=True, gc=False):
    """``nonce(12) | ciphertext | tag(16)``, and the number of the key in its thread."""

    ciphertext: bytes
    key_version: str

    def __repr__(self) -> str:
        return f"Encrypted(key_version={self.key_version!r})"


class Decrypted(Struct, frozen=True, gc=False):
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


_ENCODERS: Final[dict[str, Callable[[Any], bytes]]] = {
    JSON: msgspec.json.Encoder().encode,
    MSGPACK: msgspec.msgpack.Encoder().encode,
}
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

    def quotes_of(self, messages: Sequence[T]) -> int:
        """Return how many quotes messages take in all, as ``quotes`` counts them."""
        count = 4 * self._required * len(messages)
        for get in self._optional:
            for kind, times in Counter(map(type, map(get, messages))).items():
                if kind is not UnsetType:
                    count += times * (4 if issubclass(kind, str | bytes) else 2)
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
                raw = bytes(body) if isinstance(body, msgspec.Raw) else body
                quotes = raw.count(b'"') if b"\\" not in raw else quotes_in(raw)
                if quotes != self.quotes(message):
                    _refuse_json_duplicates(raw)
                return message
            if content_type == MSGPACK:
                message = self._msgpack.decode(body)
                if declared(body) != self.present(message):
                    raise DuplicateField
                return message
        except msgspec.MsgspecError as error:
            raise translated(error) from None
        except (ValueError, RecursionError):
            raise MalformedBody from None
        raise UnsupportedMediaType


def translated(error: msgspec.MsgspecError) -> KmsError:
    """Return our error for one of msgspec's, without the field's name that its text may quote."""
    if not isinstance(error, msgspec.ValidationError):
        return MalformedBody()
    text = str(error)
    # The name could hold anything, even what looks like the end of the message: nothing of this one is kept.
    return InvalidField("the body has an unknown field" if "unknown field" in text else text)


def declared(body: bytes | msgspec.Raw) -> int:
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


def quotes_in(text: bytes) -> int:
    """Count the quotes in JSON that are not escaped."""
    count = text.count(b'"')
    if b"\\" in text:
        # An escaped backslash escapes nothing; without those, whatever follows a backslash is escaped.
        count -= text.replace(b"\\\\", b"").count(b'\\"')
    return count


def _refuse_json_duplicates(body: bytes) -> None:
    """Look closely at an item whose quotes don't add up.

    Each quote that is not escaped begins or ends a string, and each string is a field's name or its value.
    A field given twice brings at least two quotes more than the decoded message accounts for, and nothing
    brings fewer, so an equal count proves that there is none; an unequal one brings us here.
    """

    def check(pairs: list[tuple[str, object]]) -> None:
        if len({name for name, _ in pairs}) != len(pairs):
            raise DuplicateField

    # Numbers stay text: Python refuses to convert one of thousands of digits.
    json.loads(body, object_pairs_hook=check, parse_int=str)

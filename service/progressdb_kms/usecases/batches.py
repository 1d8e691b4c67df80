"""Bodies of batches, and their answers: ``{"items": [...]}`` and ``{"results": [...]}``.

A long batch is read and written in pieces: parser and encoder are C, in which nobody else gets a turn.
"""

from __future__ import annotations

import json
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Any, Final, Generic, TypeGuard, TypeVar, cast

import msgspec
from msgspec import Struct

from progressdb_kms.domain.errors import (
    BatchTooLarge,
    DuplicateField,
    KmsError,
    MalformedBody,
    UnsupportedMediaType,
)
from progressdb_kms.usecases.cutting import Rest, Turns, read_items
from progressdb_kms.usecases.messages import JSON, MSGPACK, Reader, declared, encode, quotes_in, translated

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T", bound=Struct)

WHOLE_BYTES: Final = 2**19
"""Bytes of msgpack that are read in one go at most, in some 0.5 ms."""
WHOLE_ITEMS: Final = 2**11
"""Items, likewise."""
PIECE_ITEMS: Final = 2**8
"""Items of a longer body that are read at a time."""


class _Batch(Struct, Generic[T], frozen=True, forbid_unknown_fields=True):
    items: list[T]


class _RawBatch(Struct, frozen=True, forbid_unknown_fields=True):
    items: list[msgspec.Raw]


_JSON_RAW_BATCH: Final = msgspec.json.Decoder(_RawBatch)
_JSON_RAW_ITEMS: Final = msgspec.json.Decoder(list[msgspec.Raw])


class BatchReader(Generic[T]):
    """Reads ``{"items": [...]}``: one bad item is an error in its place, not the end of the batch.

    Args:
        model: The Struct of an item.
    """

    __slots__ = ("_item", "_json", "_json_items", "_model", "_msgpack", "_msgpack_items")

    def __init__(self, model: type[T]) -> None:
        self._model = model
        self._item = Reader(model)
        self._json = msgspec.json.Decoder(_Batch[model])  # type: ignore[valid-type]  # a model that is known at run time
        self._json_items = msgspec.json.Decoder(list[model])  # type: ignore[valid-type]  # likewise
        self._msgpack = cache(partial(_msgpack_decoder, model))
        self._msgpack_items = msgspec.msgpack.Decoder(list[model])  # type: ignore[valid-type]  # likewise

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
                return self._each(JSON, _raw_json(body, limit))
            except (msgspec.DecodeError, ValueError, RecursionError):
                raise MalformedBody from None
            _within(limit, len(batch.items))
            if quotes_in(body) != 2 + self._item.quotes_of(batch.items):
                return self._each(JSON, _raw_json(body, limit))
            return cast("list[T | KmsError]", batch.items)
        if content_type == MSGPACK:
            whole = self._whole_msgpack(body, limit)
            return self._each(MSGPACK, _raw_msgpack(body, limit)) if whole is None else [*whole]
        raise UnsupportedMediaType

    def begin(self, content_type: str, body: bytes, limit: int) -> Turns[list[T | KmsError | msgspec.Raw]]:
        """Read a long batch as ``read`` does, in pieces; what is left of each item is for ``item`` to do.

        There are two differences from ``read``, both in JSON that is refused either way: more items than
        ``limit`` are BatchTooLarge also where the rest of the body is malformed, as nobody looks at it; and
        of what follows the items, 64 KiB are. Where an item is nested about as deep as the interpreter
        allows, either may say so.

        Raises:
            KmsError: As ``read`` does.
        """
        if content_type == MSGPACK:
            return (yield from self._begin_msgpack(body, limit))
        if content_type != JSON:
            raise UnsupportedMediaType
        pieces = _Pieces(self._item, self._json_items, limit)
        try:
            if (yield from read_items(body, pieces.take)):
                return pieces.items
        except Rest as rest:
            self.read(JSON, rest.body, limit)
            raise MalformedBody from None
        return [*self.read(JSON, body, limit)]

    def item(self, content_type: str, item: T | KmsError | msgspec.Raw) -> T | KmsError:
        """Read an item that ``begin`` left, or return it as it is."""
        if not isinstance(item, msgspec.Raw):
            return item
        try:
            return self._item.read(content_type, item)
        except KmsError as error:
            # What led to it holds the frames of whoever asked, and these the rest of the batch, in
            # cycles that the garbage collector would hold everybody up for.
            error.__context__ = None
            return error.with_traceback(None)

    def has_read(self, items: Sequence[T | KmsError | msgspec.Raw]) -> TypeGuard[Sequence[T]]:
        """Say whether all of these are read, none of them with an error."""
        return set(map(type, items)) <= {self._model}

    def _begin_msgpack(self, body: bytes, limit: int) -> Turns[list[T | KmsError | msgspec.Raw]]:
        if len(body) <= WHOLE_BYTES:
            whole = self._whole_msgpack(body, min(limit, WHOLE_ITEMS))
            if whole is not None:
                return [*whole]
        raw = _raw_msgpack(body, limit)
        items: list[T | KmsError | msgspec.Raw] = []
        for begin in range(0, len(raw), PIECE_ITEMS):
            yield
            items += self._some_msgpack(raw[begin : begin + PIECE_ITEMS])
        return items

    def _whole_msgpack(self, body: bytes, most: int) -> list[T] | None:
        """Read a batch of at most ``most`` items in one pass; None where this is not all there is to do.

        No field came twice in what is as short as it can be. The decoder takes each length form of strings,
        byte strings, arrays and maps for what it is, and nothing else for one of them, so that what it was
        given is never shorter than what the encoder, which takes the shortest forms, makes of the same
        fields; a field given twice comes on top of that.
        """
        try:
            batch = self._msgpack(most).decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return None
        return cast("list[T]", batch.items) if len(encode(MSGPACK, batch)) == len(body) else None

    def _some_msgpack(self, raw: list[msgspec.Raw]) -> Sequence[T | msgspec.Raw]:
        """Read items in one pass, or return them as they are."""
        parts = [memoryview(each) for each in raw]
        length = sum(map(len, parts))
        if length > WHOLE_BYTES:
            return raw
        head = _msgpack_array(len(raw))
        try:
            items = self._msgpack_items.decode(b"".join((head, *parts)))
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return raw
        return items if len(encode(MSGPACK, items)) == len(head) + length else raw

    def _each(self, content_type: str, items: list[msgspec.Raw]) -> list[T | KmsError]:
        return [self.item(content_type, item) for item in items]


class _Pieces(Generic[T]):
    """Reads the items of a JSON batch from pieces of their array, with what ``BatchReader.read`` says."""

    def __init__(self, item: Reader[T], decoder: msgspec.json.Decoder[list[T]], limit: int) -> None:
        self.items: list[T | KmsError | msgspec.Raw] = []
        self._item = item
        self._decoder = decoder
        self._limit = limit

    def take(self, array: bytes) -> int:
        """Read the items of a piece; returns how many there are.

        Raises:
            MalformedBody: It is no array.
            BatchTooLarge: There are too many by now.
        """
        try:
            found = self._read(array)
        except msgspec.ValidationError:
            found = _raw_items(array)
        except (msgspec.DecodeError, ValueError, RecursionError):
            raise MalformedBody from None
        _within(self._limit, len(self.items) + len(found))
        self.items += found
        return len(found)

    def _read(self, array: bytes) -> Sequence[T | msgspec.Raw]:
        items = self._decoder.decode(array)
        if quotes_in(array) == self._item.quotes_of(items):
            return items
        return _raw_items(array)


def _raw_items(array: bytes) -> list[msgspec.Raw]:
    try:
        array.decode()
        return _JSON_RAW_ITEMS.decode(array)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise MalformedBody from None


def _raw_json(body: bytes, limit: int) -> list[msgspec.Raw]:
    try:
        raw = _JSON_RAW_BATCH.decode(body)
        # Before anything is done for each: millions of tiny bad items fit into a body.
        _within(limit, len(raw.items))
        names = _json_names(body)
    except msgspec.MsgspecError as error:
        raise translated(error) from None
    except (ValueError, RecursionError):
        raise MalformedBody from None
    if names != 1:
        raise DuplicateField
    return raw.items


def _raw_msgpack(body: bytes, limit: int) -> list[msgspec.Raw]:
    try:
        raw = _raw_decoder(limit).decode(body)
    except msgspec.MsgspecError as error:
        wrong = translated(error)
        if _TOO_MANY in wrong.detail:
            raise _too_large(limit) from None
        raise wrong from None
    except (ValueError, RecursionError):
        raise MalformedBody from None
    if declared(body) != 1:
        raise DuplicateField
    return cast("list[msgspec.Raw]", raw.items)


_TOO_MANY: Final = "`array` of length <="


def _msgpack_decoder(item: Any, limit: int) -> msgspec.msgpack.Decoder[Any]:  # noqa: ANN401 - any type
    """Return a decoder that looks at how many items an array says that it has before it makes one of them."""
    items = Annotated[list[item], msgspec.Meta(max_length=limit)]
    batch = msgspec.defstruct("_MsgpackBatch", [("items", items)], frozen=True, forbid_unknown_fields=True)
    return msgspec.msgpack.Decoder(batch)


_raw_decoder: Final = cache(partial(_msgpack_decoder, msgspec.Raw))


def _within(limit: int, items: int) -> None:
    if items > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> BatchTooLarge:
    return BatchTooLarge(f"a batch has at most {limit} items, this one has more")


def _json_names(body: bytes) -> int:
    """Count the fields of a JSON object, doubles included."""
    found = 0

    def count(pairs: list[tuple[str, object]]) -> None:
        nonlocal found
        found = len(pairs)  # the outermost object is the last one to be finished

    json.loads(body, object_pairs_hook=count, parse_int=str)
    return found


class ResultsWriter:
    """Writes the answer of a batch in pieces; together they are what encoding ``Results`` at once gives.

    Args:
        content_type: JSON or msgpack.
    """

    def __init__(self, content_type: str) -> None:
        self._type = content_type
        self._count = 0
        self._pieces: list[bytes] = []

    def add(self, results: Sequence[object]) -> None:
        """Write results; not none of them."""
        piece = encode(self._type, results)
        if self._type == JSON:
            piece = b"".join((b"," if self._count else b"", memoryview(piece)[1:-1]))
        else:
            piece = piece[len(_msgpack_array(len(results))) :]
        self._count += len(results)
        self._pieces.append(piece)

    def finish(self) -> list[bytes]:
        """Return the answer in pieces; each will be written alone, so that none is but a few bytes."""
        pieces = self._pieces or [b""]
        if self._type == JSON:
            pieces[0] = b'{"results":[' + pieces[0]
            pieces[-1] += b"]}"
        else:
            pieces[0] = b"\x81\xa7results" + _msgpack_array(self._count) + pieces[0]
        return pieces


def _msgpack_array(length: int) -> bytes:
    """Return the head of an array, in the shortest form."""
    if length < 2**4:
        return bytes([0x90 | length])
    return b"\xdc" + length.to_bytes(2, "big") if length < 2**16 else b"\xdd" + length.to_bytes(4, "big")

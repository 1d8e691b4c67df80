"""Reading the JSON of a long batch a piece at a time, so that nobody else waits for the whole of it.

A parser in C can't be interrupted, so it is given pieces of the items' array, each cut at a comma between two
items. First by guess, at ``},``, which usually ends an item. That is safe because each piece is parsed as an
array of its own and has something in it: arrays of JSON (RFC 8259) that are put together with commas between
them are one array, and no text has two readings. A wrong guess, within a string or an item, leaves a piece
that is no array. From there on brackets and strings are counted, which finds the right commas in whatever is
JSON, so that a piece that is no array even then is a mistake of the body; it takes some five times as long as
the parser.

Others get a turn between any two pieces and while brackets are counted. What is not cut is a single item.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from progressdb_kms.domain.errors import MalformedBody

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

T = TypeVar("T")

Turns: TypeAlias = "Generator[None, None, T]"
"""Work that yields for others to have their turn."""

PIECE: Final = 2**16
"""Bytes from which a piece ends at the next comma between two items; parsed in some 0.2 ms."""
GUESS: Final = 2**21
"""Bytes in which a ``},`` is looked for, and a piece at most that is cut by guess."""
COMMAS: Final = 2**12
"""In a longer piece that is cut by guess: with more it could be millions of tiny items."""
REST: Final = 2**16
"""Bytes behind the items that are looked at to see what is wrong with them."""
TOKEN: Final = 32
"""Bytes that take as long to pass over as one bracket to count."""

_SPACE: Final = re.compile(rb"[ \t\r\n]*+")
_NAME: Final = re.compile(rb'"(?:[^"\\]|\\.){5,30}+"')
_END: Final = re.compile(rb"\][ \t\r\n]*+\}[ \t\r\n]*+\Z")
_END_WITHIN: Final = 256
# A string that the window ends in is none here, and its quote comes alone.
_BETWEEN: Final = re.compile(rb'(?:[^",\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
_WITHIN: Final = re.compile(
    rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+"|\[[^"\[\]{}]*+\]|\{[^"\[\]{}]*+\})*+', re.DOTALL
)
_STRING: Final = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_QUOTE, _COMMA, _OPEN, _CLOSE, _BRACE, _END_BRACE = b'",[]{}'

Take: TypeAlias = "Callable[[bytes], int]"


class Rest(Exception):
    """Something comes after the items.

    Attributes:
        body: A short body that is wrong in the same way.
    """

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self.body = body


def read_items(body: bytes, take: Take) -> Turns[bool]:
    """Read ``{"items": [...]}``.

    Args:
        body: JSON, or not.
        take: Reads an array, keeps its items and returns how many there are; where it is none it keeps
            nothing and raises MalformedBody.

    Returns:
        False, without having taken anything, if it does not begin like that.

    Raises:
        MalformedBody: There is no such array, or it does not end.
        Rest: There is one, but more than it.
    """
    begin = yield from _begin(body)
    if begin < 0:
        return False
    at = begin
    end = _END.search(body, max(0, len(body) - _END_WITHIN))
    if end is not None:
        at = yield from _guess(body, at, end.start(), take)
        if at > end.start():
            return True
    at = yield from _count(body, at, take, only=at == begin)
    yield from _finish(body, at)
    return True


def _array(body: bytes, begin: int, end: int) -> bytes:
    # Copied once: an item may have a MiB and more.
    return b"".join((b"[", memoryview(body)[begin:end], b"]"))


def _begin(body: bytes) -> Turns[int]:
    """Return where the first item begins; -1 if the body does not begin as a batch does."""
    at = yield from _skip(body, 0)
    if body[at : at + 1] != b"{":
        return -1
    at = yield from _skip(body, at + 1)
    name = _NAME.match(body, at)
    try:
        if name is None or json.loads(name[0]) != "items":
            return -1
    except ValueError:
        return -1
    at = yield from _skip(body, name.end())
    if body[at : at + 1] != b":":
        return -1
    at = yield from _skip(body, at + 1)
    return at + 1 if body[at : at + 1] == b"[" else -1


def _guess(body: bytes, at: int, end: int, take: Take) -> Turns[int]:
    """Take pieces cut by guess; returns where the first begins that is none, or past ``end``."""
    only = True
    while at <= end:
        stop = end
        if end - at > PIECE:
            stop = body.find(b"},", at + PIECE, min(end, at + GUESS)) + 1
            if not stop:
                if end - at > GUESS:
                    return at
                stop = end
            if stop - at > 2 * PIECE and body.count(b",", at, stop) > COMMAS:
                return at
        try:
            # Nothing between two commas is no JSON, even where nothing between brackets is.
            if not take(_array(body, at, stop)) and not (only and stop == end):
                return at
        except MalformedBody:
            return at
        only = False
        at = stop + 1
        yield
    return at


def _count(body: bytes, at: int, take: Take, *, only: bool) -> Turns[int]:  # noqa: C901 - one loop over tokens
    """Take pieces cut by counting brackets; returns where the array has ended.

    ``only``: nothing has been taken yet.
    """
    begin, depth, spent = at, 0, 0
    while True:
        before = at
        pattern = _WITHIN if depth else _BETWEEN
        at = pattern.match(body, at, at + PIECE).end()  # type: ignore[union-attr]  # it matches nothing too
        if at == len(body):
            raise MalformedBody
        spent += at - before + TOKEN
        if spent >= PIECE:
            spent = 0
            yield
        if at == before + PIECE:
            continue
        token = body[at]
        at += 1
        if token == _QUOTE:
            at = yield from _string(body, at)
        elif token in (_OPEN, _BRACE):
            depth += 1
        elif depth and token != _COMMA:
            depth -= 1
        elif token == _COMMA and at - begin <= PIECE:
            pass
        elif token == _END_BRACE or not (take(_array(body, begin, at - 1)) or (only and token == _CLOSE)):
            raise MalformedBody
        elif token == _CLOSE:
            return at
        else:
            begin, only, spent = at, False, 0
            yield


def _string(body: bytes, at: int) -> Turns[int]:
    """Return where the string has ended that begins at ``at``."""
    while True:
        stop = at + PIECE
        at = _STRING.match(body, at, stop).end()  # type: ignore[union-attr]  # it matches nothing too
        if body[at : at + 1] == b'"':
            return at + 1
        if stop >= len(body):
            raise MalformedBody
        yield


def _finish(body: bytes, at: int) -> Turns[None]:
    end = yield from _skip(body, at)
    if body[end : end + 1] == b"}":
        end = yield from _skip(body, end + 1)
        if end == len(body):
            return
    # Of a field that is longer than this only its name counts.
    raise Rest(b'{"items":[]' + body[at : at + REST])


def _skip(body: bytes, at: int) -> Turns[int]:
    """Return where the first byte is that is no space."""
    while True:
        stop = at + PIECE
        at = _SPACE.match(body, at, stop).end()  # type: ignore[union-attr]  # it matches nothing too
        if at < stop:
            return at
        yield

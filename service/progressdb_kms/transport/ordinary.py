"""The wholly ordinary request: the narrow part of HTTP/1.1 that the fast door takes.

What is accepted here is a strict subset of RFC 9112, written as one grammar: CRLF line ends, no folding, no
field twice, printable ASCII, one Host, a body framed by one plain Content-Length. Every reader of HTTP reads
such bytes in the same way, so taking them here can't make two readers differ. Whatever else comes is not
refused: it is another parser's.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

HEAD_END: Final = b"\r\n\r\n"
_HEAD: Final = re.compile(
    rb"(GET|POST) (/[a-z_]{1,64})(?:\?([A-Za-z0-9_.=&-]{0,512}))? HTTP/1\.1\r\n"
    rb"((?:[A-Za-z0-9-]{1,64}:[\x20-\x7e]*\r\n){1,64})\r\n"
)
_LENGTH: Final = re.compile(r"0|[1-9][0-9]{0,8}")
_HOST: Final = re.compile(r"[A-Za-z0-9.:\[\]_-]{1,255}")
_CONNECTION: Final = frozenset({"keep-alive", "close"})
# They change how a request is framed, answered or passed on; the last two say that a web page sent it.
_EXTRAORDINARY: Final = frozenset(
    {
        "content-encoding",
        "expect",
        "http2-settings",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "origin",
        "sec-fetch-site",
    }
)


class Head(NamedTuple):
    """A request's head.

    Attributes:
        method: GET or POST.
        path: Without the query.
        query: What follows the question mark; empty where there is none.
        fields: Values by lower-case name.
        length: Bytes of the body.
        last: The peer asks for nothing more on this connection.
    """

    method: str
    path: str
    query: str
    fields: dict[str, str]
    length: int
    last: bool


def parse_head(data: bytes) -> Head | None:
    """Parse a request's head, the empty line included; None if it is not wholly ordinary."""
    match = _HEAD.fullmatch(data)
    if match is None:
        return None
    method, path, query, lines = (part.decode() if part else "" for part in match.groups())
    fields: dict[str, str] = {}
    for line in lines[:-2].split("\r\n"):
        name, _, value = line.partition(":")
        name = name.lower()
        if name in fields or name in _EXTRAORDINARY:
            return None
        fields[name] = value.strip(" ")
    length = fields.get("content-length")
    framed = length is None if method == "GET" else length is not None and _LENGTH.fullmatch(length)
    connection = fields.get("connection", "keep-alive").lower()
    if not (framed and connection in _CONNECTION and _HOST.fullmatch(fields.get("host", ""))):
        return None
    return Head(method, path, query, fields, int(length or 0), connection == "close")

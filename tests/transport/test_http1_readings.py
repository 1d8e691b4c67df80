"""What h11 takes leniently has one reading, however it arrives; what could be read in two ways is refused."""

from __future__ import annotations

import pytest

from tests.fuzz.targets import Seen, serve

LINE = b"POST /e HTTP/1.1\r\nHost: h\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: h\r\n\r\n"
TAKEN = {
    "obs-fold": (LINE + b"X: a\r\n \t b\r\n\r\n", ((b"host", b"h"), (b"x", b"a b")), b""),
    "bare LF": (b"POST /e HTTP/1.1\nHost: h\n\n", ((b"host", b"h"),), b""),
    "equal lengths": (
        LINE + b"Content-Length: 2, 2\r\nContent-Length: 2\r\n\r\nab",
        ((b"host", b"h"), (b"content-length", b"2")),
        b"ab",
    ),
    "leading zeros": (
        LINE + b"Content-Length: 002\r\n\r\nab",
        ((b"host", b"h"), (b"content-length", b"002")),
        b"ab",
    ),
    "chunk extension": (
        LINE + b"Transfer-Encoding: chunked\r\n\r\n2;a=b\r\nab\r\n0\r\n\r\n",
        ((b"host", b"h"), (b"transfer-encoding", b"chunked")),
        b"ab",
    ),
    "trailer": (
        LINE + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nContent-Length: 9\r\n\r\n",
        ((b"host", b"h"), (b"transfer-encoding", b"chunked")),
        b"ab",
    ),
}
REFUSED = {
    "space before colon": LINE + b"Content-Length : 2\r\n\r\nab",
    "obs-fold on the first line": b"POST /e HTTP/1.1\r\n Host: h\r\n\r\n",
    "different lengths": LINE + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
    "different lengths in a list": LINE + b"Content-Length: 2, 3\r\n\r\nabc",
    "plus": LINE + b"Content-Length: +2\r\n\r\nab",
    "minus": LINE + b"Content-Length: -2\r\n\r\nab",
    "hexadecimal": LINE + b"Content-Length: 0x2\r\n\r\nab",
    "underscore": LINE + b"Content-Length: 1_0\r\n\r\n0123456789",
    "empty length": LINE + b"Content-Length:\r\n\r\n",
    "two framings": LINE + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two framings, other order": LINE + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
    "another coding": LINE + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": LINE + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bare CR": LINE + b"X: a\rContent-Length: 2\r\n\r\nab",
    "NUL": LINE + b"X: a\0b\r\n\r\n",
    "two hosts": LINE + b"Host: other\r\n\r\n",
    "no host": b"POST /e HTTP/1.1\r\n\r\n",
    "empty line first": b"\r\n" + LINE + b"\r\n",
    "chunk size with sign": LINE + b"Transfer-Encoding: chunked\r\n\r\n+2\r\nab\r\n0\r\n\r\n",
    "chunk size with prefix": LINE + b"Transfer-Encoding: chunked\r\n\r\n0x2\r\nab\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", TAKEN)
async def test_leniency_has_one_reading(name: str) -> None:
    """The app sees one request as stated, and the next one begins right behind it; whole or byte by byte."""
    data, headers, body = TAKEN[name]
    both = data + NEXT
    expected = [Seen("POST", b"/e", headers, body), Seen("GET", b"/next", ((b"host", b"h"),), b"")]
    for pieces in ([both], [both[i : i + 1] for i in range(len(both))]):
        assert await serve(pieces) == (expected, [b"204", b"204"])


@pytest.mark.parametrize("name", REFUSED)
async def test_ambiguity_is_refused(name: str) -> None:
    """The app sees neither it nor what follows; whole or byte by byte."""
    both = REFUSED[name] + NEXT
    for pieces in ([both], [both[i : i + 1] for i in range(len(both))]):
        seen, statuses = await serve(pieces)
        assert not seen
        assert statuses == [b"400"]


@pytest.mark.parametrize(
    "line", [b"HEAD /e HTTP/1.2", b"HEAD /e HTTP/1.1\r\nContent-Length: 0\r\nTransfer-Encoding: chunked"]
)
async def test_a_refused_head_is_answered_without_a_body(line: bytes) -> None:
    """RFC 9110 9.3.2: an answer to HEAD has no body, a refusal's neither; and there is an answer."""
    assert await serve([line + b"\r\nHost: h\r\n\r\n"]) == ([], [b"400"])

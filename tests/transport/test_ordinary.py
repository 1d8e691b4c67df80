"""What the fast door takes for an ordinary request: nothing that h11 reads in another way, or not at all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from progressdb_kms.transport.ordinary import parse_head
from tests.fuzz.targets import ordinary

PLAIN = (
    b"POST /encrypt HTTP/1.1\r\nHost: kms.example:8443\r\nContent-Type: application/json\r\n"
    b"Content-Length: 12\r\nX-Request-Id:  a b \r\n\r\n"
)
LOOK = b"GET /get_wrapped?key_id=k_1&x=2 HTTP/1.1\r\nHost: [::1]:8443\r\nConnection: Keep-Alive\r\n\r\n"


def with_field(line: bytes, of: bytes = PLAIN) -> bytes:
    """Return a head with one more line."""
    return of[:-2] + line + b"\r\n\r\n"


def test_an_ordinary_head_is_taken_apart() -> None:
    """Method, path, query, fields without the space around them, and the body's length."""
    head = parse_head(PLAIN)
    assert head is not None
    assert (head.method, head.path, head.query, head.length) == ("POST", "/encrypt", "", 12)
    assert head.fields == {
        "host": "kms.example:8443",
        "content-type": "application/json",
        "content-length": "12",
        "x-request-id": "a b",
    }
    head = parse_head(LOOK)
    assert head is not None
    assert (head.method, head.path, head.query, head.length) == ("GET", "/get_wrapped", "key_id=k_1&x=2", 0)
    assert not head.last
    head = parse_head(with_field(b"Connection: CLOSE"))
    assert head is not None
    assert head.last


@pytest.mark.parametrize(
    "head",
    [
        with_field(b"Transfer-Encoding: chunked"),
        with_field(b"Content-Length: 12"),
        with_field(b"content-length: 13"),
        with_field(b"Host: other"),
        with_field(b"Expect: 100-continue"),
        with_field(b"Upgrade: h2c"),
        with_field(b"Connection: close, keep-alive"),
        with_field(b"Connection: keep-alive, upgrade"),
        with_field(b"Content-Encoding: gzip"),
        with_field(b"TE: trailers"),
        with_field(b"Origin: https://elsewhere.example"),
        with_field(b"Sec-Fetch-Site: cross-site"),
        with_field(b"X: a\r\n b"),
        with_field(b"X: a\r\n\tb"),
        with_field(b"X: a\nY: b"),
        with_field(b"X: a\rY: b"),
        with_field(b"X: a\x00b"),
        with_field(b"X: \xc3\xa4"),
        with_field(b"X\t: a"),
        with_field(b"X : a"),
        with_field(b" X: a"),
        with_field(b": a"),
        with_field(b"X"),
        PLAIN.replace(b"\r\n", b"\n"),
        PLAIN.replace(b"Content-Length: 12", b"Content-Length: +12"),
        PLAIN.replace(b"Content-Length: 12", b"Content-Length: 012"),
        PLAIN.replace(b"Content-Length: 12", b"Content-Length: 1 2"),
        PLAIN.replace(b"Content-Length: 12", b"Content-Length: 12, 12"),
        PLAIN.replace(b"Content-Length: 12", b"Content-Length: 0x12"),
        PLAIN.replace(b"Content-Length: 12", b"Content-Length: "),
        PLAIN.replace(b"Content-Length: 12", b"Content-Length: 1234567890"),
        PLAIN.replace(b"Content-Length: 12\r\n", b""),
        PLAIN.replace(b"Host: kms.example:8443\r\n", b""),
        PLAIN.replace(b"kms.example:8443", b"a b"),
        PLAIN.replace(b"kms.example:8443", b""),
        PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0"),
        PLAIN.replace(b"HTTP/1.1", b"HTTP/2.0"),
        PLAIN.replace(b"HTTP/1.1", b"http/1.1"),
        PLAIN.replace(b"POST /", b"POST  /"),
        PLAIN.replace(b"POST /", b"post /"),
        PLAIN.replace(b"POST /encrypt", b"POST https://kms.example/encrypt"),
        PLAIN.replace(b"POST /encrypt", b"CONNECT kms.example:443"),
        PLAIN.replace(b"POST /encrypt", b"POST //encrypt"),
        PLAIN.replace(b"POST /encrypt", b"POST /encrypt/"),
        PLAIN.replace(b"POST /encrypt", b"POST /%65ncrypt"),
        PLAIN.replace(b"POST /encrypt", b"POST /encrypt#x"),
        b"\r\n" + PLAIN,
        PLAIN + b"x",
        PLAIN[:-2],
        LOOK.replace(b"key_id", b"key%5fid"),
        LOOK.replace(b"Connection: Keep-Alive", b"Content-Length: 0"),
    ],
)
def test_whatever_is_out_of_the_ordinary_is_not_taken(head: bytes) -> None:
    """Framing, folding, odd bytes, odd targets and odd versions are another parser's."""
    assert parse_head(head) is None


MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, 200),
        st.sampled_from(
            [
                *(
                    b"",
                    b" ",
                    b"\t",
                    b"\r",
                    b"\n",
                    b"\r\n",
                    b"\r\n ",
                    b":",
                    b",",
                    b"\x00",
                    b"\x7f",
                    b"\x80",
                    b"0",
                ),
                *(b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: b\r\n", b"X: y\r\n"),
                b"?a=b",
            ]
        ),
        st.integers(0, 3),
    ),
    max_size=4,
)


@given(st.sampled_from([PLAIN, LOOK]), MUTATIONS)
@settings(max_examples=2000)
def test_h11_reads_the_same(head: bytes, mutations: list[tuple[int, bytes, int]]) -> None:
    """Of a head that is taken, h11 makes the same request, with the same fields and length of body."""
    for place, text, removed in mutations:
        head = head[:place] + text + head[place + removed :]
    ordinary(head)

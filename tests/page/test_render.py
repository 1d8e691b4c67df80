"""Texts, times and shares as people see them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.page.render import render, share, shown, span, when
from tests.page.conftest import Reading
from tests.page.hostile import HOSTILE

ANYTHING = st.one_of(
    st.text(st.characters()),
    st.text(st.characters(categories=["Cs", "Cc", "Cf", "Zl", "Zp"])),
    st.sampled_from(HOSTILE),
    st.integers(),
    st.floats(),
    st.none(),
    st.recursive(st.booleans(), lambda deeper: st.lists(deeper) | st.dictionaries(st.text(), deeper)),
)


@given(ANYTHING)
def test_whatever_is_shown_can_be_seen(value: object) -> None:
    """It is printable, of bounded length, and UTF-8 takes it."""
    text = shown(value)
    assert text.isprintable()
    assert len(text) <= 301 * 10
    text.encode()


def test_printable_text_stays_as_it_is() -> None:
    """What can be seen is shown, in any script; what can't is written out."""
    assert shown("räum:チャット 1") == "räum:チャット 1"
    assert shown("a\u202eb\x00\ud800") == "a\\u{202e}b\\u{0}\\u{d800}"
    assert shown("x" * 400) == "x" * 300 + "…"


@given(ANYTHING | st.floats(allow_nan=True) | st.integers(min_value=10**12))
def test_any_value_is_taken_for_a_time(value: object) -> None:
    """Or for none: what somebody put into a record is no error."""
    assert when(value) == "?" or when(value).endswith("Z")


def test_times_and_spans() -> None:
    """RFC 3339; the largest unit of which it is two or more."""
    assert when(0) == "1970-01-01T00:00:00Z"
    assert [when(value) for value in ("1", None, True, math.inf, 1e300, -1e300)] == ["?"] * 6
    assert [span(value) for value in (-5, 59, 119.9, 120, 7200, 172_800)] == [
        "0 s",
        "59 s",
        "119 s",
        "2 minutes",
        "2 hours",
        "2 days",
    ]


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_a_share_is_no_more_than_there_is(part: int, rest: int) -> None:
    """Between 0 and 100, and 100 only for all."""
    found = share(part, part + rest)
    assert 0 <= found <= 100
    assert (found == 100) == (rest == 0 and part > 0)


@pytest.mark.parametrize("text", HOSTILE)
def test_an_error_page_escapes(text: str) -> None:
    """Title, detail and all."""

    class Error:
        title = text
        detail = text
        code = text

    reading = Reading(render("error.html", {"error": Error, "status": 400, "request_id": text}).decode())
    reading.assert_tame()
    assert shown(text)[:200] in reading.text

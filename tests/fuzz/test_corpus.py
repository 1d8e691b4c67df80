"""The corpus and fresh inputs, on every target of the fuzzer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_breaks_no_promise(name: str) -> None:
    """What the fuzzer found worth keeping, and what once failed, is read or refused as promised."""
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs
    for path in inputs:
        TARGETS[name](path.read_bytes())


@pytest.mark.fuzz
@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
def test_damaged_inputs_break_no_promise(name: str, data: st.DataObject) -> None:
    """An input of the corpus with a piece replaced is read or refused as promised."""
    whole = data.draw(st.sampled_from([path.read_bytes() for path in sorted((CORPUS / name).iterdir())]))
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    TARGETS[name](whole[:start] + data.draw(st.binary(max_size=40)) + whole[end:])

"""What somebody with access to the store can write there: it is read as what it is, or left out."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.domain.errors import StoreUnavailable
from progressdb_kms.domain.rotation import Rotation, Step
from progressdb_kms.page.render import span, when
from progressdb_kms.ports import Heartbeat
from progressdb_kms.store.redis.schema import decode_heartbeat, decode_rotation
from tests.page.hostile import HOSTILE

BEAT = asdict(Heartbeat("i", 1.0, 1.0, "1.0", (1,), 1, "g"))
ROTATION = asdict(Rotation("r_2_a", 1, 2, Step.REWRAP, 10, 20))
ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text()
    | st.sampled_from(HOSTILE),
    lambda deeper: st.lists(deeper, max_size=3) | st.dictionaries(st.text(), deeper, max_size=3),
    max_leaves=4,
)


def spoiled(whole: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Return such documents with one member spoiled."""
    return st.builds(
        lambda name, value: json.dumps({**whole, name: value}).encode(), st.sampled_from(sorted(whole)), ANY
    )


@given(spoiled(BEAT))
def test_a_heartbeat_is_of_its_types_or_none(entry: bytes) -> None:
    """So that one that was forged can't break the list of all: times can be sorted and shown."""
    try:
        beat = decode_heartbeat(entry)
    except (ValueError, KeyError, TypeError):
        return
    assert isinstance(beat.instance, str)
    assert math.isfinite(beat.at)
    assert sorted([(-beat.at, beat.instance), (-1.0, "i")])
    assert span(1.0 - beat.at)
    assert when(beat.started_at)


DEEP = b"[" * 100_000


def test_what_is_nested_without_end_is_left_out() -> None:
    """Reading it raises no error of the parser's own."""
    with pytest.raises(ValueError, match="deeply"):
        decode_heartbeat(DEEP)
    with pytest.raises(StoreUnavailable):
        decode_rotation(DEEP, {})


@given(spoiled(ROTATION))
def test_a_rotation_is_of_its_types_or_unreadable(entry: bytes) -> None:
    """Its versions can be looked up, its times shown; else the store can't be trusted, and that is told."""
    try:
        rotation = decode_rotation(entry, {})
    except StoreUnavailable:
        return
    assert {1: 1}.get(rotation.target_version, 0) in {0, 1}
    assert when(rotation.started_at)
    assert rotation.finished_at is None or when(rotation.finished_at)

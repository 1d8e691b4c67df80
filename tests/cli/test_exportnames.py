"""Which exports a retention removes."""

from __future__ import annotations

import pytest

from progressdb_kms.cli.exportnames import export_name, is_export, is_leftover, surplus

DAY = 86_400
NAMES = [export_name(day * DAY, f"x_{day:016x}") for day in range(1, 6)]
OTHERS = ["progressdb-kms-notes.txt", "other.export", f"{NAMES[0]}.bak", f".{NAMES[0]}.{'0' * 16}", "x/y"]


def test_the_form_of_a_name() -> None:
    """A name has the time in UTC first, so that names sort by it, and the export's own name."""
    assert NAMES[0] == "progressdb-kms-19700102T000000Z-x_0000000000000001.export"
    assert sorted(NAMES) == NAMES
    assert all(map(is_export, NAMES))
    assert not any(map(is_export, OTHERS))
    assert [name for name in OTHERS if is_leftover(name)] == [OTHERS[3]]


@pytest.mark.parametrize(
    "keep, new, removed",
    [
        (1, 4, [0, 1, 2, 3]),
        (3, 4, [0, 1]),
        (5, 4, []),
        (9, 4, []),
        # The clock was wrong: the new one has an old date, and remains.
        (1, 0, [1, 2, 3, 4]),
        (2, 0, [1, 2, 3]),
    ],
)
def test_what_is_removed(keep: int, new: int, removed: list[int]) -> None:
    """The oldest go, the new one never does, and nothing that is not an export's name is touched."""
    assert surplus([*OTHERS, *NAMES], NAMES[new], keep) == [NAMES[number] for number in removed]


def test_a_new_export_that_is_not_listed_yet() -> None:
    """Storage that lists late costs no export more."""
    assert surplus(NAMES[:4], NAMES[4], 3) == NAMES[:2]

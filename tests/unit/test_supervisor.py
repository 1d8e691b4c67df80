"""What the supervisor makes of workers' ends; that it runs them is tested with real processes."""

from __future__ import annotations

import pytest

from progressdb_kms.bootstrap.supervisor import LONGEST_PAUSE, _report, _reported, pause
from progressdb_kms.domain.errors import InternalError, KekMismatch


def test_pauses_grow() -> None:
    """At once the first time, then ever later, but never for ever."""
    pauses = [pause(deaths) for deaths in range(1, 20)]
    assert pauses[:4] == [0, 1, 2, 4]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE


@pytest.mark.parametrize(
    "error", [KekMismatch("KEK version 1 is not the key"), FileNotFoundError(2, "No such file", "/a")]
)
def test_what_an_operator_may_read_is_handed_on(error: Exception) -> None:
    """The same class, so that the same line is printed as by one process."""
    handed = _reported(_report(error))
    assert type(handed) is type(error)
    assert str(handed) == str(error)


def test_of_a_bug_only_the_name_is_handed_on() -> None:
    """Its text may hold what was being processed."""
    report = _report(ValueError("secret"))
    assert b"secret" not in report
    handed = _reported(report)
    assert isinstance(handed, InternalError)
    assert "ValueError" in handed.detail


@pytest.mark.parametrize("text", [b"{", b"[1]", b""])
def test_a_torn_report_is_one_of_an_unknown_error(text: bytes) -> None:
    """Whoever is killed while it writes leaves half a line."""
    assert isinstance(_reported(text), InternalError)

"""A line of ``doctor``'s report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Result(StrEnum):
    """How a check went. Only FAIL keeps the service from doing its work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report.

    Attributes:
        check: What was looked at.
        result: How it went.
        detail: What was found.
        action: What to do; empty where nothing is.
    """

    check: str
    result: Result
    detail: str
    action: str = ""

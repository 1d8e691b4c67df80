"""What a verification of an audit log finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

_MOST_PROBLEMS: Final = 1000
_MOST_NOTES: Final = 1000


class Problem(NamedTuple):
    """Something that is not as it was written.

    Attributes:
        kind: ``changed``, ``removed``, ``truncated``, ``reordered``, ``duplicated``, ``forked``,
            ``after_close``, ``missing_chain``, ``unreadable``, ``unknown_key``, ``anchor``.
        chain: Which chain; empty where that can't be told.
        first: First record concerned, 0 where none can be named.
        last: Last record concerned.
        where: Source and line at which it was noticed; empty at the end.
        detail: In words.
    """

    kind: str
    chain: str
    first: int
    last: int
    where: str
    detail: str


class Tip(NamedTuple):
    """A place in a chain, as a signed document states it."""

    seq: int
    mac: str
    link: str
    closed: bool
    key_id: str


@dataclass(slots=True)
class ChainReport:
    """What was seen of a chain.

    Attributes:
        chain: Its name.
        instance: The process that wrote it, where its opening was seen.
        first: First record seen.
        last: Last record seen.
        records: How many were seen in their places.
        closed: It was closed in order.
        signed_to: Up to here a signature vouches for it.
        open_intents: Changes that were begun and of which no outcome is recorded.
    """

    chain: str
    instance: str = ""
    first: int = 0
    last: int = 0
    records: int = 0
    closed: bool = False
    signed_to: int = 0
    open_intents: int = 0


@dataclass(slots=True)
class AuditReport:
    """What a verification found. ``problems`` holds the first thousand of ``problem_count``."""

    records: int = 0
    unchained: int = 0
    ignored: int = 0
    chains: list[ChainReport] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    problem_count: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        """Whether nothing was found."""
        return self.problem_count == 0

    def problem(self, problem: Problem) -> None:
        """Take note of a problem."""
        self.problem_count += 1
        if len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(problem)

    def note(self, text: str) -> None:
        """Take note of what an auditor should know though nothing is wrong."""
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(text)

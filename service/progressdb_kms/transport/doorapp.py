"""What the fast door asks of the app that answers behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from progressdb_kms.transport.ordinary import Head

    Later = Callable[[], Awaitable["RawAnswer"]]

RawAnswer: TypeAlias = "tuple[int, bytes, bytes | list[bytes], bool]"
"""Status, header lines, body (a long one in pieces), and whether the connection must close after it."""


class Pending(Protocol):
    """An answer that somebody else's task will have."""

    def begin(self, tell: Callable[[Callable[[], RawAnswer]], None]) -> None:
        """Begin; ``tell`` is called once, later, with what makes the answer."""

    def give_up(self) -> None:
        """Tell nothing any more."""


class Ready(Protocol):
    """One kind of request, made ready from its head: the same head is not looked at twice."""

    body_limit: int
    """Bytes; a longer body is the slow way's to refuse."""

    def answer(self, session: object, body: bytes) -> RawAnswer | Later | Pending:
        """Answer a request, or return what will; none ever raises but for cancellation.

        A long body may be a bytearray, which nobody changes any more.
        """

    def late(self, session: object) -> RawAnswer:
        """Answer a request whose body did not come in time."""


class DoorApp(Protocol):
    """What the app has to say about hot routes."""

    starts: tuple[bytes, ...]
    """How the request lines of hot routes begin."""

    def ready(self, head: Head) -> Ready | None:
        """Make a request ready to be answered; None for the slow way."""

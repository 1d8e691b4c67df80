"""The board that workers share: numbers, what they said, and who takes a connection."""

from __future__ import annotations

import os

import pytest

from progressdb_kms.transport.board import MOST_SAID, SILENCE, Board, Stage


class Clock:
    """A clock that stands still."""

    now = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Give a clock."""
    return Clock()


@pytest.fixture
def board(clock: Clock) -> Board:
    """Give a board of three workers that serve."""
    made = Board(3, clock)
    for place in made.places:
        place.begin(100 + place.number)
        place.enter(Stage.SERVING)
    return made


def test_other_processes_see_it() -> None:
    """What a child writes is what its parent reads."""
    board = Board(2)
    pid = os.fork()
    if pid == 0:
        place = board.places[1]
        place.begin(os.getpid())
        place.connections = 7
        place.say(b"hello")
        os._exit(0)
    os.waitpid(pid, 0)
    assert (board.places[1].pid, board.places[1].connections) == (pid, 7)
    assert board.said() == [b"", b"hello", b""]


def test_what_was_said_is_the_last(board: Board) -> None:
    """Each saying replaces the one before; one that is too long leaves it."""
    place = board.places[0]
    for text in (b"a" * MOST_SAID, b"", b"bc", b"d"):
        place.say(text)
        assert place.said() == text
    with pytest.raises(ValueError, match="more than a worker can say"):
        place.say(b"x" * (MOST_SAID + 1))
    assert place.said() == b"d"
    assert board.places[1].said() == b""


def test_the_ended_leave_their_sums(board: Board) -> None:
    """Sums and the emptied place change together; that a worker has served is remembered."""
    place = board.places[1]
    place.say(b"mine")
    place.connections = 4
    board.move(place, b"sums")
    assert board.said() == [b"", b"", b"", b"sums"]
    assert (place.stage, place.connections, place.has_served) == (Stage.DOWN, 0, True)


def test_the_least_loaded_goes_first(board: Board, clock: Clock) -> None:
    """Who has more connections than another waits once; where all have as many nobody does."""
    first, second, third = board.places
    assert [place.hold_back(waited=False) for place in board.places] == [0, 0, 0]
    first.accepted, second.accepted, third.accepted = 2, 1, 2
    assert first.hold_back(waited=False) > 0
    assert first.hold_back(waited=True) == 0
    assert second.hold_back(waited=False) == 0
    # One that gives no sign of life, or ends, or starts, is not waited for.
    clock.now += 3
    first.alive()
    third.alive()
    assert first.hold_back(waited=False) == 0
    second.alive()
    second.enter(Stage.LEAVING)
    assert first.hold_back(waited=False) == 0


def test_who_starts_leaves_connections_to_those_that_serve(board: Board) -> None:
    """As long as another serves; at the very start all take what comes, and answer why not."""
    first, *others = board.places
    first.enter(Stage.STARTING)
    assert first.hold_back(waited=False) > 0
    assert first.hold_back(waited=True) > 0
    for place in others:
        place.enter(Stage.STARTING)
    assert first.hold_back(waited=False) == 0


def test_connections_of_all_count(board: Board) -> None:
    """The limit is reached by all together, whoever has them."""
    board.places[0].connections = 3
    board.places[2].connections = 2
    assert board.places[1].full(5)
    assert not board.places[1].full(6)


@pytest.mark.parametrize("stage", [Stage.STARTING, Stage.SERVING, Stage.LEAVING])
def test_a_silent_worker_hangs(board: Board, clock: Clock, stage: Stage) -> None:
    """Past the silence that its stage allows; one that is down can't."""
    place = board.places[0]
    place.enter(stage)
    clock.now += SILENCE[stage]
    assert not place.hung
    clock.now += 1
    assert place.hung
    place.clear()
    assert not place.hung


def test_who_ends_alone(board: Board) -> None:
    """A worker that ends while others serve, and the service does not end."""
    first, *others = board.places
    assert first.leaves_alone
    board.drain()
    assert not first.leaves_alone
    fresh = Board(2)
    assert not fresh.places[0].leaves_alone
    assert len(others) == 2

"""The fast door by itself: however a stream is cut, each request is answered in order, or handed on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.settings import Limits
from progressdb_kms.transport import door
from progressdb_kms.transport.connection import READ_BUFFER, Connection, Phase
from progressdb_kms.transport.door import Door
from progressdb_kms.transport.doorapp import RawAnswer, Ready
from progressdb_kms.transport.ordinary import Head

LIMITS = Limits(header_bytes=1024, body_bytes=1024, plaintext_bytes=1)


class Pause:
    """An awaitable that takes a step, as a store's answer does."""

    def __await__(self) -> Generator[None, None, None]:
        yield


class Waiting:
    """An answer that somebody else will have, when the test lets it."""

    def __init__(self, answer: RawAnswer, waiting: list[Waiting]) -> None:
        self.answer: RawAnswer | Exception = answer
        self.waiting = waiting
        self.given_up = False

    def begin(self, tell: Callable[[Callable[[], RawAnswer]], None]) -> None:
        """Wait for the test."""
        self.tell = tell
        self.waiting.append(self)

    def made(self) -> RawAnswer:
        """Make the answer."""
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def give_up(self) -> None:
        """Be told that nobody waits."""
        self.given_up = True


class Echo:
    """Answers with the path and the body; ``/later`` and ``/pending`` do not know the answer at once."""

    body_limit = 100

    def __init__(self, path: str, app: App) -> None:
        self.path = path
        self.app = app

    def answer(
        self, session: object, body: bytes
    ) -> RawAnswer | Callable[[], Awaitable[RawAnswer]] | Waiting:
        """Answer, or return what waits."""
        assert session == "the session"
        self.app.asked.append(body)
        answer = 200, b"", self.path.encode() + b":" + body, self.path == "/last"
        if self.path == "/pending":
            return Waiting(answer, self.app.waiting)
        return partial(self._wait, answer) if self.path == "/later" else answer

    async def _wait(self, answer: RawAnswer) -> RawAnswer:
        await Pause()
        return answer

    def late(self, session: object) -> RawAnswer:
        """Refuse."""
        assert session == "the session"
        return 408, b"", b"late", True


class App:
    """Four hot routes."""

    starts: tuple[bytes, ...] = tuple(
        f"POST /{name} HTTP/1.1".encode() for name in ("now", "later", "pending", "last")
    )

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.waiting: list[Waiting] = []

    def ready(self, head: Head) -> Ready | None:
        """Know the route, unless a field asks for something else."""
        return None if "odd" in head.fields else Echo(head.path, self)


class Task:
    """A coroutine that the test runs step by step."""

    def __init__(self, work: Any) -> None:
        self.work = work
        self.done = False
        self.running = False

    def step(self) -> None:
        """Run to its next wait."""
        self.running = True
        try:
            self.work.send(None)
        except StopIteration:
            self.done = True
        self.running = False

    def cancel(self) -> None:
        """End it."""
        self.work.close()
        self.done = True


class Line:
    """One connection with a door, and what came out of it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.connection = Connection("tls", "peer", None, limits=LIMITS, max_age=600, now=lambda: self.now)
        self.connection.attach(self, lambda: None)  # type: ignore[arg-type]  # as much of one as is used
        self.answers: list[bytes] = []
        self.handed_on: bytes | None = None
        self.tasks: list[Task] = []
        self.blocked = False
        self.reading = True
        self.later: list[Callable[[], None]] = []
        self.app = App()
        self.door = Door(
            app=self.app,
            session="the session",
            connection=self.connection,
            transport=self,  # type: ignore[arg-type]  # likewise
            limits=LIMITS,
            hand_on=self.hand_on,
            start=self.start,
            write=self.write_all,
            blocked=lambda: self.blocked,
            soon=self.later.append,
        )

    def feed(self, data: bytes) -> None:
        """Give input to whom it belongs."""
        if self.handed_on is None:
            self.door.received(data)
        else:
            self.connection.bytes_arrived(len(data))
            self.handed_on += data

    def hand_on(self, data: bytes) -> None:
        """Take what the door gives up, once."""
        assert self.handed_on is None
        self.handed_on = data

    def start(self, work: Callable[..., Any], *args: object) -> Any:
        """Start a task."""
        assert all(task.done or task.running for task in self.tasks), "two answers at once"
        self.tasks.append(Task(work(*args)))
        return self.tasks[-1]

    def step(self) -> None:
        """Let the event loop make a pass: what was left for it, and the outstanding answer."""
        due = self.later[:]
        self.later.clear()
        for turn in due:
            turn()
        for task in [task for task in self.tasks if not task.done]:
            task.step()
        waiting = self.app.waiting[:]
        self.app.waiting.clear()
        for each in waiting:
            each.tell(each.made)

    def settle(self) -> None:
        """Let all answers be given."""
        while self.later or self.app.waiting or not all(task.done for task in self.tasks):
            self.step()

    def write(self, data: bytes) -> None:
        """Take an answer: the transport's part."""
        self.answers.append(data.partition(b"\r\n\r\n")[2])

    async def write_all(self, parts: Iterable[bytes]) -> None:
        """Take an answer in pieces."""
        await Pause()
        if data := b"".join(parts):
            self.write(data)

    def is_closing(self) -> bool:
        """Stay open."""
        return False

    def pause_reading(self) -> None:
        """Hold the peer back."""
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        """Let the peer go on."""
        assert not self.reading
        self.reading = True

    def abort(self) -> None:
        """Be cut."""


def request(path: str, body: bytes, *fields: str) -> bytes:
    """Return a request."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


REQUESTS = st.one_of(
    st.builds(
        lambda path, body: (True, path.encode() + b":" + body, request(path, body)),
        st.sampled_from(["/now", "/later", "/pending"]),
        st.binary(max_size=100),
    ),
    st.builds(
        lambda raw: (False, b"", raw),
        st.sampled_from(
            [
                request("/other", b"abc"),
                request("/nowhere", b"POST /now HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"),
                request("/now", b"abc", "Odd: yes"),
                request("/now", b"abc", "Transfer-Encoding: chunked"),
                request("/now", b"x" * 101),
                request("/now", b"", "X: " + "y" * 2000),
                b"POST /now HTTP/1.0\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
                b"\r\n",
                b"\x16\x03\x01",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            ]
        ),
    ),
)


@given(st.lists(REQUESTS, min_size=1, max_size=6), st.data())
def test_a_stream_cut_anywhere(requests: list[tuple[bool, bytes, bytes]], data: st.DataObject) -> None:
    """The first k requests are answered in order, and the slow way gets all bytes from the (k+1)th on."""
    stream = b"".join(raw for _, _, raw in requests)
    cuts = data.draw(st.lists(st.tuples(st.integers(0, len(stream)), st.booleans()), max_size=12))
    line = Line()
    begin = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "SHARE", data.draw(st.sampled_from([16, door.SHARE])))
        patch.setattr(door, "PIECE", data.draw(st.sampled_from([80, door.PIECE])))
        for end, step in [*sorted(cuts), (len(stream), True)]:
            if end > begin:
                line.feed(stream[begin:end])
            begin = end
            if step:
                line.step()
        line.settle()
    answered = len(line.answers)
    assert line.answers == [answer for _, answer, _ in requests[:answered]]
    assert all(hot for hot, _, _ in requests[:answered])
    rest = b"".join(raw for _, _, raw in requests[answered:])
    if line.handed_on is None:
        # Nothing is held back for ever but the beginning of what may become a request.
        assert rest == b"" or any(rest.startswith(start[: len(rest)]) for start in App.starts)
    else:
        assert line.handed_on == rest
    assert line.connection.unread == len(rest)
    assert line.reading


@given(st.lists(st.sampled_from(["/now", "/later", "/pending"]), min_size=1, max_size=5), st.data())
def test_hot_requests_one_after_the_other_stay_at_the_door(paths: list[str], data: st.DataObject) -> None:
    """In however many pieces each comes, and though a next one begins while an answer is outstanding."""
    raws = [request(path, b"%d" % number) for number, path in enumerate(paths)]
    cuts = [sorted(data.draw(st.sets(st.integers(1, len(raw) - 1), max_size=4))) for raw in raws]
    waits = data.draw(st.lists(st.booleans(), min_size=len(raws), max_size=len(raws)))
    line = Line()
    for raw, places, wait in zip(raws, cuts, waits, strict=True):
        for begin, end in zip([0, *places], [*places, len(raw)], strict=True):
            line.feed(raw[begin:end])
        if wait:
            line.settle()
    line.settle()
    assert line.handed_on is None
    assert line.answers == [f"{path}:{number}".encode() for number, path in enumerate(paths)]
    assert line.connection.phase is Phase.IDLE


def test_each_further_request_of_a_piece_waits_for_its_turn() -> None:
    """One is answered at once, the others one a turn, in order, with what comes meanwhile behind them."""
    line = Line()
    line.feed(b"".join(request("/now", b"%d" % number) for number in range(4)))
    assert line.answers == [b"/now:0"]
    assert line.connection.phase.name == "HEADERS"
    line.step()
    line.feed(request("/later", b"4") + request("/now", b"5")[:-1])
    assert line.answers == [b"/now:0", b"/now:1"]
    line.settle()
    assert line.answers == [b"/now:0", b"/now:1", b"/now:2", b"/now:3", b"/later:4"]
    assert line.connection.deadline == LIMITS.body_timeout
    line.feed(b"5")
    assert line.answers[-1] == b"/now:5"
    assert line.connection.phase is Phase.IDLE
    assert line.connection.unread == 0


def test_a_peer_that_pipelines_without_end_is_held_back() -> None:
    """No more is read than can be kept, until the turns have made room."""
    line = Line()
    raw = request("/now", b"x" * 100)
    line.feed(raw * (READ_BUFFER // len(raw) + 3))
    assert not line.reading
    line.settle()
    assert line.reading
    assert len(line.answers) == READ_BUFFER // len(raw) + 3


@pytest.mark.parametrize("end", ["last", "drain", "abort", "blocked"])
def test_what_happens_between_two_turns_counts(end: str) -> None:
    """A last answer, a drain, a revocation, a peer that does not read: nothing is answered past them."""
    line = Line()
    second = request("/last" if end == "last" else "/now", b"1")
    line.feed(request("/now", b"0") + second + request("/now", b"2"))
    if end == "drain":
        line.connection.close_after_response()
        line.connection.finish_if_idle("drain")
    elif end == "abort":
        line.connection.abort("revoked")
    line.blocked = end == "blocked"
    line.step()
    line.step()
    expected = {"last": b"/last:1", "drain": b"/now:1", "blocked": b"/now:1"}
    assert line.answers == [b"/now:0", *filter(None, [expected.get(end)])]
    if end == "blocked":
        line.blocked = False
        line.settle()
        assert line.answers[2:] == [b"/now:2"]
    else:
        assert line.app.asked == [answer.partition(b":")[2] for answer in line.answers]
        assert line.connection.phase is Phase.CLOSING
        assert line.connection.unread > 0  # so that the closing side reads it away (RFC 9112 9.6)


@pytest.mark.parametrize("path", ["/later", "/pending"])
def test_nothing_is_looked_at_while_an_answer_is_outstanding(path: str) -> None:
    """The next request waits, up to a bound at which the peer is held back, and is then answered."""
    line = Line()
    line.feed(request(path, b"1"))
    line.feed(request("/now", b"2"))
    assert line.answers == []
    assert line.connection.phase is Phase.BUSY
    line.feed(b"x" * (READ_BUFFER + 1))
    assert not line.reading
    line.settle()
    assert line.reading
    assert line.answers == [f"{path}:1".encode(), b"/now:2"]
    assert line.handed_on == b"x" * (READ_BUFFER + 1)


def test_a_share_is_read_on_behind_an_outstanding_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its turn to be read from is not its next request's turn to be answered."""
    monkeypatch.setattr(door, "SHARE", 40)
    line = Line()
    line.feed(request("/later", b"1") + request("/now", b"2"))
    for turn in line.later:
        turn()
    assert line.answers == []
    line.settle()
    assert line.answers == [b"/later:1", b"/now:2"]


def test_who_sends_much_is_read_from_a_share_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long piece is the last one of its connection in a pass of the event loop."""
    monkeypatch.setattr(door, "SHARE", 40)
    line = Line()
    raw = request("/later", b"x" * 100)
    line.feed(raw[:80])
    assert not line.reading
    line.step()
    assert line.reading
    line.feed(raw[80:])
    line.settle()
    assert line.reading
    assert line.answers == [b"/later:" + b"x" * 100]


def test_a_peer_that_does_not_read_is_waited_for() -> None:
    """While the transport asks for a pause nothing more is answered."""
    line = Line()
    line.blocked = True
    line.feed(request("/now", b"1"))
    line.feed(request("/now", b"2"))
    assert line.answers == [b"/now:1"]
    line.blocked = False
    line.settle()
    assert line.answers == [b"/now:1", b"/now:2"]


def test_the_last_answer_closes() -> None:
    """An answer that ends the connection, and the first one after the connection's time is over."""
    line = Line()
    line.feed(request("/last", b""))
    assert line.connection.phase is Phase.CLOSING
    line.feed(request("/now", b""))
    assert line.answers == [b"/last:"]
    assert line.handed_on == request("/now", b"")
    line = Line()
    line.connection.close_after_response()
    line.feed(request("/later", b""))
    line.settle()
    assert (line.answers, line.connection.phase) == ([b"/later:"], Phase.CLOSING)


def test_a_body_that_does_not_come() -> None:
    """It has body_timeout, then it is answered and the connection closes; bytes do not buy more time."""
    line = Line()
    raw = request("/now", b"x" * 50)
    line.feed(raw[:-50])
    deadline = line.connection.deadline
    assert deadline == LIMITS.body_timeout
    line.now = 10
    line.feed(b"x")
    assert line.connection.deadline == deadline
    line.connection.expire()
    assert line.answers == [b"late"]
    assert (line.connection.phase, line.connection.why) == (Phase.CLOSING, "done")


def test_a_head_that_does_not_come() -> None:
    """It has header_timeout from its first byte."""
    line = Line()
    line.feed(b"POST /n")
    line.now = 5
    line.feed(b"ow HTTP/1.1\r\n")
    assert line.connection.deadline == LIMITS.header_timeout
    line.connection.expire()
    assert line.answers[0].startswith(b"{")
    assert (line.connection.phase, line.connection.why) == (Phase.CLOSING, "headers")


def test_headers_without_end_are_handed_on() -> None:
    """What is longer than headers may be is the slow way's to refuse."""
    line = Line()
    line.feed(b"POST /now HTTP/1.1\r\n")
    for _ in range(LIMITS.header_bytes):
        line.feed(b"X")
    assert line.handed_on is not None
    assert len(line.handed_on) == 20 + LIMITS.header_bytes


def test_a_closed_connection_ends_the_outstanding_answer() -> None:
    """Nobody is there to take it."""
    line = Line()
    line.feed(request("/later", b""))
    line.door.close()
    assert line.tasks[0].done
    assert line.answers == []


def test_a_closed_connection_gives_up_the_pending_answer() -> None:
    """Nobody is there to take it, and what is told all the same is not written."""
    line = Line()
    line.feed(request("/pending", b""))
    (waiting,) = line.app.waiting
    line.connection.abort("revoked")
    line.door.close()
    assert waiting.given_up
    waiting.tell(waiting.made)
    assert line.answers == []


def test_a_pending_answer_waits_for_a_peer_that_does_not_read() -> None:
    """It is written, and nothing else is answered before the peer has taken it."""
    line = Line()
    line.blocked = True
    line.feed(request("/pending", b"1"))
    line.feed(request("/now", b"2"))
    line.step()
    assert line.answers == [b"/pending:1"]
    line.blocked = False
    line.settle()
    assert line.answers == [b"/pending:1", b"/now:2"]


def test_a_long_pending_answer_goes_out_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a task, that waits for the peer."""
    monkeypatch.setattr(door, "PIECE", 20)
    line = Line()
    line.feed(request("/pending", b"x" * 50))
    line.settle()
    assert line.answers == [b"/pending:" + b"x" * 50]
    assert line.connection.phase is Phase.IDLE


@pytest.mark.parametrize("where", ["making", "writing"])
def test_a_bug_costs_one_connection(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever tells the answer, and the others that it tells, know nothing of it; the log does."""
    line = Line()
    line.feed(request("/pending", b"secret"))
    if where == "making":
        line.app.waiting[0].answer = TypeError("secret")
    else:
        monkeypatch.setattr(line, "write", None)
    line.step()
    assert line.connection.phase is Phase.CLOSING
    assert "TypeError" in caplog.text
    assert "secret" not in caplog.text

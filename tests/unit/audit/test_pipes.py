"""The stream to the standard output: nobody waits for its reader."""

from __future__ import annotations

import io
import os
import select
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_kms.audit import pipes
from progressdb_kms.audit.pipes import PatientStream, whole_lines
from tests.unit.audit.scene import Counts


def test_what_is_written_arrives_in_order() -> None:
    """And all of it, once it is closed."""
    target, counts = io.StringIO(), Counts()
    stream = PatientStream(target, counts)
    for number in range(100):
        stream.write(f"{number}\n")
    stream.close()
    assert target.getvalue() == "".join(f"{number}\n" for number in range(100))
    assert not counts.told


def test_a_full_pipe_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads: writing returns, what has no room is counted, what is held arrives in the end."""
    monkeypatch.setattr(pipes, "_MOST_CHARACTERS", 300_000)
    monkeypatch.setattr(pipes, "_FAREWELL", 0.01)
    reader, writer = os.pipe()
    counts = Counts()
    line = "x" * 999 + "\n"
    with os.fdopen(writer, "w") as target, os.fdopen(reader) as source:
        stream = PatientStream(target, counts)
        for _ in range(1000):  # far more than a pipe holds
            stream.write(line)
        assert counts.told["lost stdout"] >= 500
        stream.close()  # does not wait for ever either
        taken: list[str] = []

        def read() -> None:
            taken.extend(source.readline() for _ in range(1000 - counts.told["lost stdout"]))

        thread = threading.Thread(target=read)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
        assert set(taken) == {line}
        monkeypatch.setattr(pipes, "_FAREWELL", 30)
        stream.close()


def test_a_reader_that_is_gone_is_counted() -> None:
    """Nothing is raised at whoever writes."""
    target, counts = io.StringIO(), Counts()
    target.close()
    stream = PatientStream(target, counts)
    stream.write("a\nb\n")
    stream.close()
    assert counts.told == {"failed stdout": 1, "lost stdout": 2}


@given(st.lists(st.text("abc", max_size=3000), max_size=20))
def test_pieces_are_whole_lines_that_a_pipe_takes_whole(lines: list[str]) -> None:
    """Nothing is lost or cut, and a piece is over PIPE_BUF only where a line is."""
    text = "".join(line + "\n" for line in lines)
    pieces = list(whole_lines(text))
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces)
    assert all(len(piece) <= select.PIPE_BUF or piece.count("\n") == 1 for piece in pieces)

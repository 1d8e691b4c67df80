"""A stream to which writing never waits: a thread hands on what a reader takes slowly, or not at all."""

from __future__ import annotations

import select
import threading
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from progressdb_kms.ports.audit import AuditObserver

_MOST_CHARACTERS: Final = 16 * 2**20
"""Held for a reader that is behind; what comes then is dropped and counted, and a chain shows the hole."""
_FAREWELL: Final = 2.0
"""Seconds that ``close`` gives the reader to take the rest."""
_BREATH: Final = 0.01
"""Seconds between two writes: each wakes the thread, which takes the interpreter from whoever serves."""


class PatientStream:
    """Writes to a text stream from a thread of its own.

    Args:
        stream: Where to, a pipe as a rule.
        observer: Told of what was dropped.
    """

    def __init__(self, stream: TextIO, observer: AuditObserver) -> None:
        self._stream = stream
        self._observer = observer
        self._held: list[str] = []
        self._size = 0
        self._changed = threading.Condition()
        self._idle = False
        self._ending = False
        # A daemon: a reader that takes nothing must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="audit stdout", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        """Take lines, at once."""
        with self._changed:
            if self._size + len(text) > _MOST_CHARACTERS:
                self._observer.audit_lost("stdout", text.count("\n"))
                return len(text)
            self._held.append(text)
            self._size += len(text)
            if self._idle:
                self._idle = False
                self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Do nothing: the thread flushes what it has written."""

    def close(self) -> None:
        """Wait a little for the rest to be taken."""
        end = time.monotonic() + _FAREWELL
        self._ending = True
        with self._changed:
            while self._size and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._held:
                    self._idle = True
                    self._changed.wait()
                held, self._held = self._held, []
            text = "".join(held)
            try:
                for piece in whole_lines(text):
                    self._stream.write(piece)
                    self._stream.flush()
            except (OSError, ValueError):  # the reader is gone, or the stream closed: what comes is dropped
                self._observer.audit_failed("stdout")
                self._observer.audit_lost("stdout", text.count("\n"))
            with self._changed:
                self._size -= len(text)
                if self._ending:
                    self._changed.notify_all()
            if not self._ending:
                time.sleep(_BREATH)


def whole_lines(text: str) -> Iterator[str]:
    """Cut ASCII lines into pieces that a pipe takes whole (at most PIPE_BUF bytes, pipe(7)).

    Several workers write to one pipe: a longer piece could be cut in two by another's. A line that is longer
    by itself is a piece by itself.
    """
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if piece and size + len(line) > select.PIPE_BUF:
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if piece:
        yield "".join(piece)

"""The first process of a service with several workers: starts them, and again one that died; ends with them.

It holds no key, no certificate's key and no connection of any kind; it has no event loop and no thread, so
that it can fork at any time. It waits for signals and does nothing else.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn

import structlog
import uvloop

from progressdb_kms import __version__
from progressdb_kms.bootstrap.service import Seat, serve
from progressdb_kms.bootstrap.speaker import lay_down
from progressdb_kms.domain.errors import InternalError, KmsError, by_code
from progressdb_kms.observability.logs import configure_logs
from progressdb_kms.process import end_with_parent, harden
from progressdb_kms.transport.board import Board
from progressdb_kms.transport.listeners import bind_all

if TYPE_CHECKING:
    from progressdb_kms.settings import Settings
    from progressdb_kms.transport.board import Place
    from progressdb_kms.transport.listeners import Sockets

log = structlog.get_logger(__name__)

LONGEST_PAUSE: Final = 30.0
"""Seconds before a worker that dies again and again is started again."""
STEADY: Final = 60.0
"""Seconds after which a worker that died is one that had worked."""
_ENDING: Final = frozenset({signal.SIGTERM, signal.SIGINT})
_MOST_REPORTED: Final = 4096
"""Bytes: a pipe takes so much at once, so that a report is whole or not there."""


def serve_with_workers(settings: Settings) -> int:
    """Run the service in ``settings.workers`` processes until SIGTERM or SIGINT.

    Returns:
        The exit code: 0 where all workers ended in order, else 1.

    Raises:
        OperatorError: The service can't start as configured.
    """
    configure_logs(settings.log.level, settings.log.format)
    for line in harden():
        log.warning("process", detail=line)
    # Before there is a worker: one that ended at once would otherwise not be noticed.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_ENDING, signal.SIGCHLD})
    sockets = bind_all(settings.listen, settings.admin)
    try:
        # What is imported is shared with the workers as long as nobody writes to it, and the garbage
        # collector writes to all that it looks at.
        gc.collect()
        gc.freeze()
        return _Supervisor(settings, sockets).run()
    finally:
        sockets.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def pause(deaths: int) -> float:
    """Return for how many seconds to wait before a worker is started that has died so often in a row."""
    return 0.0 if deaths <= 1 else min(LONGEST_PAUSE, 2.0 ** (deaths - 2))


@dataclass(slots=True)
class _Worker:
    """A worker's process, or the time at which the next one is due."""

    place: Place
    pid: int = 0
    began: float = 0.0
    due: float = 0.0
    deaths: int = 0
    report: int = -1


@dataclass(slots=True)
class _Supervisor:
    settings: Settings
    sockets: Sockets
    board: Board = field(init=False)
    workers: list[_Worker] = field(init=False)
    failure: Exception | None = None
    code: int = 0

    def __post_init__(self) -> None:
        self.board = Board(self.settings.workers)
        self.workers = [_Worker(place) for place in self.board.places]

    def run(self) -> int:
        """Start all, and return when all have ended."""
        log.info("supervising", workers=len(self.workers), release=__version__)
        self._start_due()
        while any(worker.pid for worker in self.workers) or not self.board.draining:
            number = self._wait()
            if number in _ENDING:
                self._drain()
            self._reap()
            if not self.board.draining:
                self._start_due()
        if self.failure is not None:
            raise self.failure
        log.info("all_workers_ended", code=self.code)
        return self.code

    def _wait(self) -> int:
        """Wait for a signal, or until a worker is due; return the signal's number, 0 if none came."""
        waiting = [worker.due for worker in self.workers if not worker.pid]
        numbers = {*_ENDING, signal.SIGCHLD}
        if not waiting or self.board.draining:
            return signal.sigwaitinfo(numbers).si_signo
        came = signal.sigtimedwait(numbers, max(0.0, min(waiting) - time.monotonic()))
        return came.si_signo if came else 0

    def _drain(self) -> None:
        """Have all workers end. All at once, as their sockets are one."""
        self.board.drain()
        # Ours would keep the queue of connections open that nobody accepts any more.
        self.sockets.close(keep_file=True)
        for worker in self.workers:
            if worker.pid:
                os.kill(worker.pid, signal.SIGTERM)

    def _start_due(self) -> None:
        now = time.monotonic()
        for worker in self.workers:
            if not worker.pid and worker.due <= now:
                self._start(worker)

    def _start(self, worker: _Worker) -> None:
        reading, writing = os.pipe()
        supervisor = os.getpid()
        worker.place.begin(0)
        try:
            pid = os.fork()
        except OSError as error:  # out of memory or of processes: later there may be some
            os.close(reading)
            os.close(writing)
            self._ended(worker, f"no process to be had: {error.strerror}")
            return
        if pid == 0:
            os.close(reading)
            self._work(worker.place, supervisor, writing)
        os.close(writing)
        if worker.began:
            self.board.restarted()
        worker.pid, worker.began, worker.report = pid, time.monotonic(), reading

    def _work(self, place: Place, supervisor: int, report: int) -> NoReturn:
        """Be a worker."""
        code = 1
        try:
            place.begin(os.getpid())
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            end_with_parent(supervisor)
            code = uvloop.run(serve(self.settings, seat=Seat(place, self.sockets)))
        except BaseException as error:  # noqa: BLE001 - the top of this process; the supervisor says it
            if os.environ.get("PROGRESSDB_KMS_TRACEBACK") == "1":
                traceback.print_exception(error)
            os.write(report, _report(error))
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            # Not by returning: what is above on the stack is the supervisor's to end.
            os._exit(code)

    def _reap(self) -> None:
        """Take note of all processes that have ended; as process 1, of others' children too (init's duty)."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for worker in self.workers:
                if worker.pid == pid:
                    self._mourn(worker, os.waitstatus_to_exitcode(status))

    def _mourn(self, worker: _Worker, code: int) -> None:
        """Deal with a worker that has ended."""
        with os.fdopen(worker.report, "rb") as pipe:
            reported = pipe.read(_MOST_REPORTED)
        worker.pid, worker.report = 0, -1
        error = _reported(reported) if reported else None
        if self.board.draining:
            lay_down(worker.place)
            if code != 0:
                self.code = 1
                log.error("worker_ended_badly", worker=worker.place.number, code=code)
            return
        if error is not None and not all(each.place.has_served for each in self.workers):
            # At the start it is the configuration's fault or the code's, and the next would end likewise.
            # Later the others go on with what they have loaded, and one of many is no reason to end.
            self.failure = error
            lay_down(worker.place)
            self._drain()
            return
        if time.monotonic() - worker.began > STEADY:
            worker.deaths = 0
        self._ended(worker, str(error) if error else f"ended with {_described(code)}")

    def _ended(self, worker: _Worker, why: str) -> None:
        lay_down(worker.place)
        worker.deaths += 1
        seconds = pause(worker.deaths)
        worker.due = time.monotonic() + seconds
        log.error("worker_ended", worker=worker.place.number, why=why, again_in=seconds)


def _described(code: int) -> str:
    """Return words for an exit code as Python gives it."""
    if code >= 0:
        return f"code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _report(error: BaseException) -> bytes:
    """Write down an error for the supervisor; nothing of it but what an operator may read."""
    said: dict[str, Any]
    if isinstance(error, KmsError):
        said = {"code": error.code, "detail": error.detail[: _MOST_REPORTED // 8]}
    elif isinstance(error, OSError):
        name = str(error.filename) if error.filename is not None else None
        said = {"errno": error.errno, "strerror": error.strerror, "filename": name}
    else:
        said = {"type": type(error).__name__}
    return json.dumps(said).encode()[:_MOST_REPORTED]


def _reported(text: bytes) -> Exception:
    """Read what ``_report`` wrote."""
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        said = {"type": "an unknown error"}
    if "code" in said:
        return by_code().get(said["code"], InternalError)(said["detail"])
    if "errno" in said:
        return OSError(said["errno"], said["strerror"], said["filename"])
    return InternalError(f"a worker ended by {said['type']}; PROGRESSDB_KMS_TRACEBACK=1 shows where")

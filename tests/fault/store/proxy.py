"""A TCP proxy on loopback that can stop forwarding, in either direction, or break off within a reply."""

from __future__ import annotations

import contextlib
import socket
import threading
from enum import StrEnum


class Way(StrEnum):
    """A direction."""

    REQUESTS = "requests"
    REPLIES = "replies"


class Proxy:
    """Forwards every connection to one port.

    Args:
        port: The port behind it.

    Attributes:
        port: Its own.
    """

    def __init__(self, port: int) -> None:
        self._behind = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open = {way: threading.Event() for way in Way}
        self._cut = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._ended = False
        self.forward()
        self._start(self._accept)

    def freeze(self, *ways: Way) -> None:
        """Take what comes, and hold it back; connections stay."""
        for way in ways:
            self._open[way].clear()

    def cut(self) -> None:
        """Send half of each next reply and close its connection."""
        self._cut.set()

    def forward(self) -> None:
        """Forward everything, and what was held back first."""
        self._cut.clear()
        for gate in self._open.values():
            gate.set()

    def close(self) -> None:
        """End."""
        self._ended = True
        self.forward()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for sock in self._sockets:
                _shut(sock)
        for thread in self._threads:
            thread.join()

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)  # type: ignore[arg-type] # methods of this class
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._ended:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._behind))
            except OSError:
                near.close()
                continue
            with self._lock:
                self._sockets |= {near, far}
            left = [2]
            self._start(self._pump, near, far, Way.REQUESTS, left)
            self._start(self._pump, far, near, Way.REPLIES, left)

    def _pump(self, source: socket.socket, target: socket.socket, way: Way, left: list[int]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                self._open[way].wait()
                if way is Way.REPLIES and self._cut.is_set():
                    target.sendall(data[: len(data) // 2])
                    break
                target.sendall(data)
        _shut(source)
        _shut(target)
        with self._lock:
            left[0] -= 1
            if not left[0]:
                self._sockets -= {source, target}
                source.close()
                target.close()


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)

"""Blocking sockets whose every operation ends with the try that it belongs to."""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpcore


class Expiry(threading.local):
    """When the try that this thread makes has to end, on ``time.monotonic``."""

    at: float = float("inf")

    def bound(self, timeout: float | None) -> float:
        """Return ``timeout`` cut to what is left.

        Raises:
            TimeoutError: Nothing is left.
        """
        left = self.at - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return timeout if timeout is not None and timeout < left else left


@contextmanager
def _raising(timeout: type[Exception], failure: type[Exception]) -> Iterator[None]:
    """Raise a socket's errors as the driver expects them."""
    try:
        yield
    except TimeoutError as error:
        raise timeout(str(error)) from error
    except OSError as error:
        raise failure(str(error)) from error


class _Stream(httpcore.NetworkStream):
    """A socket whose every read and write is bounded by the try's end.

    The driver's own bounds each of them by itself, so that a service that sends a byte now and then would
    hold a call for ever.
    """

    def __init__(self, sock: socket.socket, expiry: Expiry) -> None:
        self._sock = sock
        self._expiry = expiry

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _raising(httpcore.ReadTimeout, httpcore.ReadError):
            self._sock.settimeout(self._expiry.bound(timeout))
            return self._sock.recv(max_bytes)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        rest = memoryview(buffer)
        with _raising(httpcore.WriteTimeout, httpcore.WriteError):
            while rest:
                self._sock.settimeout(self._expiry.bound(timeout))
                rest = rest[self._sock.send(rest) :]

    def close(self) -> None:
        self._sock.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        with _raising(httpcore.ConnectTimeout, httpcore.ConnectError):
            try:
                self._sock.settimeout(self._expiry.bound(timeout))
                return _Stream(
                    ssl_context.wrap_socket(self._sock, server_hostname=server_hostname), self._expiry
                )
            except BaseException:
                self._sock.close()
                raise

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - the driver's own signature
        if info == "is_readable":
            return self._is_readable()
        return self._sock if info == "socket" else None

    def _is_readable(self) -> bool:
        """Say whether an idle connection has something to read: its end, or what nobody asked for."""
        if self._sock.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))


class BoundedBackend(httpcore.NetworkBackend):
    """Opens such sockets for the driver."""

    def __init__(self, expiry: Expiry) -> None:
        self._expiry = expiry

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,  # noqa: ARG002 - never set by this client
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,  # noqa: ARG002 - likewise
    ) -> httpcore.NetworkStream:
        """Connect to the first address of ``host`` that answers."""
        with _raising(httpcore.ConnectTimeout, httpcore.ConnectError):
            sock = socket.create_connection((host, port), self._expiry.bound(timeout))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return _Stream(sock, self._expiry)

    def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,  # noqa: ARG002 - never set here
    ) -> httpcore.NetworkStream:
        """Connect to a Unix socket."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with _raising(httpcore.ConnectTimeout, httpcore.ConnectError):
            try:
                sock.settimeout(self._expiry.bound(timeout))
                sock.connect(path)
            except BaseException:
                sock.close()
                raise
        return _Stream(sock, self._expiry)

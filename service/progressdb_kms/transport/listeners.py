"""Listening sockets: TCP addresses and the Unix socket file."""

from __future__ import annotations

import asyncio
import errno
import grp
import logging
import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from progressdb_kms.domain.errors import SettingsInvalid

if TYPE_CHECKING:
    from collections.abc import Callable

    from progressdb_kms.settings import Admin, Listen, UnixListen

log = logging.getLogger(__name__)

BACKLOG = 1024
# Accepted in one turn of the event loop, so that a flood of connects does not hold up those being served:
# each costs some 0.2 ms until its handshake waits for the peer.
ACCEPT_AT_ONCE = 4
# Out of descriptors or memory, the listening socket stays readable: without a pause, accepting would spin.
ACCEPT_PAUSE = 0.5
_OUT_OF_SOMETHING = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
# sun_path of unix(7), less its closing NUL.
MAX_UNIX_PATH = 107


def listen_tcp(host: str, port: int, what: str) -> socket.socket:
    """Listen on a TCP address; ``::`` takes IPv4 as well. ``what`` is the setting's name.

    Raises:
        SettingsInvalid: The address can't be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
    except UnicodeError:  # what a host name of impossible length is, to getaddrinfo
        raise SettingsInvalid(f"{what}: {host[:32]!r} is not a host name") from None
    except OSError as error:
        raise SettingsInvalid(f"{what}: can't listen on {host} port {port}: {error.strerror}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)  # noqa: FBT003 - the standard library's signature
    except OSError as error:
        sock.close()
        raise SettingsInvalid(f"{what}: can't listen on {host} port {port}: {error.strerror}") from error
    return sock


class UnixSocket:
    """A listening Unix socket and its file.

    Args:
        listen: Where, and who may connect.

    Raises:
        SettingsInvalid: The path is taken or can't be made, or the group is unknown or not ours to give.
    """

    def __init__(self, listen: UnixListen) -> None:
        self.path = listen.path
        if len(os.fsencode(self.path)) > MAX_UNIX_PATH:
            raise SettingsInvalid(
                f"listen.unix.path is over {MAX_UNIX_PATH} bytes, more than a socket may have"
            )
        group = _group_id(listen.group)
        _remove_stale(self.path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._file: tuple[int, int] | None = None
        try:
            _bind(self.socket, self.path, int(listen.mode, 8))
            status = self.path.stat(follow_symlinks=False)
            self._file = (status.st_dev, status.st_ino)
            if group is not None:
                os.chown(self.path, -1, group, follow_symlinks=False)
            self.socket.listen(BACKLOG)
            self.socket.setblocking(False)  # noqa: FBT003 - the standard library's signature
        except OSError as error:
            self.close()
            raise SettingsInvalid(f"listen.unix: can't make {self.path}: {error.strerror}") from error

    def close(self, *, keep_file: bool = False) -> None:
        """Stop listening and remove the file, unless another process has put its own there.

        Args:
            keep_file: Leave it, as other processes listen on it.
        """
        self.socket.close()
        if keep_file:
            return
        with suppress(OSError):
            status = self.path.stat(follow_symlinks=False)
            if (status.st_dev, status.st_ino) == self._file:
                self.path.unlink()


def _bind(sock: socket.socket, path: Path, mode: int) -> None:
    # The file is born with no more than its final rights, and nobody can connect before listen().
    before = os.umask(0o777 & ~mode)
    try:
        sock.bind(os.fspath(path))
    finally:
        os.umask(before)


def _group_id(group: str | None) -> int | None:
    if group is None:
        return None
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise SettingsInvalid(f"listen.unix.group: there is no group {group} here") from None


def _remove_stale(path: Path) -> None:
    try:
        mode = path.stat(follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise SettingsInvalid(f"listen.unix: can't look at {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise SettingsInvalid(f"listen.unix: {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # noqa: FBT003 - a full backlog must not stop the start
        if probe.connect_ex(os.fspath(path)) != errno.ECONNREFUSED:
            raise SettingsInvalid(f"listen.unix: another process listens on {path}")
    with suppress(FileNotFoundError):
        path.unlink()


@dataclass(frozen=True, slots=True)
class Sockets:
    """The listening sockets of a service, bound once: by its only process, or before its workers begin."""

    tcp: socket.socket | None
    unix: UnixSocket | None
    admin: socket.socket

    def close(self, *, keep_file: bool = False) -> None:
        """Close those of this process; ``keep_file`` as for ``UnixSocket``."""
        self.admin.close()
        if self.tcp is not None:
            self.tcp.close()
        if self.unix is not None:
            self.unix.close(keep_file=keep_file)


def bind_all(listen: Listen, admin: Admin) -> Sockets:
    """Bind all addresses of a service.

    No address is ever shared (no SO_REUSEPORT), so that another service on it is refused, and never gets some
    of the connections.

    Raises:
        SettingsInvalid: One can't be had; nothing stays bound.
    """
    tcp: socket.socket | None = None
    unix: UnixSocket | None = None
    try:
        if listen.host is not None:
            tcp = listen_tcp(listen.host, listen.port, "listen")
        if listen.unix is not None:
            unix = UnixSocket(listen.unix)
        return Sockets(tcp, unix, listen_tcp(admin.host, admin.port, "admin"))
    except BaseException:
        if tcp is not None:
            tcp.close()
        if unix is not None:
            unix.close()
        raise


def peer_of(sock: socket.socket) -> str:
    """Return a TCP peer's address, for logs."""
    try:
        host, port = sock.getpeername()[:2]
    except OSError:
        return "unknown"  # gone already
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _at_once(*, waited: bool) -> float:  # noqa: ARG001 - the signature of those that do wait
    return 0.0


class Acceptor:
    """Accepts on a listening socket and hands each connection on.

    Not a task: a cancelled one could lose a connection that it has just accepted.

    Args:
        sock: Listening, non-blocking; closed by ``close``.
        accepted: Takes each connection's socket, and must not raise.
        hold_back: Says for how many seconds to leave a waiting connection to other processes that listen on
            the socket; 0 takes it. Told whether that time has been waited already.
    """

    def __init__(
        self,
        sock: socket.socket,
        accepted: Callable[[socket.socket], None],
        hold_back: Callable[..., float] = _at_once,
    ) -> None:
        self._sock = sock
        self._accepted = accepted
        self._hold_back = hold_back
        self._waited = False
        self._loop = asyncio.get_running_loop()
        self._paused: asyncio.TimerHandle | None = None
        self._closed = False
        self._resume()

    def close(self) -> None:
        """Stop accepting; connects are refused from now on."""
        if not self._closed:
            self._closed = True
            if self._paused is None:
                self._loop.remove_reader(self._sock)
            else:
                self._paused.cancel()
            self._sock.close()

    def finish(self) -> None:
        """Take what has connected already, then stop accepting.

        Closing the last descriptor of a listening socket resets the connections in its queue, whose peers may
        have sent a request. What connects between the last look and the close is reset all the same: Linux
        has no way to close the entrance alone.
        """
        if not self._closed and self._paused is None:
            for _ in range(BACKLOG + 1):
                if not self._take():
                    break
        self.close()

    def _resume(self) -> None:
        self._paused = None
        self._loop.add_reader(self._sock, self._accept)

    def _pause(self, seconds: float) -> None:
        # The socket stays readable: with the reader left in place the event loop would spin.
        self._loop.remove_reader(self._sock)
        self._paused = self._loop.call_later(seconds, self._resume)

    def _accept(self) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            if self._closed:
                return
            seconds = self._hold_back(waited=self._waited)
            self._waited = seconds > 0
            if seconds:
                self._pause(seconds)
                return
            if not self._take():
                return

    def _take(self) -> bool:
        """Accept a connection; return whether there may be another one."""
        try:
            sock, _address = self._sock.accept()
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            if error.errno in _OUT_OF_SOMETHING:
                log.error("can't accept connections: %s", error.strerror)  # noqa: TRY400 - no traceback's worth
                self._pause(ACCEPT_PAUSE)
                return False
            return True  # that one connection is gone: ECONNABORTED and the like, accept(2)
        sock.setblocking(False)  # noqa: FBT003 - the standard library's signature
        self._accepted(sock)
        return True

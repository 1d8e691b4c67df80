from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from progressdb_kms.domain.errors import SettingsInvalid
from progressdb_kms.settings import Admin, Drain, Limits, Listen, UnixListen
from progressdb_kms.transport.events import Silent
from progressdb_kms.transport.identity import IdentityRefused, peer_identity
from progressdb_kms.transport.listeners import UnixSocket, listen_tcp
from progressdb_kms.transport.server import Server
from tests.transport.app import App

if TYPE_CHECKING:
    from tests.transport.conftest import Serve

ME = os.getuid()


async def test_identity_is_the_uid(serve: Serve) -> None:
    """A peer that is let in is known by its user id."""
    running = await serve()
    assert (await (await running.unix_peer()).get("/who")).json["identity"] == f"uid:{ME}"


async def test_peer_refused(serve: Serve, tmp_path: Path) -> None:
    """A peer that is not listed is closed and counted before it can send anything."""
    running = await serve(
        unix=UnixListen(path=tmp_path / "s", allow_uids=(ME + 1,), allow_gids=(os.getgid() + 1,))
    )
    assert await (await running.unix_peer()).end() == b""
    await running.events.until("refused", "peer_uid")
    assert running.app.scopes == []


def test_peer_by_group() -> None:
    """A peer's primary group lets it in as well; its identity is the user all the same."""
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        listen = UnixListen(path=Path("s"), allow_gids=(os.getgid(),))
        assert str(peer_identity(one, listen)) == f"uid:{ME}"
        with pytest.raises(IdentityRefused) as refused:
            peer_identity(one, UnixListen(path=Path("s"), allow_uids=(ME + 1,)))
        assert refused.value.reason == "peer_uid"


@pytest.mark.parametrize("mode", ["0600", "0660", "666"])
def test_mode_and_group(tmp_path: Path, mode: str) -> None:
    """The file has the configured mode whatever the umask is, which stays as it was, and the group."""
    path = tmp_path / "s"
    before = os.umask(0o027)
    try:
        unix = UnixSocket(UnixListen(path=path, mode=mode, group=str(os.getgid())))
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    status = path.stat()
    assert stat.S_IMODE(status.st_mode) == int(mode, 8)
    assert status.st_gid == os.getgid()
    unix.close()
    assert not path.exists()


@pytest.mark.skipif(ME != 0, reason="only root can give a file to any group")
def test_a_foreign_group(tmp_path: Path) -> None:
    """The file gets a group by name too."""
    unix = UnixSocket(UnixListen(path=tmp_path / "s", group="daemon"))
    assert (tmp_path / "s").group() == "daemon"
    unix.close()


def test_unknown_group(tmp_path: Path) -> None:
    """A group that does not exist is a clear error, and no socket is made."""
    with pytest.raises(SettingsInvalid, match="no group nobody-has-this"):
        UnixSocket(UnixListen(path=tmp_path / "s", group="nobody-has-this"))
    assert not (tmp_path / "s").exists()


def test_stale_file_replaced(tmp_path: Path) -> None:
    """A socket file that a killed process left is replaced."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    inode = path.stat().st_ino
    unix = UnixSocket(UnixListen(path=path))
    assert path.exists()
    unix.close()
    assert not path.exists()
    assert inode


def test_a_file_in_use_is_left_alone(tmp_path: Path) -> None:
    """Where another process listens, starting fails and its socket stays."""
    path = tmp_path / "s"
    other = UnixSocket(UnixListen(path=path))
    with pytest.raises(SettingsInvalid, match="another process listens"):
        UnixSocket(UnixListen(path=path))
    assert path.exists()
    other.close()


def test_another_kind_of_file_is_left_alone(tmp_path: Path) -> None:
    """A regular file at the path is never removed."""
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(SettingsInvalid, match="not a socket"):
        UnixSocket(UnixListen(path=path))
    assert path.read_text() == "precious"


def test_a_successors_file_is_left_alone(tmp_path: Path) -> None:
    """Closing does not remove a file that another process has put there since."""
    path = tmp_path / "s"
    first = UnixSocket(UnixListen(path=path))
    path.unlink()
    second = UnixSocket(UnixListen(path=path))
    first.close()
    assert path.exists()
    second.close()


@pytest.mark.parametrize("path", ["missing/s", "x" * 200, "file/s"])
def test_impossible_paths(tmp_path: Path, path: str) -> None:
    """A path that can't be a socket is a one-line error."""
    (tmp_path / "file").touch()
    with pytest.raises(SettingsInvalid, match=r"^listen\.unix.*[^\n]$"):
        UnixSocket(UnixListen(path=tmp_path / path))


def bare(listen: Listen, admin: Admin) -> Server:
    """Return a server without TLS."""
    return Server(
        app=App(),
        admin_app=App(),
        listen=listen,
        admin=admin,
        limits=Limits(),
        drain=Drain(),
        tls=None,
        session_for=str,
        events=Silent(),
    )


async def test_failed_start_leaves_nothing(tmp_path: Path) -> None:
    """Where the last address can't be had, the ones before it are given back."""
    path = tmp_path / "s"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        admin = Admin(host="127.0.0.1", port=taken.getsockname()[1])
        server = bare(Listen(host=None, unix=UnixListen(path=path, allow_uids=(ME,))), admin)
        with pytest.raises(
            SettingsInvalid, match=r"admin: can't listen on 127.0.0.1 port \d+: Address already in use"
        ):
            await server.start()
    assert not path.exists()
    await server.abort()


@pytest.mark.parametrize(
    "host,why", [("192.0.2.1", "Cannot assign requested address"), ("a" * 300, "'aaa.*' is not a host name")]
)
async def test_impossible_addresses(host: str, why: str) -> None:
    """An address that is not this machine's, and what is none, are one-line errors."""
    with pytest.raises(SettingsInvalid, match=f"^admin: .*{why}$"):
        listen_tcp(host, 0, "admin")


@pytest.mark.parametrize("host", ["::1", "localhost"])
async def test_addresses(host: str, tmp_path: Path) -> None:
    """Names and IPv6 addresses can be listened on; TCP without TLS can't."""
    server = bare(Listen(host=None, unix=UnixListen(path=tmp_path / "s")), Admin(host=host, port=0))
    await server.start()
    assert server.tcp_address is None
    with socket.create_connection(server.admin_address):
        pass
    await server.abort()
    with pytest.raises(SettingsInvalid, match="TLS only"):
        await bare(Listen(host=host, port=0), Admin(host=host, port=0)).start()

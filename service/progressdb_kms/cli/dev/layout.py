"""What dev mode keeps under its directory, and making it: once, never overwriting what is there."""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

import click

from progressdb_kms.audit.keyfile import KEY_NAME, PUBLIC_NAME, new_audit_key
from progressdb_kms.cli import pki
from progressdb_kms.kek.atomic import replace_file, write_once
from progressdb_kms.kek.init import init_kek_file

CLIENTS: Final = ("server", "operator", "chat", "stranger")
_SERVER: Final = "kms"
_LEAF_DAYS: Final = 365
_RENEW_WITHIN: Final = dt.timedelta(days=1)
_SUN_PATH_MAX: Final = 107
"""Bytes of a Unix socket's path on Linux: sun_path less its final NUL (unix(7))."""

_POLICY: Final = """\
# Who may do what; nobody else may do anything. The certificate `stranger` is named nowhere.
rules:
  - identities: ["dns:server", "uid:{uid}"]
    permissions: [key:create, key:encrypt, key:decrypt, key:read]
  # examples/chat_server
  - identities: ["dns:chat"]
    permissions: [key:create, key:encrypt, key:decrypt, key:admin, key:destroy]
    thread_prefixes: ["chat:"]
  - identities: ["dns:operator"]
    permissions:
      [key:create, key:encrypt, key:decrypt, key:read, key:destroy, key:admin, rotation:run, audit:read]
"""

_CONFIG: Final = """\
# Made once by `progressdb-kms dev` and yours to change. Paths are relative to this file.
# dev itself overrides the ports (by its options), listen.unix.path and store.url.
listen:
  host: 127.0.0.1
  port: 8443
  unix:
    path: {socket}
    mode: "0600"
    allow_uids: [{uid}]
admin:
  host: 127.0.0.1
  port: 9090
tls:
  cert: pki/kms.crt
  key: pki/kms.key
  client_ca: pki/ca.crt
policy: policy.yaml
# The page for operators: https://127.0.0.1:8443/ui/ with the certificate of `operator`.
ui: true
kek:
  path: kek.yaml
store:
  url: {store_url}
audit:
  key_file: audit.yaml
drain:
  delay: 0.2
  timeout: 10
log:
  format: text
"""


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of one dev directory.

    Attributes:
        directory: Absolute path of the directory.
        sockets: Where its Unix sockets are: the directory itself, unless its path is too long for that.
    """

    directory: Path
    sockets: Path

    @property
    def pki(self) -> Path:
        """The CA and all certificates."""
        return self.directory / "pki"

    @property
    def config(self) -> Path:
        """The service's configuration."""
        return self.directory / "config.yaml"

    @property
    def kek_file(self) -> Path:
        """The KEK file."""
        return self.directory / "kek.yaml"

    @property
    def audit_key(self) -> Path:
        """The audit key; its public half, for `audit verify --public-key`, is beside it."""
        return self.directory / KEY_NAME

    @property
    def policy(self) -> Path:
        """The policy."""
        return self.directory / "policy.yaml"

    @property
    def ready(self) -> Path:
        """What runs now, as JSON; absent while nothing does."""
        return self.directory / "ready.json"

    @property
    def demo(self) -> Path:
        """The message that the first ``--demo`` left."""
        return self.directory / "demo.json"

    @property
    def store(self) -> Path:
        """The store's data."""
        return self.directory / "redis"

    @property
    def socket(self) -> Path:
        """The service's Unix socket."""
        return self.sockets / "kms.sock"

    @property
    def store_socket(self) -> Path:
        """The store's Unix socket."""
        return self.sockets / "redis" / "redis.sock"

    @property
    def store_url(self) -> str:
        """The store's URL."""
        return f"unix://{quote(str(self.store_socket))}"


def open_layout(directory: Path) -> Layout:
    """Return the layout of a directory, made (0700) if it is missing.

    Raises:
        click.ClickException: There is no directory for its sockets that is short enough and ours.
        OSError: It can't be made.
    """
    directory = directory.absolute()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _fits(directory):
        return Layout(directory, directory)
    return Layout(directory, _short_directory(directory))


@contextlib.contextmanager
def locked(layout: Layout) -> Iterator[None]:
    """Hold the directory against a second dev.

    Raises:
        click.ClickException: Another one runs on it.
    """
    with (layout.directory / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise click.ClickException(f"another dev runs on {layout.directory}") from None
        yield


def prepare(layout: Layout) -> None:
    """Make what is missing, and renew certificates that expire within a day.

    Raises:
        TlsInvalid, KekFileInvalid: What is there is unusable and can't be made anew without harm.
        OSError: A file can't be written.
    """
    if not (layout.pki / "ca.crt").exists():
        pki.init_ca(layout.pki)
    for name in (_SERVER, *CLIENTS):
        if not pki.is_usable(layout.pki, name, within=_RENEW_WITHIN):
            _issue(layout, name)
    if not layout.kek_file.exists():
        init_kek_file(layout.kek_file)
    if not layout.audit_key.exists():
        # The public half first: with the secret one there, nothing would be made any more.
        secret, public, _ = new_audit_key()
        replace_file(layout.audit_key.with_name(PUBLIC_NAME), public, 0o644)
        _once(layout.audit_key, secret)
    uid = os.getuid()
    _once(layout.policy, _POLICY.format(uid=uid))
    # A JSON string is a YAML string, whatever characters the path has.
    names = {"socket": json.dumps(str(layout.socket)), "store_url": json.dumps(layout.store_url)}
    _once(layout.config, _CONFIG.format(uid=uid, **names))


def _issue(layout: Layout, name: str) -> None:
    if name == _SERVER:
        addresses = ["127.0.0.1", "::1"]
        pki.issue(layout.pki, name, server=True, dns=["localhost"], ips=addresses, days=_LEAF_DAYS)
    else:
        pki.issue(layout.pki, name, days=_LEAF_DAYS)


def _once(path: Path, text: str | bytes) -> None:
    with contextlib.suppress(FileExistsError):
        write_once(path, text.encode() if isinstance(text, str) else text, 0o600)


def _short_directory(directory: Path) -> Path:
    """Return a directory with a short path, the same one for the same ``directory``, that only we can enter.

    Raises:
        click.ClickException: Someone else has made it, or opened it to others, or its path is long as well.
    """
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:12]
    short = Path(tempfile.gettempdir()) / f"progressdb-kms-{os.getuid()}-{name}"
    with contextlib.suppress(FileExistsError):
        short.mkdir(mode=0o700)
    # The name can be guessed and the place is everyone's. lstat, since a link may lead anywhere.
    found = short.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise click.ClickException(f"{short} is not a directory of ours alone (mode 0700); remove it")
    if not _fits(short):
        raise click.ClickException(f"no room for a Unix socket: {directory} and TMPDIR both have long paths")
    return short


def _fits(sockets: Path) -> bool:
    return len(os.fsencode(sockets / "redis" / "redis.sock")) <= _SUN_PATH_MAX

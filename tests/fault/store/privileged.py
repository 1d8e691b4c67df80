"""Faults of a machine that only root can bring about: a full disk, a network that is cut."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from contextlib import suppress

from tests.fault.store.scenarios import Alone
from tests.integration.world import eventually
from tests.store.servers import ALWAYS, Server, free_port


class FullDisk(Alone):
    """The disk of the append-only file is full: Redis exits, and is started again. Needs root."""

    def make(self) -> Server:
        """Start the server on a small disk."""
        self._mounted = self.folder / "store"
        self._mounted.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(self._mounted)], check=True)
        return super().make()

    def kinds(self) -> list[Callable[[], Callable[[], object]]]:
        """Return its faults."""
        return [self._fill]

    def _fill(self) -> Callable[[], object]:
        ballast = self._mounted / "ballast"
        # Redis takes of the same room meanwhile: the end is where nothing more fits.
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(65_536))

        def mend() -> None:
            assert self.server.process
            eventually(lambda: self.server.process and self.server.process.poll() is not None, "Redis exits")
            ballast.unlink()
            self.server.start()

        return mend

    def close(self) -> None:
        """End all."""
        super().close()
        subprocess.run(["umount", "--lazy", str(self._mounted)], check=True)


class NetworkCut(Alone):
    """The store is in a network of its own, whose link goes down or whose packets are dropped. Needs root."""

    port = True

    def make(self) -> Server:
        """Start the server behind a pair of virtual interfaces."""
        number = os.getpid() % 65_000
        self._space, self._here, self._there = f"kms-{number}", f"kmsa{number}", f"kmsb{number}"
        net = f"10.{200 + number % 50}.{number // 256}"
        self._address = f"{net}.2"
        _ip("netns", "add", self._space)
        _ip("link", "add", self._here, "type", "veth", "peer", "name", self._there, "netns", self._space)
        _ip("addr", "add", f"{net}.1/24", "dev", self._here)
        _ip("link", "set", self._here, "up")
        _ip("-n", self._space, "addr", "add", f"{net}.2/24", "dev", self._there)
        _ip("-n", self._space, "link", "set", self._there, "up")
        return Server(
            "redis",
            self.folder / "store",
            {**ALWAYS, "bind": self._address, "protected-mode": "no"},
            free_port(),
            prefix=("ip", "netns", "exec", self._space),
        ).start()

    @property
    def url(self) -> str:
        """The store's URL."""
        return f"redis://{self._address}:{self.server.port}"

    def kinds(self) -> list[Callable[[], Callable[[], object]]]:
        """Return its faults."""
        return [self._drop, self._unplug]

    def _drop(self) -> Callable[[], object]:
        rule = ["ip", "netns", "exec", self._space, "iptables"]
        subprocess.run([*rule, "-A", "INPUT", "-j", "DROP"], check=True)
        return lambda: subprocess.run([*rule, "-F", "INPUT"], check=True)

    def _unplug(self) -> Callable[[], object]:
        _ip("-n", self._space, "link", "set", self._there, "down")
        return lambda: _ip("-n", self._space, "link", "set", self._there, "up")

    def close(self) -> None:
        """End all."""
        super().close()
        _ip("netns", "del", self._space)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)

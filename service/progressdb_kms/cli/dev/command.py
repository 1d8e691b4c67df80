"""``dev``: makes what is missing, starts a store, serves, and says where."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import uvloop
from msgspec.structs import replace

from progressdb_kms.bootstrap import service
from progressdb_kms.cli.dev.layout import CLIENTS, Layout, locked, open_layout, prepare
from progressdb_kms.cli.dev.store import DevStore
from progressdb_kms.domain.errors import KmsError
from progressdb_kms.kek.atomic import replace_file
from progressdb_kms.settings import Settings, load_settings

_port = click.IntRange(0, 65535)


@dataclass(frozen=True, slots=True)
class _Options:
    port: int | None
    admin_port: int | None
    ready_file: Path | None
    demo: bool


@click.command()
@click.option(
    "--dir",
    "directory",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Holds everything.",
)
@click.option("--port", type=_port, help="API port, 0 for any free one; the configuration says 8443.")
@click.option("--admin-port", type=_port, help="Port of probes and metrics, likewise; 9090.")
@click.option(
    "--ready-file", type=click.Path(path_type=Path), help="Written as JSON when ready, beside DIR/ready.json."
)
@click.option("--demo", is_flag=True, help="Show a round trip over mTLS, and curl lines to paste.")
def dev(
    directory: Path, port: int | None, admin_port: int | None, ready_file: Path | None, *, demo: bool
) -> int:
    """Run a service for development, with its own certificates, KEK, policy and durable store.

    All of it is made under DIR once; started again on DIR, the service finds its keys.
    """
    if ready_file is not None and not ready_file.absolute().parent.is_dir():
        raise click.UsageError(f"--ready-file: there is no directory {ready_file.parent}")
    layout = open_layout(directory)
    with locked(layout):
        dev_service = _Dev(layout, _Options(port, admin_port, ready_file, demo))
        return uvloop.run(dev_service.run())


class _Dev:
    """One run of the service on a dev directory."""

    def __init__(self, layout: Layout, options: _Options) -> None:
        self._layout = layout
        self._options = options
        self._store = DevStore(layout.store, layout.store_socket)
        self._ready_files = [layout.ready, *([options.ready_file.absolute()] if options.ready_file else [])]
        self._addresses: service.Addresses | None = None
        self._demo: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT, and return the exit code."""
        # Of a run that was killed; whoever waits for the new one must not find the old.
        self._remove_ready_files()
        prepare(self._layout)
        settings = self._settings()
        try:
            await self._store.start()
            keeper = asyncio.create_task(self._store.supervise(self._write_ready_files))
            try:
                return await service.serve(settings, on_ready=self._ready)
            finally:
                keeper.cancel()
                if self._demo is not None:
                    self._demo.cancel()
                await asyncio.gather(keeper, *filter(None, [self._demo]), return_exceptions=True)
        finally:
            self._remove_ready_files()
            self._store.stop()

    def _settings(self) -> Settings:
        settings = load_settings(self._layout.config)
        listen, admin = settings.listen, settings.admin
        if self._options.port is not None:
            listen = replace(listen, port=self._options.port)
        if self._options.admin_port is not None:
            admin = replace(admin, port=self._options.admin_port)
        if listen.unix is not None:
            listen = replace(listen, unix=replace(listen.unix, path=self._layout.socket))
        store = replace(settings.store, url=self._layout.store_url)
        # The store is this process's child: here one process does all.
        return replace(settings, workers=1, listen=listen, admin=admin, store=store)

    def _ready(self, addresses: service.Addresses) -> None:
        self._addresses = addresses
        self._write_ready_files()
        ready = self._describe(addresses)
        click.echo(
            f"dev: serving {ready['url']} and {ready['unix']}; probes and metrics {ready['admin_url']}"
        )
        if self._options.demo and addresses.tcp is not None:
            self._demo = asyncio.create_task(self._show_demo(ready))

    async def _show_demo(self, ready: dict[str, Any]) -> None:
        # Only here: it brings the client, which the service does without.
        from progressdb_kms.cli.dev.demo import show_round_trip  # noqa: PLC0415 - see above

        try:
            await asyncio.to_thread(show_round_trip, ready, self._layout.demo)
        except (KmsError, OSError) as error:
            click.echo(f"dev: the round trip failed: {error}", err=True)

    def _describe(self, addresses: service.Addresses) -> dict[str, Any]:
        layout = self._layout
        host, port = addresses.admin
        return {
            "url": f"https://localhost:{addresses.tcp[1]}" if addresses.tcp else None,
            "admin_url": f"http://{host}:{port}",
            "unix": str(addresses.unix) if addresses.unix else None,
            "ca": str(layout.pki / "ca.crt"),
            "config": str(layout.config),
            "kek_file": str(layout.kek_file),
            "redis_url": layout.store_url,
            "pid": os.getpid(),
            "store_pid": self._store.pid,
            "clients": {
                name: {"cert": str(layout.pki / f"{name}.crt"), "key": str(layout.pki / f"{name}.key")}
                for name in CLIENTS
            },
        }

    def _write_ready_files(self) -> None:
        """Write what runs now; again after the store was started again, as its process id is in there."""
        if self._addresses is None:
            return
        text = json.dumps(self._describe(self._addresses), indent=2) + "\n"
        for path in self._ready_files:
            replace_file(path, text.encode(), 0o600)

    def _remove_ready_files(self) -> None:
        for path in self._ready_files:
            path.unlink(missing_ok=True)

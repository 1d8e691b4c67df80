"""How a command works on the store itself: by the service's configuration."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from progressdb_kms.usecases.keks import KekBook
    from progressdb_kms.usecases.vault import Vault

T = TypeVar("T")

config_option: Callable[..., Any] = click.option(
    "--config",
    "config",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The service's configuration file: store and KEKs are taken from it.",
)
export_file = click.Path(path_type=Path, dir_okay=False)
INCOMPLETE = 3
"""Exit code: done, but not all of it was in order; the output says what."""
RESUMABLE = 75
"""Exit code: stopped before it was done, to be run again (EX_TEMPFAIL of sysexits.h)."""


class Stopped(click.ClickException):
    """SIGTERM came before the end."""

    exit_code = RESUMABLE


def on_vault(config: Path, command: str, action: Callable[[Vault], Awaitable[T]]) -> T:
    """Run something on the configured store; for what must work on an empty store too.

    Raises:
        KmsError: As the action does, or as ``bootstrap.open_vault``.
    """
    return on_store(config, command, lambda vault, _: action(vault), registered=False)


def on_store(
    config: Path,
    command: str,
    action: Callable[[Vault, KekBook], Awaitable[T]],
    *,
    registered: bool = True,
) -> T:
    """Run something on the configured store whose registry agrees with the loaded KEKs.

    Decrypt-only versions may be missing, which is said on standard error: else a version that was erased
    could not be retired in a store that was filled from an older export.

    Raises:
        KmsError: As the action does, or as ``bootstrap.open_vault``; and KekMismatch.
        Stopped: SIGTERM came. The action was cancelled, so it has cleaned up.
    """
    # Only here: commands that call the service need neither Quart nor Redis.
    from progressdb_kms.bootstrap import open_vault  # noqa: PLC0415 - see above
    from progressdb_kms.settings import load_settings  # noqa: PLC0415 - see above
    from progressdb_kms.usecases.backup import current_view  # noqa: PLC0415 - see above

    settings = load_settings(config)

    async def run() -> T:
        # As asyncio.Runner does for SIGINT: an exception would end whatever task runs at the moment. A
        # container's first process has no default action for a signal.
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def stop(_number: int, _frame: object) -> None:
            if task is not None:
                loop.call_soon_threadsafe(task.cancel)

        signal.signal(signal.SIGTERM, stop)
        async with open_vault(settings, command) as (vault, keks):
            if registered:
                # An empty store has no registry, and no such command may make one.
                await current_view(vault)
                await keks.start(time.time(), may_lack=True)
                if keks.problem:
                    click.echo(f"progressdb-kms: warning: {keks.problem}", err=True)
            return await action(vault, keks)

    before = signal.getsignal(signal.SIGTERM)
    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        raise Stopped("stopped: run it again") from None
    finally:
        signal.signal(signal.SIGTERM, before)

"""The command group, and the one place where errors become a line on standard error and an exit code."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Final, cast

import click

from progressdb_kms.cli import missing
from progressdb_kms.domain.errors import KmsError

_NAME: Final = "progressdb-kms"
_INTERRUPTED: Final = 128 + 2

_COMMANDS: Final = {
    "audit": "audit:audit",
    "backup": "backup:backup",
    "decrypt": "messages:decrypt",
    "dev": "dev.command:dev",
    "doctor": "doctor:doctor",
    "encrypt": "messages:encrypt",
    "kek": "kek:kek",
    "keys": "keys:keys",
    "migrate": "migrate:migrate",
    "openapi": "serve:openapi",
    "pki": "pki_commands:pki",
    "provision": "provision:provision",
    "redis-tls-reload": "redis_tls_reload:redis_tls_reload",
    "rotate": "rotate:rotate",
    "rotations": "rotations:rotations",
    "restore": "restore:restore",
    "roundtrip": "roundtrip:roundtrip",
    "serve": "serve:serve",
    "version": "version:version",
}


_SERVING: Final = frozenset({"dev", "serve"})
"""Commands that run the service in their own process."""


class _Commands(click.Group):
    """Loads a command's module when it is asked for: ``keys list`` needs neither Quart nor Redis."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        with _lean() if cmd_name in _SERVING else nullcontext():
            command = getattr(importlib.import_module(f"progressdb_kms.cli.{module}"), name)
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}:{name} is not a command")
        return command


@contextmanager
def _lean() -> Iterator[None]:
    """Import what serves in less time, and without what it does not use.

    structlog takes rich along where it finds it, 4 MiB, for tracebacks that show the values of local
    variables; logs never show those (``observability.logs``), and structlog does without by itself. Modules
    live as long as the process: looking for garbage while they come takes a tenth of the time for nothing.
    """
    hidden = "structlog" not in sys.modules and "rich" not in sys.modules
    if hidden:
        cast("dict[str, Any]", sys.modules)["rich"] = None  # import then says that it is not installed
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if hidden:
            del sys.modules["rich"]


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def app() -> None:
    """Key management service: one wrapped data key per conversation thread."""


def run(arguments: list[str]) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name.

    Returns:
        The exit code: 0, 1 for an error, 2 for wrong usage or a missing package, 130 for Ctrl-C.
    """
    try:
        result = app.main(arguments, _NAME, standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except ModuleNotFoundError as error:
        return missing(error)
    except BrokenPipeError:
        # Whoever read our output has seen enough; what is still buffered has nowhere to go at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - the top: everything becomes one line and an exit code here
        if os.environ.get("PROGRESSDB_KMS_TRACEBACK") == "1":
            traceback.print_exception(error)
        message, code = _describe(error)
        click.echo(message, err=True)
        return code
    return result if isinstance(result, int) else 0


def _describe(error: Exception) -> tuple[str, int]:
    """Return what to print about an error, and the exit code."""
    code = 1
    match error:
        case click.exceptions.NoArgsIsHelpError():
            return error.ctx.get_help(), error.exit_code
        case click.UsageError():
            where = error.ctx.command_path if error.ctx else _NAME
            message, code = f"{error.format_message()} (see {where} --help)", error.exit_code
        case click.ClickException():
            message, code = error.format_message(), error.exit_code
        case KmsError():
            message = f"{error.detail} ({error.code})"
        case OSError():
            named = f"{error.filename}: " if error.filename is not None else ""
            message = f"{named}{error.strerror or type(error).__name__}"
        case _:
            # A bug. Its text may hold what was being processed, so only its name is shown.
            message = f"internal error: {type(error).__name__}; PROGRESSDB_KMS_TRACEBACK=1 shows where"
    return f"{_NAME}: {' '.join(message.split())}", code

"""``keys``: make data keys, look at them, change their states."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Final

import click

from progressdb_kms.cli.connection import Connection, connection_options
from progressdb_kms.cli.operator import INCOMPLETE, config_option, on_store
from progressdb_kms.cli.output import json_option, print_fields, print_json, print_table
from progressdb_kms.client import KeyInfo
from progressdb_kms.domain.keys import KeyState

_COLUMNS: Final = ("key_id", "thread_id", "version", "state", "kek_version", "created_at", "uses")
_PAGE_MAX: Final = 1000


@click.group()
def keys() -> None:
    """Data keys: one or more a thread. No command ever shows key material."""


@keys.command()
@click.argument("thread_id")
@click.option(
    "--idempotency-key", help="The same word from the same caller for this thread gives the same key."
)
@connection_options
@json_option
def create(thread_id: str, idempotency_key: str | None, connection: Connection, *, as_json: bool) -> None:
    """Make a key for THREAD_ID."""
    with connection.provider() as kms:
        dek = kms.create_dek_for_thread(thread_id, idempotency_key=idempotency_key)
    fields: dict[str, object] = {
        "key_id": dek.key_id,
        "thread_id": thread_id,
        "version": dek.key_version,
        "kek_id": dek.kek_id,
        "kek_version": dek.kek_version,
    }
    _print(fields, as_json=as_json)


@keys.command()
@click.argument("thread_id")
@click.option("--idempotency-key", help="The same word from the same caller for this thread rotates once.")
@connection_options
@json_option
def rotate(thread_id: str, idempotency_key: str | None, connection: Connection, *, as_json: bool) -> None:
    """Make the next key of THREAD_ID; the older ones only decrypt from then on."""
    with connection.admin() as service:
        dek = service.rotate_dek(thread_id, idempotency_key)
    fields: dict[str, object] = {
        "key_id": dek.key_id,
        "thread_id": thread_id,
        "version": dek.key_version,
        "kek_id": dek.kek_id,
        "kek_version": dek.kek_version,
    }
    _print(fields, as_json=as_json)


@keys.command("destroy-due")
@config_option
@json_option
def destroy_due(config: Path, *, as_json: bool) -> int:
    """Destroy the keys whose waiting period is over; the service does so each minute by itself."""
    # Only here: the other commands of this group need neither the store nor the use cases.
    from progressdb_kms.usecases.destruction import sweep  # noqa: PLC0415 - see above

    swept = on_store(config, "keys destroy-due", lambda vault, _: sweep(vault))
    if swept is None:
        click.echo("another instance is at it", err=True)
        return 1
    if as_json:
        print_json(asdict(swept))
    else:
        click.echo(f"destroyed {len(swept.destroyed)} keys")
    for reason in swept.files:
        click.echo(f"append-only file not rewritten, so that it may still hold them: {reason}", err=True)
    return INCOMPLETE if swept.files else 0


@keys.command("list")
@click.option("--thread-id", help="Keys of this thread only.")
@click.option(
    "--state", type=click.Choice([str(state) for state in KeyState]), help="Keys in this state only."
)
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many.")
@connection_options
@json_option
def list_keys(
    thread_id: str | None, state: str | None, limit: int, connection: Connection, *, as_json: bool
) -> None:
    """List keys."""
    with connection.admin() as service:
        # One more than asked for tells whether there are more.
        page = min(limit + 1, _PAGE_MAX)
        listing = service.list_keys(thread_id=thread_id, state=state, limit=page)
        found = [asdict(key) for key in itertools.islice(listing, limit + 1)]
    if as_json:
        print_json(found[:limit])
    else:
        print_table(_COLUMNS, ([key[column] for column in _COLUMNS] for key in found[:limit]))
    if len(found) > limit:
        click.echo(f"there are more than {limit}; ask for them with --limit", err=True)


@keys.command()
@click.argument("key_id")
@connection_options
@json_option
def show(key_id: str, connection: Connection, *, as_json: bool) -> None:
    """Show one key."""
    with connection.admin() as service:
        _show(service.get_key(key_id), as_json=as_json)


@keys.command("schedule-destruction")
@click.argument("key_id")
@click.option(
    "--waiting-days",
    type=click.IntRange(7, 30),
    help="Days until it is destroyed; the service has a default.",
)
@connection_options
@json_option
def schedule_destruction(
    key_id: str, waiting_days: int | None, connection: Connection, *, as_json: bool
) -> None:
    """Let a key be destroyed after a waiting period; until then it can be cancelled.

    What the key has encrypted can never be read again after that.
    """
    with connection.admin() as service:
        _show(service.schedule_destruction(key_id, waiting_days=waiting_days), as_json=as_json)


def _add_change(name: str, text: str) -> None:
    """Add a command that changes a key's state and takes nothing but the key."""

    def change(key_id: str, connection: Connection, *, as_json: bool) -> None:
        with connection.admin() as service:
            act: Callable[[str], KeyInfo] = getattr(service, name.replace("-", "_"))
            _show(act(key_id), as_json=as_json)

    change.__doc__ = text
    keys.command(name)(click.argument("key_id")(connection_options(json_option(change))))


_add_change("disable", "Take a key out of use, for encryption and decryption. Enable brings it back.")
_add_change("enable", "Bring a disabled key back into the state that it had.")
_add_change("cancel-destruction", "Keep a key that was scheduled for destruction. It is disabled then.")


def _show(key: KeyInfo, *, as_json: bool) -> None:
    _print(asdict(key), as_json=as_json)


def _print(fields: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        print_json(fields)
    else:
        print_fields(fields)

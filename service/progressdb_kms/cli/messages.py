"""``encrypt`` and ``decrypt``: a message from standard input or a file."""

from __future__ import annotations

import base64
import binascii
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import click

from progressdb_kms.cli.connection import Connection, connection_options
from progressdb_kms.cli.output import json_option, print_json
from progressdb_kms.kek.atomic import replace_file


def _message_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that encrypt and decrypt share, and the AAD as ``aad``."""

    @click.option("--key-id", required=True, help="The key.")
    @click.option("--aad", "aad_text", help="Additional authenticated data, as text.")
    @click.option("--aad-file", type=click.File("rb"), help="The same, from a file.")
    @click.option(
        "--in", "source", type=click.File("rb"), default="-", help="Input; standard input without it."
    )
    @click.option(
        "--out",
        "target",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Output, written whole and with mode 0600; standard output without it.",
    )
    @connection_options
    @json_option
    @functools.wraps(command)
    def with_message(
        *args: Any,  # noqa: ANN401 - whatever the command takes
        aad_text: str | None,
        aad_file: BinaryIO | None,
        raw: bool,
        as_json: bool,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        if aad_text is not None and aad_file is not None:
            raise click.UsageError("--aad and --aad-file exclude each other")
        if raw and as_json:
            raise click.UsageError("--raw and --json exclude each other")
        aad = aad_file.read() if aad_file is not None else aad_text.encode() if aad_text is not None else None
        command(*args, aad=aad, raw=raw, as_json=as_json, **kwargs)

    return with_message


@click.command()
@click.option("--raw", is_flag=True, help="Write the ciphertext's bytes instead of base64.")
@_message_options
def encrypt(
    key_id: str,
    source: BinaryIO,
    target: Path | None,
    aad: bytes | None,
    connection: Connection,
    *,
    raw: bool,
    as_json: bool,
) -> None:
    """Encrypt a message under a key, and write the ciphertext as base64."""
    with connection.provider() as kms:
        sealed = kms.encrypt_with_dek(key_id, source.read(), aad)
    text = base64.b64encode(sealed.ciphertext).decode()
    if as_json:
        print_json({"key_id": key_id, "ciphertext": text, "key_version": sealed.key_version})
    else:
        _write(target, sealed.ciphertext if raw else f"{text}\n".encode())


@click.command()
@click.option("--raw", is_flag=True, help="The input is the ciphertext's bytes instead of base64.")
@_message_options
def decrypt(
    key_id: str,
    source: BinaryIO,
    target: Path | None,
    aad: bytes | None,
    connection: Connection,
    *,
    raw: bool,
    as_json: bool,
) -> None:
    """Decrypt what encrypt wrote, and write the message's bytes."""
    data = source.read()
    if not raw:
        try:
            data = base64.b64decode(b"".join(data.split()), validate=True)
        except binascii.Error:
            raise click.ClickException("the input is not base64; --raw takes a ciphertext's bytes") from None
    with connection.provider() as kms:
        message = kms.decrypt_with_dek(key_id, data, aad)
    if as_json:
        print_json({"key_id": key_id, "plaintext": base64.b64encode(message).decode()})
    else:
        _write(target, message)


def _write(target: Path | None, data: bytes) -> None:
    if target is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        replace_file(target, data, 0o600)

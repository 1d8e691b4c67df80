"""The round trip that ``dev --demo`` shows, over mTLS by the client library, and curl lines to paste."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from progressdb_kms.client import SyncKmsProvider, open_sync_provider
from progressdb_kms.domain.errors import KmsError
from progressdb_kms.kek.atomic import write_once

THREAD: Final = "demo:greeting"
AAD: Final = THREAD.encode()
GREETING: Final = b"Hello from a thread whose key never leaves the service."


def show_round_trip(ready: Mapping[str, Any], kept: Path) -> None:
    """Make a key, send a message through encrypt and decrypt, and print what happened.

    The first run keeps its message's ciphertext; a later run decrypts that message as well.

    Args:
        ready: The content of the ready file.
        kept: Where the first run's message is kept.

    Raises:
        KmsError: A call failed.
        OSError: The message can't be kept.
    """
    files = ready["clients"]["server"]
    with open_sync_provider(ready["url"], ca=ready["ca"], cert=files["cert"], key=files["key"]) as kms:
        if kept.exists():
            _decrypt_kept(kms, kept)
        dek = kms.create_dek_for_thread(THREAD)
        click.echo(
            f"demo: made key {dek.key_id} for thread {THREAD}: version {dek.key_version}, KEK {dek.kek_id}"
        )
        sealed = kms.encrypt_with_dek(dek.key_id, GREETING, AAD).ciphertext
        click.echo(f"demo: encrypted {len(GREETING)} bytes into {len(sealed)}")
        plaintext = kms.decrypt_with_dek(dek.key_id, sealed, AAD)
        click.echo(f"demo: decrypted: {plaintext.decode()}")
    if not kept.exists():
        message = {"thread_id": THREAD, "key_id": dek.key_id, "ciphertext": _base64(sealed)}
        write_once(kept, json.dumps(message).encode(), 0o600)
        click.echo(f"demo: kept the ciphertext in {kept}; the next run decrypts it")
    _show_curl(ready, dek.key_id, sealed)


def _decrypt_kept(kms: SyncKmsProvider, kept: Path) -> None:
    message = json.loads(kept.read_text())
    try:
        plaintext = kms.decrypt_with_dek(message["key_id"], base64.b64decode(message["ciphertext"]), AAD)
    except KmsError as error:
        click.echo(f"demo: the message of an earlier run does not decrypt: {error} (remove {kept})", err=True)
    else:
        click.echo(
            f"demo: the message of an earlier run, under key {message['key_id']}: {plaintext.decode()}"
        )


def _show_curl(ready: Mapping[str, Any], key_id: str, sealed: bytes) -> None:
    files = ready["clients"]["server"]
    base = ["curl", "--cacert", ready["ca"], "--cert", files["cert"], "--key", files["key"]]
    bodies: dict[str, dict[str, str]] = {
        "create_dek_for_thread": {"thread_id": THREAD},
        "encrypt": {"key_id": key_id, "plaintext": _base64(GREETING), "aad": _base64(AAD)},
        "decrypt": {"key_id": key_id, "ciphertext": _base64(sealed), "aad": _base64(AAD)},
    }
    click.echo("\nPaste into another terminal:\n")
    click.echo(shlex.join([*base, f"{ready['url']}/healthz"]))
    for route, body in bodies.items():
        words = ["-H", "content-type: application/json", "-d", json.dumps(body), f"{ready['url']}/{route}"]
        click.echo(shlex.join([*base, *words]))
    click.echo(f"curl {ready['admin_url']}/readyz")
    click.echo(shlex.join(["progressdb-kms", "keys", "list", "--dev-dir", str(Path(ready["config"]).parent)]))
    click.echo(shlex.join(["progressdb-kms", "audit", "verify", "--config", ready["config"]]))
    click.echo("\nCtrl-C ends it; the keys stay.")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()

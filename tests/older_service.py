"""Plays the service before this one: its keys, wraps and ciphertexts in exactly its form, and its export."""

from __future__ import annotations

import json
import os
from base64 import b64encode
from collections.abc import Iterable
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FIRST = 1_712_345_678_901_234_567
"""The clock, in nanoseconds, when it made its first key."""
FIRST_SECOND = FIRST // 10**9
FIRST_TIME = "2024-04-05T19:34:38Z"


def seal(key: bytes, plaintext: bytes) -> bytes:
    """Encrypt as it did, wraps and messages alike: nonce | ciphertext, no AAD."""
    nonce = os.urandom(12)
    return nonce + AESGCM(key).encrypt(nonce, plaintext, None)


def b64(data: bytes) -> str:
    """Return base64."""
    return b64encode(data).decode()


class OlderService:
    """The older service.

    Attributes:
        master: Its master key.
        store: What its database holds: ``dek:<id>`` and ``dekmeta:<id>``.
        threads: The thread of each key, as the server's database has it.
    """

    def __init__(self, master: bytes = b"") -> None:
        self.master = master or os.urandom(32)
        self.store: dict[str, bytes] = {}
        self.threads: dict[str, str] = {}
        self._deks: dict[str, bytes] = {}
        self._clock = FIRST

    def create(self, thread_id: str, *, raw: bool = False, meta: bool = True, key_id: str = "") -> str:
        """Make a thread's key and return its id.

        Args:
            thread_id: The thread.
            raw: Store the wrapped key itself, without the thread, and not a JSON object with both.
            meta: Store metadata beside it.
            key_id: Instead of one by the clock.
        """
        key_id = key_id or f"k_{self._clock}"
        self._clock += 1_000_003
        dek = os.urandom(32)
        wrapped = seal(self.master, dek)
        stored = json.dumps({"wrapped": b64(wrapped), "thread_id": thread_id}).encode()
        self.store[f"dek:{key_id}"] = wrapped if raw else stored
        if meta:
            told = {"key_id": key_id, "created_at": "2024-04-05T19:34:38.901234567Z", "kek_id": "local"}
            self.store[f"dekmeta:{key_id}"] = json.dumps(told).encode()
        self.threads[key_id] = thread_id
        self._deks[key_id] = dek
        return key_id

    def encrypt(self, key_id: str, plaintext: bytes) -> bytes:
        """Encrypt a message."""
        return seal(self._deks[key_id], plaintext)

    def dek(self, key_id: str) -> bytes:
        """Return a raw key."""
        return self._deks[key_id]

    def line(self, key_id: str, /, **changes: Any) -> bytes:
        """Return a key's line of the export, with other members where a test wants them."""
        found: dict[str, Any] = {"key_id": key_id, "dek": b64(self.store[f"dek:{key_id}"])}
        if meta := self.store.get(f"dekmeta:{key_id}"):
            found["dekmeta"] = b64(meta)
        return json.dumps({**found, **changes}).encode() + b"\n"

    def lines(self, *, threads: bool = False, extra: Iterable[bytes] = ()) -> list[bytes]:
        """Return the export.

        Args:
            threads: With what the server's database says of threads.
            extra: Lines to put among the others; they are counted.
        """
        ids = sorted(name.removeprefix("dek:") for name in self.store if name.startswith("dek:"))
        lines = [self.line(each, **({"thread_id": self.threads[each]} if threads else {})) for each in ids]
        lines[1:1] = extra
        return [*lines, json.dumps({"keys": len(lines)}).encode() + b"\n"]

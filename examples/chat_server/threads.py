"""What a request does: threads and their messages."""

from __future__ import annotations

import itertools
import logging
import re
import time
from typing import Final

from progressdb_kms.client import KmsError
from progressdb_kms.domain.errors import KeyDecryptOnly, KeyExhausted

from .cipher import open_many, seal
from .keys import ThreadKeys, messages_prefix, meta_key

log = logging.getLogger("chat.threads")

ATTEMPTS: Final = 10
THREAD_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
MESSAGE_ID: Final = re.compile(r"[0-9]{20}-[0-9]{6}")
"""``<ts>-<seq>``: nanoseconds since the epoch, and a number for messages of the same moment."""


class MessageNotFound(Exception):
    """There is no such message."""


class Busy(Exception):
    """Others changed the same thing again and again; worth another try."""


class Threads:
    """Posts, reads and edits. All methods raise KmsError, and ThreadNotFound and ThreadEncrypted."""

    def __init__(self, keys: ThreadKeys) -> None:
        self._keys = keys
        self._store = keys.store
        self._sequence = itertools.count()

    def create(self, thread_id: str) -> None:
        """Make a thread with its key; again is the same."""
        self._keys.for_writing(thread_id)

    def post(self, thread_id: str, text: str) -> str:
        """Store a message and return its id; the first one makes the thread. Raises Busy."""
        for _ in range(ATTEMPTS):
            message_id = f"{time.time_ns():020d}-{next(self._sequence) % 1_000_000:06d}"
            if self._write(thread_id, message_id, None, text):
                return message_id
        raise Busy

    def edit(self, thread_id: str, message_id: str, text: str) -> None:
        """Replace a message's text. Raises MessageNotFound, Busy."""
        for _ in range(ATTEMPTS):
            self._keys.load(thread_id)
            old = self._store.get(messages_prefix(thread_id) + message_id)
            if old is None:
                raise MessageNotFound
            if self._write(thread_id, message_id, old, text):
                return
        raise Busy

    def read(self, thread_id: str, after: str, limit: int) -> list[dict[str, str]]:
        """Return messages in order, decrypted by one call of the KMS.

        Args:
            thread_id: Which thread.
            after: Id of a message, or empty; those behind it are returned.
            limit: At most so many.

        Returns:
            ``id`` and ``text`` of each; ``error`` in the place of a text that can't be read.
        """
        prefix = messages_prefix(thread_id)
        for _ in range(ATTEMPTS):
            seen, meta = self._keys.load(thread_id)
            found = self._store.scan(prefix, prefix + after, limit)
            texts = open_many(self._keys.kms, meta.readable, thread_id, found)
            # An error may only mean that a rotation began or ended between two of these lines.
            if not any(isinstance(text, KmsError) for text in texts):
                break
            if (self._keys.load(thread_id)[0], self._store.scan(prefix, prefix + after, limit)) == (
                seen,
                found,
            ):
                break
        else:
            raise Busy
        messages = []
        for (key, _), text in zip(found, texts, strict=True):
            if isinstance(text, KmsError):
                log.error("message %s can't be read: %s", key, text.code)
                messages.append({"id": key.removeprefix(prefix), "error": text.code})
            else:
                messages.append({"id": key.removeprefix(prefix), "text": text.decode(errors="replace")})
        return messages

    def _write(self, thread_id: str, message_id: str, old: bytes | None, text: str) -> bool:
        """Store a message where ``old`` still is; False if that, or the thread's key, changed meanwhile."""
        stored, meta = self._keys.for_writing(thread_id)
        key = messages_prefix(thread_id) + message_id
        try:
            sealed = seal(self._keys.kms, meta.key_id, thread_id, key, text.encode())
        except (KeyDecryptOnly, KeyExhausted):
            # A rotation has just begun, someone has rotated at the KMS, or the key is used up.
            self._keys.renew(thread_id, stored, meta)
            return False
        return self._store.commit({key: sealed}, given={meta_key(thread_id): stored, key: old})

"""Which key a thread has: its metadata, the first key, the next one, and the end of old ones.

Every change of the metadata is a compare-and-set, and every write of a message has the metadata that it was
encrypted by as its condition. So nothing is ever stored under a key that is on its way out.
"""

from __future__ import annotations

import logging
import secrets
import time
from contextlib import suppress
from typing import Final

import msgspec
from msgspec.structs import replace

from progressdb_kms.client import AdminClient, CreatedDek, SyncKmsProvider
from progressdb_kms.domain.errors import KeyDestroyed

from .cipher import PLAIN
from .store import Store

log = logging.getLogger("chat.keys")

JOBS: Final = "job:"


class ThreadNotFound(Exception):
    """There is no such thread, or it is being deleted."""


class ThreadEncrypted(Exception):
    """The thread is encrypted, and this server runs with encryption off."""


class Kms(msgspec.Struct, frozen=True):
    """A thread's key, as ``create_dek_for_thread`` told it."""

    key_id: str
    wrapped_dek: bytes
    kek_id: str
    kek_version: str

    @classmethod
    def of(cls, dek: CreatedDek) -> Kms:
        """Return what is kept of a new key."""
        return cls(dek.key_id, dek.wrapped, dek.kek_id, dek.kek_version)

    def __repr__(self) -> str:
        return f"Kms({self.key_id!r})"


class Meta(msgspec.Struct, frozen=True):
    """What ``thread:<id>:meta`` holds.

    Attributes:
        id: Random, new for each thread of a name: makes the first key once, however many ask for it.
        kms: The key that encrypts.
        retired: Older keys that messages may still be under; PLAIN for messages that are not encrypted.
        next: Names a rotation whose key is not here yet; makes that key once, however many ask for it.
        plain: Made with encryption off.
        deleting: Nothing is read or written any more.
    """

    id: str
    kms: Kms | None = None
    retired: list[str] = []
    next: str = ""
    plain: bool = False
    deleting: bool = False

    @property
    def key_id(self) -> str:
        """The key that encrypts; PLAIN where there is none."""
        return self.kms.key_id if self.kms else PLAIN

    @property
    def readable(self) -> set[str]:
        """Keys that messages may be under. A plaintext put into an encrypted thread is not one of them."""
        return {*self.retired, *([self.key_id] if self.kms or self.plain else [])}


class Job(msgspec.Struct, frozen=True):
    """What ``job:<id>`` holds: work on a thread that goes on after any crash.

    Attributes:
        kind: ``rotate`` or ``delete``.
        began: Seconds since the epoch.
        total: Messages of the thread when the job began.
        cursor: Messages up to this key are done.
        done: How many those are.
        unreadable: How many of them do not decrypt: while there are any, old keys stay.
        example: The first of those.
        resume_at: When they are tried again, in seconds since the epoch.
    """

    kind: str
    began: float
    total: int
    cursor: str = ""
    done: int = 0
    unreadable: int = 0
    example: str = ""
    resume_at: float = 0.0


def meta_key(thread_id: str) -> str:
    """Return where a thread's metadata is."""
    return f"thread:{thread_id}:meta"


def messages_prefix(thread_id: str) -> str:
    """Return what the keys of a thread's messages begin with. Thread ids hold no colon."""
    return f"thread:{thread_id}:msg:"


class ThreadKeys:
    """Makes, changes and ends threads' keys.

    Args:
        store: The server's data.
        kms: The provider; None with encryption off.
        admin: For the end of keys; None with the embedded provider, whose keys end with the process.
        prefix: Put before a thread's id towards the KMS.
    """

    def __init__(
        self, store: Store, kms: SyncKmsProvider | None, admin: AdminClient | None, prefix: str
    ) -> None:
        self.store = store
        self.kms = kms
        self._admin = admin
        self._prefix = prefix

    def load(self, thread_id: str) -> tuple[bytes, Meta]:
        """Return a thread's metadata, as stored and as read; raises ThreadNotFound, ThreadEncrypted."""
        stored = self.store.get(meta_key(thread_id))
        if stored is None:
            raise ThreadNotFound
        meta = msgspec.json.decode(stored, type=Meta)
        if meta.deleting:
            raise ThreadNotFound
        if self.kms is None and not meta.plain:
            raise ThreadEncrypted
        return stored, meta

    def for_writing(self, thread_id: str) -> tuple[bytes, Meta]:
        """Return a thread's metadata with a key to encrypt under; the first writer makes thread and key.

        Writers of a new thread, in whatever processes, agree on one ``id`` (the store lets one of them in),
        and by it the KMS gives all of them the same key; so does the next one after a crash.

        Raises:
            ThreadNotFound, ThreadEncrypted: See ``load``.
            KmsError: No key can be had, so nothing can be written.
        """
        key = meta_key(thread_id)
        while True:
            if self.store.get(key) is None:
                fresh = Meta(secrets.token_hex(16), plain=self.kms is None)
                self.store.commit({key: msgspec.json.encode(fresh)}, given={key: None})
            stored, meta = self.load(thread_id)
            if self.kms is None or meta.kms:
                return stored, meta
            if meta.plain:
                self.renew(thread_id, stored, meta)
            else:
                dek = self.kms.create_dek_for_thread(self._prefix + thread_id, idempotency_key=meta.id)
                changed = msgspec.json.encode(replace(meta, kms=Kms.of(dek)))
                self.store.commit({key: changed}, given={key: stored})

    def start(self, thread_id: str, kind: str) -> None:
        """Begin a job: ``rotate``, unless there is one whose key is not there yet, or ``delete``.

        Raises:
            ThreadNotFound, ThreadEncrypted: See ``load``.
        """
        while True:
            stored, meta = self.load(thread_id)
            if kind == "delete":
                meta = replace(meta, deleting=True)
            elif meta.next:
                return
            else:
                meta = replace(meta, next=secrets.token_hex(16))
            job = Job(kind, time.time(), self.store.count(messages_prefix(thread_id)))
            changes = {
                meta_key(thread_id): msgspec.json.encode(meta),
                JOBS + thread_id: msgspec.json.encode(job),
            }
            if self.store.commit(changes, given={meta_key(thread_id): stored}):
                log.info("thread %s: %s of %d messages began", thread_id, kind, job.total)
                return

    def renew(self, thread_id: str, stored: bytes, meta: Meta) -> None:
        """Give a thread its next key, since its own encrypts no more, or it has none yet.

        Args:
            thread_id: Which thread.
            stored: Its metadata as the caller saw it; where that has changed, nothing is done.
            meta: The same, read.

        Raises:
            KmsError: There is no new key yet; whoever asks next goes on.
        """
        key = meta_key(thread_id)
        if not meta.next and self.store.get(key) == stored:
            self.start(thread_id, "rotate")
            stored, meta = self.load(thread_id)
        if meta.next and self.kms:
            dek = self.kms.rotate_dek(self._prefix + thread_id, idempotency_key=meta.next)
            meta = replace(meta, kms=Kms.of(dek), retired=sorted(meta.readable), next="", plain=False)
            if self.store.commit({key: msgspec.json.encode(meta)}, given={key: stored}):
                log.info("thread %s encrypts under %s now", thread_id, dek.key_id)

    def destroy_all(self, thread_id: str, meta: Meta) -> None:
        """Schedule the destruction of all of a thread's keys, also of one that nobody lived to note.

        Raises:
            ThreadEncrypted: Encryption is off.
            KmsError: Not now, or not allowed. Again is the same.
        """
        if self.kms is None and (meta.next or not meta.plain):
            raise ThreadEncrypted
        keys, name = meta.readable, self._prefix + thread_id
        with suppress(KeyDestroyed):
            if self.kms and not meta.kms and not meta.plain:
                keys.add(self.kms.create_dek_for_thread(name, idempotency_key=meta.id).key_id)
        with suppress(KeyDestroyed):
            if self.kms and meta.next:
                keys.add(self.kms.rotate_dek(name, idempotency_key=meta.next).key_id)
        self.destroy(keys)

    def destroy(self, key_ids: set[str]) -> None:
        """Schedule the destruction of keys; raises KmsError. Again is the same."""
        for key_id in key_ids - {PLAIN}:
            if self._admin is None:
                log.warning("key %s stays until this process ends: the KMS is embedded", key_id)
                continue
            try:
                info = self._admin.schedule_destruction(key_id)
                log.info("key %s will be destroyed at %s", key_id, info.destroy_at)
            except KeyDestroyed:
                log.warning("key %s is destroyed already", key_id)

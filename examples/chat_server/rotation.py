"""What goes on in the background: rotation of threads' keys, and the deletion of threads.

All state is in the store, and each step is one transaction that has what it builds on as its condition. So a
worker may be killed anywhere, and several may run: a step that another one has done is not done again.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from progressdb_kms.client import KmsError
from progressdb_kms.domain.errors import KeyDecryptOnly, KeyExhausted

from .cipher import Envelope, open_many, seal_many
from .keys import JOBS, Job, Meta, ThreadEncrypted, ThreadKeys, messages_prefix, meta_key

log = logging.getLogger("chat.rotation")

BATCH: Final = 500
POLL: Final = 2.0
"""Seconds after which a worker looks for jobs that another process has begun."""
PAUSE: Final = 30.0
"""Seconds before messages that did not decrypt are tried again."""


class Worker:
    """Works on jobs in a thread of its own, from ``start`` until ``stop``."""

    def __init__(self, keys: ThreadKeys) -> None:
        self._keys = keys
        self._store = keys.store
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="rotation")
        self.start = self._thread.start

    def stop(self) -> None:
        """Finish the step that is under way, and end."""
        self._stopped = True
        self._wake.set()
        self._thread.join()

    def rotate(self, thread_id: str) -> dict[str, Any]:
        """Begin to rotate a thread's key, unless that is under way; return ``status``, raise as it does."""
        if self.status(thread_id)["job"] is None:
            self._keys.start(thread_id, "rotate")
            self._wake.set()
        return self.status(thread_id)

    def delete(self, thread_id: str) -> None:
        """Begin to delete a thread: nobody reads or writes it any more. Raises as ``status``."""
        self._keys.start(thread_id, "delete")
        self._wake.set()

    def status(self, thread_id: str) -> dict[str, Any]:
        """Return a thread's keys, and the job that is under way or None; see ``Job``.

        Raises:
            ThreadNotFound, ThreadEncrypted: See ``keys``.
        """
        _, meta = self._keys.load(thread_id)
        job = self._store.get(JOBS + thread_id)
        return {
            "key_id": meta.key_id,
            "retired": meta.retired,
            "job": None if job is None else msgspec.json.decode(job),
        }

    def _run(self) -> None:
        while not self._stopped:
            self._wake.clear()
            busy = False
            for key, stored in self._store.scan(JOBS):
                thread_id = key.removeprefix(JOBS)
                try:
                    busy |= self.step(thread_id, stored)
                except KmsError as error:
                    log.warning("job of thread %s waits: %s (%s)", thread_id, error.code, error.request_id)
                except ThreadEncrypted:
                    log.warning("job of thread %s waits: encryption is off", thread_id)
                except Exception:
                    log.exception("job of thread %s failed; it is tried again", thread_id)
            if not busy:
                self._wake.wait(POLL)

    def step(self, thread_id: str, stored: bytes) -> bool:
        """Take a job, as it is stored, one step further; False if there is nothing to be done now."""
        job = msgspec.json.decode(stored, type=Job)
        found = self._store.get(meta_key(thread_id))
        if found is None:
            raise RuntimeError("the thread's metadata is missing")
        given = {meta_key(thread_id): found, JOBS + thread_id: stored}
        meta = msgspec.json.decode(found, type=Meta)
        if job.kind == "delete":
            return self._delete(thread_id, meta, job, given)
        try:
            if not meta.next:
                return self._migrate(thread_id, meta, job, given)
        except (KeyDecryptOnly, KeyExhausted):
            log.warning("thread %s: %s was rotated elsewhere, or is used up", thread_id, meta.key_id)
        self._keys.renew(thread_id, found, meta)
        return True

    def _migrate(self, thread_id: str, meta: Meta, job: Job, given: dict[str, bytes]) -> bool:
        """Put the next messages under the thread's key.

        An edit meanwhile wins: its message is no longer what was read here, so it is left as it is, and it is
        under the thread's key, since the metadata is that of before.
        """
        page = self._store.scan(messages_prefix(thread_id), job.cursor, BATCH)
        if not page:
            return self._finish(thread_id, meta, job, given)
        old = [(key, value) for key, value in page if Envelope.decode(value).key_id != meta.key_id]
        texts = open_many(self._keys.kms, meta.readable, thread_id, old)
        good = [
            (key, value, text)
            for (key, value), text in zip(old, texts, strict=True)
            if isinstance(text, bytes)
        ]
        bad = [key for (key, _), text in zip(old, texts, strict=True) if isinstance(text, KmsError)]
        new = seal_many(self._keys.kms, meta.key_id, thread_id, [(key, text) for key, _, text in good])
        swaps = [(key, value, sealed) for (key, value, _), sealed in zip(good, new, strict=True)]
        job = replace(
            job,
            cursor=page[-1][0],
            done=job.done + len(page) - len(bad),
            unreadable=job.unreadable + len(bad),
            example=job.example or next(iter(bad), ""),
        )
        self._store.commit({JOBS + thread_id: msgspec.json.encode(job)}, given, swaps)
        log.info("thread %s: %d of %d messages are under %s", thread_id, job.done, job.total, meta.key_id)
        return True

    def _finish(self, thread_id: str, meta: Meta, job: Job, given: dict[str, bytes]) -> bool:
        """End a rotation: no message may need an old key any more before one is given up."""
        again = Job(job.kind, job.began, job.total)
        if job.resume_at > time.time():
            return False
        if job.unreadable and not job.resume_at:
            log.error(
                "thread %s: %d messages do not decrypt, %s first", thread_id, job.unreadable, job.example
            )
            again = replace(job, resume_at=time.time() + PAUSE)
        elif not job.unreadable and self._all_under(thread_id, meta.key_id):
            self._keys.destroy(set(meta.retired))
            ended = msgspec.json.encode(replace(meta, retired=[]))
            if self._store.commit({meta_key(thread_id): ended, JOBS + thread_id: None}, given):
                log.info("thread %s: rotation of %d messages is finished", thread_id, job.done)
            return True
        return self._store.commit({JOBS + thread_id: msgspec.json.encode(again)}, given)

    def _all_under(self, thread_id: str, key_id: str) -> bool:
        """Look at all messages: what comes next can't be taken back."""
        after = ""
        while page := self._store.scan(messages_prefix(thread_id), after, BATCH):
            if any(Envelope.decode(stored).key_id != key_id for _, stored in page):
                return False
            after = page[-1][0]
        return True

    def _delete(self, thread_id: str, meta: Meta, job: Job, given: dict[str, bytes]) -> bool:
        """Destroy the keys first: from then on what is left of the messages is noise."""
        changes: dict[str, bytes | None] = {}
        if not job.cursor:
            self._keys.destroy_all(thread_id, meta)
            job = replace(job, cursor="keys are destroyed")
        else:
            changes = {key: None for key, _ in self._store.scan(messages_prefix(thread_id), limit=BATCH)}
            if not changes:
                log.info("thread %s is deleted", thread_id)
                return self._store.commit({meta_key(thread_id): None, JOBS + thread_id: None}, given)
        changes[JOBS + thread_id] = msgspec.json.encode(replace(job, done=job.done + len(changes)))
        return self._store.commit(changes, given)

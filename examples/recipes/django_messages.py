"""Django: a provider for each process, a model field for encrypted texts, errors as 503.

In settings.py::

    KMS = {"url": "https://kms.default.svc:8443", "ca": "ca.crt", "cert": "tls.crt", "key": "tls.key"}
    MIDDLEWARE = [..., "examples.recipes.django_messages.kms_errors"]

A field of Django's sees a value and never its row, so this one only guards the column: it takes and gives
``Sealed`` and refuses plain text. The manager's ``post`` and ``read`` know the row, and cost one request
each. Call them outside ``transaction.atomic`` (and without ``ATOMIC_REQUESTS``), or its locks are held
while the service is asked.

What an encrypted column can't do: be searched, compared or sorted by. The same text is other bytes each time.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final

from django.conf import settings
from django.core.exceptions import FieldError
from django.db import models, transaction
from django.http import HttpRequest, HttpResponse, JsonResponse

from examples.recipes.sealing import Sealed, pack, seal, unpack, unseal
from progressdb_kms.client import KmsError, SyncKmsProvider, open_sync_provider, request_id_of

_log: Final = logging.getLogger(__name__)
_lock = threading.Lock()
_provider: SyncKmsProvider | None = None


def provider() -> SyncKmsProvider:
    """Return this process's provider, made at its first use; safe from many threads.

    Not at import: servers such as gunicorn import the application and fork then, and two processes that share
    a TLS connection break it for both.
    """
    global _provider  # noqa: PLW0603 - one for each process is what this is about
    with _lock:
        if _provider is None:
            _provider = open_sync_provider(**settings.KMS)
        return _provider


def _forget() -> None:
    """Let a forked child make its own; the parent's connections are the parent's to use and to close."""
    global _provider, _lock
    # The lock too: another thread of the parent may have held it at the fork, and never releases it here.
    _provider, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


class EncryptedTextField(models.BinaryField):
    """A column that holds ``Sealed`` texts and nothing else."""

    def get_prep_value(self, value: Sealed | None) -> bytes | None:
        """Return the bytes to store."""
        return None if value is None else pack(value)

    def from_db_value(self, value: bytes | None, *_: object) -> Sealed | None:
        """Return the stored text, still sealed."""
        return None if value is None else unpack(bytes(value))

    def get_lookup(self, lookup_name: str) -> Any:
        """Refuse what could only ever find nothing."""
        if lookup_name != "isnull":
            raise FieldError(f"{self.name} is encrypted: it can't be searched or compared")
        return super().get_lookup(lookup_name)


class Thread(models.Model):
    """A conversation, with the key of its messages."""

    id = models.CharField(primary_key=True, max_length=256)
    key_id = models.CharField(max_length=64)

    class Meta:
        app_label = "recipes"

    def __str__(self) -> str:
        return self.pk

    @classmethod
    def open(cls, thread_id: str) -> Thread:
        """Return a thread, made if it is new.

        The word makes it safe: whoever is first, and however often it is tried, the thread gets the same key.
        """
        found = cls.objects.filter(pk=thread_id).first()
        if found is None:
            dek = provider().create_dek_for_thread(thread_id, idempotency_key="first")
            found, _ = cls.objects.get_or_create(pk=thread_id, defaults={"key_id": dek.key_id})
        return found


class MessageManager(models.Manager["Message"]):
    """Writes and reads messages, a page at a time."""

    def post(self, thread: Thread, texts: Sequence[str]) -> list[Message]:
        """Store messages: one request, then one transaction."""
        ids = [str(uuid.uuid4()) for _ in texts]
        bodies = seal(provider(), Message.BODY, thread.pk, thread.key_id, list(zip(ids, texts, strict=True)))
        with transaction.atomic():
            return self.bulk_create(
                Message(id=row, thread=thread, body=body) for row, body in zip(ids, bodies, strict=True)
            )

    def read(self, messages: Sequence[Message]) -> list[str | KmsError]:
        """Return the texts of messages, of any threads, in one request."""
        rows = [(message.thread_id, message.id, message.body) for message in messages]
        return unseal(provider(), Message.BODY, rows)


class Message(models.Model):
    """A message, stored as ciphertext only."""

    BODY: ClassVar = "messages.body"

    id = models.CharField(primary_key=True, max_length=36)
    thread = models.ForeignKey(Thread, on_delete=models.CASCADE)
    body = EncryptedTextField()

    objects = MessageManager()

    class Meta:
        app_label = "recipes"

    def __str__(self) -> str:
        return self.pk


def kms_errors(get_response: Callable[[HttpRequest], HttpResponse]) -> Any:
    """Middleware: what a caller may try again is 503, everything else 500; neither tells why."""

    class Middleware:
        def __call__(self, request: HttpRequest) -> HttpResponse:
            return get_response(request)

        def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
            if not isinstance(error, KmsError):
                return None
            _log.error(
                "%s %s: %s, request %s", request.method, request.path, error.code, request_id_of(error)
            )
            if error.retryable:
                return JsonResponse({"title": "Try again"}, status=503, headers={"Retry-After": "1"})
            return JsonResponse({"title": "Internal error"}, status=500)

    return Middleware()

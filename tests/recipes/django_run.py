"""The recipe for Django, in a process of its own: settings are of a process, and forks want one thread.

usage: django_run.py FOLDER CA CERT KEY URL; prints "ok", or dies of what is not so.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from pathlib import Path

import django
from django.conf import settings

folder, ca, cert, key, url = sys.argv[1:]
HERE = "examples.recipes.django_messages"
FILE = Path(folder) / "messages.db"
LOG = Path(folder) / "log"
logging.basicConfig(filename=LOG, level=logging.INFO)
settings.configure(
    KMS={"url": url, "ca": ca, "cert": cert, "key": key, "deadline": 20},
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": FILE}},
    MIDDLEWARE=[f"{HERE}.kms_errors"],
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="for the test alone",
    LOGGING_CONFIG=None,
)
django.setup()

from django.core.exceptions import FieldError  # noqa: E402 - Django wants its settings first
from django.db import connection  # noqa: E402
from django.http import HttpRequest, HttpResponse, JsonResponse  # noqa: E402
from django.test import Client  # noqa: E402
from django.urls import path  # noqa: E402

from examples.recipes import django_messages as recipe  # noqa: E402
from progressdb_kms.client import open_sync_provider  # noqa: E402
from progressdb_kms.domain.errors import AuthenticationFailed, KmsError  # noqa: E402

THREAD = "django:1"


def messages(request: HttpRequest) -> HttpResponse:
    """Post a message, or list them."""
    thread = recipe.Thread.open(THREAD)
    if request.method == "POST":
        recipe.Message.objects.post(thread, [request.body.decode()])
        return HttpResponse(status=201)
    texts = recipe.Message.objects.read(list(recipe.Message.objects.filter(thread=thread)))
    for text in texts:
        if isinstance(text, KmsError):
            raise text
    return JsonResponse({"texts": texts})


urlpatterns = [path("messages", messages)]


def texts_come_back(caller: Client) -> None:
    """What is posted comes back, and no file holds it."""
    with connection.schema_editor() as editor:
        editor.create_model(recipe.Thread)
        editor.create_model(recipe.Message)
    for n in range(20):
        assert caller.post("/messages", f"secret words {n}", "text/plain").status_code == 201
    texts = caller.get("/messages").json()["texts"]
    assert sorted(texts) == sorted(f"secret words {n}" for n in range(20))
    connection.close()
    assert b"secret words" not in FILE.read_bytes()
    assert THREAD.encode() in FILE.read_bytes()


def processes_have_their_own(caller: Client) -> None:
    """One provider for all threads of a process, another one for a forked child, and both go on working."""
    texts = caller.get("/messages").json()["texts"]
    found: list[object] = []
    workers = [threading.Thread(target=lambda: found.append(recipe.provider())) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert {id(each) for each in found} == {id(recipe.provider())}
    mine = recipe.provider()
    child = os.fork()
    if child == 0:
        try:
            assert recipe.provider() is not mine
            assert recipe.provider().health().status
            assert Client().get("/messages").json()["texts"] == texts
            os._exit(0)
        except BaseException:  # noqa: BLE001 - a child that fails must not go on as the parent
            traceback.print_exc()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert recipe.provider() is mine
    assert caller.get("/messages").json()["texts"] == texts


def plain_text_is_refused() -> None:
    """Plain text is refused, and so is what would find nothing."""
    thread = recipe.Thread.open(THREAD)
    for wrong in ("hello", b"hello"):
        try:
            recipe.Message.objects.create(id="1", thread=thread, body=wrong)
        except TypeError as error:
            assert "no plain value" in str(error)  # noqa: PT017 - no pytest in this process
        else:
            raise AssertionError(wrong)
        try:
            recipe.Message.objects.filter(body=wrong).first()
        except FieldError:
            pass
        else:
            raise AssertionError(wrong)
    assert recipe.Message.objects.filter(body__isnull=True).count() == 0


def moved_texts_do_not_open(caller: Client) -> None:
    """A ciphertext in another's place is an error of that one alone."""
    one, two = recipe.Message.objects.all()[:2]
    recipe.Message.objects.filter(pk=two.pk).update(body=one.body)
    two.refresh_from_db()
    opened = recipe.Message.objects.read([one, two])
    assert isinstance(opened[0], str)
    assert isinstance(opened[1], AuthenticationFailed)
    assert caller.get("/messages").status_code == 500
    two.delete()


def nothing_is_stored_while_away(caller: Client) -> None:
    """While the service is away nothing is stored, and nothing of a message is logged."""
    before = recipe.Message.objects.count()
    recipe._provider = open_sync_provider("unix:///nowhere", retries=0)
    answer = caller.post("/messages", "secret words", "text/plain")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert recipe.Message.objects.count() == before
    assert "connection_failed" in LOG.read_text()
    assert "authentication_failed" in LOG.read_text()
    assert "secret words" not in LOG.read_text()


client = Client(raise_request_exception=False)
texts_come_back(client)
processes_have_their_own(client)
plain_text_is_refused()
moved_texts_do_not_open(client)
nothing_is_stored_while_away(client)
sys.stdout.write("ok\n")

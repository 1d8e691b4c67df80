"""The example's server as a process, its KMS, and its own code for what a test looks at beside it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client.parser import text_string_to_metric_families

from examples.chat_server.cipher import Envelope, seal_many
from examples.chat_server.keys import ThreadKeys, messages_prefix, meta_key
from examples.chat_server.store import Store
from progressdb_kms.client import AdminClient, KmsError, open_sync_provider
from tests.store.servers import free_port

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
LIMIT = 60.0
"""Seconds after which what never comes true fails a test."""
TOKEN = "made-up"


def eventually(check: Callable[[], T], what: str = "") -> T:
    """Return the first truthy result of `check`."""
    end = time.monotonic() + LIMIT
    while not (result := check()):
        assert time.monotonic() < end, f"never came true: {what or check}"
        time.sleep(0.02)
    return result


def patiently(call: Callable[[], T]) -> T:
    """Return what a call returns, made again where the KMS says that it is worth another try."""
    end = time.monotonic() + LIMIT
    while True:
        try:
            return call()
        except KmsError as error:
            if not error.retryable or time.monotonic() > end:
                raise
            time.sleep(0.1)


def kms_environment(ready: dict[str, Any], client: str = "chat") -> dict[str, str]:
    """Return the environment that leads to a development service, as this client."""
    files = ready["clients"][client]
    return {
        "PROGRESSDB_KMS_ENDPOINT": ready["url"],
        "PROGRESSDB_KMS_CA": ready["ca"],
        "PROGRESSDB_KMS_CERT": files["cert"],
        "PROGRESSDB_KMS_KEY": files["key"],
    }


def options(ready: dict[str, Any], client: str = "chat") -> dict[str, Any]:
    """Return what opens a provider or an admin client, as this client."""
    files = ready["clients"][client]
    return {"url": ready["url"], "ca": ready["ca"], "cert": files["cert"], "key": files["key"]}


def calls(ready: dict[str, Any]) -> dict[str, float]:
    """Return how many requests the service has answered, by route."""
    with urllib.request.urlopen(ready["admin_url"] + "/metrics") as page:  # noqa: S310 - a URL of our own
        text = page.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "kms_requests_total":
                route = sample.labels["route"]
                found[route] = found.get(route, 0) + sample.value
    return found


@contextmanager
def insider(ready: dict[str, Any], database: Path) -> Iterator[ThreadKeys]:
    """Give the example's own keys and store over the same data, in this process."""
    store = Store(database)
    with open_sync_provider(**options(ready)) as kms, AdminClient(**options(ready)) as admin:
        yield ThreadKeys(store, kms, admin, "chat:")
    store.close()


def fill(keys: ThreadKeys, thread_id: str, number: int) -> dict[str, str]:
    """Put messages into a thread, and return their texts by id."""
    stored, meta = keys.for_writing(thread_id)
    prefix = messages_prefix(thread_id)
    texts = {f"{n:020d}-000000": f"{thread_id}/{n}/0" for n in range(number)}
    names = list(texts)
    for start in range(0, number, 2000):
        part = [(prefix + name, texts[name].encode()) for name in names[start : start + 2000]]
        sealed = seal_many(keys.kms, meta.key_id, thread_id, part)
        writes = dict(zip([key for key, _ in part], sealed, strict=True))
        assert keys.store.commit(writes, given={meta_key(thread_id): stored})
    return texts


class Chat:
    """The example's server.

    Args:
        folder: For its log.
        database: Its data.
        environment: Further environment.
    """

    def __init__(self, folder: Path, database: Path, environment: dict[str, str]) -> None:
        self.database = database
        self.log = folder / f"chat-{free_port()}.log"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        given = {name: value for name, value in os.environ.items() if not name.startswith("PROGRESSDB_KMS_")}
        self.environment = {
            **given,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "service"), str(ROOT)]),
            "CHAT_DATABASE": str(database),
            "CHAT_BIND": f"127.0.0.1:{self.port}",
            "CHAT_ADMIN_TOKEN": TOKEN,
            **environment,
        }

    def launch(self) -> Chat:
        """Start the process."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "examples.chat_server"],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        return self

    def start(self) -> Chat:
        """Start it and return when it answers."""
        self.launch()
        eventually(self.answers, "the chat server answers")
        return self

    def answers(self) -> bool:
        """Say if it does; its process must live."""
        assert self.process
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return self.call("GET", "/healthz")[0] == 200
        except OSError:
            return False

    def kill(self) -> None:
        """End it by SIGKILL."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """End it by SIGTERM; it must end well."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(LIMIT) == 0, self.log.read_text()[-3000:]

    def request(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Make a request; returns status, headers by lower-case name, and the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, headers or {})
            response = connection.getresponse()
            answered = {name.lower(): value for name, value in response.getheaders()}
            return response.status, answered, json.loads(response.read())
        finally:
            connection.close()

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Make a request with the admin's token; returns status and body."""
        status, _, answer = self.request(method, path, body, {"Authorization": f"Bearer {TOKEN}"})
        return status, answer

    def patient(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Make a request, again while the answer is 503: a busy disk holds up the KMS's store."""
        answered = eventually(lambda: None if (got := self.call(method, path, body))[0] == 503 else got)
        assert answered
        return answered

    def post(self, thread_id: str, text: str) -> str:
        """Post a message and return its id."""
        status, answer = self.patient("POST", f"/threads/{thread_id}/messages", {"text": text})
        assert status == 201, answer
        return str(answer["id"])

    def messages(self, thread_id: str, query: str = "") -> list[dict[str, str]]:
        """Return a thread's messages."""
        status, answer = self.patient("GET", f"/threads/{thread_id}/messages{query}")
        assert status == 200, answer
        return list(answer["messages"])

    def texts(self, thread_id: str) -> list[str]:
        """Return a thread's texts; all must be readable."""
        return [message["text"] for message in self.messages(thread_id)]

    def rotation(self, thread_id: str, method: str = "GET") -> dict[str, Any]:
        """Return the progress of a thread's rotation, or begin one by POST."""
        status, answer = self.call(method, f"/admin/threads/{thread_id}/rotation")
        assert status == 200, answer
        return dict(answer)

    def rotated(self, thread_id: str) -> dict[str, Any]:
        """Wait until nothing is under way for a thread, and return what its keys are."""
        eventually(lambda: self.rotation(thread_id)["job"] is None, f"rotation of {thread_id}")
        return self.rotation(thread_id)

    def entries(self, prefix: str = "") -> dict[str, bytes]:
        """Return what the database holds."""
        with sqlite3.connect(self.database) as connection:
            rows = connection.execute("SELECT key, value FROM entries").fetchall()
        connection.close()
        return {key: value for key, value in rows if key.startswith(prefix)}

    def envelopes(self, thread_id: str) -> dict[str, Envelope]:
        """Return a thread's stored messages, by key."""
        found = self.entries(messages_prefix(thread_id))
        return {key: Envelope.decode(value) for key, value in found.items()}

    def put(self, key: str, value: bytes) -> None:
        """Write into the database, as whoever has broken into it would."""
        with sqlite3.connect(self.database) as connection:
            connection.execute("REPLACE INTO entries VALUES (?, ?)", (key, value))
        connection.close()

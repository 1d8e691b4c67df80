"""Sixteen clients that use the service throughout, and write down what they asked and what they got."""

from __future__ import annotations

import contextlib
import http.client
import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import redis

from progressdb_kms.domain.keys import ALL_TAGS
from tests.contract.wire_client import Answer, Client, b64, tls_connect, tls_context, unb64
from tests.fault.rotation.history import FloorSeen, History, Kind, Operation, Outcome, Violation
from tests.integration.world import Instance

TASKS = 16
PAUSE = 0.02
"""Seconds that a task rests between two operations: two cores carry services, store, job and clients."""
BATCH = 500
NOT_NOW = frozenset({408, 429, 503})
"""Answers that leave open whether it was done."""
_PATHS = {
    Kind.DISABLE: "disable",
    Kind.ENABLE: "enable",
    Kind.SCHEDULE: "schedule-destruction",
    Kind.CANCEL: "cancel-destruction",
}


@dataclass(frozen=True, slots=True)
class Sealed:
    """A ciphertext that was returned, and what was sent."""

    key_id: str
    message: bytes
    ciphertext: bytes


class Recorder:
    """Performs operations and writes each down.

    Args:
        history: Where to.
        instances: The services; each operation goes to one of them at random.
    """

    def __init__(self, history: History, instances: Sequence[Instance]) -> None:
        self.history = history
        self._clients = {
            name: [_client(instance, name) for instance in instances] for name in ("server", "operator")
        }

    def close(self) -> None:
        """Close the connections."""
        for clients in self._clients.values():
            for client in clients:
                client.close()

    def perform(
        self,
        asked: Operation,
        send: Callable[[Client], Answer],
        read: Callable[[Any], dict[str, Any]] = lambda _body: {},
        who: str = "server",
    ) -> Operation:
        """Do one operation.

        Args:
            asked: What is known of it before.
            send: Sends it.
            read: Gives the fields that a success adds.
            who: The certificate's name.
        """
        client = random.choice(self._clients[who])
        began = time.monotonic()
        found: dict[str, Any]
        try:
            answer = send(client)
        except (OSError, http.client.HTTPException) as error:
            client.close()
            found = {"outcome": Outcome.MAYBE, "code": type(error).__name__}
        else:
            body = answer.json()
            if answer.status == 200:
                found = {"outcome": Outcome.OK, **read(body)}
            elif answer.status in NOT_NOW:
                if answer.status == 503 and int(answer.headers.get("retry-after", "0")) < 1:
                    note(self.history, "not now says when", f"{asked.kind}: {body['code']}")
                found = {"outcome": Outcome.MAYBE, "code": body["code"]}
            else:
                found = {"outcome": Outcome.REFUSED, "code": body["code"]}
        done = replace(asked, began=began, ended=time.monotonic(), **found)
        self.history.operations.append(done)
        return done

    def create(self, thread_id: str, once: str = "", kind: Kind = Kind.CREATE) -> Operation:
        """Make a key, or rotate the thread's."""
        headers = {"Idempotency_Key": once} if once else {}

        def send(client: Client) -> Answer:
            if kind is Kind.ROTATE_DEK:
                return client.post(f"/v1/threads/{quote(thread_id, safe='')}/rotate-dek", **headers)
            return client.post("/create_dek_for_thread", {"thread_id": thread_id}, **headers)

        return self.perform(
            _asked(kind, thread_id=thread_id, once=once),
            send,
            lambda body: {"key_id": body["key_id"], "version": int(body["key_version"])},
            "operator" if kind is Kind.ROTATE_DEK else "server",
        )

    def encrypt(self, key_id: str) -> Operation:
        """Encrypt a message."""
        message = secrets.token_bytes(24)
        return self.perform(
            _asked(Kind.ENCRYPT, key_id=key_id, message=message),
            lambda client: client.post("/encrypt", {"key_id": key_id, "plaintext": b64(message)}),
            lambda body: {"ciphertext": unb64(body["ciphertext"])},
        )

    def decrypt(self, sealed: Sealed) -> Operation:
        """Decrypt a ciphertext."""
        return self.perform(
            _asked(Kind.DECRYPT, key_id=sealed.key_id, ciphertext=sealed.ciphertext, expected=sealed.message),
            lambda client: client.try_decrypt(sealed.key_id, sealed.ciphertext),
            lambda body: {"message": unb64(body["plaintext"])},
        )

    def change(self, kind: Kind, key_id: str) -> Operation:
        """Change a key's state."""
        body = {"waiting_days": 7} if kind is Kind.SCHEDULE else None
        return self.perform(
            _asked(kind, key_id=key_id),
            lambda client: client.post(f"/v1/keys/{key_id}/{_PATHS[kind]}", body),
            who="operator",
        )

    def preload(self, count: int) -> list[Sealed]:
        """Make keys, and a ciphertext under each, in batches that all must succeed."""
        sealed: list[Sealed] = []
        (client, *_) = self._clients["server"]
        for first in range(0, count, BATCH):
            threads = [f"old:{number}" for number in range(first, min(first + BATCH, count))]
            messages = [secrets.token_bytes(24) for _ in threads]
            began = time.monotonic()
            creates = [{"thread_id": thread, "idempotency_key": thread} for thread in threads]
            made = client.batch("/create_dek_batch", creates)
            items = [
                {"key_id": key["key_id"], "plaintext": b64(message)}
                for key, message in zip(made, messages, strict=True)
            ]
            results = client.batch("/encrypt_batch", items)
            ended = time.monotonic()
            for thread, key, message, result in zip(threads, made, messages, results, strict=True):
                done = {"began": began, "ended": ended, "outcome": Outcome.OK, "key_id": key["key_id"]}
                version, ciphertext = int(key["key_version"]), unb64(result["ciphertext"])
                self.history.operations += [
                    Operation(Kind.CREATE, thread_id=thread, version=version, **done),
                    Operation(Kind.ENCRYPT, message=message, ciphertext=ciphertext, **done),
                ]
                sealed.append(Sealed(key["key_id"], message, ciphertext))
        return sealed

    def decrypt_all(self) -> None:
        """Decrypt every ciphertext that was ever returned, as a client would who comes later."""
        everything = self.history.sealed()
        (client, *_) = self._clients["server"]
        for first in range(0, len(everything), BATCH):
            part = everything[first : first + BATCH]
            began = time.monotonic()
            items = [{"key_id": each.key_id, "ciphertext": b64(each.ciphertext)} for each in part]
            results = client.batch("/decrypt_batch", items)
            ended = time.monotonic()
            for each, result in zip(part, results, strict=True):
                asked = Operation(
                    Kind.DECRYPT,
                    began,
                    ended,
                    Outcome.OK,
                    key_id=each.key_id,
                    ciphertext=each.ciphertext,
                    expected=each.message,
                )
                if "error" in result:
                    done = replace(asked, outcome=Outcome.REFUSED, code=result["error"]["code"])
                else:
                    done = replace(asked, message=unb64(result["plaintext"]))
                self.history.operations.append(done)


def _client(instance: Instance, name: str) -> Client:
    """Return a client of this thread's own: those of the instance are closed when it is killed."""
    cert, key = instance.world.certificate(name)
    context = tls_context(instance.world.ca_file, cert, key)
    return Client(tls_connect("localhost", instance.port, context), f"localhost:{instance.port}")


def _asked(kind: Kind, **known: Any) -> Operation:
    return Operation(kind, 0.0, 0.0, Outcome.MAYBE, **known)


class Traffic:
    """The tasks.

    Args:
        history: Where all is written down.
        instances: The services.
        sealed: What there is to begin with.
        hasten: Lets a scheduled destruction fall due at once; it may fail.
    """

    def __init__(
        self,
        history: History,
        instances: Sequence[Instance],
        sealed: Sequence[Sealed],
        hasten: Callable[[str], None],
    ) -> None:
        self._history = history
        self._sealed = list(sealed)
        self._hasten = hasten
        self._switched = list(self._sealed[:TASKS])
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(TASKS)
        self._work: list[Future[None]] = [
            self._pool.submit(self._run, number, Recorder(history, instances)) for number in range(TASKS)
        ]

    def check(self) -> None:
        """Raise what has ended a task, if anything has."""
        for work in self._work:
            if work.done():
                work.result()

    def end(self) -> None:
        """Stop, and raise what has ended a task."""
        self._end.set()
        try:
            for work in self._work:
                work.result()
        finally:
            self._pool.shutdown()

    def abandon(self) -> None:
        """Stop, whatever has become of the tasks."""
        self._end.set()
        self._pool.shutdown()

    def _run(self, number: int, recorder: Recorder) -> None:
        task = _Task(number, recorder, self._sealed, self._switched, self._hasten)
        try:
            while not self._end.wait(PAUSE * random.uniform(0.5, 1.5)):
                if task.act() is Outcome.MAYBE:
                    self._end.wait(5 * PAUSE)
        finally:
            recorder.close()


class _Task:
    def __init__(
        self,
        number: int,
        recorder: Recorder,
        sealed: list[Sealed],
        switched: list[Sealed],
        hasten: Callable[[str], None],
    ) -> None:
        self._number = number
        self._recorder = recorder
        self._sealed = sealed
        self._switched = switched
        self._hasten = hasten
        self._mine = switched[number].key_id
        self._next = Kind.DISABLE
        self._again: Operation | None = None
        self._doomed = ""

    def act(self) -> Outcome:
        """Do one thing."""
        dice = random.random()
        if self._again is not None:
            return self._create(self._again.thread_id, self._again.once, self._again.kind)
        if dice < 0.15:
            return self._create(self._thread(), secrets.token_hex(8) if dice < 0.1 else "", Kind.CREATE)
        if dice < 0.18:
            return self._create(self._thread(), secrets.token_hex(8) if dice < 0.17 else "", Kind.ROTATE_DEK)
        if dice < 0.24:
            return self._switch() if dice < 0.23 else self._doom()
        choices = self._switched if random.random() < 0.2 else self._sealed
        chosen = random.choice(choices)
        if dice < 0.6:
            return self._encrypt(chosen.key_id)
        return self._recorder.decrypt(chosen).outcome

    def _thread(self) -> str:
        return f"room:{self._number}:{random.randrange(50)}"

    def _create(self, thread_id: str, once: str, kind: Kind) -> Outcome:
        done = self._recorder.create(thread_id, once, kind)
        # An answer that did not come is asked for again; now and then one that did come, too.
        retry = bool(once) and (done.outcome is Outcome.MAYBE or random.random() < 0.2)
        self._again = done if retry else None
        if done.outcome is Outcome.OK:
            self._encrypt(done.key_id)
        return done.outcome

    def _encrypt(self, key_id: str) -> Outcome:
        done = self._recorder.encrypt(key_id)
        if done.outcome is Outcome.OK:
            self._sealed.append(Sealed(key_id, done.message, done.ciphertext))
        return done.outcome

    def _switch(self) -> Outcome:
        done = self._recorder.change(self._next, self._mine)
        if done.outcome is Outcome.OK:
            self._next = Kind.ENABLE if self._next is Kind.DISABLE else Kind.DISABLE
        return done.outcome

    def _doom(self) -> Outcome:
        """Schedule a destruction; cancel it the next time, or have it come at once."""
        if self._doomed:
            done = self._recorder.change(Kind.CANCEL, self._doomed)
            if done.outcome is Outcome.OK:
                self._doomed = ""
            return done.outcome
        created = self._recorder.create(f"doomed:{self._number}")
        if created.outcome is not Outcome.OK:
            return created.outcome
        self._encrypt(created.key_id)
        done = self._recorder.change(Kind.SCHEDULE, created.key_id)
        if done.outcome is Outcome.OK:
            if random.random() < 0.5:
                self._hasten(created.key_id)
            else:
                self._doomed = created.key_id
        return done.outcome


class FloorWatch:
    """Reads the floors of all slots beside the run.

    With ``appendfsync always`` a reply leaves the store after the fsync of all that it shows: what is seen
    here is durable.
    """

    def __init__(self, history: History, connect: Callable[[], redis.Redis]) -> None:
        self._history = history
        self._connect = connect
        self._known: dict[str, int] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        """Stop."""
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(0.5):
            # A store that is away has nothing to show.
            with contextlib.suppress(redis.RedisError, OSError):
                self.look()

    def look(self) -> None:
        """Read once; what has changed is written down."""
        with self._connect() as client:
            pipeline = client.pipeline(transaction=False)
            for tag in ALL_TAGS:
                pipeline.hget(f"kms:{{{tag}}}:ctl", "floor")
            now = time.monotonic()
            for tag, value in zip(ALL_TAGS, pipeline.execute(), strict=True):
                floor = int(value or 0)
                if self._known.get(tag) != floor:
                    self._known[tag] = floor
                    self._history.floors.append(FloorSeen(now, tag, floor))


def note(history: History, promise: str, text: str) -> None:
    """Write down a violation that is no client's to see."""
    history.notes.append(Violation(promise, text))

"""The chat server: rotation of a thread's key, killed again and again."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest

from examples.chat_server import rotation
from examples.chat_server.cipher import Envelope, seal_many
from examples.chat_server.keys import JOBS, ThreadKeys, ThreadNotFound, messages_prefix
from examples.chat_server.rotation import Worker
from examples.chat_server.store import Store
from examples.chat_server.threads import Threads
from progressdb_kms.client import AdminClient, SyncKmsProvider, open_sync_provider
from progressdb_kms.domain.errors import KeyDestroyed, KeyNotFound, KeyPendingDestruction, PermissionDenied
from tests.examples.chat import Chat, eventually, fill, insider, patiently

THREAD = "long"


class Reader(threading.Thread):
    """Reads all of a thread, again and again, and checks each text against what was written.

    Attributes:
        texts: What each message has to be; an editor puts its new text in when that is acknowledged.
        sure: Held while a page is read or a text is changed, so that both agree.
    """

    def __init__(self, threads: Threads, texts: dict[str, str]) -> None:
        super().__init__()
        self.texts = texts
        self.sure = threading.Lock()
        self.passes = 0
        self.pages = 0
        self.wrong: list[object] = []
        self.ended = threading.Event()
        self._threads = threads

    def run(self) -> None:
        """Read until `ended`, and once more."""
        try:
            while True:
                last = self.ended.is_set()
                self.read_all()
                if last:
                    return
        except Exception as error:  # noqa: BLE001 - shown by the test
            self.wrong.append(error)

    def read_all(self) -> None:
        """Read each page once."""
        after, count = "", 0
        while True:
            with self.sure:
                page = patiently(partial(self._threads.read, THREAD, after, 200))
                self.wrong += [each for each in page if each.get("text") != self.texts[each["id"]]][:3]
            if not page:
                break
            self.pages += 1
            count += len(page)
            after = page[-1]["id"]
        if count < len(self.texts) - 1:  # one may be posted behind the last page
            self.wrong.append(f"{count} of {len(self.texts)} messages")
        self.passes += 1


@pytest.mark.fault
@pytest.mark.timeout(3600)
def test_rotation_killed_again_and_again(
    request: pytest.FixtureRequest,
    new_chat: Callable[..., Chat],
    ready: dict[str, Any],
    operator: AdminClient,
) -> None:
    """Killed at any moment a rotation goes on; each read meanwhile is right; at the end the old key goes."""
    number, kills = (100_000, 50) if request.config.getoption("--full", default=False) else (5_000, 10)
    chat = new_chat()
    old: set[str] = set()
    began = time.monotonic()
    with insider(ready, chat.database) as keys:
        chatter = Threads(keys)
        reader = Reader(chatter, fill(keys, THREAD, number))
        reader.start()
        ids = list(reader.texts)
        killed = lives = 0
        while killed < kills:
            old.add(chat.rotation(THREAD)["key_id"])
            status = chat.rotation(THREAD, "POST")
            while killed < kills:
                # A step takes 10 to 50 ms, so that some moments are within the first and some far behind.
                time.sleep(random.expovariate(20))
                chat.kill()
                status["job"] = keys.store.get(JOBS + THREAD)
                lives += 1
                killed += status["job"] is not None
                with reader.sure:
                    target = random.choice(ids)
                    reader.texts[target] = f"edited in life {lives}"
                    patiently(partial(chatter.edit, THREAD, target, reader.texts[target]))
                    posted = patiently(partial(chatter.post, THREAD, f"posted in life {lives}"))
                    reader.texts[posted] = f"posted in life {lives}"
                chat.start()
                if status["job"] is None:
                    break
        ended = chat.rotated(THREAD)
        reader.ended.set()
        reader.join()
    assert not reader.wrong, reader.wrong[:3]
    assert reader.passes > 1
    assert {each.key_id for each in chat.envelopes(THREAD).values()} == {ended["key_id"]}
    assert len(chat.envelopes(THREAD)) == len(reader.texts) == number + lives
    old.discard(ended["key_id"])
    states = {key.key_id: key.state for key in operator.list_keys(f"chat:{THREAD}")}
    assert states.pop(ended["key_id"]) == "enabled"
    assert set(states.values()) == {"pending_destruction"}
    assert set(states) == old
    print(  # noqa: T201 - the figures of the long form
        f"\n{number} messages, {killed} kills within {len(old)} rotations, {lives} lives;"
        f" {reader.passes} readings of all of them ({reader.pages} pages); {time.monotonic() - began:.0f} s"
    )


def test_progress_is_shown_and_an_unreadable_message_keeps_the_old_key(
    chat: Chat, ready: dict[str, Any], operator: AdminClient
) -> None:
    """A message that does not decrypt holds a rotation up, visibly; once it is edited, all goes on."""
    with insider(ready, chat.database) as keys:
        texts = fill(keys, "bad", 700)
    old = chat.rotation("bad")["key_id"]
    broken = list(texts)[600]
    key = messages_prefix("bad") + broken
    stored = chat.entries()[key]
    chat.put(key, stored[:-1] + bytes([stored[-1] ^ 1]))
    chat.rotation("bad", "POST")
    eventually(lambda: (chat.rotation("bad")["job"] or {}).get("resume_at"), "the rotation rests")
    status = chat.rotation("bad")
    job = status["job"]
    assert (job["total"], job["done"], job["unreadable"], job["example"]) == (700, 699, 1, key)
    assert status["retired"] == [old]
    assert operator.get_key(old).state == "decrypt_only"
    assert chat.call("PUT", f"/threads/bad/messages/{broken}", {"text": "mended"})[0] == 200
    chat.kill()
    chat.put(JOBS + "bad", msgspec.json.encode(job | {"resume_at": 1.0}))
    chat.start()
    chat.rotated("bad")
    assert operator.get_key(old).state == "pending_destruction"


class Crash(BaseException):
    """The process ends here."""


class Crashing(Store):
    """A store of a process that is killed before, or just after, one of its commits."""

    left: float = float("inf")

    def commit(self, *args: Any, **named: Any) -> bool:
        """Commit, or crash."""
        self.left -= 0.5
        if self.left < 0:
            raise Crash
        done = super().commit(*args, **named)
        self.left -= 0.5
        if self.left < 0:
            raise Crash
        return done


class Ends:
    """Notes which keys were given up, in place of an admin client of a KMS that has no destruction."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    def schedule_destruction(self, key_id: str) -> Any:
        """Note it."""
        self.keys.add(key_id)
        return type("Info", (), {"destroy_at": "then"})


class Watched:
    """A KMS that notes the keys it made, and does something of the test's before it encrypts."""

    def __init__(self, provider: SyncKmsProvider) -> None:
        self.made: set[str] = set()
        self.before: list[Callable[[], object]] = []
        self._provider = provider

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)

    def create_dek_for_thread(self, *args: Any, **named: Any) -> Any:
        """Make a key."""
        dek = self._provider.create_dek_for_thread(*args, **named)
        self.made.add(dek.key_id)
        return dek

    def rotate_dek(self, *args: Any, **named: Any) -> Any:
        """Make a thread's next key."""
        dek = self._provider.rotate_dek(*args, **named)
        self.made.add(dek.key_id)
        return dek

    def encrypt_with_dek(self, *args: Any, **named: Any) -> Any:
        """Encrypt, and let time go by before the answer comes."""
        sealed = self._provider.encrypt_with_dek(*args, **named)
        if self.before:
            self.before.pop()()
        return sealed


@pytest.fixture
def kms() -> Iterator[Watched]:
    """Give an embedded KMS."""
    with open_sync_provider("embedded:") as provider:
        yield Watched(provider)


def keys_on(store: Store, kms: Watched) -> tuple[ThreadKeys, Ends]:
    """Return the example's keys, and what notes their ends."""
    ends = Ends()
    return ThreadKeys(store, kms, ends, "chat:"), ends  # type: ignore[arg-type] # stand for provider and admin


def work(keys: ThreadKeys) -> None:
    """Do all steps of all jobs."""
    worker = Worker(keys)
    while jobs := keys.store.scan(JOBS):
        for key, stored in jobs:
            worker.step(key.removeprefix(JOBS), stored)


def texts_of(keys: ThreadKeys, thread_id: str) -> dict[str, str]:
    """Read a thread."""
    return {each["id"]: each["text"] for each in Threads(keys).read(thread_id, "", 100)}


@pytest.mark.parametrize(
    "what", [["rotate"], ["delete"], ["rotate", "work", "delete"], ["post"], ["post", "delete"]]
)
def test_a_crash_at_any_commit_is_survived(
    tmp_path: Path, kms: Watched, monkeypatch: pytest.MonkeyPatch, what: list[str]
) -> None:
    """Killed before or after any one commit, the next process finishes the work, with no key left over."""
    monkeypatch.setattr(rotation, "BATCH", 4)
    for halves in range(40):
        store = Crashing(tmp_path / f"{halves}.db")
        keys, ends = keys_on(store, kms)
        thread = f"thread-{halves}"
        kms.made.clear()
        texts = {} if what[0] == "post" else fill(keys, thread, 10)
        old = set(kms.made)
        store.left = halves / 2
        crashed = False
        try:
            for kind in what:
                if kind == "post":
                    Threads(keys).post(thread, "text")
                elif kind == "work":
                    work(keys)
                else:
                    keys.start(thread, kind)
            work(keys)
        except Crash:
            crashed = True
        store.left = float("inf")
        if what == ["post"]:
            Threads(keys).post(thread, "text")
            assert set(texts_of(keys, thread).values()) == {"text"}
        else:
            # Whoever asked had no answer and asks again; a rotation that has begun needs no second one.
            if what[-1] == "delete" or halves == 0:
                with suppress(ThreadNotFound):
                    keys.start(thread, what[-1])
            work(keys)
            assert old <= ends.keys
            if what[-1] == "delete":
                assert not store.scan("thread:")
            else:
                assert texts_of(keys, thread) == texts
                assert keys.load(thread)[1].retired == []
        alive = set() if what[-1] == "delete" else {keys.load(thread)[1].key_id}
        assert kms.made - ends.keys == alive
        used = {Envelope.decode(value).key_id for _, value in store.scan(messages_prefix(thread))}
        assert used == alive
        store.close()
        if not crashed:
            assert halves > 4
            return
    pytest.fail("more commits than expected")


def test_a_slow_write_is_not_stored_under_the_old_key(tmp_path: Path, kms: Watched) -> None:
    """A post or an edit that was encrypted before a rotation is encrypted again before it is stored."""
    store = Store(tmp_path / "db")
    keys, _ = keys_on(store, kms)
    chatter = Threads(keys)
    first = chatter.post("t", "first")

    def rotate() -> None:
        keys.start("t", "rotate")
        work(keys)

    kms.before = [rotate]
    second = chatter.post("t", "second")
    kms.before = [rotate]
    chatter.edit("t", first, "edited")
    assert texts_of(keys, "t") == {first: "edited", second: "second"}
    used = {Envelope.decode(value).key_id for _, value in store.scan(messages_prefix("t"))}
    assert used == {keys.load("t")[1].key_id}
    store.close()


def test_an_edit_beside_a_batch_wins(tmp_path: Path, kms: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is changed between a batch's reading and its writing stays changed."""
    store = Store(tmp_path / "db")
    keys, _ = keys_on(store, kms)
    texts = fill(keys, "t", 3)
    second = list(texts)[1]
    keys.start("t", "rotate")

    def slow(*args: Any) -> Any:
        sealed = seal_many(*args)
        Threads(keys).edit("t", second, "edited")
        return sealed

    monkeypatch.setattr(rotation, "seal_many", slow)
    work(keys)
    assert texts_of(keys, "t") == texts | {second: "edited"}
    store.close()


def test_a_read_across_the_end_of_a_rotation_is_right(
    tmp_path: Path, kms: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader whose messages' key is gone when it comes to decrypt them reads again."""
    store = Store(tmp_path / "db")
    keys, ends = keys_on(store, kms)
    texts = fill(keys, "t", 3)
    decrypt = kms.decrypt_many

    def late(items: list[Any], **named: Any) -> Any:
        if not ends.keys and not store.scan(JOBS):
            keys.start("t", "rotate")
            work(keys)
        return [
            KeyPendingDestruction() if key in ends.keys else decrypt([(key, *rest)])[0]
            for key, *rest in items
        ]

    monkeypatch.setattr(kms, "decrypt_many", late, raising=False)
    assert texts_of(keys, "t") == texts
    assert ends.keys
    store.close()


def test_a_batch_under_a_key_of_before_is_not_stored(
    tmp_path: Path, kms: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that slept over the begin of another rotation changes neither messages nor progress."""
    store = Store(tmp_path / "db")
    keys, _ = keys_on(store, kms)
    texts = fill(keys, "t", 3)
    keys.start("t", "rotate")
    keys.renew("t", *keys.load("t"))
    before: list[list[tuple[str, bytes]]] = []

    def sleep(*args: Any) -> Any:
        sealed = seal_many(*args)
        keys.start("t", "rotate")
        keys.renew("t", *keys.load("t"))
        before.append(store.scan("thread:") + store.scan(JOBS))
        return sealed

    with monkeypatch.context() as patch:
        patch.setattr(rotation, "seal_many", sleep)
        Worker(keys).step("t", store.get(JOBS + "t") or b"")
    assert before == [store.scan("thread:") + store.scan(JOBS)]
    work(keys)
    assert texts_of(keys, "t") == texts
    store.close()


def test_a_key_that_the_kms_does_not_know_is_not_taken_for_destroyed(
    tmp_path: Path, kms: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the wrong KMS a deletion waits, with all messages; one that is destroyed already lets it go on."""
    store = Store(tmp_path / "db")
    keys, ends = keys_on(store, kms)
    fill(keys, "t", 3)
    keys.start("t", "delete")
    for error, ended in [
        (KeyNotFound(), False),
        (PermissionDenied("key:destroy", "dns:chat"), False),
        (KeyDestroyed(), True),
    ]:
        monkeypatch.setattr(ends, "schedule_destruction", Mock(side_effect=error))
        with nullcontext() if ended else pytest.raises(type(error)):
            work(keys)
        assert bool(store.scan("thread:")) is not ended
    store.close()


def test_messages_of_one_moment_do_not_replace_each_other(
    tmp_path: Path, kms: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that come to the same id at the same nanosecond store two messages."""
    store = Store(tmp_path / "db")
    keys, _ = keys_on(store, kms)
    monkeypatch.setattr("examples.chat_server.threads.time.time_ns", lambda: 1)
    for text in ("one", "two"):
        Threads(keys).post("t", text)
    assert list(texts_of(keys, "t").values()) == ["one", "two"]
    store.close()


def test_a_message_left_behind_keeps_the_old_key(tmp_path: Path, kms: Watched) -> None:
    """Should a message under the old key turn up behind the cursor, it is migrated before the key goes."""
    store = Store(tmp_path / "db")
    keys, ends = keys_on(store, kms)
    texts = fill(keys, "t", 3)
    first = store.scan(messages_prefix("t"))[0]
    keys.start("t", "rotate")
    worker = Worker(keys)
    for _ in range(2):
        worker.step("t", store.get(JOBS + "t") or b"")
    with sqlite3.connect(tmp_path / "db") as connection:
        connection.execute("UPDATE entries SET value = ? WHERE key = ?", (first[1], first[0]))
    connection.close()
    work(keys)
    new = keys.load("t")[1].key_id
    assert new not in ends.keys
    assert {Envelope.decode(value).key_id for _, value in store.scan(messages_prefix("t"))} == {new}
    assert texts_of(keys, "t") == texts
    store.close()

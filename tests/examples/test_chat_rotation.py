"""The chat server: rotation of a thread's key, killed again and again."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from examples.chat_server import rotation
from examples.chat_server.cipher import Envelope
from examples.chat_server.keys import JOBS, Job, Meta, ThreadKeys, messages_prefix, meta_key
from examples.chat_server.rotation import Worker
from examples.chat_server.store import Store
from examples.chat_server.threads import Threads
from progressdb_kms.client import AdminClient, SyncKmsProvider, open_sync_provider
from tests.examples.chat import Chat, eventually, fill, insider

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
                page = self._threads.read(THREAD, after, 200)
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
        threads = Threads(keys)
        reader = Reader(threads, fill(keys, THREAD, number))
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
                    threads.edit(THREAD, target, reader.texts[target])
                    posted = threads.post(THREAD, f"posted in life {lives}")
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


@pytest.fixture
def kms() -> Iterator[SyncKmsProvider]:
    """Give an embedded KMS."""
    with open_sync_provider("embedded:") as provider:
        yield provider


def work(keys: ThreadKeys) -> None:
    """Do all steps of all jobs."""
    worker = Worker(keys)
    while jobs := keys.store.scan(JOBS):
        for key, stored in jobs:
            worker.step(key.removeprefix(JOBS), stored)


@pytest.mark.parametrize("what", ["rotate", "delete", "post"])
def test_a_crash_at_any_commit_is_survived(
    tmp_path: Path, kms: SyncKmsProvider, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Killed before or after any one commit, the next process finishes the work, with no key left over."""
    monkeypatch.setattr(rotation, "BATCH", 4)
    ends = Ends()
    for halves in range(40):
        store = Crashing(tmp_path / f"{what}-{halves}.db")
        keys = ThreadKeys(store, kms, ends, "chat:")  # type: ignore[arg-type] # stands for an admin client
        thread = f"{what}-{halves}"
        texts = fill(keys, thread, 10) if what != "post" else {}
        old = keys.for_writing(thread)[1].key_id if texts else ""
        store.left = halves / 2
        crashed = False
        try:
            if what == "post":
                Threads(keys).post(thread, "first")
            else:
                keys.start(thread, what)
                work(keys)
        except Crash:
            crashed = True
        store.left = float("inf")
        if what == "post":
            Threads(keys).post(thread, "second")
            found = [message["text"] for message in Threads(keys).read(thread, "", 100)]
            assert found in (["first", "second"], ["second"])
            meta = keys.load(thread)[1]
            again = kms.create_dek_for_thread(f"chat:{thread}", idempotency_key=meta.id)
            assert again.key_id == meta.key_id
        else:
            if halves == 0:
                keys.start(thread, what)  # nothing of it was stored, and nobody was told that it was
            work(keys)
            assert old in ends.keys
            if what == "delete":
                assert not store.scan("thread:")
            else:
                read = {message["id"]: message["text"] for message in Threads(keys).read(thread, "", 100)}
                assert read == texts
                new = keys.load(thread)[1]
                assert (new.retired, new.key_id in ends.keys, new.key_id == old) == ([], False, False)
                assert {Envelope.decode(v).key_id for _, v in store.scan(messages_prefix(thread))} == {
                    new.key_id
                }
        store.close()
        if not crashed:
            assert halves > 4
            return
    pytest.fail("more commits than expected")


def test_a_batch_of_before_is_not_stored_after_another_rotation(tmp_path: Path, kms: SyncKmsProvider) -> None:
    """A worker that slept while the thread was rotated once more changes nothing any more."""
    store = Store(tmp_path / "db")
    ends = Ends()
    keys = ThreadKeys(store, kms, ends, "chat:")  # type: ignore[arg-type] # stands for an admin client
    texts = fill(keys, "t", 3)
    keys.start("t", "rotate")
    keys.renew("t", *keys.load("t"))
    sleeper = Worker(keys)
    job, meta = store.get(JOBS + "t"), store.get(meta_key("t"))
    assert job
    assert meta
    given = {JOBS + "t": job, meta_key("t"): meta}
    keys.start("t", "rotate")
    work(keys)
    before = store.scan("thread:")
    decoded = msgspec.json.decode(meta, type=Meta)
    sleeper._migrate("t", decoded, msgspec.json.decode(job, type=Job), given)
    assert store.scan("thread:") == before
    assert {each["id"]: each["text"] for each in Threads(keys).read("t", "", 10)} == texts
    store.close()


def test_a_message_left_behind_keeps_the_old_key(tmp_path: Path, kms: SyncKmsProvider) -> None:
    """Should a message under the old key turn up behind the cursor, it is migrated before the key goes."""
    store = Store(tmp_path / "db")
    ends = Ends()
    keys = ThreadKeys(store, kms, ends, "chat:")  # type: ignore[arg-type] # stands for an admin client
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
    assert {each["id"]: each["text"] for each in Threads(keys).read("t", "", 10)} == texts
    store.close()

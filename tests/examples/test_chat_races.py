"""The chat server: several processes, and requests beside a rotation."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from progressdb_kms.client import AdminClient
from tests.examples.chat import Chat, eventually, fill, insider

ROUNDS = 15


def test_first_writers_agree_on_one_key(new_chat: Callable[..., Chat], operator: AdminClient) -> None:
    """Processes that post first to a new thread at the same moment end with one key."""
    chats = [new_chat() for _ in range(3)]
    together = threading.Barrier(2 * len(chats))

    def write(chat: Chat, name: str) -> None:
        for number in range(ROUNDS):
            together.wait()
            chat.post(f"new-{number}", name)

    with ThreadPoolExecutor(2 * len(chats)) as pool:
        writers = [pool.submit(write, chat, f"{n}") for n, chat in enumerate(chats * 2)]
        for writer in writers:
            writer.result()
    for number in range(ROUNDS):
        thread = f"new-{number}"
        assert len(list(operator.list_keys(f"chat:{thread}"))) == 1
        assert sorted(chats[number % 3].texts(thread)) == [f"{n}" for n in range(6)]
        assert len({each.key_id for each in chats[0].envelopes(thread).values()}) == 1


def test_two_processes_open_a_new_database_at_once(new_chat: Callable[..., Chat]) -> None:
    """A database that is not there yet is made by whoever comes first; nobody fails."""
    with ThreadPoolExecutor(4) as pool:
        chats = list(pool.map(lambda _: new_chat(), range(4)))
    for chat in chats:
        chat.post("t", "x")
    assert chats[0].texts("t") == ["x"] * 4


@pytest.mark.slow
def test_edits_win_over_a_rotation(new_chat: Callable[..., Chat], ready: dict[str, Any]) -> None:
    """Texts acknowledged beside rotations, by two processes that both migrate, are there at the end."""
    chats = [new_chat(), new_chat()]
    with insider(ready, chats[0].database) as keys:
        texts = fill(keys, "edits", 2000)
    ids = list(texts)
    done = threading.Event()

    def edit(chat: Chat, mine: list[str]) -> dict[str, str]:
        last: dict[str, str] = {}
        for number in itertools.count():
            if done.is_set():
                return last
            message = mine[number * 37 % len(mine)]
            body = {"text": f"edit {number}"}
            assert chat.patient("PUT", f"/threads/edits/messages/{message}", body)[0] == 200
            last[message] = body["text"]
        return last

    with ThreadPoolExecutor(2) as pool:
        editors = [pool.submit(edit, chat, ids[n::2]) for n, chat in enumerate(chats)]
        for chat in (*chats, *chats):
            old = chat.rotation("edits", "POST")["key_id"]
            eventually(lambda: chats[0].rotation("edits")["key_id"] != old)  # noqa: B023 - called in the loop
            chat.rotated("edits")
        done.set()
        for editor in editors:
            texts |= editor.result()
    found: dict[str, str] = {}
    after = ""
    while page := chats[0].messages("edits", f"?limit=200&after={after}"):
        found |= {message["id"]: message["text"] for message in page}
        after = page[-1]["id"]
    assert found == texts
    assert {each.key_id for each in chats[0].envelopes("edits").values()} == {
        chats[0].rotation("edits")["key_id"]
    }

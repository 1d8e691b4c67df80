"""The recipe for FastAPI, on a real service and a real SQLite file."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from examples.recipes.fastapi_messages import create_app, get_kms
from progressdb_kms.client import open_provider
from tests.client.provider_suite import new_thread


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Run an application, with its lifespan, and give a caller of it."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        transport = httpx.ASGITransport(app)
        yield await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://app"))


@pytest.fixture
def file(tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The application's file, and the service in its environment."""
    monkeypatch.setenv("MESSAGES", str(tmp_path / "messages.db"))
    return tmp_path / "messages.db"


async def test_messages_come_back_and_are_stored_encrypted(file: Path) -> None:
    """What many callers post at once is listed, and no file holds it; a second run finds it again."""
    path = f"/threads/{new_thread()}/messages"
    async with serving(create_app()) as caller:
        texts = {f"secret words {n}" for n in range(50)}
        posted = await asyncio.gather(*(caller.post(path, json={"text": text}) for text in texts))
        assert {answer.status_code for answer in posted} == {201}
    stored = b"".join(each.read_bytes() for each in file.parent.iterdir() if each.is_file())
    assert posted[0].json()["id"].encode() in stored
    assert b"secret words" not in stored
    async with serving(create_app()) as caller:
        listed = (await caller.get(path)).json()
    assert {message["text"] for message in listed} == texts
    with sqlite3.connect(file) as db:
        assert db.execute("SELECT count(*) FROM threads").fetchone() == (1,)
    db.close()


async def test_a_moved_ciphertext_is_an_error(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A message in another's place: 500 without a reason for the caller, and the reason in the log."""
    path = f"/threads/{new_thread()}/messages"
    async with serving(create_app()) as caller:
        one, two = [(await caller.post(path, json={"text": text})).json()["id"] for text in ("one", "two")]
        db = sqlite3.connect(file)
        with db:
            db.execute(
                "UPDATE messages SET body = (SELECT body FROM messages WHERE id = ?) WHERE id = ?", (one, two)
            )
        db.close()
        answer = await caller.get(path)
    assert (answer.status_code, answer.json()) == (500, {"title": "Internal error", "status": 500})
    assert answer.headers["content-type"] == "application/problem+json"
    assert "authentication_failed" in caplog.text


async def test_nothing_is_stored_while_the_service_is_away(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """503 with Retry-After, no row, and not a word of the message in the log."""
    path = f"/threads/{new_thread()}/messages"
    app = create_app()
    async with serving(app) as caller, open_provider("unix:///nowhere", retries=0) as away:
        assert (await caller.post(path, json={"text": "first"})).status_code == 201
        app.dependency_overrides[get_kms] = lambda: away
        answer = await caller.post(path, json={"text": "secret words"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert (await caller.get(path)).status_code == 503
        app.dependency_overrides.clear()
        assert [message["text"] for message in (await caller.get(path)).json()] == ["first"]
    assert "connection_failed" in caplog.text
    assert "secret words" not in caplog.text

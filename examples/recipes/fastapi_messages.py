"""FastAPI: one provider for the application's life, as a dependency, and errors as problem documents.

    PROGRESSDB_KMS_ENDPOINT=https://kms:8443 hypercorn 'examples.recipes.fastapi_messages:create_app()'

Calls of many requests at one moment travel as one batch: nothing here has to gather them.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from examples.recipes.sealing import Sealed, pack, place, unpack
from progressdb_kms.client import KmsError, KmsProvider, open_provider, request_id_of

_log: Final = logging.getLogger(__name__)
BODY: Final = "messages.body"


class Text(BaseModel):
    """A message as callers send it."""

    text: str


class Store:
    """Threads and sealed messages in SQLite: a stand-in for your own data layer."""

    def __init__(self, path: str) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("CREATE TABLE IF NOT EXISTS threads (id TEXT PRIMARY KEY, key_id TEXT NOT NULL)")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS messages"
            " (id TEXT PRIMARY KEY, thread_id TEXT NOT NULL, body BLOB NOT NULL)"
        )

    def run(self, statement: str, *values: object) -> list[Any]:
        """Carry out one statement, a transaction of its own."""
        with self._lock:
            return self._db.execute(statement, values).fetchall()

    def close(self) -> None:
        """Close the file."""
        self._db.close()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Hold the provider and the store while the application runs.

    Here and not at import: a provider belongs to the event loop that it is used in, and to one process.
    """
    with closing(Store(os.environ.get("MESSAGES", "messages.db"))) as store:
        async with open_provider() as kms:
            app.state.kms, app.state.store = kms, store
            yield


def get_kms(request: Request) -> KmsProvider:
    """Return the provider; tests override this."""
    kms: KmsProvider = request.app.state.kms
    return kms


def get_store(request: Request) -> Store:
    """Return the store."""
    store: Store = request.app.state.store
    return store


Kms = Annotated[KmsProvider, Depends(get_kms)]
Data = Annotated[Store, Depends(get_store)]


async def kms_error(request: Request, error: Exception) -> Response:
    """Answer for a call to the service that failed: 503 where trying again may help, else 500.

    The caller learns no more: whether a key is missing or a grant is, is for the log, with the request id
    that finds it in the service's.
    """
    assert isinstance(error, KmsError)  # noqa: S101 - narrows the type; it is registered for this class
    _log.error("%s %s: %s, request %s", request.method, request.url.path, error.code, request_id_of(error))
    status, title = (503, "Try again") if error.retryable else (500, "Internal error")
    headers = {"Retry-After": "1"} if status == 503 else {}  # noqa: PLR2004 - as above
    return JSONResponse(
        {"title": title, "status": status}, status, headers, media_type="application/problem+json"
    )


async def open_thread(thread_id: str, kms: Kms, store: Data) -> str:
    """Return the key of the thread in the path, made if it is new.

    The word makes it safe: whoever is first, and however often it is tried, the thread gets the same key.
    """
    find = "SELECT key_id FROM threads WHERE id = ?"
    found = await run_in_threadpool(store.run, find, thread_id)
    if not found:
        dek = await kms.create_dek_for_thread(thread_id, idempotency_key="first")
        await run_in_threadpool(
            store.run, "INSERT OR IGNORE INTO threads VALUES (?, ?)", thread_id, dek.key_id
        )
        found = await run_in_threadpool(store.run, find, thread_id)
    key_id: str = found[0][0]
    return key_id


async def post_message(
    thread_id: str, message: Text, kms: Kms, store: Data, key_id: Annotated[str, Depends(open_thread)]
) -> dict[str, str]:
    """Store a message: encrypted, or not at all."""
    row = str(uuid.uuid4())
    sealed = await kms.encrypt_with_dek(key_id, message.text.encode(), place(BODY, thread_id, row))
    body = pack(Sealed(key_id, sealed.ciphertext))
    await run_in_threadpool(store.run, "INSERT INTO messages VALUES (?, ?, ?)", row, thread_id, body)
    return {"id": row}


async def list_messages(thread_id: str, kms: Kms, store: Data) -> list[dict[str, str]]:
    """Return a thread's messages, in one request to the service."""
    rows = await run_in_threadpool(
        store.run, "SELECT id, body FROM messages WHERE thread_id = ? ORDER BY rowid", thread_id
    )
    sealed = [(row, unpack(body)) for row, body in rows]
    items = [(each.key_id, each.ciphertext, place(BODY, thread_id, row)) for row, each in sealed]
    found = []
    for (row, _), text in zip(sealed, await kms.decrypt_many(items), strict=True):
        if isinstance(text, KmsError):
            raise text
        found.append({"id": row, "text": text.decode()})
    return found


def create_app() -> FastAPI:
    """Return the application."""
    app = FastAPI(lifespan=lifespan)
    app.add_exception_handler(KmsError, kms_error)
    app.post("/threads/{thread_id}/messages", status_code=201)(post_message)
    app.get("/threads/{thread_id}/messages")(list_messages)
    return app

"""HTTP routes. Who the caller is, is not checked here: put your own authentication in front or inside.

What a request does blocks (on the database's fsync, on the KMS), so it runs in a thread; that is why the
synchronous provider is used. Calls of many threads at a time travel to the KMS together.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from quart import Quart, abort, request
from quart.typing import ResponseReturnValue
from werkzeug.exceptions import HTTPException

from progressdb_kms.client import AdminClient, EndpointInvalid, KmsError, SyncKmsProvider, open_sync_provider

from .keys import ThreadEncrypted, ThreadKeys, ThreadNotFound
from .rotation import Worker
from .settings import Settings
from .store import Store
from .threads import MESSAGE_ID, THREAD_ID, Busy, MessageNotFound, Threads

log = logging.getLogger("chat.app")

MAX_TEXT: Final = 64 * 1024
MAX_PAGE: Final = 200
WORKERS: Final = 32
ERRORS: Final[dict[type[Exception], tuple[int, str]]] = {
    ThreadNotFound: (404, "thread_not_found"),
    MessageNotFound: (404, "message_not_found"),
    ThreadEncrypted: (409, "thread_is_encrypted"),
    Busy: (503, "try_again"),
}


def create_app(settings: Settings) -> Quart:
    """Return the server; raises EndpointInvalid if the KMS's address or certificates can't be used."""
    kms, admin = _open_kms() if settings.encryption else (None, None)
    store = Store(settings.database)
    keys = ThreadKeys(store, kms, admin, settings.kms_prefix)
    worker = Worker(keys)
    app = Quart(__name__)
    app.config["MAX_CONTENT_LENGTH"] = 8 * MAX_TEXT

    @app.before_serving
    async def start() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(WORKERS))
        worker.start()

    @app.after_serving
    async def stop() -> None:
        await asyncio.to_thread(worker.stop)
        for each in (kms, admin, store):
            if each is not None:
                each.close()

    _thread_routes(app, Threads(keys), worker)
    _admin_routes(app, worker, settings.admin_token)
    for kind in (HTTPException, KmsError, *ERRORS):
        app.register_error_handler(kind, _answer)
    return app


def _open_kms() -> tuple[SyncKmsProvider, AdminClient | None]:
    kms = open_sync_provider()
    try:
        return kms, AdminClient()
    except EndpointInvalid:
        # The address is good, or the first line would have raised: it is the embedded provider's.
        return kms, None


def _thread_routes(app: Quart, threads: Threads, worker: Worker) -> None:
    @app.get("/healthz")
    async def health() -> ResponseReturnValue:
        return {"status": "ok"}

    @app.put("/threads/<thread_id>")
    async def create(thread_id: str) -> ResponseReturnValue:
        await asyncio.to_thread(threads.create, _valid(THREAD_ID.fullmatch, thread_id))
        return {"thread_id": thread_id}, 201

    @app.post("/threads/<thread_id>/messages")
    async def post(thread_id: str) -> ResponseReturnValue:
        _valid(THREAD_ID.fullmatch, thread_id)
        return {"id": await asyncio.to_thread(threads.post, thread_id, await _text())}, 201

    @app.get("/threads/<thread_id>/messages")
    async def read(thread_id: str) -> ResponseReturnValue:
        _valid(THREAD_ID.fullmatch, thread_id)
        after = request.args.get("after", "")
        limit = request.args.get("limit", 100, type=int)
        if (after and not MESSAGE_ID.fullmatch(after)) or not 1 <= limit <= MAX_PAGE:
            abort(400)
        return {"messages": await asyncio.to_thread(threads.read, thread_id, after, limit)}

    @app.put("/threads/<thread_id>/messages/<message_id>")
    async def edit(thread_id: str, message_id: str) -> ResponseReturnValue:
        _valid(THREAD_ID.fullmatch, thread_id)
        _valid(MESSAGE_ID.fullmatch, message_id)
        await asyncio.to_thread(threads.edit, thread_id, message_id, await _text())
        return {"id": message_id}

    @app.delete("/threads/<thread_id>")
    async def delete(thread_id: str) -> ResponseReturnValue:
        await asyncio.to_thread(worker.delete, _valid(THREAD_ID.fullmatch, thread_id))
        return {"thread_id": thread_id}, 202


def _admin_routes(app: Quart, worker: Worker, token: str) -> None:
    @app.route("/admin/threads/<thread_id>/rotation", methods=["GET", "POST"])
    async def rotation(thread_id: str) -> ResponseReturnValue:
        given = request.headers.get("Authorization", "")
        if not token or not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            abort(403)
        does = worker.rotate if request.method == "POST" else worker.status
        return await asyncio.to_thread(does, _valid(THREAD_ID.fullmatch, thread_id))


async def _answer(error: Exception) -> ResponseReturnValue:
    if isinstance(error, HTTPException):
        return {"error": error.name.lower().replace(" ", "_")}, error.code or 500
    if isinstance(error, KmsError):
        # What the KMS says is for operators: users learn whether it is worth another try.
        log.error("the KMS: %s: %s (request %s)", error.code, error.detail, error.request_id or "none")
        status, code = (503, "try_again") if error.retryable else (500, "encryption_failed")
    else:
        status, code = ERRORS[type(error)]
    return {"error": code}, status, {"Retry-After": "1"} if code == "try_again" else {}


def _valid(matches: Callable[[str], object], name: str) -> str:
    if not matches(name):
        abort(404)
    return name


async def _text() -> str:
    body = await request.get_json(force=True)
    text = body.get("text") if isinstance(body, dict) else None
    if not isinstance(text, str) or not text:
        abort(400)
    # Half of a surrogate pair, which JSON can hold, is no text.
    if len(text.encode(errors="surrogatepass")) > MAX_TEXT or any("\ud800" <= c <= "\udfff" for c in text):
        abort(400)
    return text

"""The app's side of a request: how its input waits for it, and the task that it runs in."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections import deque
from typing import TYPE_CHECKING, Any

from hypercorn.asyncio.task_group import TaskGroup

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from hypercorn.config import Config
    from hypercorn.typing import AppWrapper, ASGIReceiveEvent, ASGISendEvent, Scope

log = logging.getLogger(__name__)

# Pieces of a body (64 KiB at most each) that wait for the app; then the peer has to wait.
INBOX_PIECES = 2


def where(error: BaseException) -> str:
    """Return an exception's type and place, without its text: that could show what was being processed."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


class Inbox:
    """What an app's ``receive`` returns: holds the peer back, but lets a disconnect through at once."""

    def __init__(self) -> None:
        self._events: deque[ASGIReceiveEvent] = deque()
        self._gone: ASGIReceiveEvent | None = None
        self._changed = asyncio.Event()

    async def put(self, event: ASGIReceiveEvent) -> None:
        """Add an event; waits while the app has not taken the earlier ones."""
        if event["type"] == "http.disconnect":
            self._gone = event
        else:
            while len(self._events) >= INBOX_PIECES and self._gone is None:
                self._changed.clear()
                await self._changed.wait()
            if self._gone is None:
                self._events.append(event)
        self._changed.set()

    async def get(self) -> ASGIReceiveEvent:
        """Take the next event; after a disconnect, nothing but that."""
        while self._gone is None and not self._events:
            self._changed.clear()
            await self._changed.wait()
        self._changed.set()
        return self._events.popleft() if self._gone is None else self._gone


class ConnectionTasks(TaskGroup):
    """The tasks of one connection: its reading and the app's request. Leaving it waits for both."""

    def start(self, work: Callable[..., Coroutine[Any, Any, None]], *args: object) -> asyncio.Task[None]:
        """Start a task of this connection."""
        return self._task_group.create_task(work(*args))

    async def spawn_app(
        self,
        app: AppWrapper,
        config: Config,  # noqa: ARG002 - Hypercorn's signature
        scope: Scope,
        send: Callable[[ASGISendEvent | None], Awaitable[None]],
    ) -> Callable[[ASGIReceiveEvent], Awaitable[None]]:
        """Start the app on a request; returns what takes the request's body."""
        inbox = Inbox()
        self.spawn(self._run_app, app, scope, inbox, send)
        return inbox.put

    @staticmethod
    async def _run_app(
        app: Any,  # noqa: ANN401 - an ASGIWrapper, whose last two arguments it does not use
        scope: Scope,
        inbox: Inbox,
        send: Callable[[ASGISendEvent | None], Awaitable[None]],
    ) -> None:
        try:
            await app(scope, inbox.get, send, None, None)
        except Exception as error:  # noqa: BLE001 - whatever the app raised ends this request, not the server
            log.error("the app failed outside its own error handling: %s", where(error))  # noqa: TRY400 - see where
        finally:
            await send(None)

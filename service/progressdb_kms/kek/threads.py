"""Threads for calls that block: to a token's library, to another service."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

_T = TypeVar("_T")


class Threads:
    """A few threads that work off calls in order.

    Daemon threads, unlike those of an executor, which the interpreter waits for at its end: a token that
    never answers must hold up neither the event loop nor the end of the process.

    Args:
        name: What they are called.
        count: How many there are. They start with the first call.
    """

    def __init__(self, name: str, count: int) -> None:
        self._name = name
        self._count = count
        self._started = False
        self._calls: OrderedDict[Future[Any], Callable[[], Any]] = OrderedDict()
        self._waiting = threading.Condition()

    async def call(self, function: Callable[[], _T], seconds: float) -> _T:
        """Return what ``function`` returns, called in one of the threads.

        Args:
            function: What to call.
            seconds: For it, the wait for a free thread among them. A call that has not begun by then never
                does; one that has goes on alone, and its result is dropped.

        Raises:
            TimeoutError: It took longer.
        """
        if not self._started:
            self._started = True
            for number in range(self._count):
                threading.Thread(target=self._work, name=f"{self._name}-{number}", daemon=True).start()
        future: Future[_T] = Future()
        with self._waiting:
            self._calls[future] = function
            self._waiting.notify()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), seconds)
        finally:
            # While every thread hangs nobody else takes it off, and it holds keys.
            with self._waiting:
                self._calls.pop(future, None)

    def _work(self) -> None:
        while True:
            with self._waiting:
                while not self._calls:
                    self._waiting.wait()
                future, function = self._calls.popitem(last=False)
            if future.set_running_or_notify_cancel():
                _settle(future, function)


def _settle(future: Future[_T], function: Callable[[], _T]) -> None:
    try:
        result = function()
    except BaseException as error:  # noqa: BLE001 - whoever waits for the call is told
        future.set_exception(error)
    else:
        future.set_result(result)

"""One way to call both kinds of provider, and a clock that tests turn by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from progressdb_kms.client import KmsProvider, SyncKmsProvider
from progressdb_kms.client.aio import AsyncHttpSender
from progressdb_kms.client.aio_coalescing import CoalescingSender
from progressdb_kms.client.blocking import SyncHttpSender
from progressdb_kms.client.blocking_coalescing import SyncCoalescingSender
from progressdb_kms.client.endpoint import Endpoint
from progressdb_kms.client.exchange import Rules
from progressdb_kms.client.protocol import Encoding
from progressdb_kms.client.retry import RetryPolicy
from progressdb_kms.client.senders import SenderProvider, SyncSenderProvider

KINDS = ["async", "sync"]

Open = Callable[..., "Facade"]
"""What opens a provider: an endpoint, if not the stand-in's, and options of ``build``."""


@dataclass
class Clock:
    """Stands still but for the waits of the code under test, which it writes down."""

    now: float = 1000.0
    waits: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        """Return the present time."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let the time pass at once."""
        self.waits.append(seconds)
        self.now += seconds

    async def asleep(self, seconds: float) -> None:
        """Do the same for the async sender."""
        self.sleep(seconds)


class Facade:
    """A provider whose methods are all awaited, whichever kind it is."""

    def __init__(self, provider: KmsProvider | SyncKmsProvider) -> None:
        self.provider = provider

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.provider, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return await result if inspect.isawaitable(result) else result

        return call

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        result = self.provider.close()
        if inspect.isawaitable(result):
            await result


def build(
    kind: str,
    endpoint: Endpoint,
    clock: Clock,
    *,
    deadline: float = 5.0,
    retries: int = 2,
    max_connections: int = 4,
    connect_timeout: float = 5.0,
    encoding: Encoding = "json",
    coalesce: bool = False,
) -> Facade:
    """Return a provider that waits by `clock`, with jitter at its greatest."""
    rules = Rules(deadline, RetryPolicy(retries), encoding, now=clock, random=lambda: 1.0)
    limits: dict[str, Any] = {"connect_timeout": connect_timeout, "max_connections": max_connections}
    if kind == "async":
        sender = AsyncHttpSender(endpoint, rules, sleep=clock.asleep, **limits)
        return Facade(SenderProvider(CoalescingSender(sender, rules) if coalesce else sender, encoding))
    blocking = SyncHttpSender(endpoint, rules, sleep=clock.sleep, **limits)
    together = SyncCoalescingSender(blocking, rules) if coalesce else blocking
    return Facade(SyncSenderProvider(together, encoding))

"""The lock of rotations, held by whatever must not run beside one: imports, restores, purges, retirements."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from progressdb_kms.domain.errors import KmsError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from progressdb_kms.ports import Lock, RotationLedger

LEASE: Final = 15.0
RENEW: Final = 4.0


@asynccontextmanager
async def exclusive(ledger: RotationLedger, owner: str) -> AsyncIterator[Lock]:
    """Hold the lock while the body runs; when another has taken it, end the body with ``Fenced``.

    Args:
        ledger: Where it is.
        owner: Who asks, for the message to others.

    Raises:
        RotationRunning: A rotation or another such command has it.
        Fenced: It was lost meanwhile.
        StoreUnavailable: Not now.
    """
    lock = await ledger.acquire(owner, LEASE)
    body = asyncio.current_task()
    lost: list[KmsError] = []

    async def renew() -> None:
        while True:
            await asyncio.sleep(RENEW)
            try:
                await ledger.renew(lock, LEASE)
            except StoreUnavailable:
                continue
            except KmsError as error:
                lost.append(error)
                if body is not None:
                    body.cancel()
                return

    task = asyncio.create_task(renew())
    try:
        yield lock
    except asyncio.CancelledError:
        if lost:
            raise lost[0] from None
        raise
    finally:
        task.cancel()
        if not lost:
            await ledger.release(lock)

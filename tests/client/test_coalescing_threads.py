"""A thread sends for the others: what becomes of them if it is interrupted, and what of a fork."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import warnings
from collections.abc import AsyncIterator
from typing import Any

import pytest

from progressdb_kms.client import Encrypted, SyncKmsProvider, blocking_coalescing
from progressdb_kms.client.blocking import Reservation, SyncHttpSender
from progressdb_kms.client.endpoint import Endpoint, TlsFiles
from progressdb_kms.client.exchange import Attempt
from progressdb_kms.client.protocol import Reply
from tests.client.crew import Crew, eventually, results
from tests.client.harness import Clock, build
from tests.client.standin import StandIn


class InterruptedHere(BaseException):
    """What KeyboardInterrupt is to the main thread."""


class Event(threading.Event):
    """Interrupts the first thread that is woken after it was armed."""

    armed = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait, and be interrupted."""
        found = super().wait(timeout)
        if found and Event.armed:
            Event.armed = False
            raise InterruptedHere
        return found


@pytest.fixture
async def crew(
    standin: StandIn, files: TlsFiles, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Crew]:
    """Threads that share a provider."""
    monkeypatch.setattr(blocking_coalescing, "PATIENCE", 60.0)
    monkeypatch.setattr(blocking_coalescing, "Event", Event)
    async with build("sync", Endpoint(standin.url, tls=files), clock, deadline=30.0, coalesce=True) as kms:
        crew = Crew(kms, standin)
        yield crew
        await crew.close()


@pytest.mark.parametrize("moment", ["when woken to send", "while it sends"])
async def test_an_interrupted_leader_leaves_the_others_whole(
    crew: Crew, standin: StandIn, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """They make their calls themselves, and what it had taken is free again."""
    dek = await crew.kms.create_dek_for_thread("t")
    call = ("encrypt_with_dek", dek.key_id, b"m")
    gate, held = await crew.occupy(*call)
    began = await crew.gather([call] * 5)
    if moment == "while it sends":
        attempt = SyncHttpSender.attempt

        def interrupted(sender: SyncHttpSender, place: Reservation, step: Attempt) -> Reply:
            reply = attempt(sender, place, step)
            if step.request.target == "/encrypt_batch":
                raise InterruptedHere
            return reply

        monkeypatch.setattr(SyncHttpSender, "attempt", interrupted)
    else:
        Event.armed = True
    gate.open()
    found = await results(began)
    await results(held)
    assert sorted(type(result).__name__ for result in found) == ["Encrypted"] * 4 + ["InterruptedHere"]
    assert (crew.lane()._out, crew.gathered()) == (0, 0)
    sender: Any = crew.kms.provider._sender._sender  # type: ignore[union-attr] # the one that coalesces
    assert sender._pools._current.users == 0


async def test_a_forked_child_starts_afresh(crew: Crew, standin: StandIn) -> None:
    """Requests and locks of the parent's threads, which it does not have, hold up nothing there."""
    provider = crew.kms.provider
    assert isinstance(provider, SyncKmsProvider)
    dek = await crew.kms.create_dek_for_thread("t")
    call = ("encrypt_with_dek", dek.key_id, b"m")
    gate, held = await crew.occupy(*call)
    began = await crew.gather([call] * 2)
    with crew.lane()._lock, warnings.catch_warnings():
        # Newer Pythons warn of any fork beside threads, which is what is tried here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
        if child == 0:
            try:
                sealed = provider.encrypt_with_dek(dek.key_id, b"child", deadline=20)
                os._exit(0 if len(sealed.ciphertext) == 33 else 1)
            finally:
                os._exit(2)
    ended: list[int] = []

    def reap() -> bool:
        pid, status = os.waitpid(child, os.WNOHANG)
        ended.extend([os.waitstatus_to_exitcode(status)] if pid else [])
        return bool(ended)

    try:
        await eventually(reap)
    finally:
        if not ended:
            os.kill(child, signal.SIGKILL)
            await asyncio.to_thread(os.waitpid, child, 0)
    assert ended == [0]
    gate.open()
    assert {type(result) for result in await results(held + began)} == {Encrypted}

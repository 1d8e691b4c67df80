"""Coalescing over the real service: the same errors, its death in the middle, and many threads."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from progressdb_kms.client import (
    AdminClient,
    ConnectionFailed,
    Encrypted,
    KmsProvider,
    SyncKmsProvider,
    request_id_of,
)
from progressdb_kms.domain.errors import KmsError
from tests.client.crew import eventually
from tests.client.devservice import running
from tests.client.harness import Facade
from tests.client.provider_suite import UNKNOWN_KEY, connect, new_thread


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A running service."""
    with running(tmp_path_factory.mktemp("coalescing")) as ready:
        yield ready


def told(error: object) -> tuple[Any, ...]:
    """Return all that a caller can learn of an error but the request's id, which no two have in common."""
    if not isinstance(error, KmsError):
        return (type(error),)
    members = {name: value for name, value in vars(error).items() if name != "request_id"}
    return type(error), error.args, error.code, error.retryable, members, bool(request_id_of(error))


async def test_errors_are_those_of_single_calls(ready: dict[str, Any]) -> None:
    """Class, text and attributes, for each way in which one call of a batch can fail."""
    pair = ready["clients"]["operator"]
    async with connect(ready, "async", "tls") as kms:
        one, disabled, waiting = [await kms.create_dek_for_thread(new_thread()) for _ in range(3)]
        sealed = (await kms.encrypt_with_dek(one.key_id, b"m", b"aad")).ciphertext
        lost = (await kms.encrypt_with_dek(disabled.key_id, b"m")).ciphertext
    with AdminClient(ready["url"], ca=ready["ca"], cert=pair["cert"], key=pair["key"], deadline=20) as admin:
        admin.disable(disabled.key_id)
        admin.schedule_destruction(waiting.key_id, waiting_days=7)
    calls: list[tuple[Any, ...]] = [
        ("encrypt_with_dek", one.key_id, b"m"),
        ("encrypt_with_dek", UNKNOWN_KEY, b"m"),
        ("encrypt_with_dek", "not a key", b"m"),
        ("encrypt_with_dek", 7, b"m"),
        ("encrypt_with_dek", disabled.key_id, b"m"),
        ("encrypt_with_dek", waiting.key_id, b"m"),
        ("encrypt_with_dek", one.key_id, b"x" * (2**20 + 1)),
        ("encrypt_with_dek", one.key_id, b"m", b"x" * 70_000),
        ("decrypt_with_dek", one.key_id, sealed, b"aad"),
        ("decrypt_with_dek", one.key_id, sealed, b"other"),
        ("decrypt_with_dek", one.key_id, sealed[:27], b"aad"),
        ("decrypt_with_dek", UNKNOWN_KEY, sealed, b"aad"),
        ("decrypt_with_dek", disabled.key_id, lost),
        ("create_dek_for_thread", new_thread()),
        ("create_dek_for_thread", ""),
        ("create_dek_for_thread", "x" * 257),
        ("create_dek_for_thread", "a\nb"),
    ]
    keyed = [("create_dek_for_thread", new_thread(), key) for key in ("x" * 255, "x" * 256, "two words", "")]
    found = []
    for coalesce in (False, True):
        async with connect(ready, "async", "tls", coalesce=coalesce) as kms:
            begun = [getattr(kms, name)(*args) for name, *args in calls]
            begun += [getattr(kms, name)(thread, idempotency_key=key) for name, thread, key in keyed]
            found.append(await asyncio.gather(*begun, return_exceptions=True))
    single, together = found
    assert list(map(told, together)) == list(map(told, single))
    assert sum(isinstance(result, KmsError) for result in single) >= 14


async def test_a_stranger_learns_what_is_missing(ready: dict[str, Any]) -> None:
    """Each caller, with permission and identity, as alone."""
    found = []
    for coalesce in (False, True):
        async with connect(ready, "async", "tls", client="stranger", coalesce=coalesce) as kms:
            calls = [kms.encrypt_with_dek(UNKNOWN_KEY, b"m") for _ in range(5)]
            calls += [kms.create_dek_for_thread("t") for _ in range(5)]
            found.append([told(error) for error in await asyncio.gather(*calls, return_exceptions=True)])
    assert found[0] == found[1]


def work(kms: SyncKmsProvider, number: int, keys: list[str], rounds: int) -> int:
    """Make calls of all kinds in one thread, and compare; return how many results were right."""
    chance, right = random.Random(number), 0
    for step in range(rounds):
        key_id = chance.choice(keys)
        text = b"%d of %d" % (step, number) * chance.randrange(1, 40)
        sealed = kms.encrypt_with_dek(key_id, text, b"%d" % number)
        right += kms.decrypt_with_dek(key_id, sealed.ciphertext, b"%d" % number) == text
        with pytest.raises(KmsError):
            kms.decrypt_with_dek(key_id, sealed.ciphertext, b"%d" % (number + 1))
    return right


def test_many_threads_share_a_provider(ready: dict[str, Any]) -> None:
    """64 of them get their own results, and none stays when it is over."""
    before = set(threading.enumerate())
    provider = connect(ready, "sync", "tls").provider
    assert isinstance(provider, SyncKmsProvider)
    with provider as kms, ThreadPoolExecutor(64) as threads:
        keys = [kms.create_dek_for_thread(new_thread()).key_id for _ in range(4)]
        assert sum(threads.map(lambda number: work(kms, number, keys, 20), range(64))) == 64 * 20
    assert set(threading.enumerate()) <= before


async def storm(
    kms: Facade, key_id: str, kind: str, stop: threading.Event, found: list[tuple[bytes, Any]]
) -> None:
    """Encrypt in 32 tasks or threads until told to stop; note texts with results or errors."""
    provider = kms.provider

    async def task(number: int) -> None:
        assert isinstance(provider, KmsProvider)
        for step in range(10**9):
            text = b"%d of %d" % (step, number)
            try:
                found.append((text, await provider.encrypt_with_dek(key_id, text, deadline=5)))
            except KmsError as error:
                found.append((text, error))
            if stop.is_set():
                return

    def thread(number: int) -> None:
        assert isinstance(provider, SyncKmsProvider)
        for step in range(10**9):
            text = b"%d of %d" % (step, number)
            try:
                found.append((text, provider.encrypt_with_dek(key_id, text, deadline=5)))
            except KmsError as error:
                found.append((text, error))
            if stop.is_set():
                return

    if kind == "async":
        await asyncio.gather(*[task(number) for number in range(32)])
    else:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(32) as threads:
            await asyncio.gather(*[loop.run_in_executor(threads, thread, number) for number in range(32)])


@pytest.mark.slow
@pytest.mark.fault
async def test_the_service_is_killed_under_batches(tmp_path: Path, kind: str) -> None:
    """Every call ends, with its own result or error; the provider finds the service that comes back."""
    stop = threading.Event()
    with running(tmp_path) as ready:
        kms = connect(ready, kind, "tls")
        dek = await kms.create_dek_for_thread(new_thread())
        found: list[tuple[bytes, Any]] = []
        calls = asyncio.create_task(storm(kms, dek.key_id, kind, stop, found))
        await eventually(lambda: len(found) > 200)
        for pid in (ready["pid"], ready["store_pid"]):
            os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(ready["process"].wait)
        await eventually(lambda: sum(isinstance(result, KmsError) for _, result in found) >= 32)
        stop.set()
        await asyncio.wait_for(calls, 60)
    failed = [error for _, error in found if isinstance(error, KmsError)]
    sealed = [(text, result) for text, result in found if isinstance(result, Encrypted)]
    assert sealed
    assert {type(error) for error in failed} == {ConnectionFailed}
    assert len({id(error) for error in failed}) == len(failed)
    with running(tmp_path, urlsplit(ready["url"]).port or 0):
        opened = await kms.decrypt_many([(dek.key_id, result.ciphertext, None) for _, result in sealed])
        assert opened == [text for text, _ in sealed]
        again = await kms.encrypt_with_dek(dek.key_id, b"again")
        assert await kms.decrypt_with_dek(dek.key_id, again.ciphertext) == b"again"
        await kms.close()

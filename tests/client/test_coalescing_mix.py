"""Whatever calls meet each other and whatever fails: each caller gets its own result, never another's."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from progressdb_kms.client import ConnectionFailed, TransportError
from progressdb_kms.client.endpoint import TlsFiles, parse
from progressdb_kms.client.protocol import Encoding
from progressdb_kms.domain.errors import (
    AuthenticationFailed,
    DeadlineExceeded,
    InternalError,
    KeyNotFound,
    StoreUnavailable,
)
from tests.client.crew import Crew, results
from tests.client.faults import drop, drop_after_work, plain, refuse
from tests.client.harness import Clock, build
from tests.client.standin import BATCHES, Fault, Running, StandIn

AAD = b"aad"
too_many = refuse(413, "batch_too_large")
FAULTS: dict[str, Fault] = {
    "none": lambda _: True,
    "drop": drop,
    "drop after work": drop_after_work,
    "busy": refuse(503, "store_unavailable"),
    "broken": refuse(500, "internal_error"),
    "short answer": plain(200, b'{"results": []}'),
    "too many": lambda handler: handler.seen.path not in BATCHES or too_many(handler),
}
CALLS = st.tuples(
    st.sampled_from(["create", "encrypt", "decrypt", "forged", "unknown", "hurried"]),
    # Some are equal, so that only their place in the batch tells them apart.
    st.binary(max_size=40),
    st.integers(0, 2),
)


@pytest.fixture(scope="module")
def where() -> Iterator[Callable[[], StandIn]]:
    """What gives the stand-in for all examples, and is short when an example is shown."""
    with (
        tempfile.TemporaryDirectory(prefix="kms") as folder,
        Running(StandIn(), Path(folder) / "s") as running,
    ):
        yield lambda: running


class Hasty(Clock):
    """A clock by which retries wait for nothing."""

    def sleep(self, seconds: float) -> None:
        """Go on at once."""
        self.waits.append(seconds)


class Caller:
    """One call, and what it must come to."""

    def __init__(self, service: StandIn, number: int, call: tuple[str, bytes, int], keys: list[str]) -> None:
        self.service = service
        self.what, self.text, key = call
        self.key_id = keys[key]
        self.thread = f"thread {number} of {len(service.keys)}"

    def begin(self, crew: Crew) -> asyncio.Future[Any]:
        """Make it."""
        if self.what == "create":
            return crew.start("create_dek_for_thread", self.thread)
        if self.what in {"encrypt", "hurried"}:
            options = {"deadline": 0.001} if self.what == "hurried" else {}
            return crew.start("encrypt_with_dek", self.key_id, self.text, AAD, **options)
        sealed = self.service.encrypt(self.key_id, self.text, AAD)["ciphertext"]
        key_id = "unknown" if self.what == "unknown" else self.key_id
        return crew.start("decrypt_with_dek", key_id, sealed, AAD if self.what != "forged" else b"other")

    def check(self, result: Any, *, faults: bool) -> None:
        """Compare."""
        if faults and isinstance(result, TransportError | StoreUnavailable | InternalError):
            return
        if self.what == "hurried" and isinstance(result, DeadlineExceeded | ConnectionFailed):
            # The latter where its time was over while it still connected.
            return
        if self.what == "create":
            assert self.service.keys[result.key_id].thread_id == self.thread
            made = [key for key in self.service.keys.values() if key.thread_id == self.thread]
            assert len(made) == 1
        elif self.what in {"encrypt", "hurried"}:
            opened = self.service.decrypt(self.key_id, result.ciphertext, AAD)
            assert opened["plaintext"] == self.text
        elif self.what == "decrypt":
            assert result == self.text
        else:
            assert type(result) is {"forged": AuthenticationFailed, "unknown": KeyNotFound}[self.what]


@pytest.mark.fuzz
@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize("kind", ["async", "sync"])
@settings(deadline=None, max_examples=25)
@given(
    rounds=st.lists(st.lists(CALLS, min_size=1, max_size=24), min_size=1, max_size=3),
    faults=st.lists(st.sampled_from(sorted(FAULTS)), max_size=6),
)
def test_each_caller_gets_its_own(
    where: Callable[[], StandIn], kind: str, encoding: Encoding, rounds, faults
) -> None:
    """Results are the caller's own, errors too, and a create that is repeated makes no second key."""
    service = where()
    service.keys.clear()
    service.seen.clear()
    service.faults.clear()

    async def run() -> None:
        endpoint = parse(service.url, TlsFiles())
        kms = build(kind, endpoint, Hasty(), deadline=60.0, encoding=encoding, coalesce=True)
        async with kms:
            crew = Crew(kms, service, threads=24)
            keys = [(await kms.create_dek_for_thread("keys")).key_id for _ in range(3)]
            service.faults.extend(FAULTS[fault] for fault in faults)
            for calls in rounds:
                callers = [Caller(service, number, call, keys) for number, call in enumerate(calls)]
                found = await results([caller.begin(crew) for caller in callers])
                for caller, result in zip(callers, found, strict=True):
                    caller.check(result, faults=bool(faults))
            await crew.close()

    asyncio.run(run())

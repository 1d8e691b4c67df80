"""A DEK that is made through the fast door: no task of its own, and the same answers as by any other way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from progressdb_kms.api.answering import Api
from progressdb_kms.api.door import ApiDoor, PendingCreate
from progressdb_kms.settings import Limits
from progressdb_kms.transport.ordinary import parse_head
from progressdb_kms.usecases.session import Session
from tests.unit.helpers import World, make_world


class Scene:
    """A world behind a fast door."""

    def __init__(self, world: World, request_timeout: float = 60) -> None:
        self.world = world
        self.counted: list[tuple[Any, ...]] = []
        self.answers: list[tuple[int, Any]] = []
        limits = Limits(request_timeout=request_timeout)
        api = Api(world.kms, world.loader, limits, self.count, world.store.rotation_ledger, world.store.audit)
        self.door = ApiDoor(api, world.hot, self.count, debug=False)

    def count(self, route: str, status: int, code: str, *_: Any) -> None:
        """Count a request."""
        self.counted.append((route, status, code))

    def ask(self, body: bytes, session: Session | None = None, once: str = "") -> Any:
        """Ask for a DEK."""
        head = b"POST /create_dek_for_thread HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body)
        head += f"Idempotency-Key: {once}\r\n".encode() if once else b""
        parsed = parse_head(head + b"\r\n")
        assert parsed is not None
        ready = self.door.ready(parsed)
        assert ready is not None
        return ready.answer(session or self.world.session(), body)

    def begin(self, thread_id: str = "room:1", once: str = "") -> PendingCreate:
        """Ask for a thread's DEK, and begin."""
        pending = self.ask(msgspec.json.encode({"thread_id": thread_id}), once=once)
        assert isinstance(pending, PendingCreate)
        pending.begin(self.tell)
        return pending

    def tell(self, make: Callable[[], tuple[int, bytes, bytes | list[bytes], bool]]) -> None:
        """Take an answer."""
        status, _, body, _ = make()
        assert isinstance(body, bytes)
        self.answers.append((status, msgspec.json.decode(body)))

    async def settle(self) -> None:
        """Return once nothing is being made, and all are told."""
        await self.world.kms.creation.settle()
        await asyncio.sleep(0)


@pytest.fixture
async def scene(tmp_path: Path) -> Scene:
    """Put one together."""
    return Scene(await make_world(tmp_path))


async def test_many_are_made_and_each_is_told_its_own(scene: Scene) -> None:
    """No tasks but the groups'; each answer is counted once, and an idempotency key finds its DEK again."""
    before = len(asyncio.all_tasks())
    for number in range(10):
        scene.begin(f"room:{number % 5}", once=f"n{number % 5}")
    assert len(asyncio.all_tasks()) - before == 2
    await scene.settle()
    assert [status for status, _ in scene.answers] == [200] * 10
    ids = [answer["key_id"] for _, answer in scene.answers]
    assert ids[:5] == ids[5:]
    assert len(set(ids)) == 5
    assert scene.counted == [("/create_dek_for_thread", 200, "ok")] * 10
    assert await scene.world.encrypt(ids[0])


@pytest.mark.parametrize(
    "body, name, status, code",
    [
        (b'{"thread_id":"mail:1"}', "room", 403, "permission_denied"),
        (b'{"thread_id":"room:1"}', "stranger", 403, "permission_denied"),
        (b'{"thread_id":""}', "server", 400, "invalid_thread_id"),
        (b'{"thread_id":"a","thread_id":"b"}', "server", 400, "duplicate_field"),
        (b"{", "server", 400, "malformed_body"),
    ],
)
async def test_what_is_refused_is_refused_at_once(
    scene: Scene, body: bytes, name: str, status: int, code: str
) -> None:
    """Nothing is made, and the caller is told why; a stranger's body is not even looked at."""
    answer = scene.ask(body, scene.world.session(name))
    scene.tell(lambda: answer)
    assert [(status, answer["code"]) for status, answer in scene.answers] == [(status, code)]
    assert scene.counted == [("/create_dek_for_thread", status, code)]
    await scene.settle()
    assert not scene.world.store.calls["create"]


async def test_a_failure_is_explained(scene: Scene) -> None:
    """The store is away: 503, told to all of the group."""
    scene.world.store.down = True
    for _ in range(3):
        scene.begin()
    await scene.settle()
    assert [(status, answer["code"]) for status, answer in scene.answers] == [(503, "store_unavailable")] * 3


async def test_a_bug_is_an_internal_error(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of its text reaches the caller."""

    async def broken(deks: Any) -> Any:
        raise LookupError("secret")

    monkeypatch.setattr(scene.world.store, "create", broken)
    scene.begin()
    await scene.settle()
    ((status, answer),) = scene.answers
    assert (status, answer["code"]) == (500, "internal_error")
    assert "secret" not in str(answer)


async def test_time_that_is_over_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store hangs: 503, and what it says later is written down and told to nobody."""
    scene = Scene(await make_world(tmp_path), request_timeout=0.05)
    gate = asyncio.Event()
    create = scene.world.store.create

    async def held(deks: Any) -> Any:
        await gate.wait()
        return await create(deks)

    monkeypatch.setattr(scene.world.store, "create", held)
    scene.begin()
    while not scene.answers:  # noqa: ASYNC110 - its timer's turn
        await asyncio.sleep(0)
    assert [(status, answer["code"]) for status, answer in scene.answers] == [(503, "deadline_exceeded")]
    gate.set()
    await scene.settle()
    assert len(scene.answers) == len(scene.counted) == 1
    assert scene.world.trail.said() == [("key.create", "ok")]


async def test_whoever_is_gone_before_it_began_has_nothing_made(scene: Scene) -> None:
    """What nobody waits for is never begun; the others are made."""
    given_up = scene.begin("room:1")
    scene.begin("room:2")
    given_up.give_up()
    await scene.settle()
    assert len(scene.answers) == 1
    assert [event.thread_id for event in scene.world.trail.events] == ["room:2"]


async def test_whoever_can_not_be_told_keeps_it_from_nobody(scene: Scene) -> None:
    """A bug in how one is told."""
    loop, seen = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: seen.append(context["exception"]))
    first = scene.ask(b'{"thread_id":"room:1"}')
    first.begin(lambda _: 1 / 0)
    scene.begin("room:2")
    await scene.settle()
    assert [status for status, _ in scene.answers] == [200]
    assert [type(error) for error in seen] == [ZeroDivisionError]


async def test_a_caller_with_limits_holds_its_place_meanwhile(tmp_path: Path) -> None:
    """It goes by the way that sees to it."""
    scene = Scene(await make_world(tmp_path))
    session = scene.world.session()
    scene.world.book.replace(scene.world.book.policy, "g1")
    session._quota = object()  # type: ignore[assignment]  # whichever it is
    assert not isinstance(scene.ask(b'{"thread_id":"room:1"}', session), PendingCreate)

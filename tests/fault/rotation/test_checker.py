"""Each promise that the checker knows: what breaks it is found, what keeps it is left alone."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fault.rotation.audited import unrecorded
from tests.fault.rotation.campaign import connect, powered_world
from tests.fault.rotation.history import (
    FloorSeen,
    History,
    Kind,
    Operation,
    Outcome,
    check_history,
)
from tests.fault.rotation.stored import Snapshot, Stored, check_store, read_store
from tests.fault.rotation.traffic import Recorder
from tests.integration.rotating import rotate

OK, REFUSED, MAYBE = Outcome.OK, Outcome.REFUSED, Outcome.MAYBE
pytestmark = pytest.mark.fault


def made(key_id: str, at: float = 0.0, *, kind: Kind = Kind.CREATE, **fields: object) -> Operation:
    """Return an answered create."""
    known: dict[str, object] = {"thread_id": "room", "version": 1, **fields}
    return Operation(kind, at, at + 0.1, OK, key_id=key_id, **known)  # type: ignore[arg-type]


def did(kind: Kind, began: float, outcome: Outcome = OK, code: str = "") -> Operation:
    """Return an operation on the key ``k`` that took 0.1 s."""
    return Operation(kind, began, began + 0.1, outcome, code, key_id="k")


BROKEN = {
    "a retry found another key": ([made("a", once="x"), made("b", 1, once="x")], "retries agree"),
    "a retry found another version": (
        [made("a", once="x"), made("a", 1, once="x", version=2)],
        "retries agree",
    ),
    "two threads got one key": ([made("a"), made("a", 1, thread_id="other")], "retries agree"),
    "a decryption gave another message": (
        [Operation(Kind.DECRYPT, 0, 1, OK, key_id="k", message=b"other", expected=b"message")],
        "ciphertexts decrypt",
    ),
    "a use after a disable": (
        [did(Kind.DISABLE, 0), did(Kind.DECRYPT, 1.2)],
        "nothing succeeds after a disable or destroy",
    ),
    "a use after a destruction": (
        [did(Kind.SCHEDULE, 0), did(Kind.CANCEL, 1), did(Kind.ENCRYPT, 2)],
        "nothing succeeds after a disable or destroy",
    ),
    "a use that ended before the enable": (
        [did(Kind.DISABLE, 0), did(Kind.DECRYPT, 1.2), did(Kind.ENABLE, 1.4)],
        "nothing succeeds after a disable or destroy",
    ),
    "an old DEK encrypted": (
        [made("k"), made("n", kind=Kind.ROTATE_DEK, version=2), did(Kind.ENCRYPT, 1.2)],
        "an old DEK only decrypts",
    ),
    "a key was not found": (
        [made("k"), did(Kind.DECRYPT, 1, REFUSED, "key_not_found")],
        "refusals have a cause",
    ),
    "a key was disabled by nobody": (
        [made("k"), did(Kind.DECRYPT, 1, REFUSED, "key_disabled"), did(Kind.DISABLE, 2)],
        "refusals have a cause",
    ),
    "a ciphertext was refused": (
        [did(Kind.DECRYPT, 1, REFUSED, "authentication_failed")],
        "refusals have a cause",
    ),
    "the service broke": ([did(Kind.ENCRYPT, 1, REFUSED, "internal_error")], "refusals have a cause"),
}

KEPT = {
    "retries that agree": [
        made("a", once="x"),
        made("a", 1, once="x"),
        made("r", once="x", kind=Kind.ROTATE_DEK, version=2),
    ],
    "plain creates": [made("a"), made("b", version=2)],
    "a use within the second": [did(Kind.DISABLE, 0), did(Kind.DECRYPT, 1.0)],
    "a use after a disable that is not known to have been": [
        did(Kind.DISABLE, 0, MAYBE),
        did(Kind.DECRYPT, 5),
    ],
    "a use after an enable": [did(Kind.DISABLE, 0), did(Kind.ENABLE, 2), did(Kind.DECRYPT, 3)],
    "a use after an enable that may have been": [
        did(Kind.DISABLE, 0),
        did(Kind.ENABLE, 2, MAYBE),
        did(Kind.DECRYPT, 3),
    ],
    "refusals with causes": [
        made("k"),
        did(Kind.DISABLE, 0, MAYBE),
        did(Kind.DECRYPT, 1, REFUSED, "key_disabled"),
        made("n", 2, kind=Kind.ROTATE_DEK, version=2),
        did(Kind.ENCRYPT, 4, REFUSED, "key_decrypt_only"),
    ],
    "an old DEK that decrypts": [
        made("k"),
        made("n", kind=Kind.ROTATE_DEK, version=2),
        did(Kind.DECRYPT, 5),
    ],
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_promise_is_found(case: str) -> None:
    """A history that breaks one promise shows this one and no other."""
    operations, promise = BROKEN[case]
    assert {found.promise for found in check_history(History(operations))} == {promise}


@pytest.mark.parametrize("case", KEPT)
def test_a_kept_promise_is_left_alone(case: str) -> None:
    """What may be is no violation: spread within the second, and everything that "maybe" allows."""
    assert check_history(History(KEPT[case])) == []


def test_a_floor_that_falls() -> None:
    """A floor may rise, and stay, but never fall; slots do not mix."""
    seen = [FloorSeen(at, tag, floor) for at, (tag, floor) in enumerate([("AA", 2), ("AB", 1), ("AA", 3)])]
    assert check_history(History(floors=seen)) == []
    (found,) = check_history(History(floors=[*seen, FloorSeen(9, "AA", 2)]))
    assert (found.promise, "from 3 to 2" in found.text) == ("floors never fall", True)


@pytest.fixture(scope="module")
def rotated(shim: Path) -> Iterator[tuple[History, Stored]]:
    """Give what is stored after a rotation, and what the clients saw."""
    world, _ = powered_world(shim)
    try:
        service = world.instance("a").start()
        history = History()
        recorder = Recorder(history, [service])
        victim = recorder.preload(30)[0].key_id
        assert recorder.change(Kind.DISABLE, victim).outcome is OK
        time.sleep(1.1)  # keys of the second in which a rotation begins need no copy
        rotate(service)
        recorder.close()
        with connect(world) as client:
            yield history, read_store(client, world.kek_file.read_text())
    finally:
        world.close()


def _key(stored: Stored) -> str:
    return min(key_id for key_id, record in stored.records.items() if record["state"] == b"enabled")


def _lose(stored: Stored) -> None:
    key_id = _key(stored)
    del stored.records[key_id]
    stored.census[key_id[2:4], 2].remove(key_id)
    for snapshot in stored.snapshots.values():
        for bucket in snapshot.buckets:
            bucket.pop(key_id, None)  # type: ignore[attr-defined]


def _spoil(stored: Stored) -> None:
    record = stored.records[_key(stored)]
    record["wrapped"] = record["wrapped"][:-1] + bytes([record["wrapped"][-1] ^ 1])


def _other_key(stored: Stored) -> None:
    record = stored.records[_key(stored)]
    record["version"] = b"7"


def _enable(stored: Stored) -> None:
    for record in stored.records.values():
        record["state"] = b"enabled"


def _destroy(stored: Stored) -> None:
    stored.records[_key(stored)]["state"] = b"destroyed"


def _uncount(stored: Stored) -> None:
    key_id = _key(stored)
    stored.census[key_id[2:4], 2].remove(key_id)


def _phantom(stored: Stored) -> None:
    stored.census["AA", 1] = {"k_AA"}


def _lie(stored: Stored) -> None:
    stored.records[_key(stored)]["kek_version"] = b"1"


def _raise_floor(stored: Stored) -> None:
    stored.floors[_key(stored)[2:4]] = 3


def _unseal(stored: Stored) -> None:
    name, snapshot = next(iter(stored.snapshots.items()))
    stored.snapshots[name] = Snapshot(f"{len(snapshot.buckets)} -1", snapshot.buckets)


def _drop_copy(stored: Stored) -> None:
    for snapshot in stored.snapshots.values():
        for bucket in snapshot.buckets:
            bucket.clear()  # type: ignore[attr-defined]


def _swap_copies(stored: Stored) -> None:
    buckets = [bucket for snapshot in stored.snapshots.values() for bucket in snapshot.buckets if bucket]
    one, other = buckets[:2]
    first, second = next(iter(one)), next(iter(other))
    one[first], other[second] = other[second], one[first]  # type: ignore[index]


def _unfinished(stored: Stored) -> None:
    stored.rotations[0]["outcome"] = ""


def _quarantine(stored: Stored) -> None:
    stored.quarantined.append("kms:{AA}:quarantine:r_2")


DAMAGE: list[tuple[Callable[[Stored], None], str]] = [
    (_lose, "acknowledged keys exist"),
    (_lose, "ciphertexts decrypt"),
    (_spoil, "acknowledged keys exist"),
    (_spoil, "ciphertexts decrypt"),
    (_other_key, "acknowledged keys exist"),
    (_enable, "acknowledged states stay"),
    (_destroy, "destroyed is destroyed"),
    (_uncount, "records and census agree"),
    (_phantom, "records and census agree"),
    (_phantom, "census of old versions is zero"),
    (_lie, "records and census agree"),
    (_raise_floor, "no record below the floor"),
    (_unseal, "snapshots verify"),
    (_drop_copy, "snapshots verify"),
    (_swap_copies, "snapshots verify"),
    (_unfinished, "rotations end clean"),
    (_quarantine, "rotations end clean"),
]


@pytest.mark.parametrize("damage, promise", DAMAGE)
def test_damage_in_the_store_is_found(
    rotated: tuple[History, Stored], damage: Callable[[Stored], None], promise: str
) -> None:
    """A sound store shows nothing; each damage breaks its promise."""
    history, sound = rotated
    assert check_history(history) + check_store(history, sound) == []
    damaged = copy.copy(sound)
    for name in ("records", "census", "floors", "snapshots", "rotations", "quarantined"):
        setattr(damaged, name, copy.deepcopy(getattr(sound, name)))
    damage(damaged)
    assert promise in {found.promise for found in check_store(history, damaged)}


def test_a_change_without_a_record_is_seen() -> None:
    """A change that was acknowledged more often than announced; a create is one, however often answered."""
    disable = Operation(Kind.DISABLE, 0.0, 1.0, Outcome.OK, key_id="k")
    create = Operation(Kind.CREATE, 0.0, 1.0, Outcome.OK, key_id="k", once="o")
    lost = Operation(Kind.ENABLE, 0.0, 1.0, Outcome.MAYBE, key_id="k")
    history = History([create, create, disable, lost, disable])
    records = [
        {"audit": "key.create", "key_id": "k", "outcome": "intent"},
        *(
            {"audit": "key.disable", "key_id": "k", "outcome": outcome}
            for outcome in ("intent", "ok", "intent")
        ),
    ]
    assert list(unrecorded(history, records)) == []
    for number in range(4):
        without = records[:number] + records[number + 1 :]
        expected = [] if records[number]["outcome"] == "ok" else ["acknowledged changes are audited"]
        assert [each.promise for each in unrecorded(history, without)] == expected

"""What clients saw, written down outside the processes that are killed, and what must hold of it.

An operation is its invocation and its answer. No answer, or one that says "not now", leaves open whether it
took place: ``maybe``. Times are of one monotonic clock in the test's process, so that "invoked after it was
acknowledged" is meant as it is said.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

SPREAD = 1.0
"""Seconds within which a change of state reaches every instance."""


class Kind(StrEnum):
    """What was asked for."""

    CREATE = "create"
    ROTATE_DEK = "rotate_dek"
    ENCRYPT = "encrypt"
    DECRYPT = "decrypt"
    DISABLE = "disable"
    ENABLE = "enable"
    SCHEDULE = "schedule_destruction"
    CANCEL = "cancel_destruction"


class Outcome(StrEnum):
    """How it ended."""

    OK = "ok"
    REFUSED = "refused"
    MAYBE = "maybe"


CREATES = frozenset({Kind.CREATE, Kind.ROTATE_DEK})
USES = frozenset({Kind.ENCRYPT, Kind.DECRYPT})
CHANGES = frozenset({Kind.DISABLE, Kind.ENABLE, Kind.SCHEDULE, Kind.CANCEL})
FORBIDS = frozenset({Kind.DISABLE, Kind.SCHEDULE})
"""After these nothing succeeds. A cancelled destruction leaves the key disabled: only ENABLE ends it."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation as its client saw it.

    Attributes:
        kind: What was asked for.
        began: When it was invoked, monotonic seconds.
        ended: When its answer came, or was given up.
        outcome: How it ended.
        code: The refusal's code, or why nothing is known.
        key_id: The key; of a create, the one in the answer.
        thread_id: The thread of a create.
        once: Its Idempotency-Key.
        version: Of a create's answer: the DEK's number in its thread.
        message: What was encrypted, or came out of a decryption.
        ciphertext: What came out of an encryption, or was decrypted.
        expected: Of a decryption: the message that was encrypted.
    """

    kind: Kind
    began: float
    ended: float
    outcome: Outcome
    code: str = ""
    key_id: str = ""
    thread_id: str = ""
    once: str = ""
    version: int = 0
    message: bytes = field(default=b"", repr=False)
    ciphertext: bytes = field(default=b"", repr=False)
    expected: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class FloorSeen:
    """The floor of a slot, as somebody read it beside the run."""

    at: float
    tag: str
    floor: int


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was not kept.

    Attributes:
        promise: Its short name.
        text: What was seen.
    """

    promise: str
    text: str


@dataclass(slots=True)
class History:
    """Everything that was seen. Appending is safe from several threads.

    Attributes:
        operations: In order of their ends.
        floors: In order of their reading.
        notes: Violations that were seen as they happened, by others than clients.
    """

    operations: list[Operation] = field(default_factory=list)
    floors: list[FloorSeen] = field(default_factory=list)
    notes: list[Violation] = field(default_factory=list)

    def acknowledged(self) -> dict[str, Operation]:
        """Return each key that was acknowledged, with the first answer that did."""
        found: dict[str, Operation] = {}
        for operation in self.operations:
            if operation.kind in CREATES and operation.outcome is Outcome.OK:
                found.setdefault(operation.key_id, operation)
        return found

    def sealed(self) -> list[Operation]:
        """Return the encryptions that were answered."""
        return [each for each in self.operations if each.kind is Kind.ENCRYPT and each.outcome is Outcome.OK]

    def table(self) -> dict[str, dict[str, int]]:
        """Return the number of operations by kind and outcome."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for operation in self.operations:
            counts[operation.kind][operation.outcome] += 1
        return {kind: dict(sorted(row.items())) for kind, row in sorted(counts.items())}


def check_history(history: History) -> list[Violation]:
    """Return what the clients' own view shows to be broken."""
    found = list(history.notes)
    found += _retries(history.operations)
    found += _decryptions(history.operations)
    found += _uses_after_changes(history.operations)
    found += _old_deks(history.operations)
    found += _unexplained(history)
    found += _floors(history.floors)
    return found


def _retries(operations: Iterable[Operation]) -> Iterator[Violation]:
    first: dict[tuple[str, str, str], Operation] = {}
    owners: dict[str, Operation] = {}
    for each in operations:
        if each.kind not in CREATES or each.outcome is not Outcome.OK:
            continue
        known = first.setdefault((each.kind, each.thread_id, each.once), each) if each.once else each
        if (known.key_id, known.version) != (each.key_id, each.version):
            yield Violation(
                "retries agree",
                f"{each.kind} of {each.thread_id} with {each.once} answered {known.key_id} version"
                f" {known.version}, then {each.key_id} version {each.version}",
            )
        owner = owners.setdefault(each.key_id, each)
        if (owner.thread_id, owner.once) != (each.thread_id, each.once):
            yield Violation(
                "retries agree", f"{each.key_id} was given to {owner.thread_id} and to {each.thread_id}"
            )


def _decryptions(operations: Iterable[Operation]) -> Iterator[Violation]:
    for each in operations:
        if each.kind is Kind.DECRYPT and each.outcome is Outcome.OK and each.message != each.expected:
            yield Violation("ciphertexts decrypt", f"{each.key_id} decrypted to another message")


def _by_key(operations: Iterable[Operation], kinds: frozenset[Kind]) -> dict[str, list[Operation]]:
    found: dict[str, list[Operation]] = defaultdict(list)
    for each in operations:
        if each.kind in kinds:
            found[each.key_id].append(each)
    return found


def _uses_after_changes(operations: list[Operation]) -> Iterator[Violation]:
    uses = _by_key(operations, USES)
    for key_id, changes in _by_key(operations, CHANGES).items():
        for change in changes:
            if change.kind not in FORBIDS or change.outcome is not Outcome.OK:
                continue
            # An enable may take effect from its invocation on, whatever became of its answer.
            again = min(
                (
                    other.began
                    for other in changes
                    if other.kind is Kind.ENABLE
                    and other.outcome is not Outcome.REFUSED
                    and other.ended > change.began
                ),
                default=float("inf"),
            )
            for use in uses[key_id]:
                late = use.began - change.ended
                if use.outcome is Outcome.OK and late > SPREAD and use.ended < again:
                    yield Violation(
                        "nothing succeeds after a disable or destroy",
                        f"{use.kind} with {key_id} succeeded, invoked {late:.2f} s after the acknowledged"
                        f" {change.kind}",
                    )


def _old_deks(operations: list[Operation]) -> Iterator[Violation]:
    rotated: dict[str, list[Operation]] = defaultdict(list)
    keys: dict[str, Operation] = {}
    for each in operations:
        if each.kind in CREATES and each.outcome is Outcome.OK:
            keys.setdefault(each.key_id, each)
            if each.kind is Kind.ROTATE_DEK:
                rotated[each.thread_id].append(each)
    for use in operations:
        if use.kind is not Kind.ENCRYPT or use.outcome is not Outcome.OK or use.key_id not in keys:
            continue
        key = keys[use.key_id]
        for rotation in rotated[key.thread_id]:
            if key.version < rotation.version and use.began - rotation.ended > SPREAD:
                yield Violation(
                    "an old DEK only decrypts",
                    f"{use.key_id} encrypted, invoked {use.began - rotation.ended:.2f} s after its thread's"
                    f" rotation to version {rotation.version} was acknowledged",
                )


_EXPLAINS = {
    "key_disabled": frozenset({Kind.DISABLE, Kind.CANCEL}),
    "key_pending_destruction": frozenset({Kind.SCHEDULE}),
    "key_destroyed": frozenset({Kind.SCHEDULE}),
}


def _unexplained(history: History) -> Iterator[Violation]:
    """A refusal needs a cause in the history: somebody's change, acknowledged or not."""
    changes = _by_key(history.operations, CHANGES)
    keys = history.acknowledged()
    rotated: dict[str, float] = {}
    for each in history.operations:
        if each.kind is Kind.ROTATE_DEK:
            rotated[each.thread_id] = min(each.began, rotated.get(each.thread_id, each.began))
    for each in history.operations:
        if each.outcome is not Outcome.REFUSED:
            continue
        causes = _EXPLAINS.get(each.code, frozenset())
        if any(change.kind in causes and change.began < each.ended for change in changes[each.key_id]):
            continue
        thread = keys[each.key_id].thread_id if each.key_id in keys else ""
        if each.code == "key_decrypt_only" and rotated.get(thread, each.ended) < each.ended:
            continue
        # A retry of a change whose first answer was lost, or a change beside a destruction.
        if each.code == "invalid_transition" and any(
            change.began < each.ended and change is not each for change in changes[each.key_id]
        ):
            continue
        yield Violation(
            "refusals have a cause", f"{each.kind} with {each.key_id or each.thread_id}: {each.code}"
        )


def _floors(samples: Iterable[FloorSeen]) -> Iterator[Violation]:
    highest: dict[str, int] = {}
    for sample in samples:
        before = highest.get(sample.tag, 0)
        if sample.floor < before:
            yield Violation(
                "floors never fall", f"the floor of slot {sample.tag} fell from {before} to {sample.floor}"
            )
        highest[sample.tag] = max(before, sample.floor)

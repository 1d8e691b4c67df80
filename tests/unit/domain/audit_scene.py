"""Makes audit logs to be spoilt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from progressdb_kms.domain.audit import CHECKPOINT, CLOSE, OPEN, AuditKey, Chain, Record, VerifyKey
from progressdb_kms.domain.auditreport import AuditReport
from progressdb_kms.domain.auditverify import AuditVerifier

KEY = AuditKey(b"\x01" * 32)
OTHER_KEY = AuditKey(b"\x02" * 32)
MAC = (KEY.verify,)
PUBLIC = (VerifyKey.of(KEY.verify.public),)


class Log:
    """A chain, record by record.

    Attributes:
        records: All records.
    """

    def __init__(self, name: str = "c1", key: AuditKey = KEY) -> None:
        self.chain = Chain(key, name)
        self.records: list[Record] = []

    def open(self, generation: int = 1, **more: object) -> Log:
        """Begin."""
        return self._control(OPEN, roster=generation, **more)

    def say(self, count: int, action: str = "key.create", outcome: str = "ok") -> Log:
        """Go on."""
        for _ in range(count):
            number = len(self.records)
            fields = {"audit": action, "at": 1.5, "outcome": outcome, "request_id": f"r{number}"}
            self.records.append(self.chain.append(fields))
        return self

    def sign(self) -> Log:
        """Add a checkpoint."""
        return self._control(CHECKPOINT, roster=1)

    def close(self) -> Log:
        """End."""
        return self._control(CLOSE, roster=1)

    def head(self, last: int | None = None, *, closed: bool = False) -> bytes:
        """Return the signed head at a record, the last one by default."""
        record = self.records[-1] if last is None else self.records[last - 1]
        return self.chain.head(record, 2.0, closed=closed)

    @property
    def lines(self) -> list[bytes]:
        """The records' lines."""
        return [record.line for record in self.records]

    def _control(self, action: str, **more: object) -> Log:
        self.records.append(self.chain.control({"audit": action, "at": 1.0, "outcome": "ok", **more}))
        return self


def whole(before: int = 5, after: int = 5, name: str = "c1") -> Log:
    """Return a closed chain with a checkpoint in it: records 1, 2 to 6, 7, 8 to 12, 13."""
    return Log(name).open().say(before).sign().say(after).close()


def verified(
    lines: Iterable[bytes],
    keys: Sequence[VerifyKey] = MAC,
    anchor: Iterable[bytes] = (),
    *,
    partial: bool = False,
) -> AuditReport:
    """Verify lines of a file named ``f``."""
    verifier = AuditVerifier(keys, partial=partial)
    for text in anchor:
        verifier.anchor(text)
    for number, line in enumerate(lines, 1):
        verifier.feed(line, "f", number)
    return verifier.finish()


def found(report: AuditReport) -> list[tuple[str, int, int]]:
    """Return kind and records of each problem."""
    return [(problem.kind, problem.first, problem.last) for problem in report.problems]

"""SQLAlchemy: a column type for encrypted texts, and the two calls around it.

A type of SQLAlchemy's sees a value and never its row, so it can't know the thread's key, nor bind the text
to the row. Here the type only guards the column: it takes and gives ``Sealed`` and refuses plain text.
``post`` and ``read`` know the row, and talk to the service outside the transaction, a page at a time.

What an encrypted column can't do: be searched, compared or sorted by. The same text is other bytes each time.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from sqlalchemy import ClauseElement, Dialect, ForeignKey, LargeBinary, String, TypeDecorator
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.sql.operators import OperatorType, is_, is_not

from examples.recipes.sealing import Sealed, pack, seal, unpack, unseal
from progressdb_kms.client import KmsError, SyncKmsProvider


class EncryptedText(TypeDecorator[Sealed]):
    """A column that holds ``Sealed`` texts and nothing else."""

    impl = LargeBinary
    cache_ok = True

    class Comparator(TypeDecorator.Comparator[Sealed]):
        """Refuses what could only ever find nothing, or sort by chance."""

        def operate(self, op: OperatorType, *other: Any, **kwargs: Any) -> Any:
            """Let the test for NULL through, and columns: SQLAlchemy itself compares those."""
            columns = bool(other) and isinstance(other[0], ClauseElement)
            if op not in {is_, is_not} and not columns:
                raise TypeError("an encrypted column can't be searched, compared or sorted by")
            return super().operate(op, *other, **kwargs)

    comparator_factory = Comparator

    def process_bind_param(self, value: Sealed | None, dialect: Dialect) -> bytes | None:  # noqa: ARG002
        """Return the bytes to store."""
        return None if value is None else pack(value)

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> Sealed | None:  # noqa: ARG002
        """Return the stored text, still sealed."""
        return None if value is None else unpack(value)


class Base(DeclarativeBase):
    """The tables."""


class Thread(Base):
    """A conversation, with the key of its messages."""

    __tablename__ = "threads"
    id: Mapped[str] = mapped_column(String(256), primary_key=True)
    key_id: Mapped[str] = mapped_column(String(64))


class Message(Base):
    """A message, stored as ciphertext only."""

    __tablename__ = "messages"
    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    thread_id: Mapped[str] = mapped_column(ForeignKey("threads.id"), index=True)
    body: Mapped[Sealed] = mapped_column(EncryptedText)


BODY: Final = "messages.body"


def open_thread(sessions: sessionmaker[Session], kms: SyncKmsProvider, thread_id: str) -> str:
    """Return the key of a thread, made if it is new.

    The word makes it safe: whoever is first, and however often it is tried, the thread gets the same key.
    """
    with sessions() as session:
        found = session.get(Thread, thread_id)
    if found is not None:
        return found.key_id
    dek = kms.create_dek_for_thread(thread_id, idempotency_key="first")
    with suppress(IntegrityError), sessions.begin() as session:  # another was first, with this very key
        session.add(Thread(id=thread_id, key_id=dek.key_id))
    return dek.key_id


def post(
    sessions: sessionmaker[Session], kms: SyncKmsProvider, thread_id: str, texts: Sequence[str]
) -> list[str]:
    """Store messages and return their ids: one request, then one transaction."""
    key_id = open_thread(sessions, kms, thread_id)
    ids = [str(uuid.uuid4()) for _ in texts]
    bodies = seal(kms, BODY, thread_id, key_id, list(zip(ids, texts, strict=True)))
    with sessions.begin() as session:
        session.add_all(
            Message(id=row, thread_id=thread_id, body=body) for row, body in zip(ids, bodies, strict=True)
        )
    return ids


def read(kms: SyncKmsProvider, messages: Sequence[Message]) -> list[str | KmsError]:
    """Return the texts of messages, of any threads, in one request."""
    return unseal(kms, BODY, [(message.thread_id, message.id, message.body) for message in messages])

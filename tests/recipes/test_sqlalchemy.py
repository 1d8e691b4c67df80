"""The recipe for SQLAlchemy, on a real service and a real SQLite file."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine, create_engine, insert, select, update
from sqlalchemy.exc import StatementError
from sqlalchemy.orm import Session, sessionmaker

from examples.recipes.sqlalchemy_messages import Base, Message, Thread, open_thread, post, read
from progressdb_kms.client import SyncKmsProvider, open_sync_provider
from progressdb_kms.domain.errors import AuthenticationFailed, KmsError
from tests.client.provider_suite import new_thread


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The database's file."""
    return tmp_path / "messages.db"


@pytest.fixture
def engine(file: Path) -> Iterator[Engine]:
    """A database with the recipe's tables."""
    engine = create_engine(f"sqlite:///{file}")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def sessions(engine: Engine) -> sessionmaker[Session]:
    """Makes sessions."""
    return sessionmaker(engine)


def test_messages_come_back_and_are_stored_encrypted(
    sessions: sessionmaker[Session], kms: SyncKmsProvider, file: Path
) -> None:
    """What is posted is read again, in order, and no file of the database holds it."""
    thread = new_thread()
    texts = [f"secret words {n}" for n in range(100)]
    ids = post(sessions, kms, thread, texts)
    with sessions() as session:
        messages = [session.get_one(Message, row) for row in ids]
        assert session.get_one(Thread, thread).key_id == messages[0].body.key_id
    assert read(kms, messages) == texts
    stored = b"".join(path.read_bytes() for path in file.parent.iterdir() if path.is_file())
    assert ids[0].encode() in stored
    assert b"secret words" not in stored


def test_a_page_costs_one_request(
    sessions: sessionmaker[Session], kms: SyncKmsProvider, ready: dict[str, Any]
) -> None:
    """Posting and reading a hundred messages is one request each, and one more makes the key."""

    def answered() -> float:
        with urllib.request.urlopen(f"{ready['admin_url']}/metrics") as answer:  # noqa: S310 - our own, on loopback
            text = answer.read().decode()
        (family,) = [each for each in text_string_to_metric_families(text) if each.name == "kms_requests"]
        return sum(sample.value for sample in family.samples if sample.name == "kms_requests_total")

    before = answered()
    ids = post(sessions, kms, new_thread(), [f"message {n}" for n in range(100)])
    assert answered() == before + 2
    with sessions() as session:
        messages = [session.get_one(Message, row) for row in ids]
    assert len(read(kms, messages)) == 100
    assert answered() == before + 3


def test_threads_of_many_writers_have_one_key(sessions: sessionmaker[Session], kms: SyncKmsProvider) -> None:
    """Whoever is first: all writers of a new thread find the same key."""
    thread = new_thread()
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: open_thread(sessions, kms, thread), range(8)))
    assert len(found) == 1


def test_a_moved_ciphertext_does_not_open(sessions: sessionmaker[Session], kms: SyncKmsProvider) -> None:
    """Whoever can write the table still can't put one message in another's place."""
    first, second = post(sessions, kms, new_thread(), ["one", "two"])
    with sessions.begin() as session:
        body = session.get_one(Message, first).body
        session.execute(update(Message).where(Message.id == second).values(body=body))
    with sessions() as session:
        found = read(kms, [session.get_one(Message, first), session.get_one(Message, second)])
    assert found[0] == "one"
    assert isinstance(found[1], AuthenticationFailed)


def test_plain_text_is_refused(sessions: sessionmaker[Session], kms: SyncKmsProvider) -> None:
    """Neither the ORM nor a statement stores a text in the clear."""
    thread = new_thread()
    open_thread(sessions, kms, thread)
    with pytest.raises(StatementError, match="no plain value"), sessions.begin() as session:
        session.add(Message(id="1", thread_id=thread, body="hello"))
    with pytest.raises(StatementError, match="no plain value"), sessions.begin() as session:
        session.execute(insert(Message).values(id="1", thread_id=thread, body=b"hello"))
    with sessions() as session:
        assert session.scalars(select(Message).where(Message.thread_id == thread)).all() == []


def test_the_column_can_not_be_searched() -> None:
    """What would find nothing, or sort by chance, is an error; the test for NULL works."""
    for ask in (
        lambda: Message.body == "hello",
        lambda: Message.body.like("h%"),
        lambda: Message.body.in_(["hello"]),
        Message.body.desc,
    ):
        with pytest.raises(TypeError, match="can't be searched"):
            ask()
    assert "IS NOT NULL" in str(select(Message).where(Message.body.is_not(None)))


def test_nothing_is_stored_while_the_service_is_away(
    sessions: sessionmaker[Session], kms: SyncKmsProvider
) -> None:
    """A post that can't be encrypted ends in an error and leaves no row."""
    thread = new_thread()
    open_thread(sessions, kms, thread)
    with (
        open_sync_provider("unix:///nowhere", retries=0) as away,
        pytest.raises(KmsError) as caught,
    ):
        post(sessions, away, thread, ["hello"])
    assert caught.value.retryable
    with sessions() as session:
        assert session.scalars(select(Message)).all() == []

"""Where the server's own data is: keys and values, ordered by key. Another database needs these methods."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

Swap = tuple[str, bytes, bytes]
"""A key, the value that is expected there, and the one to replace it with."""


class Store:
    """One SQLite file, shared by any number of threads and processes of one machine.

    Args:
        path: The file; made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        # SQLite lets one writer in at a time, and others poll; within the process a lock wakes them instead.
        self._writing = threading.Lock()
        self._connections: list[sqlite3.Connection] = []
        self._connection().execute(
            "CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"
        )

    def get(self, key: str) -> bytes | None:
        """Return a value."""
        row = self._connection().execute("SELECT value FROM entries WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def scan(self, prefix: str, after: str = "", limit: int = 500) -> list[tuple[str, bytes]]:
        """Return entries with this prefix and a key greater than ``after``, in order."""
        query = "SELECT key, value FROM entries WHERE key > ? AND key < ? ORDER BY key LIMIT ?"
        return self._connection().execute(query, (max(prefix, after), _end(prefix), limit)).fetchall()

    def count(self, prefix: str) -> int:
        """Return how many entries have this prefix."""
        query = "SELECT count(*) FROM entries WHERE key > ? AND key < ?"
        return int(self._connection().execute(query, (prefix, _end(prefix))).fetchone()[0])

    def commit(
        self,
        writes: Mapping[str, bytes | None],
        given: Mapping[str, bytes | None],
        swaps: Sequence[Swap] = (),
    ) -> bool:
        """Change everything in one transaction, or nothing; durable when this returns True.

        Args:
            writes: New values; None removes.
            given: What must still be there (None: nothing) for anything to be changed.
            swaps: Values to replace where the expected one is still there; others are left as they are.
        """
        put = [(key, value) for key, value in writes.items() if value is not None]
        gone = [(key,) for key, value in writes.items() if value is None]
        connection = self._connection()
        with self._writing, connection:
            connection.execute("BEGIN IMMEDIATE")
            if any(self.get(key) != value for key, value in given.items()):
                return False
            update = "UPDATE entries SET value = ? WHERE key = ? AND value = ?"
            connection.executemany(update, [(new, key, old) for key, old, new in swaps])
            connection.executemany("REPLACE INTO entries VALUES (?, ?)", put)
            connection.executemany("DELETE FROM entries WHERE key = ?", gone)
        return True

    def close(self) -> None:
        """Close all connections."""
        for connection in self._connections:
            connection.close()

    def _connection(self) -> sqlite3.Connection:
        """Return this thread's connection."""
        found: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if found is None:
            found = sqlite3.connect(self._path, timeout=10, isolation_level=None, check_same_thread=False)
            found.execute("PRAGMA journal_mode = WAL").close()
            # A commit is on disk when it returns. NORMAL would lose acknowledged messages in a power cut.
            found.execute("PRAGMA synchronous = FULL").close()
            self._local.connection = found
            self._connections.append(found)
        return found


def _end(prefix: str) -> str:
    """Return the first key behind all that have a prefix."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)

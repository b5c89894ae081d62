"""Answers that stay right until the database changes: SQLite tells cheaply whether it did since they were made.

Pages of the library are asked for far more often than it changes. With PostgreSQL nothing is kept: it has no such
number, and cores of its own.
"""

import contextlib
import sqlite3
from collections import OrderedDict
from collections.abc import Hashable

from mechint.server.db import Database

MAX_KEPT = 256  # answers
WAIT_SECONDS = 0.02


class Unchanged:
    """Answers by what was asked, of one database and one event loop.

    `mark()` before an answer is made, `keep` it with that mark after; `get` has it until the database has changed. An
    answer that was made while something changed is newer than its mark, and is dropped with it: none is ever too old.
    """

    def __init__(self, db: Database):
        self._connection: sqlite3.Connection | None = None
        if db.is_sqlite:
            # of its own: `data_version` counts what other connections commit
            path = db.engine.url.database
            self._connection = sqlite3.connect(str(path), timeout=WAIT_SECONDS, isolation_level=None)
        self._mark: int | None = None
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()

    def mark(self) -> int | None:
        """The number of the database's present state; None where there is no telling."""
        if self._connection is None:
            return None
        try:
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error:  # busy for longer than a request should wait
            return None

    def get(self, asked: Hashable, mark: int | None) -> bytes | None:
        """The answer to `asked`, if one is kept that was made at this mark."""
        if mark is None or mark != self._mark:
            return None
        return self._kept.get(asked)

    def keep(self, asked: Hashable, mark: int | None, answer: bytes) -> None:
        """`mark` is the one from before the answer was made."""
        if mark is None:
            return
        if mark != self._mark:
            # of two that were made at the same time one may be older; what differs from the present is never got
            self._kept.clear()
            self._mark = mark
        self._kept[asked] = answer
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

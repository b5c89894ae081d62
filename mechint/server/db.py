"""The database: engines, transactions, migrations.

SQLite runs in WAL mode, and a transaction that will write says so when it begins (BEGIN IMMEDIATE): two writers then
wait for each other instead of failing in the middle. Everything else is the same on PostgreSQL.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, text, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session

from mechint.errors import MechintError, one_line
from mechint.locks import lock
from mechint.provenance import make_dir
from mechint.server.models import Revision
from mechint.server.settings import Settings

BUSY_MILLISECONDS = 30_000
# Any number that no other program takes in the same PostgreSQL database: migrations run under this lock.
MIGRATION_LOCK = 7_236_215_514


class Database:
    """Transactions on one database; share one a process.

    `with db.read() as session` and `with db.write() as session`: the latter commits at its end, or rolls back. Objects
    stay usable after either.
    """

    def __init__(self, url: str):
        self.url = url
        self.engine = make_engine(url)

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        connection = self.engine.connect().execution_options(mechint_writes=True)
        with connection, Session(connection, expire_on_commit=False) as session:
            yield session
            session.commit()

    def close(self) -> None:
        self.engine.dispose()


def make_engine(url: str) -> Engine:
    """An engine. Raises `MechintError` for an address that SQLAlchemy cannot read, or whose driver is not installed."""
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "postgresql" and parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise MechintError(
                f"the database {parsed.get_backend_name()!r} is not supported; sqlite and postgresql are"
            )
        if parsed.get_backend_name() == "sqlite":
            if parsed.database in (None, "", ":memory:"):
                raise MechintError("an SQLite database in memory is seen by one process only: name a file")
            make_dir(Path(str(parsed.database)).absolute().parent)
            engine = create_engine(parsed, connect_args={"check_same_thread": False}, pool_size=20, max_overflow=20)
            _prepare_sqlite(engine)
            return engine
        return create_engine(parsed, pool_pre_ping=True, pool_size=10, max_overflow=20)
    except (ArgumentError, ImportError) as error:
        raise MechintError(f"MECHINT_DATABASE_URL cannot be used: {one_line(error, 200)}") from None


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # we begin transactions ourselves, below
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={BUSY_MILLISECONDS}")
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA secure_delete=ON")  # blanked tokens leave no trace in free pages
        cursor.close()

    @event.listens_for(engine, "begin")
    def on_begin(connection: Any) -> None:
        writes = connection.get_execution_options().get("mechint_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def next_seq(session: Session) -> int:
    """The next number of a change, held until this transaction ends: see `models`."""
    statement = update(Revision).where(Revision.id == 1).values(value=Revision.value + 1).returning(Revision.value)
    return session.execute(statement).scalar_one()


def open_database(settings: Settings, *, migrate: bool = True) -> Database:
    """The database of the settings, with its tables as this version needs them.

    Raises:
        MechintError: it cannot be reached, or is of a newer version.
    """
    from sqlalchemy.exc import OperationalError

    database = Database(settings.database)
    try:
        if migrate:
            upgrade(database, settings)
        return database
    except OperationalError as error:
        shown = make_url(settings.database).render_as_string(hide_password=True)
        raise MechintError(f"the database {shown} cannot be used: {one_line(error.orig, 200)}") from None


def upgrade(database: Database, settings: Settings) -> None:
    """Bring the tables to the newest version, one process at a time."""
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["quiet"] = True
    with _migration_lock(database, settings), database.engine.connect() as connection:
        connection = connection.execution_options(mechint_writes=True)
        config.attributes["connection"] = connection
        if not database.is_sqlite:
            connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise MechintError(
                f"the database is of a version that this mechint does not know ({one_line(error, 120)}): update mechint"
            ) from None
        connection.commit()


@contextlib.contextmanager
def _migration_lock(database: Database, settings: Settings) -> Iterator[None]:
    """SQLite has no advisory locks: a lock file beside the database. It goes when the process does."""
    if not database.is_sqlite:
        yield
        return
    make_dir(settings.data_dir)
    handle = os.open(settings.data_dir / "migrations.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        lock(handle, wait=True)
        yield
    finally:
        os.close(handle)

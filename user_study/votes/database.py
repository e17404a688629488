"""Opening the database: SQLite in WAL mode, or PostgreSQL by URL; one writer at a time in both.

The writer's lock is taken before anything is read, so no transaction has to be tried twice: BEGIN IMMEDIATE in SQLite,
an advisory lock in PostgreSQL, which holds for all replicas of the server.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from hypersd_bench.errors import HypersdBenchError, InputError
from user_study.votes.schema import metadata

LOCK = 0x48534442  # of PostgreSQL's advisory lock: any number, the same in all replicas


class DatabaseDown(HypersdBenchError):
    """The database does not answer, or refuses to write (a full disk, a lost server)."""


class Database:
    """A migrated database and its two kinds of transaction."""

    def __init__(self, url: str) -> None:
        """Connect and bring the tables up to date; raises InputError where that can't be done."""
        self.name = _shown(url)
        self._engine = _make_engine(url)
        self._writer = Lock() if self._engine.dialect.name == "sqlite" else nullcontext()
        try:
            self._migrate()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A consistent view; waits for no writer."""
        with self._translated(), self._engine.connect() as db, db.begin():
            yield db

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that is the only writer from its first statement; all of it is kept, or nothing."""
        with self._translated(), self._writer, self._engine.connect() as db:
            db = db.execution_options(writing=True)
            with db.begin():
                yield db

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(files("user_study.votes").joinpath("migrations")))
        config.set_main_option("path_separator", "os")
        try:
            with self.writing() as db:
                found = MigrationContext.configure(db).get_current_revision()
                head = ScriptDirectory.from_config(config).get_current_head()
                if found == head:
                    return
                if found is None and sa.inspect(db).has_table("study"):
                    raise InputError(f"{self.name} holds tables of another program or version; use an empty database")
                config.attributes.update(connection=db, metadata=metadata)
                command.upgrade(config, "head")
        except CommandError as error:
            raise InputError(
                f"{self.name} was written by another version (schema {found}, this version knows up to {head}); "
                f"use the hypersd-bench that wrote it, or a newer one"
            ) from error
        except DatabaseDown as error:
            raise InputError(str(error)) from error

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise DatabaseDown(f"{self.name}: {str(error.orig).strip().splitlines()[0]}") from error
        except PoolTimeout as error:  # no connection was free in time
            raise DatabaseDown(f"{self.name}: {error}") from error


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file."""
    return sa.URL.create("sqlite", database=str(path)).render_as_string()


def _shown(url: str) -> str:
    """The URL for messages, its password hidden; a SQLite file by its path."""
    try:
        parsed = sa.make_url(url)
    except ArgumentError:
        raise InputError(  # without the URL: a password may stand in it
            "--db is not a database URL; write postgresql+psycopg://user@host/name, or leave --db out"
        ) from None
    return parsed.database or url if parsed.drivername == "sqlite" else parsed.render_as_string(hide_password=True)


def _make_engine(url: str) -> sa.Engine:
    dialect = sa.make_url(url).get_backend_name()
    if dialect not in ("sqlite", "postgresql"):
        raise InputError(f"--db: {dialect} is not supported; SQLite (the default) and postgresql+psycopg://… are")
    try:
        if dialect == "sqlite":
            return _configured_sqlite(sa.create_engine(url, connect_args={"timeout": 30}))
        engine = sa.create_engine(url, pool_size=8, max_overflow=24, pool_pre_ping=True)
    except NoSuchModuleError as error:
        raise InputError(f"--db: {error}; write postgresql+psycopg://…") from error
    except ImportError as error:
        raise InputError(
            "PostgreSQL needs the extra packages of hypersd-bench[postgres]: pip install 'hypersd-bench[postgres]'"
        ) from error

    @sa.event.listens_for(engine, "begin")
    def _begin(db: sa.Connection) -> None:
        if db.get_execution_options().get("writing"):
            db.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK}, hashtext(current_schema()))")

    return engine


def _configured_sqlite(engine: sa.Engine) -> sa.Engine:
    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _: object) -> None:
        connection.isolation_level = None  # the driver begins no transactions of its own; the next listener does
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA foreign_keys=ON")

    @sa.event.listens_for(engine, "begin")
    def _begin(db: sa.Connection) -> None:
        # the write lock first: no upgrade can fail half-way
        db.exec_driver_sql("BEGIN IMMEDIATE" if db.get_execution_options().get("writing") else "BEGIN")

    return engine

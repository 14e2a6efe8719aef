"""The store in PostgreSQL, for any number of servers on one database. Each server has one connection that writes.

Every transition first locks the execution that it changes (`Db.lock`), and reads only then. So two servers change an
execution one after the other. Executions that nodes started are locked by the first one, from which all the others come:
so no transition of a child waits for one of its parent that waits for the child. The isolation level is READ COMMITTED: after it has waited for a lock, a transition reads
what the other server has committed. A claim locks the task alone, and passes over what others have locked.

The statements of a transaction whose results nobody needs yet are sent together with the next one (pipeline mode).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row
from psycopg.types.numeric import Int8Dumper
from psycopg.types.string import StrDumperUnknown

from nexum_engine.clock import Clock
from nexum_engine.errors import InvalidRequest, NexumError, StoreRefused
from nexum_engine.store.base import Space
from nexum_engine.store.db import Row, load_queries
from nexum_engine.store.group_commit import CommitFailed, GroupCommitStore, Transition, stopping

MINIMUM_VERSION = 14
CONNECT_SECONDS = 5
RECONNECT_SECONDS = 10.0
"""How long a transaction that was not stored is tried again while the database can't be reached."""
CONFLICT_SECONDS = 20.0
"""How long a transition is tried again if it can't get its locks."""
TOGETHER_LOCK_MS, ALONE_LOCK_MS = 200, 5000
"""How long a statement waits for a lock. Transitions that share a transaction lock executions in any order, so two
servers may wait for each other: then each transition gets a transaction of its own."""
CLOCK_INTERVAL = 5.0  # seconds between two comparisons with the database's clock
MIGRATION_LOCK = 0x4E58554D  # the same number as SQLite's application_id

logger = logging.getLogger(__name__)
Connection = psycopg.Connection[dict[str, Any]]

_LOCKS = {"oldest_task": "FOR UPDATE OF nodes SKIP LOCKED"}
"""What is added to a query of queries.sql so that it locks the rows that it finds."""


def dialect() -> dict[str, str]:
    """Return the queries for PostgreSQL by name: those of postgresql.sql, and the others of queries.sql, translated."""
    queries = {**load_queries(), **load_queries("postgresql.sql")}
    return {name: _translated(sql, _LOCKS.get(name, "")) for name, sql in queries.items()}


def _translated(sql: str, lock: str) -> str:
    sql = re.sub(r"^--.*\n", "", sql, flags=re.MULTILINE).strip().removesuffix(";")
    sql = re.sub(r"length\(CAST\(([\w.]+) AS BLOB\)\)", r"octet_length(\1)", sql)
    sql = sql.replace("json_group_object(name, value)", "coalesce(json_object_agg(name, value), '{}')::text")
    sql = re.sub(r"(?<!:):(\w+)", r"%(\1)s", sql.replace("%", "%%"))
    return f"{sql} {lock}" if lock else sql


class _TextDumper(StrDumperUnknown):
    """Writes text without the character NUL, which PostgreSQL can't store: error messages of workers may have it."""

    def dump(self, obj: str) -> Any:
        return super().dump(obj.replace("\0", "\N{REPLACEMENT CHARACTER}"))


class _Unknown(Exception):
    """The connection was lost after the commit was sent."""


class _Unreachable(Exception):
    """The database could not be reached, and nothing of the transaction is stored."""


class PostgresStore(GroupCommitStore):
    """A Nexum database in PostgreSQL. Any number of servers may have it open."""

    def __init__(self, url: str, clock: Clock, connection: Connection) -> None:
        super().__init__()
        self._url = url
        self._clock = clock
        self._queries = dialect()
        self._writes = frozenset(name for name, sql in self._queries.items() if not sql.startswith(("SELECT", "WITH")))
        self._connection: Connection | None = connection
        self._opened_as = without_password(url)
        self._next_comparison = 0.0

    @classmethod
    async def open(cls, database_url: str, clock: Clock) -> PostgresStore:
        """Open the database, and create or update its tables. Raises StoreRefused."""
        try:
            connection = await asyncio.to_thread(_open, database_url)
        except psycopg.Error as error:
            raise StoreRefused(f"can't open {without_password(database_url)}: {_line(error)}") from error
        return cls(database_url, clock, connection)

    @property
    def opened_as(self) -> str:
        return self._opened_as

    @property
    def file(self) -> Path | None:
        return None

    async def compact(self, *, max_bytes: int | None, always: bool) -> Space:
        """Return the size of the database. PostgreSQL itself uses free space again (autovacuum)."""
        if self._closed:
            raise stopping()
        (outcome,) = await self._loop.run_in_executor(
            self._writer, lambda: self._run_batch([lambda db: db.one("database_size")], alone=False)
        )
        if isinstance(outcome, Exception):
            raise outcome
        return Space(outcome["bytes"], 0)

    async def backup(self, file: Path, *, overwrite: bool, progress: Callable[[int, int], None]) -> int:
        raise InvalidRequest(f"a backup of {self._opened_as} is PostgreSQL's own work: use pg_dump, or its archiving")

    async def close(self) -> None:
        await self._end_waiting()
        await self._loop.run_in_executor(self._writer, self._disconnect)
        self._writer.shutdown()

    async def _recover(self, error: CommitFailed) -> None:
        logger.error("database %s: %s; nothing that was acknowledged is lost", self._opened_as, error)
        for look_again in self.on_unknown:
            look_again()

    # ---- In the writer thread ----------------------------------------------------------------------------------------

    def _run_batch(self, transitions: list[Transition], *, alone: bool) -> list[Any]:
        try:
            if len(transitions) > 1:
                try:
                    return self._transaction(transitions, alone=alone)
                except (_Unknown, _Unreachable):
                    raise
                except Exception as error:  # noqa: BLE001 - the transition that fails alone raises it again
                    logger.debug("%d transitions get transactions of their own: %s", len(transitions), _line(error))
            return [self._outcome(transition, alone=alone) for transition in transitions]
        except Exception as error:
            raise CommitFailed(error) from error

    def _outcome(self, transition: Transition, *, alone: bool) -> Any:
        """Run one transition in a transaction of its own. Return its result or exception."""
        end = time.monotonic() + CONFLICT_SECONDS
        while True:
            try:
                return self._transaction([transition], alone=alone)[0]
            except (_Unknown, _Unreachable):
                raise
            except psycopg.Error as error:
                if not _is_conflict(error) or time.monotonic() > end:
                    return error
                time.sleep(random.uniform(0.001, 0.02))
            except Exception as error:  # noqa: BLE001 - the transition's caller gets this error
                return error

    def _transaction(self, transitions: list[Transition], *, alone: bool) -> list[Any]:
        """Run transitions in one transaction. If it was not stored because the connection was lost, try again."""
        end = time.monotonic() + RECONNECT_SECONDS
        while True:
            connection = self._connected(end)
            is_sent = False
            try:
                with connection.pipeline() as pipeline:
                    connection.execute("BEGIN")
                    lock_ms = TOGETHER_LOCK_MS if len(transitions) > 1 else ALONE_LOCK_MS
                    connection.execute(f"SET LOCAL lock_timeout = {lock_ms}")
                    if alone:
                        # A deletion chooses executions by what else there is. No other server may add to it meanwhile.
                        connection.execute("LOCK TABLE executions IN SHARE ROW EXCLUSIVE MODE")
                    db = _PostgresDb(connection, pipeline, self._queries, self._writes, self._clock.now_ms())
                    outcomes = [_outcome_of(transition, db) for transition in transitions]
                    pipeline.sync()  # so that an error of a statement is not taken for one of the commit
                    is_sent = True
                    connection.execute("COMMIT")
                    pipeline.sync()
                return outcomes
            except psycopg.Error as error:
                if _is_lost(error, connection):
                    self._disconnect()
                    if is_sent:
                        raise _Unknown(f"the connection was lost: {_line(error)}") from error
                    logger.warning("database %s: %s; connecting again", self._opened_as, _line(error))
                    continue
                self._roll_back(connection)
                raise
            except BaseException:
                self._roll_back(connection)
                raise

    def _roll_back(self, connection: Connection) -> None:
        try:
            if connection.info.transaction_status != TransactionStatus.IDLE:
                connection.execute("ROLLBACK")
        except psycopg.Error:
            self._disconnect()

    def _connected(self, end: float) -> Connection:
        """Return the connection, and open it again if it was lost. Raises _Unreachable."""
        while self._connection is None:
            try:
                self._connection = _connect(self._url)
                self._next_comparison = 0.0
            except psycopg.Error as error:
                if time.monotonic() > end:
                    raise _Unreachable(f"the database can't be reached: {_line(error)}") from error
                time.sleep(0.1)
        if time.monotonic() >= self._next_comparison:
            with contextlib.suppress(psycopg.Error):
                self._clock.follow(_database_ms(self._connection))
            self._next_comparison = time.monotonic() + CLOCK_INTERVAL
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                connection.close()


def _outcome_of(transition: Transition, db: _PostgresDb) -> Any:
    """Return a transition's result, or its error if it has written nothing that the error must undo."""
    written = db.written
    try:
        return transition(db)
    except NexumError as error:
        if db.written != written:
            raise
        return error


class _PostgresDb:
    def __init__(
        self,
        connection: Connection,
        pipeline: psycopg.Pipeline,
        queries: Mapping[str, str],
        writes: frozenset[str],
        now_ms: int,
    ) -> None:
        self._connection = connection
        self._pipeline = pipeline
        self._queries = queries
        self._writes = writes
        self._locked: set[int] = set()
        self.now_ms = now_ms
        self.written = 0

    def _execute(self, query: str, parameters: Mapping[str, object]) -> psycopg.Cursor[dict[str, Any]]:
        self.written += query in self._writes
        return self._connection.execute(self._queries[query], parameters, prepare=True)

    def all(self, query: str, **parameters: object) -> list[Row]:
        return [*self._execute(query, parameters).fetchall()]

    def one(self, query: str, **parameters: object) -> Row | None:
        return self._execute(query, parameters).fetchone()

    def run(self, query: str, **parameters: object) -> None:
        self._execute(query, parameters)

    def changes(self, query: str, **parameters: object) -> int:
        cursor = self._execute(query, parameters)
        self._pipeline.sync()
        return cursor.rowcount

    def lock(self, execution: int) -> None:
        if execution not in self._locked:
            self._locked.add(execution)
            self._connection.execute(self._queries["lock"], {"execution": execution}, prepare=True)


# ---- Connecting ------------------------------------------------------------------------------------------------------


def _connect(url: str) -> Connection:
    connection = psycopg.connect(url, autocommit=True, row_factory=dict_row, **_settings(url))
    connection.adapters.register_dumper(int, Int8Dumper)  # by default the type follows the value, and overflows
    connection.adapters.register_dumper(str, _TextDumper)
    return connection


def _settings(url: str) -> dict[str, Any]:
    """Return the settings of a connection that the URL leaves open. They notice a network that has gone away."""
    defaults = {
        "application_name": "nexum",
        "connect_timeout": CONNECT_SECONDS,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
        "target_session_attrs": "read-write",
    }
    given = conninfo_to_dict(url)
    return {name: value for name, value in defaults.items() if name not in given}


def without_password(url: str) -> str:
    """Return the URL as a person may see it."""
    given = conninfo_to_dict(url, password="", sslpassword="")
    return f"postgresql: {make_conninfo('', **{name: str(value) for name, value in given.items() if value})}"


def _open(url: str) -> Connection:
    connection = _connect(url)
    try:
        version = connection.info.server_version // 10_000
        if version < MINIMUM_VERSION:
            raise StoreRefused(
                f"{without_password(url)} is PostgreSQL {version}; Nexum needs {MINIMUM_VERSION} or newer"
            )
        encoding = connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise StoreRefused(
                f"{without_password(url)} has the encoding {encoding}: create a database with ENCODING 'UTF8' "
                "TEMPLATE template0"
            )
        _migrate(url, connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(url: str, connection: Connection) -> None:
    """Create or update the tables. One server does, and the others wait."""
    folder = files("nexum_engine.store") / "postgresql_migrations"
    scripts = sorted((one for one in folder.iterdir() if one.name.endswith(".sql")), key=lambda one: one.name)
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
        found = connection.execute("SELECT to_regclass('nexum_schema') AS name").fetchone()
        version = 0
        if found is not None and found["name"] is not None:
            row = connection.execute("SELECT version FROM nexum_schema").fetchone()
            version = 0 if row is None else row["version"]
        else:
            others = connection.execute("SELECT to_regclass('executions') AS name").fetchone()
            if others is not None and others["name"] is not None:
                raise StoreRefused(
                    f"{without_password(url)} has a table `executions` of another program: name another database, or "
                    "another schema (?options=-csearch_path%3DNAME)"
                )
            connection.execute("CREATE TABLE nexum_schema (version bigint NOT NULL)")
            connection.execute("INSERT INTO nexum_schema VALUES (0)")
        if version > len(scripts):
            raise StoreRefused(
                f"{without_password(url)} was written by a newer Nexum (schema {version}; this one knows "
                f"{len(scripts)}): update this server with pip install -U nexum-durable-autogen"
            )
        for script in scripts[version:]:
            connection.execute(script.read_text(encoding="utf-8").encode())
        connection.execute("UPDATE nexum_schema SET version = %s", (len(scripts),))


def _database_ms(connection: Connection) -> int:
    """Return the database's time now, corrected by half of the time that the question took."""
    begun = time.monotonic()
    row = connection.execute("SELECT extract(epoch FROM clock_timestamp()) * 1000 AS ms").fetchone()
    assert row is not None
    return int(row["ms"]) + round((time.monotonic() - begun) * 500)


# ---- Errors ----------------------------------------------------------------------------------------------------------


def _is_conflict(error: psycopg.Error) -> bool:
    """Return whether another server was in the way, so that a second try can succeed."""
    return isinstance(
        error,
        (
            psycopg.errors.SerializationFailure,
            psycopg.errors.DeadlockDetected,
            psycopg.errors.LockNotAvailable,
            psycopg.errors.UniqueViolation,
        ),
    )


def _is_lost(error: psycopg.Error, connection: Connection) -> bool:
    """Return whether the connection is of no use any more: it is broken, or leads to a standby after a failover."""
    return (
        connection.broken
        or connection.closed
        or isinstance(error, psycopg.errors.ReadOnlySqlTransaction)
        or (error.sqlstate or "").startswith(("08", "57P"))
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""The store in PostgreSQL, for any number of servers on one database. Each server has one connection that writes.

Every transition first locks the execution that it changes (`Db.lock`), and reads only then. So two servers change an
execution one after the other. Executions that nodes started are locked by the first one, from which all others come: so
no transition of a child waits for one of its parent that waits for the child.

The isolation level is READ COMMITTED: after it has waited for a lock, a transition reads what the other server has
committed. A claim locks the task alone, and passes over what others have locked.

The statements of a transaction whose results nobody needs yet are sent together with the next one (pipeline mode).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
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
from nexum_engine.store.results import Changed, News

MINIMUM_VERSION = 14
CONNECT_SECONDS = 5
RECONNECT_SECONDS = 10.0
"""How long a transaction that was not stored is tried again while the database can't be reached."""
CONFLICT_SECONDS = 20.0
"""How long a transition is tried again if it can't get its locks."""
TOGETHER_LOCK_MS = 200
"""How long transitions that share a transaction wait for a lock. They lock executions in any order, so two servers may
wait for each other: then each transition gets a transaction of its own."""
CLOCK_INTERVAL = 5.0  # seconds between two comparisons with the database's clock
MIGRATION_LOCK = 0x4E58554D  # the same number as SQLite's application_id

logger = logging.getLogger(__name__)
Connection = psycopg.Connection[dict[str, Any]]

_LOCKS = {"oldest_task": "FOR UPDATE OF nodes SKIP LOCKED"}
"""What is added to a query of queries.sql so that it locks the rows that it finds."""


_BY_SERVER = ("take_task", "renew_lease", "resume_node")
"""The statements after which the attempt's worker is known to be connected to this server."""
_OF_NO_OTHER = ("restart_leases", "restart_owned_leases", "shorten_leases")
_NO_OTHER = "NOT EXISTS (SELECT 1 FROM servers WHERE id = server AND alive_until > now() AND id <> :server)"
"""What is added to the statements that shorten leases, so that they leave alone the workers of another server."""


def dialect() -> dict[str, str]:
    """Return the queries by name: those of postgresql.sql, and the others of queries.sql, translated."""
    queries = {**load_queries(), **load_queries("postgresql.sql")}
    for name in _BY_SERVER:
        queries[name] = queries[name].replace("UPDATE nodes SET ", "UPDATE nodes SET server = :server, ", 1)
    for name in _OF_NO_OTHER:
        queries[name] = queries[name].replace(";", f" AND {_NO_OTHER};")
    return {name: _translated(text, _LOCKS.get(name, "")) for name, text in queries.items()}


def _translated(text: str, lock: str) -> str:
    text = re.sub(r"^--.*\n", "", text, flags=re.MULTILINE).strip().removesuffix(";")
    text = re.sub(r"length\(CAST\(([\w.]+) AS BLOB\)\)", r"octet_length(\1)", text)
    text = text.replace("json_group_object(name, value)", "coalesce(json_object_agg(name, value), '{}')::text")
    text = re.sub(r"(?<!:):(\w+)", r"%(\1)s", text.replace("%", "%%"))
    return f"{text} {lock}" if lock else text


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
        self._writes = frozenset(
            name for name, text in self._queries.items() if not text.startswith(("SELECT", "WITH"))
        )
        self._connection: Connection | None = connection
        self._opened_as = without_password(url)
        self._next_comparison = 0.0
        self._server = secrets.randbits(62)
        self._channel = _channel(connection)
        self._news_until = time.monotonic() + NEWS_SECONDS
        """Until when to send news. If no other server was alive for long, they are not sent: they hold up commits."""
        self._companion: _Companion | None = None

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

    def join(self, on_news: Callable[[News], None]) -> None:
        self._companion = _Companion(self, on_news)

    async def close(self) -> None:
        if self._companion is not None:
            self._companion.stopping.set()
            await self._loop.run_in_executor(self._writer, self._wake_companion)
            await asyncio.to_thread(self._companion.join)
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
                    if len(transitions) > 1:
                        connection.execute(f"SET LOCAL lock_timeout = {TOGETHER_LOCK_MS}")
                    if alone:
                        # A deletion chooses executions by what else there is. No other server may add to it meanwhile.
                        connection.execute("LOCK TABLE executions IN SHARE ROW EXCLUSIVE MODE")
                    db = _PostgresDb(
                        connection, pipeline, self._queries, self._writes, self._clock.now_ms(), self._server
                    )
                    outcomes = [_outcome_of(transition, db) for transition in transitions]
                    if time.monotonic() < self._news_until and (news := _news_of(outcomes)):
                        connection.execute(_NOTIFY, (self._channel, _payload(self._server, news)))
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

    def _wake_companion(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(psycopg.Error):
                self._connection.execute(_NOTIFY, (self._channel, _payload(self._server, News())))

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
        server: int,
    ) -> None:
        self._connection = connection
        self._pipeline = pipeline
        self._queries = queries
        self._writes = writes
        self._locked: set[int] = set()
        self._given = {"server": server}
        self.now_ms = now_ms
        self.written = 0

    def _execute(self, query: str, parameters: Mapping[str, object]) -> psycopg.Cursor[dict[str, Any]]:
        self.written += query in self._writes
        return self._connection.execute(self._queries[query], {**parameters, **self._given}, prepare=True)

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


# ---- Other servers ---------------------------------------------------------------------------------------------------

BEAT_SECONDS, ALIVE_SECONDS = 1.0, 3.0
"""How often a server says that it is alive, and how long it counts as alive after that."""
NEWS_SECONDS = 60.0
"""How long news are sent after another server was last known to be alive."""
SLOW_SECONDS = 5.0
"""How often a server looks for what it may have missed."""
TAKEN_OVER_GRACE_MS = 1500
"""How long the workers of a dead server have to connect to another one."""
MAX_PAYLOAD = 7900  # bytes: PostgreSQL allows 8000
_NOTIFY = "SELECT pg_notify(%s, %s)"


class _Companion:
    """A thread with a connection of its own: it says that this server is alive, and hears from the others."""

    def __init__(self, store: PostgresStore, on_news: Callable[[News], None]) -> None:
        self._store = store
        self._on_news = on_news
        self._loop = asyncio.get_running_loop()
        self.stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nexum-news", daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while not self.stopping.is_set():
            try:
                with _connect(self._store._url) as connection:
                    self._listen(connection)
            except psycopg.Error as error:
                logger.debug("no news from other servers: %s", _line(error))
                self.stopping.wait(BEAT_SECONDS / 2)

    def _listen(self, connection: Connection) -> None:
        store, queries = self._store, self._store._queries
        me = {"server": store._server, "seconds": ALIVE_SECONDS}
        connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(store._channel)))
        connection.execute(queries["beat"], me)
        # From now on the others send news, although they have not counted this server yet.
        connection.execute(_NOTIFY, (store._channel, _payload(store._server, News())))
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._look_again)  # what was sent before was not heard
        looked = beaten = 0.0
        while not self.stopping.is_set():
            if time.monotonic() >= beaten + BEAT_SECONDS:
                beaten = time.monotonic()
                row = connection.execute(queries["beat"], me).fetchone()
                if row is not None and row["others"]:
                    self._note_other()
                now_ms = store._clock.now_ms()
                connection.execute(queries["take_over"], {"lease_expires_ms": now_ms + TAKEN_OVER_GRACE_MS})
                is_slow = beaten >= looked + SLOW_SECONDS
                if is_slow:
                    looked = beaten
                    connection.execute(queries["forget_dead"])
                self._tell(News(due_ms=now_ms, anything=is_slow))
            for note in connection.notifies(timeout=max(0.0, beaten + BEAT_SECONDS - time.monotonic()), stop_after=1):
                if (news := _news_from(store._server, note.payload)) is not None:
                    self._note_other()
                    self._tell(news)
        connection.execute(queries["leave"], me)

    def _look_again(self) -> None:
        for look_again in self._store.on_unknown:
            look_again()

    def _note_other(self) -> None:
        self._store._news_until = time.monotonic() + NEWS_SECONDS

    def _tell(self, news: News) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._on_news, news)


def _channel(connection: Connection) -> str:
    """Return the name under which the servers of this schema send news."""
    row = connection.execute("SELECT current_schema() AS name").fetchone()
    return f"nexum_{'' if row is None else row['name']}"[:60]


def _news_of(outcomes: list[Any]) -> News | None:
    """Return what the other servers must know of a transaction; None if it is nothing."""
    changes = [one if isinstance(one, Changed) else getattr(one, "changed", None) for one in outcomes]
    found = [one for one in changes if isinstance(one, Changed) and one != Changed()]
    if not found:
        return None
    due = [one.due_ms for one in found if one.due_ms is not None]
    return News(
        tuple(ready.version_hash for one in found for ready in one.ready),
        tuple(ended.execution_id for one in found for ended in one.ended),
        min(due, default=None),
    )


def _payload(server: int, news: News) -> str:
    text = json.dumps([server, news.ready, news.ended, news.due_ms])
    return text if len(text) <= MAX_PAYLOAD else json.dumps([server, [], [], None])


def _news_from(server: int, payload: str) -> News | None:
    """Return the news that another server sent; None if this server sent them."""
    sender, ready, ended, due_ms = json.loads(payload)
    if sender == server:
        return None
    return News(tuple(ready), tuple(ended), due_ms, anything=not ready and not ended and due_ms is None)


# ---- Connecting ------------------------------------------------------------------------------------------------------


def _connect(url: str) -> Connection:
    connection = psycopg.connect(url, autocommit=True, row_factory=dict_row, **_settings(url))
    set_types(connection)
    return connection


def set_types(connection: psycopg.Connection[Any]) -> None:
    """Set how values are sent."""
    connection.adapters.register_dumper(int, Int8Dumper)  # by default the type follows the value, and overflows
    connection.adapters.register_dumper(str, _TextDumper)


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
    try:
        given = conninfo_to_dict(url, password="", sslpassword="")
    except psycopg.ProgrammingError:
        return "the given postgresql:// URL"
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

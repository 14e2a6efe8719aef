"""The store in PostgreSQL, for any number of servers on one database. Each server has one connection that writes.

Every transition first locks the execution that it changes (`Db.lock`), and reads only after that. So two servers change
an execution one after the other. An execution that a client started has one lock together with all executions that its
nodes started, at any depth. So a parent and its child can't wait for each other's locks.

The isolation level is READ COMMITTED: after a transition has waited for a lock, it reads what the other server has
committed. Transitions that only read an execution or a list have REPEATABLE READ: all their statements read one state.
A claim locks only the task, and skips the tasks that other servers have locked.

A statement whose result is not needed yet is sent together with the next statement (pipeline mode).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

from nexum_engine.clock import Clock
from nexum_engine.errors import InvalidRequest, NexumError, StoreRefused, StoreUnavailable
from nexum_engine.store.base import CommitFailed, Kind, Space, Store, Transition
from nexum_engine.store.db import Row, row_of
from nexum_engine.store.postgresql_connection import (
    Connection,
    connect,
    database_ms,
    is_conflict,
    is_lost,
    line_of,
    open_database,
    pipeline_of,
    read_database_id,
    shut_down,
    sync,
    vacuum,
    without_password,
)
from nexum_engine.store.postgresql_queries import dialect
from nexum_engine.store.postgresql_servers import (
    ALIVE_SECONDS,
    NEWS_SECONDS,
    OtherServers,
    channel_of,
    hold_server,
    news_of,
    send,
)
from nexum_engine.store.results import News

RECONNECT_SECONDS = 10.0
"""How long to retry a transaction that was not stored because the connection was lost."""
CLOSE_SECONDS = 3.0
"""How long a server that ends waits for PostgreSQL's answers, before it ends its connections."""
CONFLICT_SECONDS = 20.0
"""How long to retry a transition that can't get its locks."""
TOGETHER_LOCK_MS = 200
"""How long transitions that share a transaction wait for a lock. Such transitions lock executions in any order, so
two servers may wait for each other. After this wait, each transition gets a transaction of its own."""
CLOCK_INTERVAL = 5.0  # seconds between two comparisons with the database's clock

logger = logging.getLogger(__name__)


class _Lost(Exception):
    """The connection was lost after the commit was sent, or it was lost earlier and the retries have failed, too.

    In the first case, it is unknown whether the transaction is stored. In the second case, it is not stored.
    """


class PostgresStore(Store):
    """A Nexum database in PostgreSQL. Any number of servers may have it open."""

    _reads_snapshots = True

    def __init__(self, url: str, clock: Clock, connection: Connection, server: int, database_id: str) -> None:
        super().__init__(without_password(url), database_id, None)
        self._url = url
        self._clock = clock
        self._queries = dialect()
        self._writes = frozenset(
            name for name, text in self._queries.items() if not text.startswith(("SELECT", "WITH"))
        )
        self._connection: Connection | None = connection
        self._next_comparison = 0.0
        self._server = server
        self._channel = channel_of(connection)
        self._news_until = time.monotonic() + NEWS_SECONDS
        """The time until which news is sent. While no other server is alive, none is sent: it would delay commits."""
        self._others: OtherServers | None = None

    @classmethod
    async def open(cls, database_url: str, clock: Clock) -> PostgresStore:
        """Open the database, and create or update its tables. Raises StoreRefused."""
        try:
            connection = await asyncio.to_thread(open_database, database_url)
            server = secrets.randbits(62)
            await asyncio.to_thread(hold_server, connection, server)
            # Follow the database's clock before anything reads `clock`. The clock of this machine may be wrong, and the
            # other servers follow the clock of this server.
            clock.follow(*await asyncio.to_thread(database_ms, connection))
            database_id = await asyncio.to_thread(read_database_id, connection)
        except psycopg.Error as error:
            why = line_of(error)
            if "unsupported startup parameter" in why:
                why += "; let the pool's role have the setting instead: ALTER ROLE … SET search_path = …"
            raise StoreRefused(f"can't open {without_password(database_url)}: {why}") from error
        return cls(database_url, clock, connection, server, database_id)

    async def compact(self, *, max_bytes: int | None, always: bool) -> Space:
        """Return the size of the database. With `always`, first make the space of deleted rows usable for new rows.

        PostgreSQL's autovacuum also does this from time to time.
        """
        self._check_open()
        if always:
            try:
                await asyncio.to_thread(vacuum, self._url)
            except psycopg.Error as error:
                raise StoreUnavailable(f"the space could not be freed: {line_of(error)}") from error
        size = await self.run(lambda db: row_of(db, "database_size"))
        return Space(size["bytes"], 0)

    async def backup(self, file: Path, *, overwrite: bool, progress: Callable[[int, int], None]) -> int:
        raise InvalidRequest(f"Nexum can't back up {self.opened_as}: use pg_dump, or PostgreSQL's archiving")

    def join(self, on_news: Callable[[News], None]) -> None:
        # Forget the servers whose process has ended. If this server replaces a killed server, the workers of the killed
        # server then need not wait until that server counts as dead.
        self.run(lambda db: db.run("forget_ended", seconds=ALIVE_SECONDS))
        self._others = OtherServers(
            self._url,
            self._server,
            self._channel,
            self._clock,
            on_news=on_news,
            on_alive=self._note_other,
            on_gap=self._look_again,
        )

    def _note_other(self) -> None:
        """Keep sending news for NEWS_SECONDS from now: a different server is alive."""
        self._news_until = time.monotonic() + NEWS_SECONDS

    async def close(self) -> None:
        if self._others is not None:
            await asyncio.to_thread(self._others.leave)
        ending = asyncio.ensure_future(self._end_waiting())
        await asyncio.wait({ending}, timeout=CLOSE_SECONDS)
        if not ending.done() and (connection := self._connection) is not None:
            logger.warning("database %s does not answer: ending the connection", self.opened_as)
            shut_down(connection)
        await ending
        await self._loop.run_in_executor(self._writer, self._disconnect)
        self._writer.shutdown()

    async def _recover(self, error: CommitFailed) -> None:
        self._log_failure(error)
        self._look_again()

    # ---- In the writer thread ----------------------------------------------------------------------------------------

    def _run_batch(self, transitions: list[Transition], kind: Kind) -> list[Any]:
        try:
            if len(transitions) > 1:
                try:
                    return self._transaction(transitions, kind)
                except _Lost:
                    raise
                except Exception as error:  # noqa: BLE001 - when run separately, the failing transition raises it again
                    logger.debug("%d transitions get transactions of their own: %s", len(transitions), line_of(error))
            return [self._in_own_transaction(transition, kind) for transition in transitions]
        except Exception as error:
            raise CommitFailed(error) from error

    def _in_own_transaction(self, transition: Transition, kind: Kind) -> Any:
        """Run one transition in a transaction of its own. Return its result or exception."""
        end = time.monotonic() + CONFLICT_SECONDS
        while True:
            try:
                return self._transaction([transition], kind)[0]
            except _Lost:
                raise
            except psycopg.Error as error:
                if not is_conflict(error) or time.monotonic() > end:
                    return _for_caller(error)
                time.sleep(random.uniform(0.001, 0.02))
            except Exception as error:  # noqa: BLE001 - the transition's caller gets this error
                return error

    def _transaction(self, transitions: list[Transition], kind: Kind) -> list[Any]:
        """Run transitions in one transaction. If the connection is lost before the commit, connect again and retry."""
        end = time.monotonic() + RECONNECT_SECONDS
        while True:
            connection = self._connected(end)
            is_sent = False
            try:
                with pipeline_of(connection) as pipeline:
                    connection.execute(
                        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY" if kind is Kind.SNAPSHOT else "BEGIN"
                    )
                    if len(transitions) > 1:
                        connection.execute(f"SET LOCAL lock_timeout = {TOGETHER_LOCK_MS}")
                    if kind is Kind.ALONE:
                        # Whether an execution may be deleted depends on other executions, too. So let no other server
                        # add or change executions during this transaction.
                        connection.execute("LOCK TABLE executions IN SHARE ROW EXCLUSIVE MODE")
                    db = _PostgresDb(
                        connection, pipeline, self._queries, self._writes, self._clock.now_ms(), self._server
                    )
                    outcomes = [_result_of(transition, db) for transition in transitions]
                    if time.monotonic() < self._news_until and (news := news_of(outcomes)):
                        send(connection, self._channel, self._server, db.now_ms, news)
                    sync(connection, pipeline)  # so that a statement's error is not mistaken for an error of the commit
                    is_sent = kind is not Kind.SNAPSHOT  # after COMMIT, only a transaction that reads may run again
                    connection.execute("COMMIT")
                    sync(connection, pipeline)
                return outcomes
            except psycopg.Error as error:
                if is_lost(error, connection):
                    self._disconnect()
                    # Don't retry for ever: a statement that ends its connection each time would block all others.
                    if is_sent or self._closed or time.monotonic() > end:
                        raise _Lost(f"the connection was lost: {line_of(error)}") from error
                    logger.warning("database %s: %s; connecting again", self.opened_as, line_of(error))
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
        """Return the connection, and open it again if it was lost. Raises _Lost."""
        while self._connection is None:
            try:
                self._connection = connect(self._url)
                hold_server(self._connection, self._server)
                self._next_comparison = 0.0
            except psycopg.Error as error:
                if self._closed or time.monotonic() > end:
                    raise _Lost(f"the database can't be reached: {line_of(error)}") from error
                time.sleep(0.1)
        if time.monotonic() >= self._next_comparison:
            with contextlib.suppress(psycopg.Error):
                self._clock.follow(*database_ms(self._connection))
            self._next_comparison = time.monotonic() + CLOCK_INTERVAL
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                connection.close()


def _for_caller(error: psycopg.Error) -> Exception:
    """Return the error for the caller of a transition that PostgreSQL refused.

    An error of a type that is not named here comes from a bug, and is returned unchanged.
    """
    if isinstance(error, (psycopg.OperationalError, psycopg.errors.InsufficientPrivilege)):
        return StoreUnavailable(f"PostgreSQL refused the change, and nothing was stored: {line_of(error)}")
    return error


def _result_of(transition: Transition, db: _PostgresDb) -> Any:
    """Return a transition's result. Return its error if the transition has written nothing, else raise the error."""
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
        sync(self._connection, self._pipeline)
        return cursor.rowcount

    def lock(self, execution: int) -> None:
        if execution not in self._locked:
            self._locked.add(execution)
            self._connection.execute(self._queries["lock"], {"execution": execution}, prepare=True)

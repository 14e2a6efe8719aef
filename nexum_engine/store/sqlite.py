"""The store in SQLite: one process, one connection, and one writer thread that commits waiting transitions together."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from filelock import FileLock

from nexum_engine.clock import Clock
from nexum_engine.errors import NexumError, StoreRefused, StoreUnavailable
from nexum_engine.location import database_path
from nexum_engine.store.base import Store
from nexum_engine.store.db import Db, Row, load_queries
from nexum_engine.store.sqlite_file import DatabaseFile, FilesLost, check_file, lock

P = ParamSpec("P")
T = TypeVar("T")
logger = logging.getLogger(__name__)

MINIMUM_SQLITE = (3, 37, 0)  # the first version with STRICT tables
MAX_BATCH = 256  # transitions in one transaction
WATCH_INTERVAL = 1.0  # seconds between checks of the files of an idle database


@dataclass
class _Submission:
    transition: Callable[[Db], Any]
    future: asyncio.Future[Any]


class SqliteStore(Store):
    """A Nexum database in one SQLite file.

    Group commit: transitions share a transaction if they are submitted in one turn of the event loop, or while the
    previous transaction is being written. If one transition fails, the others are still committed.

    SQLite before 3.51.3 has a bug when several connections write (WAL reset). The bug can't occur here, because the
    store has one connection.
    """

    def __init__(self, path: Path, clock: Clock, lock: FileLock, database: DatabaseFile) -> None:
        self._path = path
        self._clock = clock
        self._lock = lock
        self._database = database
        self._queries = load_queries()
        self._loop = asyncio.get_running_loop()
        self._failed: asyncio.Future[str] = self._loop.create_future()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="nexum-store")
        self._waiting: list[_Submission] = []
        self._pump: asyncio.Task[None] | None = None
        self._watcher = self._loop.create_task(self._watch(), name="watch the database's files")
        self._closed = False

    @classmethod
    async def open(cls, database_url: str, clock: Clock, *, lock_timeout: float = 0.0) -> SqliteStore:
        """Open or create the database. Raises StoreRefused or StoreLocked. Another program's file is left untouched."""
        if sqlite3.sqlite_version_info < MINIMUM_SQLITE:
            raise StoreRefused(
                f"this Python has SQLite {sqlite3.sqlite_version}; Nexum needs "
                f"{'.'.join(map(str, MINIMUM_SQLITE))} or newer: use a newer Python"
            )
        path = database_path(database_url)
        return await asyncio.to_thread(cls._open, path, clock, lock_timeout, asyncio.get_running_loop())

    @classmethod
    def _open(cls, path: Path, clock: Clock, lock_timeout: float, loop: asyncio.AbstractEventLoop) -> SqliteStore:
        check_file(path)
        held = lock(path, lock_timeout)
        try:
            database = DatabaseFile.open(path, timeout=lock_timeout)
        except BaseException:
            held.release()
            raise

        async def build() -> SqliteStore:
            return cls(path, clock, held, database)

        return asyncio.run_coroutine_threadsafe(build(), loop).result()

    @property
    def opened_as(self) -> str:
        return str(self._path)

    @property
    def failed(self) -> asyncio.Future[str]:
        return self._failed

    def run(self, transition: Callable[Concatenate[Db, P], T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closed or self._failed.done():
            future.set_exception(StoreUnavailable("the server is stopping: retry when it is running again"))
            return future
        self._waiting.append(_Submission(lambda db: transition(db, *args, **kwargs), future))
        if self._pump is None:
            self._pump = self._loop.create_task(self._write_waiting())
        return future

    async def close(self) -> None:
        self._closed = True
        self._watcher.cancel()
        await asyncio.gather(self._watcher, return_exceptions=True)
        if self._pump is not None:
            await self._pump
        close = self._database.abandon if self._failed.done() else self._database.close
        await self._loop.run_in_executor(self._writer, close)
        self._writer.shutdown()
        self._lock.release()

    async def _watch(self) -> None:
        """Check the files even if no call arrives, so that a server that has lost them ends and frees its port."""
        while not self._failed.done():
            await asyncio.sleep(WATCH_INTERVAL)
            try:
                await self._loop.run_in_executor(self._writer, self._database.check)
            except FilesLost as error:
                await self._recover(_CommitFailed(error))

    async def _write_waiting(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                transitions = [submission.transition for submission in batch]
                try:
                    outcomes = await self._loop.run_in_executor(self._writer, self._run_batch, transitions)
                except _CommitFailed as error:
                    outcomes = [error.for_caller()] * len(batch)
                    await self._recover(error)
                for submission, outcome in zip(batch, outcomes, strict=True):
                    if submission.future.cancelled():
                        continue
                    if isinstance(outcome, BaseException):
                        submission.future.set_exception(outcome)
                    else:
                        submission.future.set_result(outcome)
        finally:
            self._pump = None

    def _run_batch(self, transitions: list[Callable[[Db], Any]]) -> list[Any]:
        """Run transitions in the writer thread. Return a list with each transition's result or exception."""
        try:
            try:
                return self._transaction(transitions, savepoints=False)
            except sqlite3.IntegrityError:
                pass
            except (sqlite3.Error, FilesLost):
                raise
            except Exception:  # noqa: BLE001, S110 - the run with savepoints finds it again
                pass
            # Run the batch again with savepoints. The first run has none: they cost time, and few batches fail.
            self._database.connection.execute("ROLLBACK")
            return self._transaction(transitions, savepoints=True)
        except Exception as error:
            # Catch more than sqlite3.Error, so that every caller gets an answer: SQLite can raise MemoryError.
            raise _CommitFailed(error) from error

    def _transaction(self, transitions: list[Callable[[Db], Any]], *, savepoints: bool) -> list[Any]:
        """Run transitions in one transaction, and return their results.

        With `savepoints`, a failed transition is undone alone, and the list has its exception in place of a result.
        """
        db = _SqliteDb(self._database.connection, self._queries, self._clock.now_ms())
        self._database.begin()
        if savepoints:
            outcomes = [self._in_savepoint(transition, db) for transition in transitions]
        else:
            outcomes = [transition(db) for transition in transitions]
        self._database.commit()
        return outcomes

    def _in_savepoint(self, transition: Callable[[Db], Any], db: _SqliteDb) -> Any:
        connection = self._database.connection
        connection.execute("SAVEPOINT transition")
        try:
            outcome = transition(db)
        except sqlite3.IntegrityError as error:
            # Fail only this transition: a violated constraint is a bug of the transition, not a fault of the database.
            outcome = error
        except sqlite3.Error:
            raise
        except Exception as error:  # noqa: BLE001 - the transition's caller gets this error
            outcome = error
        if isinstance(outcome, Exception):
            connection.execute("ROLLBACK TO transition")
        connection.execute("RELEASE transition")
        return outcome

    async def _recover(self, error: _CommitFailed) -> None:
        """Reopen the database after a failed transaction, or mark the store as failed."""
        # Don't reopen after a disk error: after a failed fsync, a read may return data that is not on the disk.
        reason: Exception | None = error
        if error.is_temporary:
            try:
                await self._loop.run_in_executor(self._writer, self._database.reopen)
                logger.error("database %s: %s; nothing that was acknowledged is lost", self._path, error)
                reason = None
            except (sqlite3.Error, OSError, NexumError) as failure:
                reason = failure
        if reason is not None:
            if not self._failed.done():
                is_told = isinstance(error.cause, FilesLost)
                self._failed.set_result(
                    str(reason) if is_told else f"database {self._path} can't be trusted any more: {reason}"
                )
            for submission in self._waiting:
                if not submission.future.done():
                    submission.future.set_exception(error.for_caller())
            self._waiting = []
        for look_again in self.on_unknown:
            look_again()


class _CommitFailed(Exception):
    """The failure of a whole transaction, with all its transitions."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause) or type(cause).__name__)
        self.cause = cause

    @property
    def is_temporary(self) -> bool:
        """Whether the file is sound, and only the disk is full or another program has locked the file."""
        # Compare the message, because Python 3.10 has no sqlite3.Error.sqlite_errorcode.
        return isinstance(self.cause, sqlite3.Error) and any(word in str(self.cause) for word in ("full", "locked"))

    def for_caller(self) -> StoreUnavailable:
        return StoreUnavailable("the database could not confirm the transaction, so it may or may not be stored: retry")


class _SqliteDb:
    def __init__(self, connection: sqlite3.Connection, queries: Mapping[str, str], now_ms: int) -> None:
        self._connection = connection
        self._queries = queries
        self.now_ms = now_ms

    def all(self, query: str, **parameters: object) -> list[Row]:
        return self._connection.execute(self._queries[query], parameters).fetchall()

    def one(self, query: str, **parameters: object) -> Row | None:
        row: Row | None = self._connection.execute(self._queries[query], parameters).fetchone()
        return row

    def run(self, query: str, **parameters: object) -> int:
        return self._connection.execute(self._queries[query], parameters).rowcount

"""The store in SQLite: one process, one connection, and one writer thread that commits waiting transitions together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import sys
import uuid
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from nexum_engine.clock import Clock
from nexum_engine.errors import NexumError, StoreLocked, StoreRefused, StoreUnavailable
from nexum_engine.location import database_path
from nexum_engine.store.base import Store
from nexum_engine.store.db import Db, Row, load_queries

P = ParamSpec("P")
T = TypeVar("T")
logger = logging.getLogger(__name__)

APPLICATION_ID = 0x4E58554D
"""The mark of a Nexum database: SQLite's application_id in the file's header."""
MINIMUM_SQLITE = (3, 37, 0)  # the first version with STRICT tables
MAX_BATCH = 256  # transitions in one transaction
_HEADER = b"SQLite format 3\x00"


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

    def __init__(self, path: Path, clock: Clock, lock: FileLock, connection: sqlite3.Connection) -> None:
        self._path = path
        self._clock = clock
        self._lock = lock
        self._connection = connection
        self._queries = load_queries()
        self._loop = asyncio.get_running_loop()
        self._failed: asyncio.Future[str] = self._loop.create_future()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="nexum-store")
        self._waiting: list[_Submission] = []
        self._pump: asyncio.Task[None] | None = None
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
        _check_file(path)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = FileLock(f"{path}.lock", mode=0o600, thread_local=False)
            lock.acquire(timeout=lock_timeout)
        except Timeout as error:
            raise StoreLocked(
                f"database {path} is in use by another Nexum server: stop that server, or give this one another "
                "database with --database-url sqlite:///path"
            ) from error
        except OSError as error:
            raise StoreRefused(f"database {path} can't be opened: {error.strerror or error}") from error
        try:
            _check_file(path)
            connection = _connect(path)
        except BaseException:
            lock.release()
            raise

        async def build() -> SqliteStore:
            return cls(path, clock, lock, connection)

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
        if self._pump is not None:
            await self._pump
        await self._loop.run_in_executor(self._writer, self._connection.close)
        self._writer.shutdown()
        self._lock.release()

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
            except sqlite3.Error:
                raise
            except Exception:  # noqa: BLE001, S110 - the run with savepoints finds it again
                pass
            # Run the batch again with savepoints. The first run has none: they cost time, and few batches fail.
            self._connection.execute("ROLLBACK")
            return self._transaction(transitions, savepoints=True)
        except Exception as error:
            # Catch more than sqlite3.Error, so that every caller gets an answer: SQLite can raise MemoryError.
            raise _CommitFailed(error) from error

    def _transaction(self, transitions: list[Callable[[Db], Any]], *, savepoints: bool) -> list[Any]:
        """Run transitions in one transaction, and return their results.

        With `savepoints`, a failed transition is undone alone, and the list has its exception in place of a result.
        """
        connection = self._connection
        db = _SqliteDb(connection, self._queries, self._clock.now_ms())
        connection.execute("BEGIN IMMEDIATE")
        if savepoints:
            outcomes = [self._in_savepoint(transition, db) for transition in transitions]
        else:
            outcomes = [transition(db) for transition in transitions]
        connection.execute("COMMIT")
        return outcomes

    def _in_savepoint(self, transition: Callable[[Db], Any], db: _SqliteDb) -> Any:
        self._connection.execute("SAVEPOINT transition")
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
            self._connection.execute("ROLLBACK TO transition")
        self._connection.execute("RELEASE transition")
        return outcome

    async def _recover(self, error: _CommitFailed) -> None:
        """Reopen the database after a failed transaction, or mark the store as failed."""
        # Don't reopen after a disk error: after a failed fsync, a read may return data that is not on the disk.
        reason: Exception | None = error
        if error.is_passing:
            try:
                self._connection = await self._loop.run_in_executor(self._writer, self._reopen)
                logger.error("database %s: %s; nothing that was acknowledged is lost", self._path, error)
                reason = None
            except (sqlite3.Error, NexumError) as failure:
                reason = failure
        if reason is not None:
            if not self._failed.done():
                self._failed.set_result(f"database {self._path} can't be trusted any more: {reason}")
            for submission in self._waiting:
                if not submission.future.done():
                    submission.future.set_exception(error.for_caller())
            self._waiting = []
        for look_again in self.on_unknown:
            look_again()

    def _reopen(self) -> sqlite3.Connection:
        with contextlib.suppress(sqlite3.Error):  # the error of this connection is already known
            self._connection.close()
        return _connect(self._path)


class _CommitFailed(Exception):
    """The failure of a whole transaction, with all its transitions."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause) or type(cause).__name__)
        self.cause = cause

    @property
    def is_passing(self) -> bool:
        """Whether the cause can pass: the disk is full, or another program has locked the file. The file is sound."""
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


def _check_file(path: Path) -> None:
    """Raise StoreRefused if the file is not a Nexum database that this version can open. Only the header is read."""
    try:
        with path.open("rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreRefused(f"database {path} can't be read: {error.strerror or error}") from error
    if len(header) < 100 or not header.startswith(_HEADER):
        raise StoreRefused(f"{path} is not a database: it was left untouched; name another file with --database-url")
    # https://www.sqlite.org/fileformat.html#the_database_header
    if int.from_bytes(header[68:72], "big") != APPLICATION_ID:
        raise StoreRefused(
            f"{path} is another program's database: it was left untouched; name another file with --database-url"
        )
    _check_version(path, int.from_bytes(header[60:64], "big"))


def _check_version(path: Path, version: int) -> None:
    if version > len(_migrations()):
        raise StoreRefused(
            f"{path} has schema version {version}, made by a newer Nexum; this one knows {len(_migrations())}: "
            "use the newer one"
        )


def _migrations() -> list[str]:
    """Return the SQL scripts of the schema in order. The first script makes version 1."""
    folder = files("nexum_engine.store") / "sqlite_migrations"
    return [
        entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".sql")
    ]


def _connect(path: Path) -> sqlite3.Connection:
    try:
        unclean = _was_unclean(path)
        if not path.exists():
            _create(path)
        connection = _open_connection(path)
        # Check the schema version again: the write-ahead log may have a newer one than the header of the file.
        _check_version(path, connection.execute("PRAGMA user_version").fetchone()[0])
        _migrate(connection)
        connection.execute("PRAGMA journal_mode = WAL")
        check = connection.execute("PRAGMA quick_check(1)").fetchone()[0] if unclean else "ok"
    except (sqlite3.Error, OSError) as error:
        raise StoreRefused(f"database {path} can't be opened: {error}") from error
    if check != "ok":
        connection.close()
        raise StoreRefused(f"database {path} is damaged: {check}")
    return connection


def _was_unclean(path: Path) -> bool:
    """Return whether the last server died without closing the database. Its write-ahead log is then not empty."""
    try:
        return Path(f"{path}-wal").stat().st_size > 0
    except FileNotFoundError:
        return False


def _create(path: Path) -> None:
    """Create the database under a temporary name, and rename it. So a kill leaves no incomplete database."""
    new = path.with_name(f"{path.name}.new-{uuid.uuid4().hex[:8]}")
    try:
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        connection = _open_connection(new)
        try:
            _migrate(connection)
        finally:
            connection.close()
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    # Sync the folder to make the rename durable. Windows can't open a folder, and needs no sync.
    if sys.platform != "win32":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _open_connection(path: Path) -> sqlite3.Connection:
    # Use autocommit, because the store begins and ends transactions itself. Turn off the thread check, because one
    # thread opens the connection and the writer thread uses it.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=128)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    if sqlite3.sqlite_version_info < (3, 43, 0):
        connection.create_function("octet_length", 1, _octet_length, deterministic=True)
    return connection


def _octet_length(text: str | None) -> int | None:
    return None if text is None else len(text.encode("utf-8"))


def _migrate(connection: sqlite3.Connection) -> None:
    """Update the schema. Each script is committed together with its version number."""
    done = connection.execute("PRAGMA user_version").fetchone()[0]
    for version, script in enumerate(_migrations()[done:], start=done + 1):
        connection.executescript(
            f"BEGIN IMMEDIATE;\n{script}\nPRAGMA application_id = {APPLICATION_ID};\nPRAGMA user_version = {version};\n"
            "COMMIT;"
        )

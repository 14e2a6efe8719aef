"""The store in SQLite: one process and one connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from nexum_engine.clock import Clock
from nexum_engine.errors import Conflict, NexumError, StoreRefused, StoreUnavailable
from nexum_engine.location import database_path
from nexum_engine.store.base import CommitFailed, Kind, Space, Store, Submission, Transition
from nexum_engine.store.db import Row, load_queries
from nexum_engine.store.sqlite_connection import check_file
from nexum_engine.store.sqlite_file import DatabaseFile, FilesLost, lock, new_backup

logger = logging.getLogger(__name__)

MINIMUM_SQLITE = (3, 37, 0)  # the first version with STRICT tables
WATCH_INTERVAL = 1.0  # seconds between checks of the files of an idle database
BACKUP_STEP_PAGES = 256
QUICK_TRANSACTION = 0.005
"""If transactions take less time than this, in seconds, brief transitions run on the event loop."""


class SqliteStore(Store):
    """A Nexum database in one SQLite file.

    SQLite before 3.51.3 has a bug when several connections write (WAL reset). The bug can't occur here, because the
    store has one connection.
    """

    def __init__(self, path: Path, clock: Clock, lock: FileLock, database: DatabaseFile) -> None:
        super().__init__(str(path), database.mark.hex(), path)
        self._path = path
        self._clock = clock
        self._lock = lock
        self._database = database
        self._queries = load_queries()
        self._turn = threading.RLock()
        """Held during a transaction, and by a backup's thread while it reads."""
        self._is_quick = True
        """Whether the disk is quick: since a transaction wrote within QUICK_TRANSACTION, none has taken longer."""
        self._backup: _Backup | None = None
        self._watcher = self._loop.create_task(self._watch(), name="watch the database's files")

    @classmethod
    async def open(cls, database_url: str, clock: Clock) -> SqliteStore:
        """Open or create the database. Raises StoreRefused or StoreLocked. Another program's file is left untouched."""
        if sqlite3.sqlite_version_info < MINIMUM_SQLITE:
            raise StoreRefused(
                f"this Python has SQLite {sqlite3.sqlite_version}; Nexum needs "
                f"{'.'.join(map(str, MINIMUM_SQLITE))} or newer: use a newer Python"
            )
        path = database_path(database_url)
        opening = asyncio.get_running_loop().run_in_executor(None, _open, path)
        try:
            held, database = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_opened)  # the thread opens the database all the same
            raise
        return cls(path, clock, held, database)

    async def compact(self, *, max_bytes: int | None, always: bool) -> Space:
        self._check_open()
        return await self._loop.run_in_executor(self._writer, self._compact, max_bytes, always)

    def _compact(self, max_bytes: int | None, always: bool) -> Space:
        with self._turn:
            space = self._database.space()
            if (
                not space.free_bytes
                or not (always or space.free_bytes >= space.total_bytes / 4)
                or (max_bytes is not None and space.total_bytes - space.free_bytes > max_bytes)
                or self._backup is not None
            ):
                return space
            try:
                self._database.compact()
            except (sqlite3.Error, OSError) as error:
                # For instance, the disk is full. The failed compaction has left the database unchanged.
                logger.warning("database %s could not be compacted: %s", self._path, error)
                return space
            left = self._database.space()
            return replace(left, released_bytes=space.total_bytes - left.total_bytes)

    async def backup(self, file: Path, *, overwrite: bool, progress: Callable[[int, int], None]) -> int:
        self._check_open()
        if self._backup is not None:
            raise Conflict("another backup of this database is being made: wait until it is complete")
        self._backup = backup = _Backup(self._turn, self._database, progress)
        copying = self._loop.create_task(asyncio.to_thread(self._make_backup, backup, file, overwrite))
        try:
            return await asyncio.shield(copying)
        finally:
            backup.stop()  # the caller may have been cancelled
            await asyncio.gather(copying, return_exceptions=True)
            self._backup = None

    def _make_backup(self, backup: _Backup, file: Path, overwrite: bool) -> int:
        try:
            with new_backup(self._path, file, overwrite=overwrite) as target:
                backup.copy_to(target)
            return file.stat().st_size
        finally:
            backup.ended.set()

    def _stop_backup(self) -> None:
        """Stop a backup that is being made. Call this before the connection is closed."""
        backup = self._backup
        if backup is not None:
            backup.stop()
            backup.ended.wait()

    async def close(self) -> None:
        self._closed = True
        self._watcher.cancel()
        await asyncio.gather(self._watcher, return_exceptions=True)
        await self._end_waiting()
        await asyncio.to_thread(self._stop_backup)
        close = self._database.abandon if self.failed.done() else self._database.close
        await self._loop.run_in_executor(self._writer, close)
        self._writer.shutdown()
        self._lock.release()

    async def _watch(self) -> None:
        """Check the files even if no call arrives. A server that has lost its files then ends, and frees its port."""
        while not self.failed.done():
            await asyncio.sleep(WATCH_INTERVAL)
            try:
                await self._loop.run_in_executor(self._writer, self._check)
            except FilesLost as error:
                await self._recover(CommitFailed(error))

    def _check(self) -> None:
        with self._turn:
            self._database.check(closely=True)

    def _begin_write(self, batch: list[Submission]) -> None:
        """Write a batch, on the event loop if that can't block it for long.

        To hand a brief transition to the writer thread and back takes about as long as its statements. But the event
        loop must not wait for a slow disk or a compaction, and it would leave a backup's thread no time between writes.
        """
        is_brief = self._is_quick and self._backup is None and all(one.is_brief for one in batch)
        if is_brief and self._turn.acquire(blocking=False):
            try:
                tell = self._write(batch)
            finally:
                self._turn.release()
            tell()
        else:
            super()._begin_write(batch)

    def _run_batch(self, transitions: list[Transition], kind: Kind) -> list[Any]:
        return (self._run_without_references if kind is Kind.ALONE else self._run_together)(transitions)

    def _run_together(self, transitions: list[Transition]) -> list[Any]:
        try:
            with self._turn:
                try:
                    return self._transaction(transitions, savepoints=False)
                except sqlite3.IntegrityError:
                    pass
                except (sqlite3.Error, FilesLost):
                    raise
                except Exception:  # noqa: BLE001, S110 - the run with savepoints raises it again
                    pass
                # Run the batch again with savepoints. The first run has none: they cost time, and few batches fail.
                self._database.connection.execute("ROLLBACK")
                return self._transaction(transitions, savepoints=True)
        except Exception as error:
            # Catch more than sqlite3.Error, so that every caller gets an answer: SQLite can raise MemoryError.
            raise CommitFailed(error) from error

    def _run_without_references(self, transitions: list[Transition]) -> list[Any]:
        with self._turn:
            self._database.connection.execute("PRAGMA foreign_keys = OFF")
            try:
                return self._run_together(transitions)
            finally:
                with contextlib.suppress(sqlite3.Error):  # the transaction has failed: its connection is opened again
                    self._database.connection.execute("PRAGMA foreign_keys = ON")

    def _transaction(self, transitions: list[Transition], *, savepoints: bool) -> list[Any]:
        """Run transitions in one transaction, and return their results.

        With `savepoints`, only a failed transition is undone, and the list has its exception in place of its result.
        """
        begun = time.monotonic()
        db = _SqliteDb(self._database.connection, self._queries, self._clock.now_ms())
        self._database.begin()
        if savepoints:
            outcomes = [self._in_savepoint(transition, db) for transition in transitions]
        else:
            outcomes = [transition(db) for transition in transitions]
        has_changes = self._database.commit()
        if time.monotonic() - begun >= QUICK_TRANSACTION:
            self._is_quick = False
        elif has_changes:
            self._is_quick = True
        return outcomes

    def _in_savepoint(self, transition: Transition, db: _SqliteDb) -> Any:
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

    async def _recover(self, error: CommitFailed) -> None:
        # Don't reopen after a disk error: after a failed fsync, a read may return data that is not on the disk.
        reason: Exception | None = error
        if _is_temporary(error.cause):
            try:
                await asyncio.to_thread(self._stop_backup)
                await self._loop.run_in_executor(self._writer, self._database.reopen)
                self._log_failure(error)
                reason = None
            except (sqlite3.Error, OSError, NexumError) as failure:
                reason = failure
        if reason is not None:
            names_database = isinstance(error.cause, FilesLost)
            lost = "" if names_database else f"database {self._path} can't be trusted any more: "
            self._refuse_waiting(f"{lost}{reason}")
        self._look_again()


def _open(path: Path) -> tuple[FileLock, DatabaseFile]:
    check_file(path)
    held = lock(path)
    try:
        return held, DatabaseFile.open(path)
    except BaseException:
        held.release()
        raise


def _close_opened(opening: asyncio.Future[tuple[FileLock, DatabaseFile]]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        held, database = opening.result()
        database.close()
        held.release()


class _Backup:
    """The copying of a database in a thread of its own, which reads between the transactions of the writer thread."""

    def __init__(self, turn: threading.RLock, database: DatabaseFile, progress: Callable[[int, int], None]) -> None:
        self.ended = threading.Event()
        self._turn = turn
        self._database = database
        self._progress = progress
        self._stopped = False

    def stop(self) -> None:
        """Make `copy_to` raise StoreUnavailable soon, unless it has ended."""
        self._stopped = True

    def copy_to(self, target: sqlite3.Connection) -> None:
        """Copy the database. If a transaction of this connection changes a page meanwhile, the page is copied again."""
        begun = time.monotonic()
        page_size = 0

        def between_steps(_: int, remaining: int, total: int) -> None:
            nonlocal begun
            took = time.monotonic() - begun
            self._turn.release()
            try:
                self._progress((total - remaining) * page_size, total * page_size)
                time.sleep(max(took, 0.001))  # the writer thread takes its turn
            finally:
                self._turn.acquire()
            if self._stopped:
                raise StoreUnavailable("the backup was stopped: make it again")
            begun = time.monotonic()

        with self._turn:
            if self._stopped:
                raise StoreUnavailable("the backup was stopped: make it again")
            # Read the connection only now: a compaction may have replaced it since the backup was requested.
            source = self._database.connection
            page_size = source.execute("PRAGMA page_size").fetchone()[0]
            source.backup(target, pages=BACKUP_STEP_PAGES, progress=between_steps)


def _is_temporary(error: Exception) -> bool:
    """Return whether the file is sound, and only the disk is full or another program has locked the file."""
    # Compare the message, because Python 3.10 has no sqlite3.Error.sqlite_errorcode.
    return isinstance(error, sqlite3.Error) and any(word in str(error) for word in ("full", "locked"))


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

    def run(self, query: str, **parameters: object) -> None:
        self._connection.execute(self._queries[query], parameters)

    def changes(self, query: str, **parameters: object) -> int:
        return self._connection.execute(self._queries[query], parameters).rowcount

    def lock(self, execution: int) -> None:
        """Do nothing: one process has the database, and its transitions run one after the other."""

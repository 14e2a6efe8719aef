"""The files of a SQLite database: opening them, watching them while they are open, and restoring a backup.

A database is a file and, while a server has it open, a write-ahead log. A commit is written to the log. A checkpoint
copies the log into the file, and the next commit starts the log again.

Each log has a stamp, which tells to which file it belongs: see `sqlite_stamp`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import sqlite3
import stat
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from nexum_engine.errors import Conflict, InvalidRequest, NexumError, StoreRefused
from nexum_engine.location import DEFAULT_FOLDER
from nexum_engine.store.base import Space
from nexum_engine.store.sqlite_connection import (
    cannot_open,
    check_file,
    check_version,
    checkpoint,
    connect,
    in_use,
    leave,
    migrate,
    version_of,
)
from nexum_engine.store.sqlite_stamp import STAMP_BYTES, Stamp, belongs, blob_in, layout_of, read_stamp, write_stamp

FOLDER_TICK = 0.1
"""If a folder changes twice within this many seconds, its times may be the same after both changes."""
COARSE_FOLDER_TICK = 2.0
"""The same for file systems that count whole seconds."""
LOG_BYTES = 1024 * (24 + 4096)
"""The length of a log with 1,024 pages. SQLite copies the log into the file when the log has 1,000 pages or more."""

logger = logging.getLogger(__name__)


class FilesLost(NexumError):
    """The path no longer names the open files, or another program has changed them. Nothing may be acknowledged."""


class DatabaseFile:
    """An open database: the only connection to it, and the descriptors with which its files are watched.

    SQLite locks the file in exclusive mode. This lock is on the file itself, so it holds for every name of the file.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        # Keep the paths as texts: `check` runs twice for each transaction, and a Path would cost it time.
        self._name, self._log_name = os.fspath(path), os.fspath(log_of(path))
        self._folder = os.path.dirname(self._name) or os.curdir
        self._attach(connection)

    def _attach(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self._layout = layout_of(connection)
        binary = getattr(os, "O_BINARY", 0)
        # Close this descriptor only after the connection: on POSIX, closing it releases SQLite's locks on the file.
        self._file = os.open(self._path, os.O_RDONLY | binary)
        self._log = os.open(self._log_name, os.O_RDWR | binary)
        self._file_id, self._log_id = _file_id(self._file, self._name), _file_id(self._log, self._log_name)
        self._named_in: tuple[int, ...] | None = None
        """The folder and its times when the paths named the open files. None if the folder may change unnoticed."""
        self._file_bytes = self._log_bytes = 0
        self._log_filled = 0
        """The length of the log up to which commits don't make it longer: see `_lengthen_log`."""
        self.mark: bytes = connection.execute("SELECT mark FROM file_mark").fetchone()[0]
        """Random bytes that never change. A copy of the database has the same."""
        self._stamp = read_stamp(connection)
        self._stamp_in_file = self._stamp.own
        self._changes = 0

    # ---- Opening and closing -----------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: Path) -> DatabaseFile:
        """Open or create the database. The caller must hold the `lock` of the path.

        Raises StoreRefused, and StoreLocked if another program has locked the file.
        """
        connection: sqlite3.Connection | None = None
        try:
            check_file(path)
            if path.exists():
                # Open the file once to get the operating system's error: SQLite reports a read-only file as a "disk I/O
                # error".
                os.close(os.open(path, os.O_RDWR))
            was_open = _size(log_of(path)) > 0
            _check_log(path)
            _remove_leftovers(path)
            if not path.exists():
                _create(path)
            connection = connect(path)
            # Check the schema version again: the write-ahead log may have a newer one than the header of the file.
            check_version(path, connection.execute("PRAGMA user_version").fetchone()[0])
            migrate(path, connection)
            stamp = read_stamp(connection)
            if was_open or not stamp.closed:
                _check_contents(path, connection)
            if not was_open and not stamp.closed:
                _explain_missing_log(path)
            _begin_log(connection, stamp)
            return cls(path, connection)
        except BaseException as error:
            if connection is not None:
                leave(connection)
            if isinstance(error, (sqlite3.Error, OSError)):
                raise cannot_open(path, error) from error
            raise

    def reopen(self) -> None:
        """Open the database again, after an error that may be temporary. Raises sqlite3.Error, OSError."""
        self.abandon()
        self._attach(connect(self._path))

    def close(self) -> None:
        """Copy the log into the file, and close the database."""
        try:
            self.check(closely=True)
            self._complete()
        except (FilesLost, sqlite3.Error) as error:
            logger.warning("database %s was not closed as usual: %s", self._path, error)
            self.abandon()
        else:
            self._detach()

    def abandon(self) -> None:
        """Close the database after an error, and keep the log.

        If the log was separated from the file, first copy the log into the file.
        """
        if self._is_separated():
            with contextlib.suppress(sqlite3.Error):
                self._complete()
        leave(self.connection)
        self._detach()

    def _complete(self) -> None:
        """Copy the log into the file, and mark the file as closed."""
        stamp = Stamp(os.urandom(STAMP_BYTES), self._stamp_in_file, closed=True)
        write_stamp(self.connection, stamp)
        self._stamp = stamp  # if the checkpoint fails, a compaction gives up, and the database stays open
        checkpoint(self.connection)

    def _detach(self) -> None:
        """Close the connection and the descriptors. Does nothing the second time."""
        # Close the log's descriptor first: SQLite then deletes the log, and Windows can't delete an open file.
        log, self._log = self._log, -1
        if log >= 0:
            os.close(log)
        with contextlib.suppress(sqlite3.Error):
            self.connection.close()
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    # ---- Space -------------------------------------------------------------------------------------------------------

    def space(self) -> Space:
        """Return how large the database is, and how much of it is free."""
        size, pages, free = (
            self.connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_size", "page_count", "freelist_count")
        )
        return Space(size * pages, size * free)

    def compact(self) -> None:
        """Replace the file by a copy without free pages. Call this between transactions.

        If the process is killed, the former file or the new file is left, complete and without a log. Raises
        sqlite3.Error or OSError. After such an error, the database is open again, if it can be opened.
        """
        self.check(closely=True)
        if os.fstat(self._file).st_nlink > 1:
            raise OSError(errno.EMLINK, "the file has other names (hard links), which would still name the old file")
        new = _new_name(self._path)
        try:
            _create_empty(new)
            self.connection.execute("VACUUM INTO ?", (str(new),))
            _close_copy(new, self._stamp.own)
            self._complete()
            self._detach()
            try:
                new.replace(os.path.realpath(self._path))
                sync_folder(self._path)
            finally:
                connection = connect(self._path)
                _begin_log(connection, read_stamp(connection))
                self._attach(connection)
        finally:
            _discard(new)

    # ---- Transactions ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin a transaction. Raises FilesLost."""
        self.check()
        self.connection.execute("BEGIN IMMEDIATE")
        self._changes = self.connection.total_changes

    def commit(self) -> bool:
        """Commit the transaction, and return whether it has changed anything.

        Raises FilesLost if the database's files were moved, deleted or replaced.
        """
        stamp = self._stamp
        has_changes = self.connection.total_changes != self._changes
        if has_changes and self._stamp_in_file == stamp.own:
            # The log was copied into the file, so this transaction starts the log again. Each log needs a new stamp.
            stamp = Stamp(os.urandom(STAMP_BYTES), stamp.own, closed=False)
            write_stamp(self.connection, stamp)
        self.connection.execute("COMMIT")
        self._stamp = stamp
        if has_changes:  # what was only read was in the file that `begin` has checked
            self.check()
            if self._log_filled < self._log_bytes < LOG_BYTES:
                self._lengthen_log()
        return has_changes

    def _lengthen_log(self) -> None:
        """Write zeros behind the log, so that the log is twice as long, and the next commits don't make it longer.

        A commit that makes the log longer takes 1.6 times as long, because the file system must also store the new
        length. SQLite reads a log up to the first frame without the log's salts, so it never reads the zeros.
        """
        end = os.lseek(self._log, 0, os.SEEK_END)
        try:
            self._log_filled = end + os.write(self._log, bytes(min(end, LOG_BYTES - end)))
        except OSError:  # a full disk may have room for the commits themselves
            self._log_filled = LOG_BYTES

    # ---- Watching ----------------------------------------------------------------------------------------------------

    def check(self, *, closely: bool = False) -> None:
        """Raise FilesLost if the path no longer names the open files, or if anything but this connection changed them.

        This takes microseconds. With `closely`, look at the files even if the folder's times are unchanged: some file
        systems don't update them.
        """
        if not self._is_named(closely=closely):
            raise FilesLost(self._lost("it or its log was moved, deleted or replaced"))
        if not self._is_ours() or not self._is_log_whole():
            raise FilesLost(self._lost("another program has truncated or overwritten it"))

    def _is_named(self, *, closely: bool) -> bool:
        """Return whether the paths of the database and of its log still name the open files."""
        try:
            # Whoever moves, deletes or replaces a file changes the times of its folder. Look at the files only after
            # such a change: since Linux 6.13, the first commit after a look at the log's status takes a third longer.
            # A program such as rsync may set st_mtime back afterwards, but no program can set st_ctime.
            status = os.stat(self._folder)
            folder = *_id(status), status.st_mtime_ns, status.st_ctime_ns
            if folder == self._named_in and not closely:
                return True
            file, log = os.stat(self._name), os.stat(self._log_name)
        except OSError:
            return False
        is_named = self._file_id in (None, _id(file)) and self._log_id in (None, _id(log))
        # A link may lead to another folder. And a change soon after another one may leave the folder's times unchanged.
        tick = FOLDER_TICK if status.st_mtime_ns % 1_000_000_000 else COARSE_FOLDER_TICK
        age = time.time() - max(status.st_mtime, status.st_ctime)
        is_settled = is_named and age > tick and not os.path.islink(self._name)
        self._named_in = folder if is_settled else None
        return is_named

    def _is_log_whole(self) -> bool:
        # SQLite never shrinks an open log. So if the log is smaller, another program has truncated it. If SQLite has
        # written to the truncated log since then, the log may be long enough again, but it begins with zeros.
        size = os.lseek(self._log, 0, os.SEEK_END)
        if size < self._log_bytes or (size and not any(self._read(self._log, 0, 4))):
            return False
        self._log_bytes = size
        return True

    def _is_ours(self) -> bool:
        """Return whether the open file still has this database's mark and stamp, and has not shrunk."""
        layout, size = self._layout, os.lseek(self._file, 0, os.SEEK_END)
        if size < self._file_bytes or blob_in(self._page(layout.mark_page)) != self.mark:
            return False
        self._file_bytes = size
        self._stamp_in_file = blob_in(self._page(layout.stamp_page))[:STAMP_BYTES]
        return self._stamp_in_file in (self._stamp.own, self._stamp.base)

    def _is_separated(self) -> bool:
        """Return whether the open file and log are undamaged, but the path no longer leads to both of them.

        One of them was moved, or the log was deleted.
        """
        if self._file < 0 or os.fstat(self._file).st_nlink == 0 or not self._is_ours() or not self._is_log_whole():
            return False
        return not self._is_named(closely=True)

    def _page(self, number: int) -> bytes:
        return self._read(self._file, (number - 1) * self._layout.page_size, self._layout.page_size)

    def _read(self, descriptor: int, start: int, size: int) -> bytes:
        if sys.platform == "win32":  # it has no pread
            os.lseek(descriptor, start, os.SEEK_SET)
            contents = os.read(descriptor, size)
        else:
            contents = os.pread(descriptor, size, start)
        return contents

    def _lost(self, why: str) -> str:
        return (
            f"database {self._path} was changed while the server was running: {why}. The server stops, because it "
            "could lose what it records: put the file back, or restore a backup with: nexum restore FILE"
        )


def _file_id(descriptor: int, path: str) -> tuple[int, int] | None:
    """Return the device and inode of the open file. They tell later whether the path still names this file.

    Some file systems give other numbers for the path than for the open file. Then the numbers are of no use: return
    None.
    """
    opened, named = _id(os.fstat(descriptor)), _id(os.stat(path))
    return named if named == opened else None


def _id(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


# ---- Opening ---------------------------------------------------------------------------------------------------------


def log_of(path: Path) -> Path:
    """Return the path of the database's write-ahead log. If `path` is a link, the log is beside its target."""
    return Path(f"{os.path.realpath(path)}-wal")


def lock_file_of(path: Path) -> Path:
    """Return the path of the database's lock file."""
    return Path(f"{os.path.realpath(path)}.lock")


def lock(path: Path) -> FileLock:
    """Take the lock file of the database. Raises StoreLocked if another process holds it.

    The lock file lets only one process at a time open or restore a database, even a database that doesn't exist yet. An
    open database is also protected by SQLite's lock on the file itself, because anybody may delete a lock file.
    """
    taken = FileLock(lock_file_of(path), mode=0o600, thread_local=False)
    try:
        _make_folder(path.parent)
        taken.acquire(timeout=0)
    except Timeout as error:
        raise in_use(path) from error
    except (OSError, NotImplementedError) as error:
        raise cannot_open(path, error) from error
    return taken


def _make_folder(folder: Path) -> None:
    """Make the database's folder. Keep the default folder out of Git: the database has prompts and results."""
    if folder.exists():
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.name == DEFAULT_FOLDER:
        (folder / ".gitignore").write_text("*\n", encoding="utf-8")


def _check_log(path: Path) -> None:
    """Raise StoreRefused if a log beside the file doesn't belong to it. SQLite would copy that log into the file."""
    log, journal = log_of(path), Path(f"{os.path.realpath(path)}-journal")
    if _size(journal):
        raise StoreRefused(
            f"{journal} is the journal of another program: {path} was left untouched; move the journal away"
        )
    if not _size(log):
        return
    if not path.exists():
        raise StoreRefused(
            f"database {path} is gone, but its log {log} is still there: put the file back, restore a backup with "
            "`nexum restore FILE`, or move the log away"
        )
    if not _has_own_log(path):
        raise StoreRefused(
            f"{log} is not the log of {path}: one of the two was replaced, for instance by a backup. Both were left "
            f"untouched. To use a backup, run `nexum restore FILE`. To use {path} without the log, give it as FILE"
        )


def _has_own_log(path: Path) -> bool:
    """Return whether the log beside the file belongs to the file. Raises sqlite3.OperationalError.

    The files are not changed. But if the log holds no transaction, SQLite may delete the log.
    """
    version = version_of(path)
    try:
        # Read the file together with the log. A server that is killed during a checkpoint leaves a file with some pages
        # from before the checkpoint and others from after it. SQLite can't read such a file without its log.
        connection = connect(path)
        try:
            if max(version, connection.execute("PRAGMA user_version").fetchone()[0]) < 2:
                return True  # before schema version 2, logs have no stamps
            layout = layout_of(connection)
        finally:
            leave(connection)
    except sqlite3.OperationalError:
        raise
    except (sqlite3.DatabaseError, KeyError):
        return False  # the log's pages don't match those of the file
    if not _size(log_of(path)):
        return True  # SQLite has found no transaction in the log, and deleted it
    with path.open("rb") as file:
        file.seek((layout.stamp_page - 1) * layout.page_size)
        own = Stamp.decode(blob_in(file.read(layout.page_size))).own
    return belongs(log_of(path), layout, own)


def _explain_missing_log(path: Path) -> None:
    """Warn that a database without a log was not closed. Raises StoreRefused if the file has hard links."""
    missing = f"database {path} was not closed by its last server, and its log {log_of(path)} is missing"
    if path.stat().st_nlink > 1:
        raise StoreRefused(
            f"{missing}. The file has other names (hard links): open it by the name that has the log, or give up what "
            f"is in the log with `nexum restore {path}`"
        )
    logger.warning("%s. If the log was deleted, or lies beside another name of the file, results are missing", missing)


def _check_contents(path: Path, connection: sqlite3.Connection) -> None:
    check = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if check != "ok":
        raise StoreRefused(f"database {path} is damaged: {check}; restore a backup with `nexum restore FILE`")


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, f"{path} is a folder")
    return status.st_size


def _create(path: Path) -> None:
    """Create the database under a temporary name, and rename it. A killed process leaves no incomplete database."""
    new = _new_name(path)
    try:
        _create_empty(new)
        # Make the file durable only once, at the end. Otherwise it would take 40 fsyncs.
        connection = connect(new, synchronous="OFF")
        try:
            migrate(path, connection)
            write_stamp(connection, Stamp(os.urandom(STAMP_BYTES), bytes(STAMP_BYTES), closed=True))
        finally:
            connection.close()
        _sync(new)
        new.replace(os.path.realpath(path))
    finally:
        _discard(new)
    sync_folder(path)


def _new_name(path: Path) -> Path:
    return Path(f"{os.path.realpath(path)}.new-{uuid.uuid4().hex[:8]}")


def _discard(new: Path) -> None:
    """Remove a temporary file, and the journal or log that SQLite leaves beside it after an error."""
    for file in (new, log_of(new), Path(f"{new}-journal")):
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files that a killed process left. The caller holds the `lock` of the path.

    A restore that is killed before it replaces the file leaves second names of the file and of its log (`_set_aside`).
    Remove them, too: a file with several names can't be compacted.
    """
    real = Path(os.path.realpath(path))
    temporary = re.compile(rf"{re.escape(real.name)}\.new-[0-9a-f]{{8}}(-wal|-journal)?")
    second = re.compile(rf"{re.escape(real.name)}\.\d{{8}}-\d{{6}}-[0-9a-f]{{4}}")
    for name in os.listdir(real.parent):
        file = real.parent / name
        with contextlib.suppress(OSError):
            if temporary.fullmatch(name):
                file.unlink()
            elif second.fullmatch(name) and file.samefile(real):
                log = log_of(file)
                if log.exists():
                    if not log.samefile(log_of(real)):
                        continue  # the file's own log is lost, and this may be the last name of it
                    log.unlink()
                file.unlink()


def sync_folder(path: Path) -> None:
    """Make a rename of the database durable."""
    # Windows can't open a folder, and needs no sync.
    if sys.platform != "win32":
        folder = os.open(os.path.dirname(os.path.realpath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _create_empty(new: Path) -> None:
    """Create a file that only this user can read. Raises FileExistsError."""
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _close_copy(copy: Path, base: bytes) -> None:
    """Mark a copy of a database as closed, and make it durable. `base` is the stamp of the copied database."""
    connection = connect(copy)
    try:
        write_stamp(connection, Stamp(os.urandom(STAMP_BYTES), base, closed=True))
    finally:
        connection.close()
    _sync(copy)


def _sync(file: Path) -> None:
    """Make the contents of a file durable."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _begin_log(connection: sqlite3.Connection, stamp: Stamp) -> None:
    """Change the stamp in the file at a server's start.

    Otherwise this server's log would also belong to a backup of the file that was made before the server started.
    """
    checkpoint(connection)
    in_file = Stamp(os.urandom(STAMP_BYTES), stamp.own, closed=False)
    write_stamp(connection, in_file)
    checkpoint(connection)
    # From this write on, the log of a running server is never empty. So if a killed server's log is empty or missing,
    # something is lost.
    write_stamp(connection, Stamp(os.urandom(STAMP_BYTES), in_file.own, closed=False))


# ---- Backups ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_backup(path: Path, file: Path, *, overwrite: bool) -> Iterator[sqlite3.Connection]:
    """Yield a connection to an empty database, which gets the name `file` at the end of the `with` block.

    `path` is the database that is backed up. Raises InvalidRequest if the file can't be written, and Conflict if the
    file exists and `overwrite` is false. A file that isn't a Nexum database is never overwritten.
    """
    if Path(os.path.realpath(file)) in (Path(os.path.realpath(path)), log_of(path), lock_file_of(path)):
        raise InvalidRequest(f"{file} is a file of the database itself: give the backup another name")
    new = _new_name(file)
    try:
        _refuse_overwrite(file, overwrite)
        _create_empty(new)
        target = sqlite3.connect(new, isolation_level=None, check_same_thread=False)
        try:
            yield target
            base = read_stamp(target).own
        finally:
            target.close()
        _close_copy(new, base)
        _refuse_overwrite(file, overwrite)
        new.replace(os.path.realpath(file))
        sync_folder(file)
    except (OSError, sqlite3.Error) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise InvalidRequest(f"the backup {file} can't be written: {reason}") from error
    finally:
        _discard(new)


def _refuse_overwrite(file: Path, overwrite: bool) -> None:
    if not os.path.lexists(file):
        return
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder; give the name of a file")
    if not overwrite:
        raise Conflict(f"{file} exists: give another name, or overwrite it with --overwrite")
    try:
        check_file(file)
    except StoreRefused as error:
        raise InvalidRequest(f"{file} is not overwritten: it is not a Nexum database of this version") from error


# ---- Restoring -------------------------------------------------------------------------------------------------------


def restore(path: Path, backup: Path) -> Path | None:
    """Replace the database with a copy of `backup`. Return where the former database is kept, if there was one.

    A log beside the backup is used if it belongs to the backup. The former database keeps its log. Raises StoreRefused
    for a backup that can't be opened, and StoreLocked if a server has the database open.
    """
    check_file(backup)
    if not backup.exists():
        raise StoreRefused(f"there is no backup {backup}")
    held = lock(path)
    new = _new_name(path)
    try:
        _refuse_open_file(path)
        try:
            _remove_leftovers(path)  # a killed restore leaves a copy, and a second one may need its disk space
            _copy_backup(backup, new)
            DatabaseFile.open(new).close()
            former = _set_aside(path)
            new.replace(os.path.realpath(path))
            # If the process is killed before the next line, the former database's log is beside the new file. The log
            # doesn't belong to the new file, so no server uses it.
            log_of(path).unlink(missing_ok=True)
            sync_folder(path)
        except (sqlite3.Error, OSError) as error:
            raise cannot_open(path, error) from error
        finally:
            _discard(new)
    finally:
        held.release()
    return former


def _refuse_open_file(path: Path) -> None:
    """Raise StoreLocked if a server has the database open, even if its lock file was deleted."""
    if not path.exists():
        return
    try:
        connection = connect(path)
    except sqlite3.Error as error:
        if "locked" in str(error):
            raise in_use(path) from error
        return  # SQLite can't open this file, so no server has it open
    leave(connection)


def _copy_backup(backup: Path, new: Path) -> None:
    shutil.copyfile(backup, new)
    new.chmod(0o600)
    if _size(log_of(backup)):
        shutil.copyfile(log_of(backup), log_of(new))
        if not _has_own_log(new):
            logger.warning("%s is not the log of %s, and is not used", log_of(backup), backup)
            log_of(new).unlink()


def _set_aside(path: Path) -> Path | None:
    """Give the database file and its log second names. Return the file's second name, or None if there is no database.

    `restore` then replaces the file, and removes the log. If the process is killed in between, the second names still
    name a file and its own log.
    """
    real = Path(os.path.realpath(path))
    if not real.exists() and not _size(log_of(real)):
        return None
    former = real.with_name(f"{real.name}.{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}")
    for file, second in ((real, former), (log_of(real), log_of(former))):
        if file.exists():
            try:
                os.link(file, second)
            except OSError:  # a file system without hard links
                shutil.copyfile(file, second)
    return former

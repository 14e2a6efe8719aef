"""Connections to a SQLite database: their settings and errors, the check of the file's header, and the schema."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
from functools import cache
from pathlib import Path
from typing import Literal

from nexum_engine.errors import NexumError, StoreLocked, StoreRefused
from nexum_engine.location import last_server
from nexum_engine.store.db import load_migrations
from nexum_engine.store.sqlite_stamp import STAMP_BYTES, Stamp, read_stamp, write_stamp

APPLICATION_ID = 0x4E58554D
"""The application_id of a Nexum database. SQLite keeps it in the header of the file."""
SLOW_UPDATE_BYTES = 50_000_000
"""If a database has at least this size, its schema update takes seconds, and is logged."""
_HEADER = b"SQLite format 3\x00"
_OTHER_FILE = "name another file with DATABASE_URL (or the option --database-url of nexum)"

logger = logging.getLogger(__name__)


def connect(path: Path, *, synchronous: Literal["FULL", "OFF"] = "FULL") -> sqlite3.Connection:
    """Open a SQLite file. With `synchronous="OFF"`, the operating system decides when changes get to the disk.

    Raises sqlite3.OperationalError if another program has locked the file.
    """
    # Use autocommit, because the store begins and ends transactions itself. Turn off the thread check, because
    # several threads use the connection, one after the other.
    connection = sqlite3.connect(
        path, timeout=0.0, isolation_level=None, check_same_thread=False, cached_statements=128
    )
    connection.row_factory = sqlite3.Row
    try:
        # Don't overwrite freed pages with zeros: a pruned execution may have many pages.
        connection.execute("PRAGMA secure_delete = FAST")
        # Lock the file for as long as it is open. SQLite then needs no shared memory, which network file systems and
        # some containers don't have.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def leave(connection: sqlite3.Connection) -> None:
    """Close the connection, and keep the log: the interrupt stops SQLite from copying the log into the file."""
    with contextlib.suppress(sqlite3.Error):
        connection.interrupt()
        connection.close()


def checkpoint(connection: sqlite3.Connection) -> None:
    """Copy the log into the file, and empty the log."""
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


# ---- The header of the file ------------------------------------------------------------------------------------------


def check_file(path: Path) -> None:
    """Raise StoreRefused if the file is not a Nexum database that this version can open. Only the header is read."""
    try:
        if stat.S_ISFIFO(path.stat().st_mode):
            raise StoreRefused(f"{path} is a pipe, not a database; {_OTHER_FILE}")  # to open it could wait for ever
        with path.open("rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        return
    except OSError as error:
        raise cannot_open(path, error) from error
    if len(header) < 100 or not header.startswith(_HEADER):
        raise StoreRefused(f"{path} is not a database: it was left untouched; {_OTHER_FILE}")
    # https://www.sqlite.org/fileformat.html#the_database_header
    if int.from_bytes(header[68:72], "big") != APPLICATION_ID:
        raise StoreRefused(f"{path} is another program's database: it was left untouched; {_OTHER_FILE}")
    check_version(path, _version_in(header))


def version_of(path: Path) -> int:
    """Return the schema version in the header of the file. The write-ahead log may have a newer one."""
    with path.open("rb") as file:
        return _version_in(file.read(100))


def is_current(path: Path) -> bool:
    """Return whether the file has the newest schema version that this version knows. Only the header is read."""
    return version_of(path) == len(_migrations())


def _version_in(header: bytes) -> int:
    return int.from_bytes(header[60:64], "big")


def check_version(path: Path, version: int) -> None:
    if version > len(_migrations()):
        raise StoreRefused(
            f"{path} has schema version {version}, made by a newer Nexum; this Nexum knows {len(_migrations())}: "
            "use the newer Nexum"
        )


# ---- The schema ------------------------------------------------------------------------------------------------------


@cache
def _migrations() -> list[str]:
    return load_migrations("sqlite_migrations")


def migrate(path: Path, connection: sqlite3.Connection) -> None:
    """Update the schema. Each script is committed together with its version number."""
    done = connection.execute("PRAGMA user_version").fetchone()[0]
    scripts = _migrations()[done:]
    if not scripts:
        return
    if done and path.stat().st_size >= SLOW_UPDATE_BYTES:
        logger.warning(
            "database %s: updating its schema from version %d to %d. This takes one to three minutes for a million "
            "executions. If it is interrupted, the next start begins it again",
            path,
            done,
            done + len(scripts),
        )
    # A script may drop large tables. To save time, don't let SQLite check the references to each dropped row, and don't
    # let it overwrite the row. Let the cache hold the indexes in which the script looks up each row.
    settings = {"foreign_keys": 0, "secure_delete": 0, "cache_size": -256_000}
    before = {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in settings}
    for name, value in settings.items():
        connection.execute(f"PRAGMA {name} = {value}")
    for version, script in enumerate(scripts, start=done + 1):
        if version > 2:
            # Copy the log into the file first: the base of the new stamp below must be the stamp that is in the file.
            checkpoint(connection)
        connection.executescript(
            f"BEGIN IMMEDIATE;\n{script}\nPRAGMA application_id = {APPLICATION_ID};\nPRAGMA user_version = {version};"
        )
        if version > 2:  # there is a table log_stamp, and every log with a commit needs a stamp
            last = read_stamp(connection)
            write_stamp(connection, Stamp(os.urandom(STAMP_BYTES), last.own, closed=last.closed))
        connection.execute("COMMIT")
        if done and version < done + len(scripts):
            checkpoint(connection)  # so that each log has one stamp
    for name, value in before.items():
        connection.execute(f"PRAGMA {name} = {value}")


# ---- Errors ----------------------------------------------------------------------------------------------------------


def cannot_open(path: Path, error: Exception) -> NexumError:
    """Return the error of a database that can't be opened, with the next step."""
    if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
        return in_use(path)
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    step = "check its folder and the disk"
    if path.is_dir():
        reason, step = "it is a folder", "give the path of a file"
    elif isinstance(error, PermissionError) or "readonly" in reason or "Read-only" in reason:
        there = next(one for one in (path, *path.parents) if one.exists())
        step = f"make the file and its folder {path.parent} writable" if there == path else f"make {there} writable"
    return StoreRefused(f"database {path} can't be opened: {reason}; {step}, or {_OTHER_FILE}")


def in_use(path: Path) -> StoreLocked:
    """Return the error for a database that another process has open. The error names the database's last server."""
    last = last_server(path)
    server = f" (its last server: {last})" if last else ""
    return StoreLocked(
        f"database {path} is in use by another Nexum server, or by another program{server}: stop it, or {_OTHER_FILE}"
    )

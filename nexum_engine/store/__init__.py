"""The store of executions. `open_store` picks the dialect from the database URL.

Every change of state is a transition: a function in `executions.py`, `tasks.py`, `leases.py`, `waits.py`, `retry.py` or
`retention.py`. It runs inside one transaction, and is the same for every database. If the state doesn't allow the
change, the transition raises an error of `nexum_engine.errors`, and its changes are rolled back.

What follows from a change is in `flow.py`. Every query is in `queries.sql`. A dialect's module has the code that only
its database needs.
"""

from __future__ import annotations

from pathlib import Path

from nexum_engine.clock import Clock
from nexum_engine.errors import StoreRefused
from nexum_engine.location import database_path
from nexum_engine.store.base import Checked, Store

__all__ = ["Checked", "Store", "check_database", "database_exists", "open_store", "restore_database"]


async def open_store(database_url: str, clock: Clock) -> Store:
    """Open (or create) the database that the URL names: `sqlite:///path`, or `postgresql://user@host/database`.

    Raises StoreRefused for a URL or a file that this version can't open, and StoreLocked if another server has the file
    open.
    """
    scheme = database_url.partition(":")[0]
    if scheme == "sqlite":
        from nexum_engine.store.sqlite import SqliteStore

        return await SqliteStore.open(database_url, clock)
    if scheme in ("postgresql", "postgres"):
        try:
            from nexum_engine.store.postgresql import PostgresStore
        except ImportError as error:
            raise StoreRefused("PostgreSQL needs the package psycopg: pip install 'psycopg[binary]'") from error
        return await PostgresStore.open(database_url, clock)
    raise StoreRefused(f"database URL {database_url!r} is not supported: use sqlite:///path, or postgresql://…")


def database_exists(database_url: str) -> bool:
    """Return whether the database exists. A command that only reads asks this first: `open_store` would create it."""
    if not database_url.startswith("sqlite:"):
        return True
    return database_path(database_url).exists()


def restore_database(database_url: str, backup: Path) -> Path | None:
    """Replace the database that the URL names with a copy of `backup`. Return the former database's new path, if any.

    Raises StoreRefused for a URL or a backup that can't be used, and StoreLocked if a server has the database open.
    """
    path = database_path(database_url)
    from nexum_engine.store.sqlite_file import restore

    return restore(path, backup)


def check_database(file: Path) -> Checked:
    """Check a database file, and report what is damaged. The file is only read.

    Raises StoreRefused for a file that can't be used, and StoreLocked if a server has the database open.
    """
    from nexum_engine.store.sqlite_check import check

    return check(file)

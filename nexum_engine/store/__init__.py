"""Where executions are recorded. `open_store` picks the dialect from the database URL.

Every change of state is a function in `executions.py`, `tasks.py` or `leases.py`, every query is in `queries.sql`; a
dialect file has what differs for its database.
"""

from __future__ import annotations

from nexum_engine.clock import Clock
from nexum_engine.errors import StoreRefused
from nexum_engine.location import database_path
from nexum_engine.store.base import Store

__all__ = ["Store", "database_exists", "open_store"]


async def open_store(database_url: str, clock: Clock, *, lock_timeout: float = 0.0) -> Store:
    """Open (or create) the database that the URL names: `sqlite:///path`.

    `lock_timeout` is how long to wait, in seconds, for another server to let go of the file.
    Raises StoreRefused for a URL or a file that this version can't open, StoreLocked when another server has it.
    """
    scheme = database_url.partition(":")[0]
    if scheme == "sqlite":
        from nexum_engine.store.sqlite import SqliteStore

        return await SqliteStore.open(database_url, clock, lock_timeout=lock_timeout)
    if scheme in ("postgresql", "postgres"):
        raise StoreRefused(
            "PostgreSQL is not supported yet: use sqlite:///path, and one server for all workers on all machines"
        )
    raise StoreRefused(f"database URL {database_url!r} is not understood: use sqlite:///path")


def database_exists(database_url: str) -> bool:
    """Whether there is something to open: looking at records should not create a database."""
    if not database_url.startswith("sqlite:"):
        return True
    return database_path(database_url).exists()

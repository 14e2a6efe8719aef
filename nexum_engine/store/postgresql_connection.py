"""Connections to PostgreSQL: their settings and errors, and the tables that a server finds or creates."""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq.abc import PGconn
from psycopg.rows import dict_row
from psycopg.types.numeric import Int8Dumper
from psycopg.types.string import StrDumperUnknown
from psycopg.waiting import Ready, Wait

from nexum_engine.errors import StoreRefused
from nexum_engine.store.db import load_migrations

MINIMUM_VERSION = 14
CONNECT_SECONDS = 5
NOTIFICATION_SECONDS = 5.0
"""How long a notification may take to arrive when a database is opened."""
MIGRATION_LOCK = 0x4E58554D
"""The advisory lock that a server holds while it creates or updates the tables."""

SESSION = {
    "client_encoding": "UTF8",
    "default_transaction_isolation": "read committed",
    "standard_conforming_strings": "on",
    "jit": "off",
    "idle_session_timeout": "0",
    "idle_in_transaction_session_timeout": "10s",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10s",
}
"""The settings of every session. The role or the database may have others, which the queries are not written for.

With the timeouts, PostgreSQL soon releases the locks of a server whose machine is lost in a transaction. By default it
would keep them for two hours, and the other servers would wait for them. If only the server's process is suspended,
PostgreSQL notices that only if it has answered all statements.
"""

Connection = psycopg.Connection[dict[str, Any]]


class _TextDumper(StrDumperUnknown):
    """Writes text without the character NUL, which PostgreSQL can't store. Error messages of workers may contain it."""

    def dump(self, obj: str) -> Any:
        return super().dump(obj.replace("\0", "\N{REPLACEMENT CHARACTER}"))


def connect(url: str) -> Connection:
    """Open a connection whose rows are dictionaries."""
    connection = psycopg.connect(url, autocommit=True, row_factory=dict_row, **_settings(url))
    connection.execute("SELECT set_config(key, value, false) FROM json_each_text(%s)", (json.dumps(SESSION),))
    # By default, psycopg sends a small number as a small type, in which PostgreSQL's arithmetic overflows.
    connection.adapters.register_dumper(int, Int8Dumper)
    connection.adapters.register_dumper(str, _TextDumper)
    return connection


def shut_down(connection: Connection) -> None:
    """End a connection for which another thread waits. The thread gets an error.

    Only the socket is shut down: a thread that waits for PostgreSQL's answer would not notice `close`.
    """
    with contextlib.suppress(psycopg.Error, OSError):
        wire = socket.socket(fileno=connection.fileno())
        try:
            wire.shutdown(socket.SHUT_RDWR)
        finally:
            wire.detach()  # the connection closes it


def _settings(url: str) -> dict[str, Any]:
    """Return the default settings of a connection, except those that the URL sets.

    The timeouts among these settings are short, so that a connection soon notices that the network is lost.
    """
    defaults = {
        "application_name": "nexum",
        "connect_timeout": CONNECT_SECONDS,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
        "target_session_attrs": "read-write",
    }
    given = conninfo_to_dict(url)
    return {name: value for name, value in defaults.items() if name not in given}


def without_password(url: str) -> str:
    """Return the URL without its passwords, for messages."""
    try:
        given = conninfo_to_dict(url, password="", sslpassword="")
    except psycopg.ProgrammingError:
        return "the given postgresql:// URL"
    return f"postgresql: {make_conninfo('', **{name: str(value) for name, value in given.items() if value})}"


def open_database(url: str) -> Connection:
    """Connect to a database, and create or update its tables. Raises StoreRefused, and psycopg.Error."""
    connection = connect(url)
    try:
        version = connection.info.server_version // 10_000
        if version < MINIMUM_VERSION:
            raise StoreRefused(
                f"{without_password(url)} is PostgreSQL {version}; Nexum needs {MINIMUM_VERSION} or newer"
            )
        encoding = connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise StoreRefused(
                f"{without_password(url)} has the encoding {encoding}: create a database with ENCODING 'UTF8' "
                "TEMPLATE template0"
            )
        _check_session(url, connection)
        _migrate(url, connection)
    except BaseException:
        connection.close()
        raise
    return connection


def read_database_id(connection: Connection) -> str:
    """Return the value of `Store.database_id`."""
    row = connection.execute("SELECT database_id FROM nexum_schema").fetchone()
    assert row is not None
    database_id: str = row["database_id"]
    return database_id


def _check_session(url: str, connection: Connection) -> None:
    """Raise StoreRefused if no notification arrives: then a pooler shares the connection's session among clients.

    Some poolers lend the sessions of PostgreSQL to their clients for one transaction at a time. Then settings, prepared
    statements and notifications get to the wrong client.
    """
    channel = sql.Identifier(f"nexum_{secrets.token_hex(8)}")
    connection.execute(sql.SQL("LISTEN {}").format(channel))
    with connect(url) as other:
        other.execute(sql.SQL("NOTIFY {}").format(channel))
    if not any(connection.notifies(timeout=NOTIFICATION_SECONDS, stop_after=1)):
        raise StoreRefused(
            f"{without_password(url)}: a notification did not arrive, probably because of a pooler in transaction "
            "mode, such as PgBouncer: give the URL of PostgreSQL itself, or of a pool in session mode"
        )
    connection.execute(sql.SQL("UNLISTEN {}").format(channel))


def _migrate(url: str, connection: Connection) -> None:
    """Create or update the tables. If several servers start together, one of them updates, and the others wait."""
    scripts = load_migrations("postgresql_migrations")
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
        found = connection.execute("SELECT to_regclass('nexum_schema') AS name").fetchone()
        version = 0
        if found is not None and found["name"] is not None:
            row = connection.execute("SELECT version FROM nexum_schema").fetchone()
            version = 0 if row is None else row["version"]
        else:
            others = connection.execute("SELECT to_regclass('executions') AS name").fetchone()
            if others is not None and others["name"] is not None:
                raise StoreRefused(
                    f"{without_password(url)} has a table `executions` of another program: name another database, or "
                    "another schema (?options=-csearch_path%3DNAME)"
                )
            connection.execute("CREATE TABLE nexum_schema (version bigint NOT NULL)")
            connection.execute("INSERT INTO nexum_schema VALUES (0)")
        if version > len(scripts):
            raise StoreRefused(
                f"{without_password(url)} was written by a newer Nexum (schema {version}; this one knows "
                f"{len(scripts)}): update this server with pip install -U nexum-durable-autogen"
            )
        for script in scripts[version:]:
            connection.execute(script.encode())
        connection.execute("UPDATE nexum_schema SET version = %s", (len(scripts),))


def vacuum(url: str) -> None:
    """Make the space of deleted rows usable for new rows. Servers can run transactions meanwhile."""
    with connect(url) as connection:
        connection.execute("VACUUM executions, nodes, attempts, events, attributes")


def database_ms(connection: Connection) -> tuple[int, int]:
    """Return a lower and an upper bound of the database's time now, which differ by the time that the query took."""
    begun = time.monotonic()
    row = connection.execute("SELECT extract(epoch FROM clock_timestamp()) * 1000 AS ms").fetchone()
    assert row is not None
    return int(row["ms"]), math.ceil(row["ms"] + math.ceil((time.monotonic() - begun) * 1000))


@contextmanager
def pipeline_of(connection: Connection) -> Iterator[psycopg.Pipeline]:
    """Run a block of statements in pipeline mode. An error of the block is raised as it is.

    After an error, the end of the pipeline fails, too. Outside this function, psycopg would log that second error, in
    several lines.
    """
    failure: BaseException | None = None
    try:
        with connection.pipeline() as pipeline:
            try:
                yield pipeline
            except BaseException as error:  # noqa: BLE001 - it is raised below
                failure = error
    except psycopg.Error as error:
        failure = failure or error
    if failure is not None:
        raise failure


def sync(connection: Connection, pipeline: psycopg.Pipeline) -> None:
    """Wait for the answers to all statements of a pipeline. Raises the error of the first statement that has failed.

    Send all statements first: psycopg's `sync` begins to wait although a large statement may be only partly sent, and
    PostgreSQL then waits for the rest.
    """
    if connection.pgconn.flush():
        connection.wait(_sent(connection.pgconn))
    pipeline.sync()


def _sent(pgconn: PGconn) -> PQGen[None]:
    while pgconn.flush():
        if (yield Wait.RW) & Ready.R:
            pgconn.consume_input()  # PostgreSQL reads no more until its answers are read


# ---- Errors ----------------------------------------------------------------------------------------------------------


def is_conflict(error: psycopg.Error) -> bool:
    """Return whether the error comes from a conflict with another server's transaction, so that a retry can succeed."""
    return isinstance(
        error,
        (
            psycopg.errors.SerializationFailure,
            psycopg.errors.DeadlockDetected,
            psycopg.errors.LockNotAvailable,
            psycopg.errors.UniqueViolation,
        ),
    )


def is_lost(error: psycopg.Error, connection: Connection) -> bool:
    """Return whether the connection is of no use any more: it is broken, or leads to a standby after a failover."""
    return (
        connection.broken
        or connection.closed
        or isinstance(error, psycopg.errors.ReadOnlySqlTransaction)
        or (error.sqlstate or "").startswith(("08", "57P"))
    )


def line_of(error: Exception) -> str:
    """Return the message of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__

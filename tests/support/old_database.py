"""A database of schema version 2, with the rows that the code of that version wrote."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from harness import ROOT

from nexum_engine.store.sqlite_connection import APPLICATION_ID


def make_old_database(path: Path) -> None:
    """Create a database as a server of schema version 2 leaves it when it is stopped."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    scripts = sorted((ROOT / "nexum_engine" / "store" / "sqlite_migrations").glob("*.sql"))[:2]
    for script in (*scripts, ROOT / "tests" / "engine" / "version_2.sql"):
        connection.executescript(script.read_text(encoding="utf-8"))
    connection.execute("UPDATE log_stamp SET stamp = ?", (bytes(32) + b"\x01",))  # a closed database has this flag
    connection.commit()
    connection.executescript(f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 2;")
    connection.close()

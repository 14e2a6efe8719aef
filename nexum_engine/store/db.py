"""The interface through which a transition uses the database: named queries inside one transaction."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, Protocol, TypeVar

from nexum_engine.errors import StoreRefused

Row = Mapping[str, Any]
Marked = TypeVar("Marked", bound=Callable[..., Any])
SNAPSHOTS: set[Callable[..., Any]] = set()
"""The transitions whose statements all read one state of the database."""
BRIEF: set[Callable[..., Any]] = set()
"""The transitions that rarely read or change more than a few rows."""


class Db(Protocol):
    """One open transaction."""

    @property
    def now_ms(self) -> int:
        """The transaction's time in milliseconds. All its statements use the same time."""
        ...

    def all(self, query: str, **parameters: object) -> list[Row]:
        """Run the query that is called `query` in queries.sql, and return its rows."""
        ...

    def one(self, query: str, **parameters: object) -> Row | None:
        """Run the query that is called `query` in queries.sql, and return its first row, or None."""
        ...

    def run(self, query: str, **parameters: object) -> None:
        """Run the statement that is called `query` in queries.sql. PostgreSQL may get it with the next one."""
        ...

    def changes(self, query: str, **parameters: object) -> int:
        """Run the statement that is called `query` in queries.sql, and return how many rows it changed."""
        ...

    def lock(self, execution: int) -> None:
        """Lock the execution with this number, so that no other server changes it before the commit.

        If another server is changing the execution, wait until that server's transaction has ended. Call this before
        the reads that decide what to change.
        """
        ...


def row_of(db: Db, query: str, **parameters: object) -> Row:
    """Run a query that always has a row, such as a count, and return its first row."""
    row = db.one(query, **parameters)
    assert row is not None, f"the query {query} has found nothing: {parameters}"
    return row


def of_one_snapshot(reading: Marked) -> Marked:
    """Mark a transition that only reads. All its statements read one state, even if other servers write meanwhile."""
    SNAPSHOTS.add(reading)
    return reading


def brief(transition: Marked) -> Marked:
    """Mark a transition that rarely reads or changes more than a few rows. A tool call is made of such transitions."""
    BRIEF.add(transition)
    return transition


def load_queries(file: str = "queries.sql") -> dict[str, str]:
    """Return the statements of an SQL file in this package, by name."""
    with _reading_package():
        text = (files("nexum_engine.store") / file).read_text(encoding="utf-8")
    parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def load_migrations(folder: str) -> list[str]:
    """Return the SQL scripts of a schema in order. The first script makes version 1."""
    with _reading_package():
        entries = sorted((files("nexum_engine.store") / folder).iterdir(), key=lambda entry: entry.name)
        return [entry.read_text(encoding="utf-8") for entry in entries if entry.name.endswith(".sql")]


@contextmanager
def _reading_package() -> Iterator[None]:
    """Raise StoreRefused if a file of this package is missing. Otherwise it would look like a missing database."""
    try:
        yield
    except FileNotFoundError as error:
        raise StoreRefused(
            f"the package nexum_engine lacks its file {error.filename}: install the package again. If this program was "
            "frozen, freeze it again with the package's data files (PyInstaller: --collect-data nexum_engine)"
        ) from error

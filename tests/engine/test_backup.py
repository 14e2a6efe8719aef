"""Backups that are made while the store serves."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness import needs_links
from processes import run_script
from server_thread import ServerThread

from nexum_engine.client import NexumClient
from nexum_engine.clock import ManualClock
from nexum_engine.errors import Conflict, InvalidRequest, StoreUnavailable
from nexum_engine.store import (
    Checked,
    check_database,
    executions,
    listing,
    open_store,
    reading,
    restore_database,
    retention,
    sqlite,
    tasks,
)
from nexum_engine.store.sqlite import SqliteStore
from nexum_engine.workflow import workflow

ONE_NODE = '{"nodes": {"a": {"type": "EFFECT"}}}'
ECHO = workflow("one").effect("a").build()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = await opened(tmp_path / "nexum.db")
    await store.run(executions.register_workflow, "one", "v1", ONE_NODE)
    yield store
    if not store._closed:
        await store.close()


async def opened(path: Path) -> SqliteStore:
    store = await open_store(f"sqlite:///{path}", ManualClock())
    assert isinstance(store, SqliteStore)
    return store


async def record(store: SqliteStore, key: str, size: int = 10) -> str:
    one = ("one", "v1", "0", key, "owner", 30_000, "", json.dumps("y" * size))
    return (await store.run(tasks.start_owned, *one)).execution_id


async def ids(store: SqliteStore) -> set[str]:
    return {one.execution_id for one in await store.run(listing.list_executions, "", "", 10_000)}


def say_nothing(copied: int, total: int) -> None:
    pass


def leftovers(folder: Path) -> list[str]:
    return [one.name for one in folder.iterdir() if ".new-" in one.name]


class Gate:
    """A progress callback that stops the backup after its first step, until the test sets `open`."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self.steps: list[tuple[int, int]] = []

    def __call__(self, copied: int, total: int) -> None:
        self.steps.append((copied, total))
        self.reached.set()
        assert self.open.wait(30)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    monkeypatch.setattr(sqlite, "BACKUP_STEP_PAGES", 5)
    return Gate()


async def test_backup_that_is_requested_during_a_compaction_is_made(
    tmp_path: Path, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await record(store, "old", 50_000)
    await store.run_alone(retention.prune, 0)
    kept = await record(store, "kept")
    begun, requested, compact = threading.Event(), threading.Event(), store._database.compact

    def wait_and_compact() -> None:
        begun.set()
        assert requested.wait(30)
        compact()

    monkeypatch.setattr(store._database, "compact", wait_and_compact)
    compacting = asyncio.create_task(store.compact(max_bytes=None, always=True))
    await asyncio.to_thread(begun.wait)
    making = asyncio.create_task(store.backup(tmp_path / "b.db", overwrite=False, progress=say_nothing))
    await asyncio.sleep(0)  # the task runs until it waits for the compaction
    requested.set()
    assert (await compacting).released_bytes > 0
    await making
    assert check_database(tmp_path / "b.db") == Checked(1, ())
    assert await ids(store) == {kept}


@pytest.mark.every_python
async def test_store_serves_while_backup_is_made_and_backup_is_consistent(
    tmp_path: Path, store: SqliteStore, gate: Gate
) -> None:
    before = {await record(store, f"k{one}", 5000) for one in range(100)}
    making = asyncio.create_task(store.backup(tmp_path / "b.db", overwrite=False, progress=gate))
    await asyncio.to_thread(gate.reached.wait)
    assert not (tmp_path / "b.db").exists()
    during = {await record(store, f"during{one}", 5000) for one in range(20)}
    with pytest.raises(Conflict, match="another backup of this database is being made"):
        await store.backup(tmp_path / "c.db", overwrite=False, progress=say_nothing)
    assert (await store.compact(max_bytes=None, always=True)).released_bytes == 0
    gate.open.set()
    beside: set[str] = set()
    while not making.done():
        beside.add(await record(store, f"beside{len(beside)}", 5000))
    assert await making == (tmp_path / "b.db").stat().st_size
    assert len(gate.steps) > 20
    assert all(one[0] <= one[1] for one in gate.steps)
    await record(store, "after")
    assert leftovers(tmp_path) == []

    assert check_database(tmp_path / "b.db").findings == ()
    former = restore_database(f"sqlite:///{tmp_path / 'restored.db'}", tmp_path / "b.db")
    assert former is None
    restored = await opened(tmp_path / "restored.db")
    found = await ids(restored)
    assert found >= before | during
    # The backup may also hold some executions of `beside`: the earliest ones, without a gap.
    assert found <= before | during | beside
    assert {one.split("-")[1] for one in found} == {str(number) for number in range(1, len(found) + 1)}
    await restored.close()


async def test_restored_backup_gives_no_warning(
    tmp_path: Path, store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    kept = await record(store, "k")
    await store.backup(tmp_path / "b.db", overwrite=False, progress=say_nothing)
    await record(store, "later")
    await store.close()
    former = restore_database(f"sqlite:///{tmp_path / 'nexum.db'}", tmp_path / "b.db")
    assert former is not None
    again = await opened(tmp_path / "nexum.db")
    assert await ids(again) == {kept}
    await again.close()
    assert caplog.messages == []
    if sys.platform != "win32":
        assert (tmp_path / "b.db").stat().st_mode & 0o777 == 0o600


async def test_restore_removes_the_copy_of_a_killed_restore(tmp_path: Path, store: SqliteStore) -> None:
    await store.backup(tmp_path / "b.db", overwrite=False, progress=say_nothing)
    await store.close()
    (tmp_path / "nexum.db.new-0123abcd").touch()
    restore_database(f"sqlite:///{tmp_path / 'nexum.db'}", tmp_path / "b.db")
    assert leftovers(tmp_path) == []


async def test_cancelled_backup_leaves_no_file(tmp_path: Path, store: SqliteStore, gate: Gate) -> None:
    for one in range(20):
        await record(store, f"k{one}", 5000)
    making = asyncio.create_task(store.backup(tmp_path / "b.db", overwrite=False, progress=gate))
    await asyncio.to_thread(gate.reached.wait)
    making.cancel()
    gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert not (tmp_path / "b.db").exists()
    assert leftovers(tmp_path) == []
    assert await store.backup(tmp_path / "b.db", overwrite=False, progress=say_nothing) > 0


async def test_backup_that_fails_leaves_no_journal(
    tmp_path: Path, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(_: object, target: sqlite3.Connection) -> None:
        (new,) = leftovers(tmp_path)
        Path(tmp_path, f"{new}-journal").touch()  # SQLite leaves it if the disk is full
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("nexum_engine.store.sqlite._Backup.copy_to", fill_the_disk)
    with pytest.raises(InvalidRequest, match=r"b\.db can't be written: database or disk is full"):
        await store.backup(tmp_path / "b.db", overwrite=False, progress=say_nothing)
    assert leftovers(tmp_path) == []


async def test_closing_store_stops_backup(tmp_path: Path, store: SqliteStore, gate: Gate) -> None:
    for one in range(20):
        await record(store, f"k{one}", 5000)
    making = asyncio.create_task(store.backup(tmp_path / "b.db", overwrite=False, progress=gate))
    await asyncio.to_thread(gate.reached.wait)
    closing = asyncio.create_task(store.close())
    gate.open.set()
    with pytest.raises(StoreUnavailable):
        await making
    await closing
    assert not (tmp_path / "b.db").exists()
    assert leftovers(tmp_path) == []


async def test_backup_goes_on_after_a_failed_transaction(tmp_path: Path, store: SqliteStore, gate: Gate) -> None:
    kept = {await record(store, f"k{one}", 5000) for one in range(20)}
    making = asyncio.create_task(store.backup(tmp_path / "b.db", overwrite=False, progress=gate))
    await asyncio.to_thread(gate.reached.wait)

    def fail(_: object) -> None:
        store._database.connection.execute("DELETE FROM nodes")
        raise InvalidRequest("this transaction is rolled back")

    with pytest.raises(InvalidRequest):
        await store.run(fail)
    gate.open.set()
    await making
    copy = await opened(tmp_path / "b.db")
    assert await ids(copy) == kept
    assert (await copy.run(reading.get_execution, max(kept))).outputs() == {"a": json.dumps("y" * 5000)}
    await copy.close()


async def test_existing_file_is_only_replaced_if_requested_and_a_database(tmp_path: Path, store: SqliteStore) -> None:
    await store.backup(tmp_path / "b.db", overwrite=False, progress=say_nothing)
    with pytest.raises(Conflict, match=r"b\.db exists: give another name, or overwrite it with --overwrite"):
        await store.backup(tmp_path / "b.db", overwrite=False, progress=say_nothing)
    await record(store, "k")
    await store.backup(tmp_path / "b.db", overwrite=True, progress=say_nothing)
    assert check_database(tmp_path / "b.db").executions == 1
    note = tmp_path / "note.txt"
    await asyncio.to_thread(note.write_text, "mine")
    with pytest.raises(InvalidRequest, match="is not overwritten: it is not a Nexum database"):
        await store.backup(note, overwrite=True, progress=say_nothing)
    assert await asyncio.to_thread(note.read_text) == "mine"


@pytest.mark.parametrize(
    "name", ["nexum.db", "nexum.db-wal", "nexum.db.lock", pytest.param("link.db", marks=needs_links)]
)
async def test_backup_onto_the_database_itself_is_refused(tmp_path: Path, store: SqliteStore, name: str) -> None:
    if name == "link.db":
        os.symlink(tmp_path / "nexum.db", tmp_path / name)
    execution_id = await record(store, "k")
    with pytest.raises(InvalidRequest, match="is a file of the database itself"):
        await store.backup(tmp_path / name, overwrite=True, progress=say_nothing)
    assert await ids(store) == {execution_id}


@pytest.mark.parametrize(("name", "said"), [("no/where.db", "can't be written: "), ("", "it is a folder")])
async def test_backup_that_cannot_be_written_is_refused(
    tmp_path: Path, store: SqliteStore, name: str, said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        await store.backup(tmp_path / name, overwrite=True, progress=say_nothing)
    assert await store.backup(tmp_path / "b.db", overwrite=False, progress=say_nothing) > 0


# ---- A server --------------------------------------------------------------------------------------------------------


@pytest.mark.sqlite
async def test_server_makes_backup_and_says_why_it_does_not(tmp_path: Path, server: ServerThread) -> None:
    async with NexumClient(server.address) as client:
        await client.register_workflow(ECHO)
        await client.start_execution(ECHO, {}, idempotency_key="k")
        steps = [step async for step in client.backup(tmp_path / "b.db")]
        assert steps[-1][0] == steps[-1][1] == (tmp_path / "b.db").stat().st_size
        with pytest.raises(Conflict, match="exists"):
            [step async for step in client.backup(tmp_path / "b.db")]
        with pytest.raises(InvalidRequest, match="is not an absolute path"):
            [step async for step in client.backup(Path("b.db"))]
        with pytest.raises(InvalidRequest, match="can't be written"):
            [step async for step in client.backup(tmp_path / "no" / "where")]
    assert check_database(tmp_path / "b.db").executions == 1


@pytest.mark.sqlite
def test_backup_command_with_and_without_server(tmp_path: Path, server: ServerThread) -> None:
    def nexum(*arguments: str) -> tuple[int, str]:
        return run_script(["-m", "nexum_engine", "backup", *arguments], tmp_path, {}, forked=True)

    code, output = nexum("b.db", "--json", "--nexum", server.address)
    assert (code, json.loads(output)) == (
        0,
        {"file": str(tmp_path / "b.db"), "bytes": (tmp_path / "b.db").stat().st_size},
    )
    code, output = nexum("b.db", "--nexum", server.address)
    assert (code, output) == (
        1,
        f"error: {tmp_path / 'b.db'} exists: give another name, or overwrite it with --overwrite",
    )
    # A backup is itself a database, so it can be backed up without a server.
    code, output = nexum("c.db", "--database-url", f"sqlite:///{tmp_path / 'b.db'}")
    assert (code, output.startswith("c.db: ")) == (0, True)
    connection = sqlite3.connect(tmp_path / "c.db")
    assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    connection.close()

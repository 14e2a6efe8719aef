"""Pruning: what is deleted, what is kept, how large the transactions are, and what happens to the file."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from harness import nexum_server, running
from processes import run_script
from server_thread import ServerThread

from nexum_engine.client import NexumClient
from nexum_engine.clock import ManualClock
from nexum_engine.errors import ExecutionNotFound, InvalidRequest, NotFound, StoreUnavailable, TaskNotFound
from nexum_engine.options import duration
from nexum_engine.records import ExecutionStatus, Pruned
from nexum_engine.server.retention import Retention
from nexum_engine.store import Store, executions, listing, open_store, reading, retention, sqlite_file, tasks
from nexum_engine.store.sqlite import SqliteStore
from nexum_engine.workflow import workflow

DAY_MS = 86_400_000
TWO_NODES = '{"nodes": {"a": {"type": "EFFECT"}, "b": {"type": "EFFECT", "dependencies": ["a"]}}}'
ONE_NODE = '{"nodes": {"a": {"type": "EFFECT"}}}'
ECHO = workflow("one").effect("a").build()
NOT_OF_AN_EXECUTION = {"workflow_versions", "limits", "file_mark", "log_stamp", "pruned", "nexum_schema"}


@pytest.fixture
async def store(database_url: str, clock: ManualClock) -> AsyncIterator[Store]:
    store = await open_store(database_url, clock)
    await register(store)
    yield store
    await store.close()


@pytest.fixture
async def sqlite_store(tmp_path: Path, clock: ManualClock) -> AsyncIterator[SqliteStore]:
    store = await opened(tmp_path / "nexum.db", clock)
    await register(store)
    yield store
    if not store._closed:
        await store.close()


async def register(store: Store) -> None:
    await store.run(executions.register_workflow, "one", "v1", ONE_NODE)
    await store.run(executions.register_workflow, "two", "v2", TWO_NODES)


async def opened(path: Path, clock: ManualClock) -> SqliteStore:
    store = await open_store(f"sqlite:///{path}", clock)
    assert isinstance(store, SqliteStore)
    return store


async def start(store: Store, key: str = "", *, input: str = "0", workflow_id: str = "one") -> str:
    """Start an execution that has no owner: its task is for workers."""
    version = {"one": "v1", "two": "v2"}[workflow_id]
    started = await store.run(executions.start_execution, workflow_id, version, input, key)
    return started.execution_id


async def finish(store: Store, output: str = '"done"') -> str:
    """Complete the task that has been due the longest; return its id."""
    task = (await store.run(tasks.claim, "worker", ("v1", "v2"), 2**40, 30_000, True)).task
    assert task is not None
    await store.run(tasks.complete_task, task.task_id, output)
    return task.task_id


async def record(store: Store, key: str, output: str = '"done"') -> str:
    """Record an event, as a durable run does."""
    one = ("one", "v1", "0", key, "owner", 30_000, "", output)
    return (await store.run(tasks.start_owned, *one)).execution_id


async def prune(store: Store, days: float = 30, **options: Any) -> Pruned:
    """Prune until nothing is left to prune; return the sum of all transactions' results."""
    total, verdicts = Pruned(after=0), retention.Verdicts()
    while total.after is not None:
        total += await store.run_alone(
            retention.prune, round(days * DAY_MS), after=total.after, verdicts=verdicts, **options
        )
    return total


async def ids(store: Store) -> set[str]:
    return {one.execution_id for one in await store.run(listing.list_executions, "", "", 100_000)}


def rows(store: Store) -> dict[str, int]:
    """Return the number of rows of each table with data of executions."""
    if not isinstance(store, SqliteStore):
        from postgres import rows_of  # psycopg may not be installed

        return rows_of(store, NOT_OF_AN_EXECUTION)
    connection = store._database.connection
    names = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    return {
        name: connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in names - NOT_OF_AN_EXECUTION
    }


# ---- What is deleted -------------------------------------------------------------------------------------------------


@pytest.mark.both_stores
async def test_executions_that_nodes_started_are_pruned_with_their_parent(store: Store, clock: ManualClock) -> None:
    nodes = {"each": {"type": "MAP"}, "sub": {"type": "SUBWORKFLOW", "dependencies": ["each"]}}
    await store.run(executions.register_workflow, "parent", "p1", json.dumps({"nodes": nodes}))
    await store.run(executions.register_workflow, "child", "c1", '{"nodes": {"each": {"type": "MAP"}}}')
    await store.run(executions.start_execution, "parent", "p1", "1", "")

    async def report(version: str, output: str) -> None:
        task = (await store.run(tasks.claim, "worker", (version,), 2**40, 30_000, True)).task
        assert task is not None
        await store.run(tasks.complete_task, task.task_id, output)

    await report("p1", "[1, 2]")
    await report("p1", "1")
    await report("p1", "2")
    await report("p1", '{"subWorkflowId": "child"}')
    await report("c1", "[3]")
    clock.advance(10 * DAY_MS)
    await prune(store, 1)
    assert rows(store)["executions"] == 5  # the parent runs, so its children are kept, although two have ended
    await report("c1", "3")
    clock.advance(10 * DAY_MS)
    assert (await prune(store, 1)).executions == 1
    assert set(rows(store).values()) == {0}


async def test_pruned_execution_leaves_no_row_in_any_table(sqlite_store: SqliteStore, clock: ManualClock) -> None:
    execution_id = await start(sqlite_store, "k", workflow_id="two")
    failed = (await sqlite_store.run(tasks.claim, "worker", ("v2",), 2**40, 30_000, True)).task
    assert failed is not None
    await sqlite_store.run(tasks.fail_task, failed.task_id, "no", False)
    clock.advance(10)
    task_ids = [await finish(sqlite_store), await finish(sqlite_store)]
    number = int(execution_id.split("-")[1])
    sqlite_store._database.connection.execute("INSERT INTO attributes VALUES (?, 'customer', 'c-17')", (number,))
    sqlite_store._database.connection.execute("INSERT INTO events VALUES (?, 1, 'e', '', 'null', 0, NULL)", (number,))
    sqlite_store._database.connection.execute("INSERT INTO former_ids VALUES (?, ?)", (execution_id, number))
    sqlite_store._database.connection.execute("INSERT INTO former_ids VALUES (?, ?)", (failed.task_id, 1000 * number))
    before = rows(sqlite_store)
    assert min(before.values()) > 0, "fill the new table in this test, too"

    clock.advance(31 * 86_400)
    assert await prune(sqlite_store) == Pruned(executions=1)
    assert rows(sqlite_store) == dict.fromkeys(before, 0)
    with pytest.raises(ExecutionNotFound):
        await sqlite_store.run(reading.get_execution, execution_id)
    for task_id in (*task_ids, failed.task_id):
        with pytest.raises(TaskNotFound):
            await sqlite_store.run(tasks.complete_task, task_id, '"done"')
    assert sqlite_store._database.connection.execute("PRAGMA foreign_key_check").fetchall() == []


async def test_running_and_newer_executions_are_kept(sqlite_store: SqliteStore, clock: ManualClock) -> None:
    running_ids = {await start(sqlite_store, "running", workflow_id="two"), await start(sqlite_store)}
    sqlite_store._database.connection.execute("UPDATE executions SET ended_ms = 1 WHERE sequence = 1")  # damaged
    cancelled = await start(sqlite_store, "cancelled")
    await sqlite_store.run(executions.cancel_execution, cancelled)
    old = {await record(sqlite_store, "old"), await record(sqlite_store, ""), cancelled}
    clock.advance(29 * 86_400)
    late = await start(sqlite_store, "late")
    await sqlite_store.run(executions.cancel_execution, late)
    clock.advance(86_400)

    dry = await prune(sqlite_store, dry_run=True)
    assert await ids(sqlite_store) == {*running_ids, *old, late}
    assert dry == await prune(sqlite_store) == Pruned(executions=3, kept=2)
    assert await ids(sqlite_store) == {*running_ids, late}
    clock.advance(28 * 86_400)
    assert (await prune(sqlite_store)).executions == 0
    clock.advance(86_400)
    assert (await prune(sqlite_store)).executions == 1
    assert await ids(sqlite_store) == running_ids


@pytest.mark.both_stores
async def test_key_of_pruned_execution_starts_again(store: Store, clock: ManualClock) -> None:
    first = await start(store, "k", input="1")
    await finish(store)
    assert await start(store, "k", input="1") == first
    assert (await prune(store, 0)).executions == 1
    second = await start(store, "k", input="2")
    assert second != first
    assert (await store.run(reading.get_execution, second)).status is ExecutionStatus.RUNNING
    with pytest.raises(ExecutionNotFound):
        await store.run(listing.list_executions, "", "", 10, before=first)


async def test_number_is_never_used_twice(tmp_path: Path, clock: ManualClock) -> None:
    numbers: list[int] = []
    for _ in range(3):
        store = await opened(tmp_path / "nexum.db", clock)
        await store.run(executions.register_workflow, "one", "v1", ONE_NODE)
        for _ in range(3):
            numbers.append(int((await record(store, "")).split("-")[1]))
        await prune(store, 0)
        await store.compact(max_bytes=None, always=True)
        await store.close()
    assert numbers == list(range(1, 10))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"days": -1}, InvalidRequest, "older_than_ms can't be negative"),
        ({"session": "a/b"}, InvalidRequest, "a session is pruned as a whole"),
        ({"session": "a:b"}, InvalidRequest, "a session is pruned as a whole"),
        ({"session": "unknown"}, NotFound, "no execution has a key that begins with unknown/ or unknown:"),
    ],
)
async def test_wrong_request_is_refused(
    store: Store, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        await prune(store, **options)


# ---- Sessions --------------------------------------------------------------------------------------------------------


@pytest.mark.both_stores
async def test_session_is_pruned_as_a_whole_or_not_at_all(store: Store, clock: ManualClock) -> None:
    session = {await record(store, f"s/{one}") for one in range(5)}
    tool_call = await start(store, "s:charge")
    await finish(store)
    others = {await record(store, "sx/1"), await record(store, "s")}
    clock.advance(31 * 86_400)
    assert await prune(store, dry_run=True) == Pruned(executions=8, sessions=2)

    # A new run of the session begins. So the whole session is kept.
    one = ("one", "v1", "0", "s/run", "owner", 30_000)
    run = await store.run(tasks.start_owned, *one)
    assert run.task is not None
    assert await prune(store) == Pruned(executions=2, sessions=1, kept=6)
    assert await prune(store, session="s") == Pruned(kept=7)
    assert await ids(store) == {*session, tool_call, run.execution_id}

    # The run ends now. The session is kept, because less than 30 days have passed since this end.
    await store.run(tasks.complete_task, run.task.task_id, '"done"')
    assert await prune(store) == Pruned(kept=6)
    assert not others & await ids(store)
    clock.advance(31 * 86_400)
    assert await prune(store) == Pruned(executions=7, sessions=1)
    assert await ids(store) == set()


async def test_execution_from_before_a_clock_was_set_back_keeps_no_later_one(store: Store, clock: ManualClock) -> None:
    clock.advance(365 * 86_400)
    kept = await record(store, "from next year")
    clock.advance(-365 * 86_400)
    await record(store, "s/1")
    await record(store, "k")
    clock.advance(31 * 86_400)
    assert await prune(store) == Pruned(executions=2, sessions=1)
    assert await ids(store) == {kept}


async def test_keys_with_separators_outside_sessions_are_pruned_alone(store: Store, clock: ManualClock) -> None:
    for key in ("order:1", "order/2"):
        await start(store, key)
        await finish(store)
    clock.advance(31 * 86_400)
    running_id = await start(store, "order:3")
    assert await prune(store) == Pruned(executions=2)
    assert await ids(store) == {running_id}


async def test_named_session_is_pruned_alone(store: Store) -> None:
    kept = {await record(store, "other/1"), await record(store, "s1/1"), await record(store, "k")}
    for one in range(3):
        await record(store, f"s/{one}")
    assert await prune(store, 0, session="s", dry_run=True) == Pruned(executions=3, sessions=1)
    assert await prune(store, 0, session="s") == Pruned(executions=3, sessions=1)
    assert await ids(store) == kept


@pytest.mark.both_stores
async def test_no_transaction_leaves_half_a_session(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "MAX_EXECUTIONS", 5)
    monkeypatch.setattr(retention, "PAGE", 3)
    sessions: dict[str, set[str]] = {}
    for one in range(60):  # the sessions are interleaved
        sessions.setdefault(f"s{one % 4}", set()).add(await record(store, f"s{one % 4}/{one}"))
        await record(store, f"k{one}")
    clock.advance(31 * 86_400)
    after: int | None = 0
    transactions = 0
    while after is not None:
        part = await store.run_alone(retention.prune, 30 * DAY_MS, after=after)
        after, transactions, left = part.after, transactions + 1, await ids(store)
        assert {name for name, members in sessions.items() if len(members & left) not in (0, 15)} == set()
    assert transactions > 10
    assert await ids(store) == set()


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.both_stores), *range(1, 8)])
async def test_random_history_is_pruned_as_a_model_says(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr(retention, "MAX_EXECUTIONS", chance.randint(1, 20))
    monkeypatch.setattr(retention, "PAGE", chance.randint(1, 20))
    now, ended, keys = 0, dict[str, float](), dict[str, str]()
    owned_sessions = set()
    for number in range(80):
        name = chance.choice("abcdefg")
        key = chance.choice(["", f"{number}", f"{name}/{number}", f"{name}:{number}", f"{name}x{number}"])
        if chance.random() < 0.4 and key:
            execution_id = await record(store, key)
            ended[execution_id] = now
            if "/" in key:
                owned_sessions.add(name)
        else:
            execution_id = await start(store, key)
            ended[execution_id] = float("inf")
            if chance.random() < 0.9:
                await store.run(executions.cancel_execution, execution_id)
                ended[execution_id] = now
        keys[execution_id] = key
        if chance.random() < 0.5:
            days = chance.randint(1, 5)
            clock.advance(days * 86_400)
            now += days

    def unit(execution_id: str) -> list[str]:
        key = keys[execution_id]
        if key[1:2] in ("/", ":") and key[0] in owned_sessions:
            return [one for one, other in keys.items() if other[:2] in (f"{key[0]}/", f"{key[0]}:")]
        return [execution_id]

    days = chance.randint(0, now)
    pruned = {one for one in keys if all(ended[member] <= now - days for member in unit(one))}
    dry = await prune(store, days, dry_run=True)
    assert await ids(store) == {*keys}
    done = await prune(store, days)
    assert (dry.executions, dry.sessions, dry.kept) == (done.executions, done.sessions, done.kept)
    assert await ids(store) == {*keys} - pruned
    assert done.executions == len(pruned)


# ---- Transactions ----------------------------------------------------------------------------------------------------


async def test_transactions_are_small_and_linear(sqlite_store: SqliteStore, clock: ManualClock) -> None:
    await asyncio.gather(*(record(sqlite_store, f"k{one}") for one in range(2000)))
    clock.advance(31 * 86_400)
    statements: list[str] = []
    sqlite_store._database.connection.set_trace_callback(statements.append)
    after: int | None = 0
    sizes = []
    while after is not None:
        part = await sqlite_store.run_alone(retention.prune, 30 * DAY_MS, after=after)
        sizes.append(part.executions)
        after = part.after
    sqlite_store._database.connection.set_trace_callback(None)
    assert sum(sizes) == 2000
    assert max(sizes) <= retention.MAX_EXECUTIONS + retention.PAGE
    assert len(statements) < 1000  # consecutive executions are deleted together


@pytest.mark.parametrize("dry_run", [False, True])
async def test_keys_with_one_beginning_are_read_once_in_all_calls_of_prune(
    sqlite_store: SqliteStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    for number in range(10):
        await start(sqlite_store, f"order/{number}")
        await finish(sqlite_store)
    clock.advance(40 * DAY_MS)
    monkeypatch.setattr(retention, "PAGE", 2)
    monkeypatch.setattr(retention, "MAX_EXECUTIONS", 2)
    monkeypatch.setattr("nexum_engine.server.retention.PART_SECONDS", 0)
    statements: list[str] = []
    sqlite_store._database.connection.set_trace_callback(statements.append)
    server = Retention(sqlite_store)
    after: int | None = 0
    parts = []
    while after is not None:
        part = await server.prune(30 * DAY_MS, after=after, dry_run=dry_run)
        parts.append(part.executions)
        after = part.after
    sqlite_store._database.connection.set_trace_callback(None)
    assert parts[:5] == [2] * 5
    assert sum("idempotency_key >= 'order/'" in one and "WHERE owned" in one for one in statements) == 1


async def test_references_are_checked_again_after_a_deletion(sqlite_store: SqliteStore) -> None:
    def unchecked(db: Any) -> int:
        return int(sqlite_store._database.connection.execute("PRAGMA foreign_keys").fetchone()[0])

    alone, beside = sqlite_store.run_alone(unchecked), sqlite_store.run(unchecked)
    assert (await alone, await beside) == (0, 1)
    with pytest.raises(InvalidRequest):
        await sqlite_store.run_alone(retention.prune, -1)
    assert await sqlite_store.run(unchecked) == 1


# ---- The file --------------------------------------------------------------------------------------------------------


async def test_compacting_gives_space_back_and_keeps_the_rest(
    tmp_path: Path, sqlite_store: SqliteStore, clock: ManualClock
) -> None:
    path = tmp_path / "nexum.db"
    for one in range(50):
        await record(sqlite_store, f"k{one}", json.dumps("y" * 20_000))
    clock.advance(31 * 86_400)
    kept = await record(sqlite_store, "kept", json.dumps("z" * 20_000))
    before = await sqlite_store.compact(max_bytes=None, always=False)
    assert (before.released_bytes, before.total_bytes > 1_000_000) == (0, True)
    await prune(sqlite_store)
    assert (await sqlite_store.compact(max_bytes=1000, always=True)).released_bytes == 0
    space = await sqlite_store.compact(max_bytes=1_000_000, always=False)
    assert space.released_bytes > 900_000
    assert space.free_bytes == 0
    check_files(path, space.total_bytes)
    assert space.total_bytes < 200_000

    # The store continues in the new file, which it keeps locked. After a restart, the file has all data.
    later = await record(sqlite_store, "later")
    assert (await sqlite_store.run(reading.get_execution, kept)).outputs() == {"a": json.dumps("z" * 20_000)}
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        sqlite3.connect(path, timeout=0).execute("SELECT * FROM executions")
    await sqlite_store.close()
    again = await opened(path, clock)
    assert await ids(again) == {kept, later}
    await again.close()


def check_files(path: Path, total: int) -> None:
    """Check that the database has this size, that only its user can read it, and that no other file was left."""
    assert path.stat().st_size == total
    assert not [one for one in path.parent.iterdir() if ".new-" in one.name]
    if sys.platform != "win32":
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(sys.platform == "win32", reason="Windows can't link an open file")
@pytest.mark.parametrize("fault", ["hard link", "rename", "full disk"])
async def test_failed_compaction_changes_nothing(
    tmp_path: Path,
    sqlite_store: SqliteStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    path = tmp_path / "nexum.db"
    await record(sqlite_store, "k", json.dumps("y" * 200_000))
    await prune(sqlite_store, 0)
    if fault == "hard link":
        os.link(path, tmp_path / "other.db")
    elif fault == "rename":

        def refuse(*_: object) -> None:
            raise PermissionError(13, "in use by another program")

        monkeypatch.setattr(Path, "replace", refuse)
    else:

        def is_full(*_: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(sqlite_file, "checkpoint", is_full)
    assert (await sqlite_store.compact(max_bytes=None, always=True)).released_bytes == 0
    assert "could not be compacted" in caplog.text
    monkeypatch.undo()
    # The large result makes SQLite copy the log into the file, so the next transaction starts the log again.
    kept = {await record(sqlite_store, "next", json.dumps("z" * 5_000_000)), await record(sqlite_store, "last")}
    await sqlite_store.close()
    again = await opened(path, ManualClock())
    assert await ids(again) == kept
    await again.close()


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_kill_during_compaction_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, moment: str
) -> None:
    program = (
        "import asyncio, os, sys\nfrom pathlib import Path\nfrom test_retention import *\n"
        "async def main():\n"
        "    store = await opened(Path('nexum.db').absolute(), ManualClock())\n"
        "    await store.run(executions.register_workflow, 'one', 'v1', ONE_NODE)\n"
        "    await record(store, 'k', json.dumps('y' * 200_000))\n"
        "    await prune(store, 0)\n"
        "    await record(store, 'kept')\n"
        "    rename = Path.replace\n"
        "    def killed(self, target):\n"
        f"        if {moment == 'after'}: rename(self, target)\n"
        "        print('killed', flush=True); os._exit(9)\n"
        "    Path.replace = killed\n"
        "    await store.compact(max_bytes=None, always=True)\n"
        "asyncio.run(main())\n"
    )
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, here.parent / "support", here.parents[1])))
    with running(["-c", program], cwd=tmp_path, env={"PYTHONPATH": path}) as one:
        one.wait_for("killed")
        assert one.wait() == 9
    store = await opened(tmp_path / "nexum.db", ManualClock())
    found = await store.run(listing.list_executions, "", "", 10)
    assert [one.idempotency_key for one in found] == ["kept"]
    await store.close()
    assert caplog.messages == []  # for instance, no warning that the log is missing
    assert not [one for one in os.listdir(tmp_path) if ".new-" in one]


# ---- A server --------------------------------------------------------------------------------------------------------


async def start_on(client: NexumClient, *keys: str) -> list[str]:
    """Start executions on a server, and cancel them."""
    await client.register_workflow(ECHO)
    found = [(await client.start_execution(ECHO, {}, idempotency_key=key)).execution_id for key in keys]
    for execution_id in found:
        await client.cancel_execution(execution_id)
    return found


async def test_server_prunes_while_calls_are_answered(server: ServerThread) -> None:
    async with NexumClient(server.address) as client:
        (pruned,) = await start_on(client, "k")
        await client.start_execution(ECHO, {}, idempotency_key="running")
        pruning = client.prune(0)
        started = client.start_execution(ECHO, {}, idempotency_key="beside")
        part, beside = await asyncio.gather(pruning, started)
        assert (part.executions, part.kept >= 1) == (1, True)
        assert part.total_bytes > 0
        with pytest.raises(ExecutionNotFound):
            await client.get_status(pruned)
        with pytest.raises(ExecutionNotFound):
            await client.get_execution(pruned)
        with pytest.raises(NotFound):
            await client.prune(0, session="unknown")
        again = await client.start_execution(ECHO, {}, idempotency_key="k")
        assert not again.existing
        assert await client.get_status(beside.execution_id) is ExecutionStatus.RUNNING


async def test_call_of_prune_does_not_rest_for_longer_than_its_client_waits(
    sqlite_store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def prune_slowly(*_: object, **__: object) -> Pruned:
        await asyncio.sleep(0.2)
        sqlite_store.submitted += 2  # the server gets other calls
        return Pruned(1, after=1)

    monkeypatch.setattr(sqlite_store, "run_alone", prune_slowly)
    monkeypatch.setattr("nexum_engine.server.retention.PART_SECONDS", 0.25)
    monkeypatch.setattr("nexum_engine.server.retention.MAX_REST", 0.1)
    # Without MAX_REST, the rest would take 1.8 s.
    pruned = await asyncio.wait_for(Retention(sqlite_store).prune(0), 1.2)
    assert pruned.executions == 2


async def test_policy_deletes_what_has_become_old(tmp_path: Path) -> None:
    with nexum_server(tmp_path, arguments=["--keep", "0.2s"]) as server:
        async with NexumClient(server.address) as client:
            await start_on(client, "a", "b")
            running_id = (await client.start_execution(ECHO, {}, idempotency_key="running")).execution_id
            deadline = asyncio.get_running_loop().time() + 20
            while len(found := await client.list_executions()) > 1:
                assert asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0.1)
            assert [one.execution_id for one in found] == [running_id]


def nexum(folder: Path, *arguments: str) -> tuple[int, str]:
    return run_script(["-m", "nexum_engine", *arguments], folder, {}, forked=True)


@pytest.mark.sqlite
async def test_prune_command_with_and_without_server(tmp_path: Path) -> None:
    database = ("--database-url", f"sqlite:///{tmp_path / 'nexum.db'}")
    with nexum_server(tmp_path) as server:
        async with NexumClient(server.address) as client:
            await start_on(client, "s:1", "s:2", "k")
            await client.start_execution(ECHO, {}, idempotency_key="s:3")
        ask = ("--nexum", server.address)
        code, output = nexum(tmp_path, "prune", "--older-than", "0s", "--session", "s", *ask)
        assert (code, "error: session s is kept: it has an execution that is RUNNING" in output) == (1, True)
        code, output = nexum(tmp_path, "prune", "--older-than", "0s", "--dry-run", "--json", *ask)
        assert (code, json.loads(output)) == (0, {"executions": 3, "sessions": 0, "kept": 1, "dry_run": True})
    code, output = nexum(tmp_path, "prune", "--older-than", "0s", "--dry-run", *database)
    assert (code, output.splitlines()[0]) == (
        0,
        "would delete 3 executions; 1 of that age kept: RUNNING, or in a session that is",
    )
    code, output = nexum(tmp_path, "prune", "--older-than", "0s", "--compact", "--json", *database)
    found = json.loads(output)
    assert (code, found["executions"], found["kept"], found["free_bytes"]) == (0, 3, 1, 0)
    check_files(tmp_path / "nexum.db", found["total_bytes"])


@pytest.mark.parametrize(
    ("text", "seconds"), [("45s", 45), ("1.5m", 90), ("12h", 43_200), ("30d", 2_592_000), ("2w", 1_209_600), ("0s", 0)]
)
def test_age_is_read(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["30", "soon", "-1d", "nand", "infd", "40000d", "", "d", "1y"])
def test_wrong_age_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a duration up to 36,500d: give a number and s, m, h"):
        duration(text)


async def test_prune_stops_when_the_store_is_closed(sqlite_store: SqliteStore) -> None:
    await sqlite_store.close()
    with pytest.raises(StoreUnavailable):
        await sqlite_store.run_alone(retention.prune, 0)
    with pytest.raises(StoreUnavailable):
        await sqlite_store.compact(max_bytes=None, always=True)

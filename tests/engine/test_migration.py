"""A database of schema version 2 is updated, and its executions continue."""

from __future__ import annotations

import logging
import sqlite3
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from harness import ROOT, running
from old_database import make_old_database

from nexum_engine.clock import ManualClock
from nexum_engine.errors import StaleTask
from nexum_engine.records import Execution, ExecutionStatus, NodeStatus, Outcome, Task
from nexum_engine.store import Store, executions, leases, listing, open_store, reading, tasks
from nexum_engine.store.results import Changes
from nexum_engine.store.sqlite import SqliteStore

pytestmark = pytest.mark.every_python

WRITTEN_UNTIL = 1_700_000_003_150  # the latest time that version_2.sql contains
LEASE_MS = 30_000
OLD_NODES = """
SELECT execution_id, node_id, node_type, status, output_json, error FROM nodes ORDER BY execution_id, position
"""
OLD_ATTEMPTS = """
SELECT execution_id, node_id, attempt, worker_id, started_ms, ended_ms, outcome, error FROM attempts ORDER BY attempt
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Make a database of schema version 2, with the rows that the code of that version wrote."""
    path = tmp_path / "nexum.db"
    make_old_database(path)
    return path


def read(path: Path) -> bytes:
    return path.read_bytes()


async def opened(path: Path, clock: ManualClock | None = None) -> Store:
    return await open_store(f"sqlite:///{path}", clock or ManualClock(WRITTEN_UNTIL))


def task_of(path: Path, key: str, attempt: int = 1, node: str = "a") -> str:
    """Return the task id of an attempt in a database of schema version 2."""
    connection = sqlite3.connect(path)
    (row,) = connection.execute(
        "SELECT task_id FROM attempts JOIN executions USING (execution_id) "
        "WHERE idempotency_key = ? AND attempt = ? AND node_id = ? ORDER BY sequence DESC LIMIT 1",
        (key, attempt, node),
    )
    connection.close()
    return str(row[0])


async def execution_of(store: Store, key: str, workflow_id: str = "one") -> Execution:
    found = await store.run(listing.list_executions, workflow_id, "", 1, key_prefix=key)
    return await store.run(reading.get_execution, found[0].execution_id, True)


async def take(store: Store, worker_id: str, version: str = "v-one") -> Task | None:
    return (await store.run(tasks.claim, worker_id, (version,), 2**40, LEASE_MS, True)).task


async def test_every_record_reads_as_before(
    old: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = sqlite3.connect(old)
    ids = [row[0] for row in connection.execute("SELECT execution_id FROM executions ORDER BY sequence DESC")]
    fields = {
        row[0]: row
        for row in connection.execute(
            "SELECT execution_id, workflow_id, version_hash, status, input_json, coalesce(idempotency_key, ''), "
            "created_ms, ended_ms, error FROM executions"
        )
    }
    nodes, attempts = defaultdict(list), defaultdict(list)
    for row in connection.execute(OLD_NODES):
        nodes[row[0]].append(row[1:])
    for row in connection.execute(OLD_ATTEMPTS):
        attempts[row[0], row[1]].append(row[2:])
    connection.close()
    new = {NodeStatus.WAITING, NodeStatus.SKIPPED}
    assert {status for rows in nodes.values() for _, _, status, _, _ in rows} == set(NodeStatus) - new
    assert {one[4] for rows in attempts.values() for one in rows} >= {"RUNNING", "COMPLETED", "FAILED", "LOST"}

    monkeypatch.setattr("nexum_engine.store.sqlite_connection.SLOW_UPDATE_BYTES", 0)
    with caplog.at_level(logging.WARNING):
        store = await opened(old)
    (said,) = caplog.messages
    assert said.startswith(f"database {old}: updating its schema from version 2 to")
    assert [one.execution_id for one in await store.run(listing.list_executions, "", "", 100)] == ids
    for execution_id in ids:
        one = await store.run(reading.get_execution, execution_id, True)
        assert fields[execution_id] == (
            one.execution_id,
            one.workflow_id,
            one.version_hash,
            one.status.value,
            one.input_json,
            one.idempotency_key,
            one.created_ms,
            one.ended_ms,
            one.error,
        )
        assert nodes[execution_id] == [
            (node.node_id, node.node_type, node.status.value, node.output_json, node.error) for node in one.nodes
        ]
        for node in one.nodes:
            assert attempts[execution_id, node.node_id] == [
                (a.attempt, a.worker_id, a.started_ms, a.ended_ms, a.outcome.value, a.error) for a in node.attempts
            ]
    counts = [(one.workflow_id, one.active_executions) for one in await store.run(executions.workflow_versions, "one")]
    assert counts == [("one", sum(row[1] == "one" and row[3] == "RUNNING" for row in fields.values()))]
    assert isinstance(store, SqliteStore)
    connection = store._database.connection
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    assert connection.execute("PRAGMA foreign_keys").fetchone()[0] == 1
    assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    await store.close()


async def test_workers_keep_their_tasks(old: Path) -> None:
    running_task, third, lost = task_of(old, "running"), task_of(old, "third-attempt", 3), task_of(old, "lost")
    stale, reported = task_of(old, "third-attempt", 1), task_of(old, "completed")
    store = await opened(old)
    await store.run(leases.restart, 1500, 2 * LEASE_MS)
    # Heartbeats name the old ids. A worker whose lease ran out gets its task back.
    assert (await store.run(leases.renew, "w1", (running_task, third), LEASE_MS)).lost == ()
    assert (await store.run(leases.renew, "w-silent", (lost,), LEASE_MS)).resumed
    for task_id in (running_task, third, lost):
        changed = await store.run(tasks.complete_task, task_id, '"late"')
        assert [one.status for one in changed.ended] == [ExecutionStatus.COMPLETED]
        assert await store.run(tasks.complete_task, task_id, '"late"') == Changes()  # reported twice
    with pytest.raises(StaleTask):
        await store.run(tasks.complete_task, stale, '"stale"')
    with pytest.raises(StaleTask):
        await store.run(tasks.complete_task, reported, '"another result"')
    attempts = (await execution_of(store, "third-attempt")).nodes[0].attempts
    assert [one.outcome for one in attempts] == [Outcome.FAILED, Outcome.LOST, Outcome.COMPLETED]
    await store.close()


async def test_leases_and_retries_continue(old: Path) -> None:
    clock = ManualClock(WRITTEN_UNTIL)
    store = await opened(old, clock)
    due = {}
    while (task := await take(store, "w2")) is not None:
        due[task.execution_id] = task
    assert set(due) == {(await execution_of(store, key)).execution_id for key in ("waiting", "lost")}
    # Two attempts of `retried` failed before the update. The third attempt is due 2 s after the second failure.
    clock.advance(1.98)
    assert await take(store, "w2") is None
    clock.advance(0.01)
    retried = await take(store, "w2")
    assert retried is not None
    assert (retried.attempt, retried.execution_id) == (3, (await execution_of(store, "retried")).execution_id)
    # The lease of `running-unstreamed` began before the update of the database. It runs out now.
    clock.advance(LEASE_MS / 1000)
    await store.run(leases.sweep, clock.now_ms())
    (attempt,) = (await execution_of(store, "running-unstreamed")).nodes[0].attempts
    assert attempt.outcome is Outcome.EXPIRED
    await store.close()


async def test_owners_and_keys_continue(old: Path) -> None:
    held, recorded = task_of(old, "owned-running"), task_of(old, "owned-completed")
    store = await opened(old)

    async def own(key: str, owner: str, output_json: str = "", held_task_id: str = "") -> tuple[str, ExecutionStatus]:
        one = ("one", "v-one", f'{{"of": "{key}"}}', key, owner, LEASE_MS, held_task_id, output_json)
        started = await store.run(tasks.start_owned, *one)
        return (started.task.task_id if started.task else "", started.status)

    assert await own("owned-running", "owner-1") == (held, ExecutionStatus.RUNNING)
    assert await own("new", "owner-1", '"event"', held) == ("", ExecutionStatus.COMPLETED)
    with pytest.raises(StaleTask):
        await own("newer", "owner-1", '"event"', recorded)
    taken_over, _ = await own("owned-dead", "owner-3")
    assert (await store.run(tasks.complete_task, taken_over, "1")).ended[0].idempotency_key == "owned-dead"
    for key, status, existing in (
        ("again", ExecutionStatus.COMPLETED, True),
        ("failed", ExecutionStatus.RUNNING, False),
    ):
        started = await store.run(executions.start_execution, "one", "v-one", f'{{"of": "{key}"}}', key)
        assert (started.status, started.existing) == (status, existing)
    await store.close()


async def test_diamond_is_finished(old: Path) -> None:
    half_done = task_of(old, "diamond", node="b")
    store = await opened(old)
    await store.run(tasks.complete_task, half_done, '"of b"')
    execution = await execution_of(store, "diamond", "diamond")
    for node in "cd":
        while (
            task := await take(store, "w1", "v-diamond")
        ) is not None and task.execution_id != execution.execution_id:
            pass
        assert task is not None
        assert task.node_id == node
        changed = await store.run(tasks.complete_task, task.task_id, f'"of {node}"')
    assert changed.ended[0].outputs() == {node: f'"of {node}"' for node in "abcd"}
    await store.close()


async def test_server_killed_after_the_update_loses_nothing(old: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from nexum_engine.store import sqlite_connection\n"
        "path = Path(sys.argv[1]); connection = sqlite_connection.connect(path)\n"
        "sqlite_connection.migrate(path, connection); print('updated', flush=True); os._exit(9)\n"
    )
    with running(["-c", program, str(old)], cwd=old.parent, env={"PYTHONPATH": str(ROOT)}) as server:
        server.wait_for("updated")
        assert server.wait() == 9
    assert read(old.with_name("nexum.db-wal"))
    store = await opened(old)
    assert len(await store.run(listing.list_executions, "", "", 100)) == 16
    await store.close()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
async def test_interrupted_update_is_begun_again(old: Path) -> None:
    before = read(old)
    program = (
        "import resource, sys; from pathlib import Path; from nexum_engine.store import sqlite_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sqlite_file.DatabaseFile.open(Path(sys.argv[1]))\n"
    )
    with running(["-c", program, str(old)], cwd=old.parent, env={"PYTHONPATH": str(ROOT)}) as server:
        assert server.wait() == 1
        assert "can't be opened: disk I/O error" in server.output
    assert read(old) == before
    store = await opened(old)
    assert len(await store.run(listing.list_executions, "", "", 100)) == 16
    await store.close()

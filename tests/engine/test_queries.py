"""What the store's queries read and write: no query scans a table, and a tool call writes few pages."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path

import pytest
from harness import ROOT

from nexum_engine.clock import ManualClock
from nexum_engine.store import executions, open_store, tasks
from nexum_engine.store.db import load_queries
from nexum_engine.store.sqlite import SqliteStore

QUERIES = load_queries()
SCANS = {"executions": "SCAN executions"}
"""Queries that may scan a table. This one reads the newest executions until it has enough."""
PAGE_BYTES, FRAME_HEADER_BYTES = 4096, 24


@pytest.fixture(scope="module")
def schema() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    for script in sorted((ROOT / "nexum_engine" / "store" / "sqlite_migrations").glob("*.sql")):
        connection.executescript(script.read_text(encoding="utf-8"))
    return connection


@pytest.mark.parametrize("name", QUERIES)
def test_query_scans_no_table(schema: sqlite3.Connection, name: str) -> None:
    parameters = dict.fromkeys(re.findall(r":(\w+)", QUERIES[name]))
    plan = [row[3] for row in schema.execute(f"EXPLAIN QUERY PLAN {QUERIES[name]}", parameters)]
    tables = "|".join(row[0] for row in schema.execute("SELECT name FROM sqlite_schema WHERE type = 'table'"))
    scans = [step for step in plan if re.match(rf"SCAN ({tables}|others|earlier)\b", step)]
    assert scans == [SCANS[name]] if name in SCANS else scans == [], plan


def test_every_index_is_used_by_a_query(schema: sqlite3.Connection) -> None:
    plans = [
        str(row[3])
        for query in QUERIES.values()
        for row in schema.execute(f"EXPLAIN QUERY PLAN {query}", dict.fromkeys(re.findall(r":(\w+)", query)))
    ]
    made = [row[0] for row in schema.execute("SELECT name FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL")]
    assert made
    assert [index for index in made if not any(f"USING INDEX {index} " in step for step in plans)] == []


async def test_tool_call_takes_12_statements_and_at_most_10_pages(tmp_path: Path) -> None:
    store = await open_store(f"sqlite:///{tmp_path / 'nexum.db'}", ManualClock())
    assert isinstance(store, SqliteStore)
    version = f"sha256:{'a' * 64}"
    await store.run(executions.register_workflow, "tool-call", version, '{"nodes": {"tool_call": {"type": "EFFECT"}}}')
    connection = store._database.connection
    connection.execute("PRAGMA wal_autocheckpoint = 0")

    async def call(number: int) -> None:
        """Make a tool call of usual size, as the server does for a worker that waits."""
        key, request = f"session:{number * 7919 % 10_007:064}", json.dumps({"tool": "t", "arguments": {"x": "y" * 280}})
        started = store.run(executions.start_execution, "tool-call", version, request, key)
        claim = await store.run(tasks.claim, "worker", (version,), 2**22, 30_000, True)
        assert claim.task is not None
        changed = await store.run(tasks.complete_task, claim.task.task_id, json.dumps("y" * 1024))
        assert [one.execution_id for one in changed.ended] == [(await started).execution_id]
        assert changed.ended[0].outputs() == {"tool_call": json.dumps("y" * 1024)}

    for number in range(500):
        await call(number)
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    log = tmp_path / "nexum.db-wal"
    before = log.stat().st_size
    for number in range(500, 600):
        await call(number)
    pages = (log.stat().st_size - before) / (PAGE_BYTES + FRAME_HEADER_BYTES) / 100
    connection.set_trace_callback(None)
    assert statements.count("COMMIT") == 2 * 100
    assert len(statements) <= 12 * 100, statements[:20]
    assert pages <= 10
    await store.close()


async def test_recorded_event_takes_6_statements_and_at_most_5_pages(tmp_path: Path) -> None:
    store = await open_store(f"sqlite:///{tmp_path / 'nexum.db'}", ManualClock())
    assert isinstance(store, SqliteStore)
    await store.run(executions.register_workflow, "event", "v1", '{"nodes": {"event": {"type": "EFFECT"}}}')
    run = (await store.run(tasks.start_owned, "event", "v1", "0", "run", "owner", 30_000, True)).task
    assert run is not None

    async def record(number: int) -> None:
        """Record an event of usual size, as a durable run does for a model's reply."""
        one = ("event", "v1", json.dumps({"position": number}), f"session:agent:{number:06}", "owner", 30_000, True)
        await store.run(tasks.start_owned, *one, run.task_id, json.dumps("y" * 1024))

    connection = store._database.connection
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    for number in range(300):
        await record(number)
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    log = tmp_path / "nexum.db-wal"
    before = log.stat().st_size
    for number in range(300, 400):
        await record(number)
    pages = (log.stat().st_size - before) / (PAGE_BYTES + FRAME_HEADER_BYTES) / 100
    connection.set_trace_callback(None)
    assert statements.count("COMMIT") == 100
    assert len(statements) <= 6 * 100, statements[:10]
    assert pages <= 5
    await store.close()

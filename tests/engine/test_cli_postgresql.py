"""The commands on a database in PostgreSQL: most commands work, and the other ones name PostgreSQL's own programs."""

from __future__ import annotations

import asyncio
import queue
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import nexum_server
from nexum_wire import DEADLINE, connected, register, start
from server_thread import server_thread

from nexum_engine.__main__ import main
from nexum_engine.clock import SystemClock
from nexum_engine.store import executions, open_store, tasks
from nexum_engine.wire import nexum_pb2 as pb

psycopg = pytest.importorskip("psycopg", reason="psycopg isn't installed")

from postgres import program  # noqa: E402

Command = Callable[..., tuple[int, str]]
NODES = {
    "w": '{"nodes": {"a": {"type": "EFFECT"}}}',
    "h": '{"nodes": {"ok": {"type": "HUMAN_APPROVAL"}, "no": {"type": "HUMAN_APPROVAL"}}}',
    "e": '{"nodes": {"a": {"type": "EVENT", "event": "go"}}}',
}


@pytest.fixture
def url(postgres_url: str) -> str:
    """The URL of an empty database, with a password that no output may show."""
    return postgres_url.replace("postgres:@", "postgres:secret@")


async def begun(url: str) -> list[str]:
    """Start an execution of each workflow, and fail the execution of `w`."""
    store = await open_store(url, SystemClock())
    for name, ir in NODES.items():
        await store.run(executions.register_workflow, name, "v1", ir)
    ids = [(await store.run(executions.start_execution, name, "v1", "{}", "")).execution_id for name in NODES]
    task = (await store.run(tasks.claim, "w1", ("v1",), 2**40, 30_000, True)).task
    assert task is not None
    await store.run(tasks.fail_task, task.task_id, "no", True)
    await store.close()
    return ids


@pytest.fixture
def nexum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """A function that runs a command in this process. It returns the exit code and the output."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        code = main(list(arguments))
        output = "".join(capsys.readouterr())
        assert "secret" not in output
        return code, output

    return run


def test_commands_open_the_database_themselves(nexum: Command, url: str) -> None:
    failed, human, event = asyncio.run(begun(url))
    for arguments, said in (
        (["ps"], "FAILED"),
        (["show", failed], "attempt 1"),
        (["retry", failed], f"{failed} is RUNNING again"),
        (["cancel", failed], f"{failed} is CANCELLED"),
        (["approvals"], human),
        (["approve", human, "ok"], "is approved"),
        (["reject", human, "no"], "is rejected"),
        (["send", event, "go", "1"], "sent go"),
        (["prune", "--older-than", "0s", "--compact"], "deleted 3 executions"),
    ):
        code, output = nexum(*arguments, "--database-url", url)
        assert code == 0, output
        assert said in output


def test_commands_for_files_name_the_program_to_use(
    nexum: Command, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    with nexum_server(tmp_path, database_url=url) as server:
        for arguments, program in (
            (["backup", "copy.db", "--nexum", server.address], "pg_dump"),
            (["backup", "copy.db", "--database-url", url], "pg_dump"),
            (["restore", "copy.db"], "pg_restore"),
            (["restore", "copy.db", "--database-url", url], "pg_restore"),
            (["check"], "pg_amcheck"),
        ):
            code, output = nexum(*arguments)
            assert code == 1
            assert program in output
            assert output.strip().count("\n") == 0


def test_cancel_in_the_database_ends_a_wait_on_a_server(
    nexum: Command, tmp_path: Path, url: str, begun_waits: queue.SimpleQueue[str]
) -> None:
    with server_thread(tmp_path, database_url=url) as server, connected(server.address) as stub:
        register(stub, {"a": []})
        execution_id = start(stub)
        waiting = stub.GetExecution.future(pb.GetExecutionRequest(execution_id=execution_id, wait_ms=25_000))
        assert begun_waits.get(timeout=DEADLINE) == execution_id
        assert nexum("cancel", execution_id, "--database-url", url)[0] == 0
        assert waiting.result(10).status == "CANCELLED"


def test_dump_of_postgresql_is_restored_into_an_empty_database(tmp_path: Path, url: str, nexum: Command) -> None:
    ids = asyncio.run(begun(url))
    shown = [nexum("show", one, "--json", "--database-url", url) for one in ids]
    dump = tmp_path / "nexum.dump"
    subprocess.run([program("pg_dump"), "--format=custom", "--file", dump, url], check=True)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS restored")
        connection.execute("CREATE DATABASE restored")
    name = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
    restored = url.replace(f"/{name}?", "/restored?")
    assert restored != url
    subprocess.run([program("pg_restore"), "--exit-on-error", "--dbname", restored, dump], check=True)
    assert [nexum("show", one, "--json", "--database-url", restored) for one in ids] == shown
    nexum("cancel", ids[1], "--database-url", restored)
    assert nexum("show", ids[1], "--json", "--database-url", restored) != shown[1]

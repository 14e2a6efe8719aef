"""A program that opens the database itself is a server: others can connect to it, and it survives the same faults."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from harness import ROOT, Process, logged, running
from processes import command_line, counting_worker

from nexum_engine import in_process
from nexum_engine.client import NexumClient
from nexum_engine.commands import look
from nexum_engine.embedded import EmbeddedNexum
from nexum_engine.errors import NexumError, ServerNotReady
from nexum_engine.owner import Owner
from nexum_engine.store.sqlite_file import DatabaseFile
from nexum_engine.workflow import workflow

PROGRAM = str(ROOT / "tests" / "programs" / "hosting_program.py")
OPENED = "this program opened the database"
EVENT = workflow("event").effect("a").build()
on_posix = pytest.mark.skipif(sys.platform == "win32", reason="forks, and signals")


@contextmanager
def program(folder: Path, *arguments: object) -> Iterator[Process]:
    with running([PROGRAM, *map(str, arguments)], cwd=folder, forked=True) as process:
        yield process
    assert "Traceback" not in process.output, process.output


def run(folder: Path, *arguments: object) -> tuple[int, str]:
    with program(folder, *arguments) as process:
        code = process.wait()
    return code, process.output


def recorded(folder: Path) -> set[str]:
    """Return the keys of the events that a reader of the folder finds."""
    listed: list[dict[str, Any]] = json.loads(
        asyncio.run(
            look(
                command_line("ps", "--json", "--limit", "1000", "--database-url", f"sqlite:///{folder}/.nexum/local.db")
            )
        )
    )
    return {one["idempotency_key"] for one in listed if one["status"] == "COMPLETED"}


def acknowledged(*outputs: str) -> set[str]:
    return {line.split()[1] for output in outputs for line in output.splitlines() if line.startswith("RECORDED ")}


def address_file(folder: Path) -> Path:
    return folder / ".nexum" / "local.db.address"


# ---- Nothing to start ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["several", pytest.param("on_uvloop", marks=on_posix)])
def test_program_in_an_empty_folder_records_and_leaves_a_closed_database(tmp_path: Path, mode: str) -> None:
    code, output = run(tmp_path, mode, "e", 5)
    assert (code, acknowledged(output)) == (0, {f"e-{number}" for number in range(1, 6)})
    assert output.count(OPENED) == 1
    left = {path.name for path in (tmp_path / ".nexum").iterdir()}
    assert left - {"local.db.lock"} == {".gitignore", "local.db"}  # on Windows, the lock's release deletes its file
    assert recorded(tmp_path) == acknowledged(output)


def test_event_loops_and_threads_of_a_program_share_one_server(tmp_path: Path) -> None:
    code, output = run(tmp_path, "threads", "t")
    assert (code, len(acknowledged(output)), output.count(OPENED)) == (0, 80, 1)
    assert recorded(tmp_path) == acknowledged(output)


def test_killed_program_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    outputs = []
    for number in range(4):
        with program(tmp_path, "several", f"k{number}", 100_000) as process:
            process.wait_for(f"RECORDED k{number}-{1 + 7 * number}")
            process.kill()
            process.wait()
        outputs.append(process.output)
    code, output = run(tmp_path, "several", "last", 1)
    assert code == 0
    missing = acknowledged(*outputs, output) - recorded(tmp_path)
    assert not missing


# ---- Others in the same folder ---------------------------------------------------------------------------------------


def command(folder: Path, *arguments: str) -> str:
    with running(["-m", "nexum_engine", *arguments], cwd=folder, forked=True) as process:
        assert process.wait() == 0, process.output
    return process.output


def test_commands_and_workers_reach_a_program_whose_event_loop_is_blocked(tmp_path: Path) -> None:
    gate, database = tmp_path / "gate", str(tmp_path / ".nexum" / "local.db")
    with program(tmp_path, "blocked", "b", gate) as host:
        host.wait_for("RECORDED b-1")
        assert "COMPLETED" in command(tmp_path, "ps")
        with counting_worker(tmp_path, database):
            submit = [
                str(ROOT / "tests" / "programs" / "submitter.py"),
                "default",
                "60",
                "count_effect",
                json.dumps({"log": str(tmp_path / "log"), "number": 1}),
            ]
            with running(submit, cwd=tmp_path, forked=True) as caller:
                assert caller.wait() == 0, caller.output
        code, output = run(tmp_path, "several", "c", 5)
        assert (code, OPENED in output) == (0, False)
        gate.touch()
        assert host.wait() == 0
    assert recorded(tmp_path) >= acknowledged(host.output, output)
    assert (tmp_path / "log").exists()


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "ended"])
def test_second_program_goes_on_when_the_host_is_gone(tmp_path: Path, is_killed: bool) -> None:
    gates = tmp_path / "one", tmp_path / "other"
    with program(tmp_path, "several", "one", 1, gates[0]) as one:
        one.wait_for("RECORDED one-1")
        with program(tmp_path, "several", "other", 1, gates[1]) as other:
            other.wait_for("RECORDED other-3")
            assert OPENED not in other.output
            if is_killed:
                one.kill()
            else:
                gates[0].touch()
            one.wait()
            other.wait_for(f"the server does not answer: {OPENED}")
            other.wait_for("RECORDED")
            gates[1].touch()
            assert other.wait() == 0
    assert not acknowledged(one.output, other.output) - recorded(tmp_path)


# ---- Ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "code", "is_closed"),
    [("exit", 7, True), ("os._exit", 7, False), ("unclosed", 0, True)],
)
def test_program_may_end_anyhow(tmp_path: Path, how: str, code: int, is_closed: bool) -> None:
    got, output = run(tmp_path, "ends", how)
    assert (got, acknowledged(output)) == (code, {how})
    assert [line for line in output.splitlines() if OPENED not in line] == [f"RECORDED {how}"]
    assert address_file(tmp_path).exists() is not is_closed
    assert run(tmp_path, "several", "again", 1)[0] == 0
    assert recorded(tmp_path) == {how, "again-1"}


def test_thread_records_on_after_the_end_of_the_main_thread(tmp_path: Path) -> None:
    code, output = run(tmp_path, "main_ends", "m")
    assert (code, len(acknowledged(output)), address_file(tmp_path).exists()) == (0, 9, False)
    assert recorded(tmp_path) == acknowledged(output)


@on_posix
def test_ctrl_c_ends_the_program_and_closes_the_database(tmp_path: Path) -> None:
    with running([PROGRAM, "ends", "wait"], cwd=tmp_path) as process:
        process.wait_for("RECORDED wait")
        process.interrupt()
        assert process.wait() != 0
    assert process.lines[-1] == "KeyboardInterrupt"
    assert "nexum" not in process.output.partition("Traceback")[2].replace(str(ROOT), "")
    assert not address_file(tmp_path).exists()


# ---- Forks -----------------------------------------------------------------------------------------------------------


@on_posix
def test_forked_child_records_over_tcp_and_leaves_the_parents_database_alone(tmp_path: Path) -> None:
    code, output = run(tmp_path, "forks", "f")
    assert (code, output.count(OPENED)) == (0, 1)
    assert acknowledged(output) == {"f-parent-1", "f-child", "f-parent-2"} == recorded(tmp_path)


@on_posix
def test_forked_child_that_outlives_the_program_does_not_hold_the_database(tmp_path: Path) -> None:
    with program(tmp_path, "orphan", "o") as process:
        orphan = int(process.wait_for("ORPHAN").split()[1])
        process.popen.kill()
        process.popen.wait()
        try:
            code, output = run(tmp_path, "several", "next", 1)
            os.kill(orphan, 0)  # raises an error if it has ended
        finally:
            os.kill(orphan, signal.SIGKILL)
    assert (code, acknowledged(output)) == (0, {"next-1"})


@on_posix
def test_forked_child_without_a_server_says_what_to_do(tmp_path: Path) -> None:
    code, output = run(tmp_path, "forked_without_a_server", "n")
    assert code == 0
    assert (
        "ERROR no Nexum server answers, and a forked process can't open the database itself: start a server" in output
    )


# ---- In this process -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("NEXUM_ADDRESS", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


async def test_program_whose_threads_are_greenlets_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Monkey patching by gevent runs all threads in one thread of the system. Without the refusal, the program hangs.
    monkeypatch.setattr("threading.get_native_id", lambda: 1)
    with pytest.raises(NexumError, match="threads are greenlets of gevent or eventlet"):
        async with EmbeddedNexum(None, owners=True):
            pass


async def test_recorded_event_costs_one_commit_and_no_grpc_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits: list[None] = []
    commit = DatabaseFile.commit

    def counted(file: DatabaseFile) -> None:
        commits.append(None)
        commit(file)

    async with EmbeddedNexum(None, owners=True) as nexum:
        monkeypatch.setattr(grpc.aio, "insecure_channel", None)  # so that a connection over gRPC raises TypeError
        async with NexumClient(nexum.address) as client, Owner(client) as owner:
            await owner.record(EVENT, {}, {"n": 0}, idempotency_key="0")
            monkeypatch.setattr(DatabaseFile, "commit", counted)
            for number in range(1, 51):
                await owner.record(EVENT, {}, {"n": number}, idempotency_key=str(number))
            assert len(commits) <= 50 + 2  # the sweep and a heartbeat may commit, too


async def test_full_database_acknowledges_nothing_and_recovers(folder: Path) -> None:
    async with EmbeddedNexum(None, owners=True) as nexum, NexumClient(nexum.address) as client, Owner(client) as owner:
        (server,) = in_process._servers.values()
        database = server._servicer._store._database  # type: ignore[attr-defined]

        def limit(pages: int) -> None:
            database.connection.execute(f"PRAGMA max_page_count = {pages}")

        await owner.record(EVENT, {}, {}, idempotency_key="before")
        pages = database.connection.execute("PRAGMA page_count").fetchone()[0]
        limit(pages + 10)
        with pytest.raises(ServerNotReady):
            await client.start_execution(EVENT, {"big": "x" * 1_000_000}, idempotency_key="big")
        limit(1_000_000)
        await owner.record(EVENT, {}, {}, idempotency_key="after")
        keys = {one.idempotency_key for one in await client.list_executions()}
        assert keys == {"before", "after"}


async def test_second_block_of_a_process_keeps_the_server_of_the_first(folder: Path) -> None:
    lines: list[str] = []
    with logged(lines, "nexum_engine"):
        first, second = EmbeddedNexum(None), EmbeddedNexum(None, owners=True)
        async with EmbeddedNexum(None) as third:
            await first.__aenter__()
            assert first.embedded
        async with NexumClient(third.address) as client:
            await client.ping()
            await first.__aexit__(None)
            async with second:
                await client.ping(patience=5)
    assert [OPENED in line for line in lines] == [True, True]
    assert not in_process._servers


async def test_threads_end_with_the_last_block_and_the_opening_is_logged_once(folder: Path) -> None:
    import threading

    lines: list[str] = []
    before = set(threading.enumerate())
    with logged(lines, "nexum_engine"):
        for _ in range(5):
            async with EmbeddedNexum(None):
                assert {one.name for one in set(threading.enumerate()) - before} >= {"nexum"}
    left = {one.name for one in set(threading.enumerate()) - before}
    assert not {name for name in left if name.startswith("nexum")}
    assert lines
    assert all(OPENED in line for line in lines)
    # Another line only tells that another program has taken or left the default port meanwhile.
    reasons = [line.partition(": ")[0] for line in lines]
    assert all(reason != next_reason for reason, next_reason in itertools.pairwise(reasons))

"""`nexum ps` with filters and --watch, `nexum show --follow`, and `nexum retry`."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import Server, environment, free_port, nexum_server, running
from nexum_wire import DEADLINE, complete, connected, poll, register
from processes import Command, InProcess, command_line, run_script
from server_thread import ServerThread, server_thread

from nexum_engine import server_or_database
from nexum_engine.__main__ import main
from nexum_engine.commands import look
from nexum_engine.errors import StoreLocked
from nexum_engine.location import remove_address, write_address
from nexum_engine.screen import Screen
from nexum_engine.store import Store, open_store
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.wire.nexum_pb2_grpc import NexumServiceStub

WIDTH = 80


@pytest.fixture
def stub(server: ServerThread) -> Iterator[NexumServiceStub]:
    with connected(server.address) as connection:
        register(connection, {"a": [], "b": ["a"]})
        yield connection


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with nexum_server(tmp_path_factory.mktemp("nexum")) as running:
        yield running


def listed(server: ServerThread, *arguments: str) -> list[str]:
    """Return the ids that `ps` lists, and check that its table has the same ids. Run `ps` in this process."""
    where = ("--nexum", server.address)
    ids = [
        one["execution_id"] for one in json.loads(asyncio.run(look(command_line("ps", *arguments, "--json", *where))))
    ]
    output = asyncio.run(look(command_line("ps", *arguments, *where)))
    lines = output.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert [line.split()[0] for line in lines[1:]] == ids if ids else output == "no executions"
    return ids


def begin(stub: NexumServiceStub, **fields: Any) -> str:
    request = pb.StartRequest(workflow_id="w", version_hash="v1", input_json='{"q": 1}', **fields)
    return str(stub.StartExecution(request, timeout=DEADLINE).execution_id)


def fail(stub: NexumServiceStub) -> str:
    task = poll(stub)
    request = pb.FailRequest(task_id=task.task_id, error_message="it broke", final=True)
    stub.FailTask(request, timeout=DEADLINE)
    return str(task.node_id)


def test_ps_filters(server: ServerThread, stub: NexumServiceStub) -> None:
    failed = begin(stub, attributes={"customer": "c-17", "env": "prod"})
    fail(stub)
    other = begin(stub, attributes={"customer": "c-18", "env": "prod"}, idempotency_key="k/1")
    assert listed(server, "--status", "FAILED", "--since", "2h", "--attr", "customer=c-17") == [failed]
    assert listed(server, "--attr", "env=prod") == [other, failed]
    assert listed(server, "--attr", "env=prod", "--attr", "customer=c-18") == [other]
    assert listed(server, "--workflow", "w", "--key", "k/") == [other]
    assert listed(server, "--until", "2h") == []
    assert listed(server, "--since", "2020-01-31T12:00Z", "--until", "2999-01-01", "--limit", "1") == [other]
    assert listed(server, "--since", "2999-01-01") == []
    shown = asyncio.run(look(command_line("show", failed, "--nexum", server.address)))
    assert "\nattributes customer=c-17, env=prod\n" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--since", "soon"], 2, "argument --since: 'soon' is not a time: give an age (30s, 15m, 2h, 7d) or a date"),
        (["--until", "9" * 30 + "d"], 2, "is not a time"),
        (["--since", "0001-01-01"], 2, "is not a time"),
        (["--attr", "customer"], 2, "argument --attr: 'customer' is not an attribute: give NAME=VALUE"),
        (["--attr", "=c"], 2, "give NAME=VALUE"),
        (["--attr", "a=1", "--attr", "a=2"], 2, "--attr names 'a' twice"),
        (["--status", "done"], 1, "unknown status 'DONE'"),
        (["--watch", "--database-url", "sqlite:///x.db"], 1, "--watch and --follow need a server"),
    ],
)
def test_wrong_filter_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], shared: Server, arguments: list[str], code: int, words: str
) -> None:
    try:
        found = main(["ps", "--nexum", shared.address, *arguments])
    except SystemExit as ended:  # raised by argparse
        found = int(str(ended.code))
    printed, said = capsys.readouterr()
    assert (found, printed, words in said.splitlines()[-1]) == (code, "", True), said


# ---- Watching --------------------------------------------------------------------------------------------------------


def test_watch_prints_what_changes_and_ends_with_130(
    tmp_path: Path, server: ServerThread, stub: NexumServiceStub
) -> None:
    first = begin(stub)
    with running(
        ["-m", "nexum_engine", "ps", "--watch", "--nexum", server.address], cwd=tmp_path, forked=True
    ) as watching:
        assert "RUNNING" in watching.wait_for(first)
        second = begin(stub)
        assert "RUNNING" in watching.wait_for(second)
        fail(stub)
        assert "FAILED" in watching.wait_for(first)
        watching.interrupt()
        assert watching.wait(10) == 130
    assert [line.split()[:2] for line in watching.lines[1:]] == [
        [first, "RUNNING"],
        [second, "RUNNING"],
        [first, "FAILED"],
    ]
    assert watching.lines[0].split() == ["EXECUTION", "STATUS", "STARTED", "WORKFLOW"]


@pytest.mark.sqlite
def test_watch_continues_with_the_next_server(tmp_path: Path) -> None:
    """An embedded server ends with its run. Then the next run's server opens the same database."""
    where = {"DATABASE_URL": f"sqlite:///{tmp_path / 'nexum.db'}"}
    with nexum_server(tmp_path) as server, connected(server.address) as stub:
        register(stub, {"a": []})
        first = begin(stub)
    with running(["-m", "nexum_engine", "ps", "--watch"], cwd=tmp_path, env=where, forked=True) as watching:
        watching.wait_for(first)
        watching.wait_for("no server or run is active here: this shows the changes when one is")
        with nexum_server(tmp_path) as server, connected(server.address) as stub:
            watching.wait_for(begin(stub))
        watching.interrupt()
        assert watching.wait(10) == 130
    assert watching.output.count(first) == 1


@pytest.mark.sqlite
@pytest.mark.parametrize("command", ["show", "show --follow"])
def test_command_asks_the_server_of_a_run_that_is_just_opening_the_database(
    command: str, tmp_path: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, refusals = tmp_path / "nexum.db", []
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{path}")
    with server_thread(tmp_path) as server, connected(server.address) as stub:
        register(stub, {"a": []})
        execution = begin(stub)
        complete(stub, poll(stub))
        remove_address(path, server.address)  # as if the server didn't listen yet

        async def opened(*args: Any, **options: Any) -> Store:
            try:
                return await open_store(*args, **options)
            except StoreLocked as refusal:
                refusals.append(refusal)
                write_address(path, server.address)
                raise

        monkeypatch.setattr(server_or_database, "open_store", opened)
        code, output = in_process(main, *command.split(), execution)
    assert len(refusals) == 1
    assert code == 0
    assert "COMPLETED" in output


def test_note_is_shown_below_a_view_that_is_higher_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "5")
    monkeypatch.setenv("TERM", "xterm")
    drawn: list[str] = []
    screen = Screen(drawn.append, in_place=True)
    screen.show([f"row {n}" for n in range(9)], [])
    screen.note("nobody is here")
    shown = [[line for line in re.split(r"\x1b\[\??\d*[A-Za-z]|\n", text) if line] for text in drawn]
    assert shown == [["row 0", "row 1", "row 2", "row 3"], ["row 0", "row 1", "row 2", "nobody is here"]]


def test_watch_of_a_named_server_that_does_not_answer_fails(tmp_path: Path) -> None:
    command = ["-m", "nexum_engine", "ps", "--watch", "--nexum", f"127.0.0.1:{free_port()}"]
    code, output = run_script(command, tmp_path, forked=True)
    assert (code, output.startswith("error: no Nexum server answers on")) == (2, True)


def test_json_of_watch_is_a_line_for_each_change(tmp_path: Path, server: ServerThread, stub: NexumServiceStub) -> None:
    first = begin(stub)
    command = ["-m", "nexum_engine", "ps", "--watch", "--json", "--nexum", server.address]
    with running(command, cwd=tmp_path, forked=True) as watching:
        assert json.loads(watching.wait_for(first))["status"] == "RUNNING"
        fail(stub)
        assert json.loads(watching.wait_for("FAILED"))["execution_id"] == first


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("command", ["ps", "show"])
def test_terminal_is_redrawn_in_place(
    tmp_path: Path, server: ServerThread, stub: NexumServiceStub, command: str
) -> None:
    import pty

    first = begin(stub)
    arguments = ["ps", "--watch"] if command == "ps" else ["show", first, "--follow"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "nexum_engine", *arguments, "--nexum", server.address],
        cwd=tmp_path,
        env=environment({"TERM": "xterm"}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    ) as process:
        os.close(theirs)
        seen = b""

        def read_until(text: bytes) -> None:
            nonlocal seen
            while text not in seen:
                seen += os.read(ours, 65536)

        read_until(b"RUNNING")
        fail(stub)
        read_until(b"FAILED")
        if command == "ps":
            process.send_signal(2)
        assert process.wait(20) == (130 if command == "ps" else 1)
    with suppress(OSError):  # Linux raises EIO at the end of the output
        while more := os.read(ours, 65536):
            seen += more
    os.close(ours)
    # Each redrawing begins where the previous one began, and ends with wrapping on and the cursor below the text.
    drawn = seen.decode().split("\x1b[?7l")
    height = [one.count("\n") for one in drawn[1:]]
    for before, (one, following) in zip(height, itertools.pairwise(drawn[1:]), strict=False):
        assert one.endswith(f"\x1b[?7h\x1b[J\r\n\x1b[{before}F")
        assert following.count("\x1b[?7h") == 1
    assert "Traceback" not in seen.decode()


# ---- show --follow ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "code"), [("COMPLETED", 0), ("FAILED", 1), ("CANCELLED", 1)])
def test_follow_prints_what_happens_until_the_end(
    tmp_path: Path, server: ServerThread, stub: NexumServiceStub, status: str, code: int
) -> None:
    execution_id = begin(stub)
    command = ["-m", "nexum_engine", "show", execution_id, "--follow", "--nexum", server.address]
    with running(command, cwd=tmp_path, forked=True) as following:
        following.wait_for(f"{execution_id} started")
        complete(stub, poll(stub))
        following.wait_for("a is COMPLETED")
        if status == "COMPLETED":
            complete(stub, poll(stub))
        elif status == "FAILED":
            fail(stub)
        else:
            stub.CancelExecution(pb.CancelRequest(execution_id=execution_id), timeout=DEADLINE)
        following.wait_for(f"{execution_id} is {status}")
        assert following.wait(10) == code
    assert len(set(following.lines)) == len(following.lines)
    assert max(map(len, following.lines)) <= WIDTH
    assert any(re.match(r"a attempt 1 COMPLETED after \d+\.\d\d s", line) for line in following.lines)
    assert ("    it broke" in following.lines) == (status == "FAILED")


def test_follow_of_unknown_execution_fails(tmp_path: Path, server: ServerThread) -> None:
    follow = ["-m", "nexum_engine", "show", "exec-9", "--follow", "--nexum", server.address]
    code, output = run_script(follow, tmp_path, forked=True)
    assert (code, output) == (1, "error: no execution 'exec-9' in this server's database")


def test_show_of_session_says_which_command_shows_it(tmp_path: Path, server: ServerThread) -> None:
    command = ["-m", "nexum_engine", "show", "order-1", "--nexum", server.address]
    code, output = run_script(command, tmp_path, forked=True)
    assert (code, output) == (
        1,
        "error: no execution 'order-1' in this server's database; "
        "if order-1 is a durable session: python -m durable_autogen show order-1",
    )


def test_follow_of_ended_execution_needs_no_server(tmp_path: Path) -> None:
    url = harness.url_of(tmp_path)
    with server_thread(tmp_path, database_url=url) as server, connected(server.address) as stub:
        register(stub, {"a": []})
        execution_id = begin(stub)
        complete(stub, poll(stub))
    where = {"DATABASE_URL": url}
    code, output = run_script(["-m", "nexum_engine", "show", execution_id, "--follow"], tmp_path, where, forked=True)
    assert (code, output.splitlines()[-1]) == (0, f"{execution_id} is COMPLETED")


# ---- retry -----------------------------------------------------------------------------------------------------------


def test_retry_with_and_without_server(tmp_path: Path, nexum: Command) -> None:
    url = harness.url_of(tmp_path)
    with server_thread(tmp_path, database_url=url) as server, connected(server.address) as stub:
        register(stub, {"a": [], "b": ["a"]})
        execution_id = begin(stub)
        complete(stub, poll(stub))
        assert nexum("retry", execution_id, "--nexum", server.address) == (
            0,
            f"{execution_id} is RUNNING: there is nothing to retry",
        )
        assert fail(stub) == "b"
        assert nexum("retry", execution_id, "--nexum", server.address) == (0, f"{execution_id} is RUNNING again")
        assert fail(stub) == "b"
        code, output = nexum("retry", "exec-9", "--nexum", server.address)
        assert (code, output) == (1, "error: no execution 'exec-9' in this server's database")
    assert nexum("retry", execution_id, "--database-url", url) == (0, f"{execution_id} is RUNNING again")
    with server_thread(tmp_path, database_url=url) as server, connected(server.address) as stub:
        task = poll(stub, wait_ms=20_000)
        assert (task.node_id, task.attempt) == ("b", 3)

"""submit_task.py: one durable call from any kind of program, also while servers and workers end and restart."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from harness import KILLED, ROOT, Process, nexum_server, running, tool_worker
from nexum_wire import connected, register, start
from processes import (
    attempts,
    call_of,
    counting_worker,
    effects,
    recorded,
    result_of,
    submitter,
    wait_until,
)
from server_thread import ServerThread, server_thread

import submit_task
from nexum_engine.client import NexumClient, Observed, Started
from nexum_engine.errors import ExecutionNotFound, InvalidRequest, ServerNotReady, ServerUnavailable, WaitTimeout
from nexum_engine.records import Attempt, Execution, ExecutionStatus, Node, NodeStatus, NodeType, Outcome
from nexum_engine.server import Limits
from submit_task import Origin, Session, ToolCallFailed, call_key, submit_tool_call, submit_tool_call_async
from support import notices
from workflow import OFFLINE_TOOL_CALL

MANY_LOOPS = """
import asyncio, sys, weakref
from submit_task import submit_tool_call_async

loops = []

async def call(log, number):
    loops.append(weakref.ref(asyncio.get_running_loop()))
    await submit_tool_call_async("count_effect", {"log": log, "number": number}, f"session-{number}")

for number in range(5):
    asyncio.run(call(sys.argv[1], number))
print("LOOPS", sum(loop() is not None for loop in loops))
"""
MANY_SESSIONS = """
import sys, threading
from submit_task import submit_tool_call


seen = []
for number in range(20):
    submit_tool_call("count_effect", {"log": sys.argv[1], "number": number}, f"session-{number}")
    seen.append(sum(not isinstance(one, threading.Timer) for one in threading.enumerate()))
print("THREADS", seen[-1] - seen[0])
"""


@pytest.fixture
def address(server: ServerThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a server with a worker. The test's own process works in their folder, and uses this server by default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEXUM_ADDRESS", server.address)
    with counting_worker(tmp_path, server.address):
        yield server.address


def number_of(result: str) -> int:
    return int(result.partition(" ")[0])


# ---- The key ---------------------------------------------------------------------------------------------------------


def test_the_key_is_the_sha256_that_the_readme_names() -> None:
    # printf '%s' 'web_search{"max_results":5,"query":"Tökyo"}' | sha256sum
    expected = "0ad6d4d0c09b1c6a120539f8ceaa82b819e201e5435fe1c4f8e4b2a9b4137ea4"
    assert call_key("web_search", {"query": "Tökyo", "max_results": 5}) == expected


def test_the_order_of_arguments_does_not_matter_and_their_types_do() -> None:
    assert call_key("t", {"a": 1, "b": 2}) == call_key("t", {"b": 2, "a": 1})
    assert call_key("t", {"a": 1}) != call_key("t", {"a": "1"})
    assert call_key("t", {"a": 1}) != call_key("t", {"a": True})
    assert call_key("t", {}) != call_key("u", {})


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"x", "\ud800"], ids=["NaN", "set", "bytes", "lone surrogate"])
def test_arguments_that_are_not_json_are_refused(value: object) -> None:
    with pytest.raises(InvalidRequest, match="the arguments of t can't be written as JSON"):
        call_key("t", {"value": value})


# ---- Results ---------------------------------------------------------------------------------------------------------


@pytest.mark.every_python
@pytest.mark.usefixtures("address")
def test_repeated_synchronous_call_returns_the_recorded_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"log": str(tmp_path / "log"), "number": 7}
    first = submit_tool_call("count_effect", arguments, "s")
    assert number_of(first) == 7
    output = capsys.readouterr().out
    assert re.fullmatch(r"\[Nexum\] Submitted (exec-\S+) \(count_effect\)\n\[Nexum\] \1 .* done ✓\n", output)
    assert submit_tool_call("count_effect", arguments, "s") == first
    assert re.fullmatch(
        r"\[Nexum\] exec-\S+ \(count_effect\) already COMPLETED \(cached\) ✓\n", capsys.readouterr().out
    )
    assert len(effects(tmp_path / "log")) == 1


@pytest.mark.every_python
@pytest.mark.usefixtures("address")
def test_threads_that_make_the_same_call_share_one_execution(tmp_path: Path) -> None:
    arguments = {"log": str(tmp_path / "log"), "number": 1}
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: submit_tool_call("count_effect", arguments, "s"), range(8)))
    assert len(set(results)) == 1
    assert len(effects(tmp_path / "log")) == 1


@pytest.mark.every_python
async def test_async_code_makes_calls_at_the_same_time(tmp_path: Path, address: str) -> None:
    log = str(tmp_path / "log")
    results = await asyncio.gather(
        *(submit_tool_call_async("count_effect", {"log": log, "number": n}, "s") for n in range(6))
    )
    assert [number_of(one) for one in results] == list(range(6))


@pytest.mark.every_python
@pytest.mark.usefixtures("address")
def test_one_event_loop_after_the_other_can_be_used(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    for number in (1, 1, 2):
        result = asyncio.run(submit_tool_call_async("count_effect", {"log": log, "number": number}, "s"))
        assert number_of(result) == number
    assert len(effects(tmp_path / "log")) == 2


# Run these programs in separate processes. In this process, another test may have a connection open, and while one
# event loop has a connection, gRPC keeps all event loops alive.
@pytest.mark.every_python
@pytest.mark.parametrize(
    ("program", "left"), [(MANY_LOOPS, "LOOPS 1"), (MANY_SESSIONS, "THREADS 0")], ids=["loops", "sessions"]
)
def test_calls_in_many_loops_or_sessions_leave_nothing_behind(
    tmp_path: Path, address: str, program: str, left: str
) -> None:
    with running(["-c", program, str(tmp_path / "log")], cwd=tmp_path, env={"NEXUM_ADDRESS": address}) as process:
        assert process.wait() == 0, process.output
    assert process.lines[-1] == left


@pytest.mark.usefixtures("address")
def test_different_sessions_and_scopes_have_different_executions(tmp_path: Path) -> None:
    arguments = {"log": str(tmp_path / "log"), "number": 1}
    results = [
        submit_tool_call("count_effect", arguments, session, scope=scope)
        for session, scope in (("a", ""), ("b", ""), ("a", "reply 1"), ("a", "reply 2"), ("a", "reply 1"))
    ]
    assert results[2] == results[4]
    assert len(set(results)) == 4
    assert len(effects(tmp_path / "log")) == 4


async def test_a_live_call_is_never_answered_with_an_offline_result(tmp_path: Path, server: ServerThread) -> None:
    with tool_worker(tmp_path, server.address):
        offline = Session("s", nexum=server.address, workflow=OFFLINE_TOOL_CALL)
        result = await offline.call("web_search", {"query": "population of Tokyo"})
        assert result.origin is Origin.EXECUTED
        assert "offline.example" in result.text
    live = Session("s", nexum=server.address)
    with pytest.raises(WaitTimeout):
        await live.call("web_search", {"query": "population of Tokyo"}, timeout=0.2)
    await offline.close()
    await live.close()


def test_fifty_calls_from_two_processes_leave_one_valid_session_file(tmp_path: Path, address: str) -> None:
    log = str(tmp_path / "log")
    calls = [{"log": log, "number": n} for n in range(25)]
    more = [{"log": log, "number": n} for n in range(25, 50)]
    with submitter(tmp_path, address, "count_effect", *calls) as one:
        with submitter(tmp_path, address, "count_effect", *more) as other:
            assert other.wait() == 0, other.output
        assert one.wait() == 0, one.output
    session = tmp_path / ".session-s.json"
    entries = json.loads(session.read_text())["executions"]["tool-call"]
    assert entries == {call_key(*call_of(one)): one["execution_id"] for one in recorded(tmp_path, address)}
    assert len(entries) == 50
    assert session.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.glob(".session*")) == [session.name, f"{session.name}.lock"]
    assert len(effects(tmp_path / "log")) == 50


# ---- Against a stand-in for the server -------------------------------------------------------------------------------


class StandIn(NexumClient):
    """A client that takes its answers from `answers`, one after the other, and notes how long each call may wait."""

    def __init__(self, *answers: Execution | Exception) -> None:
        super().__init__("127.0.0.1:1")
        self.answers = list(answers)
        self.waits: list[float] = []
        self.patience: list[float] = []

    async def start_execution(self, *_: object, patience: float = 0.0, **__: object) -> Started:
        self.patience.append(patience)
        self.answer()
        return Started("exec-1", existing=True, status=ExecutionStatus.RUNNING, ended=None)

    async def get_execution(self, *_: object, wait: float = 0.0, **__: object) -> Observed:
        self.waits.append(wait)
        return Observed(self.answer(), has_poller=True)

    def answer(self) -> Execution:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def execution(status: ExecutionStatus) -> Execution:
    return Execution(
        execution_id="exec-1",
        workflow_id="tool-call",
        version_hash="v",
        status=status,
        input_json="{}",
        idempotency_key="k",
        created_ms=0,
        ended_ms=None,
        error="",
    )


RUNNING, CANCELLED = execution(ExecutionStatus.RUNNING), execution(ExecutionStatus.CANCELLED)


async def test_wait_is_explained_after_a_second_and_every_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    gone = ServerUnavailable("gone")
    client = StandIn(gone, gone, gone, RUNNING, RUNNING, RUNNING, CANCELLED)
    async with client, Session("s", client=client, tell=told.append) as session:
        with pytest.raises(ToolCallFailed, match="cancelled"):
            await session.call("t", {})
    first, often = submit_task.FIRST_NOTICE, submit_task.NOTICE_EVERY
    assert client.patience == [first, often, often, often]
    assert client.waits == [first, often, often]
    assert len(told) == 3 + 1 + 2 + 1
    assert all(line.startswith("[Nexum] ") for line in told)


async def test_server_that_forgets_executions_is_asked_until_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    client = StandIn(RUNNING, ExecutionNotFound("exec-1"), RUNNING, ExecutionNotFound("exec-1"))
    async with client, Session("s", client=client) as session:
        with pytest.raises(ExecutionNotFound):
            await session.call("t", {}, timeout=0)
    assert len(client.waits) == 1


async def test_wait_for_a_person_pauses_between_questions_even_without_a_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    lost = Attempt(attempt=1, worker_id="w", started_ms=0, ended_ms=1, outcome=Outcome.UNKNOWN, error="gone")
    node = Node("tool_call", NodeType.EFFECT, NodeStatus.WAITING, output_json=None, error="", attempts=(lost,))
    unknown = replace(RUNNING, nodes=(node,))
    client = StandIn(RUNNING, unknown, unknown, unknown, CANCELLED)
    async with client, Session("s", client=client, tell=told.append) as session:
        with pytest.raises(ToolCallFailed, match="cancelled"):
            await session.call("t", {}, timeout=0)
    often = submit_task.NOTICE_EVERY
    assert client.waits == [0, often, often, often]
    assert sum("is UNKNOWN" in line for line in told) == 1


@pytest.mark.every_python
def test_interrupted_caller_leaves_no_task_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, ended = threading.Event(), threading.Event()

    async def wait(*_: object) -> str:
        try:
            waiting.set()
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ""

    def interrupt(_: object) -> str:
        waiting.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(submit_task, "submit_tool_call_async", wait)
    monkeypatch.setattr(Future, "result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        submit_tool_call("t", {})
    assert ended.wait(10)


# ---- Failures --------------------------------------------------------------------------------------------------------


def test_failed_tool_raises_its_reason_and_is_restarted_with_the_same_key(
    tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    arguments = {"log": str(log), "gate": str(gate)}
    with pytest.raises(ToolCallFailed, match="fail_until failed: the gate is closed ✗"):
        submit_tool_call("fail_until", arguments, "s")
    gate.touch()
    assert submit_tool_call("fail_until", arguments, "s") == "the gate is open"
    assert "(fail_until) was FAILED: starting it again" in capsys.readouterr().out
    assert [one["status"] for one in recorded(tmp_path, address)] == ["FAILED", "COMPLETED"]
    first, second = effects(log)
    assert first.key == second.key != ""


async def test_cancelled_call_raises_and_is_restarted(tmp_path: Path, address: str) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    arguments = {"log": str(log), "gate": str(gate)}
    session = Session("s", nexum=address)
    waiting = asyncio.create_task(session.call("effect_then_gate", arguments))
    await asyncio.to_thread(wait_until, lambda: bool(effects(log)), "the tool runs")
    async with NexumClient(address) as client:
        (execution,) = await client.list_executions()
        await client.cancel_execution(execution.execution_id)
    with pytest.raises(ToolCallFailed, match="effect_then_gate failed: the execution was cancelled"):
        await waiting
    await asyncio.to_thread(gate.touch)
    assert (await session.call("effect_then_gate", arguments)).origin is Origin.EXECUTED
    await session.close()
    assert len({effect.key for effect in effects(log)}) == 1


async def test_timeout_leaves_the_execution_running_and_a_later_call_attaches(
    tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    arguments = {"log": str(log), "gate": str(gate)}
    session = Session("s", nexum=address)
    for said in ("Submitted", "already RUNNING, attached"):
        with pytest.raises(
            WaitTimeout, match=r"has no result after 0\.3 s\. Execution \S+ continues; make the same call again"
        ):
            await session.call("effect_then_gate", arguments, timeout=0.3)
        assert said in capsys.readouterr().out
    await asyncio.to_thread(gate.touch)
    assert (await session.call("effect_then_gate", arguments)).text == "attempt 1"
    await session.close()
    assert len(effects(log)) == 1


async def test_an_unknown_tool_is_an_error_that_names_the_tools(tmp_path: Path, address: str) -> None:
    session = Session("s", nexum=address)
    with pytest.raises(ToolCallFailed, match=r"there is no tool named 'nope'; the tools are .*web_search"):
        await session.call("nope", {})
    await session.close()


def test_call_without_a_server_prints_the_wait_and_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEXUM_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(submit_task, "FIRST_NOTICE", 0.1)
    with pytest.raises(ServerUnavailable, match=r"no Nexum server answers on 127\.0\.0\.1:1"):
        submit_tool_call("web_search", {"query": "x"}, timeout=0.5)
    assert "[Nexum] no Nexum server answers on 127.0.0.1:1: trying for 0 s more" in capsys.readouterr().out


def test_call_to_a_server_with_a_full_queue_names_the_full_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit_task, "FIRST_NOTICE", 0.1)
    with server_thread(tmp_path, limits=Limits(queue=1)) as server, connected(server.address) as stub:
        register(stub, {"a": []})
        start(stub)
        monkeypatch.setenv("NEXUM_ADDRESS", server.address)
        with pytest.raises(ServerNotReady, match="at least 1 tasks wait for workers"):
            submit_tool_call("web_search", {"query": "x"}, timeout=0.5)
    output = capsys.readouterr().out
    assert "can't do this now: at least 1 tasks wait for workers" in output
    assert "no Nexum server answers" not in output


# ---- Servers and workers that come and go ----------------------------------------------------------------------------


def test_waiting_line_without_a_worker_names_the_command_to_start_one(tmp_path: Path, server: ServerThread) -> None:
    arguments = {"log": str(tmp_path / "log"), "number": 1}
    with submitter(tmp_path, server.address, "count_effect", arguments) as process:
        line = process.wait_for("waiting:")
        assert "no worker polls for tool-call (version sha256:" in line
        assert line.endswith("start one with: python worker.py")
        with counting_worker(tmp_path, server.address):
            assert process.wait() == 0


def test_waiting_line_of_a_retry_has_the_failures_reason(tmp_path: Path, server: ServerThread) -> None:
    gate = tmp_path / "gate"
    with (
        counting_worker(tmp_path, server.address),
        submitter(tmp_path, server.address, "fail_then_gate", {"gate": str(gate)}) as process,
    ):
        line = process.wait_for("waiting:")
        assert re.search(r"; attempt 1 failed: RuntimeError: the page was not there!+\.\.\.$", line)
        assert len(line.partition("attempt 1 failed: ")[2]) == notices.SHOWN_REASON
        line = process.wait_for("waiting:")
        assert "waiting: attempt 2 was handed to a worker; attempt 1 failed: RuntimeError: the page" in line
        gate.touch()
        assert process.wait() == 0
    assert process.lines[-1] == "RESULT attempt 2"


def test_waiting_line_reports_the_attempt_of_a_killed_worker_as_lost(tmp_path: Path, server: ServerThread) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    with submitter(tmp_path, server.address, "effect_then_gate", {"log": str(log), "gate": str(gate)}) as process:
        with counting_worker(tmp_path, server.address) as worker:
            wait_until(lambda: bool(effects(log)), "the tool runs")
            worker.kill()
            assert worker.popen.returncode in KILLED
        process.wait_for("attempt 1 lost: ")
        gate.touch()
        with counting_worker(tmp_path, server.address):
            assert process.wait() == 0


def test_a_call_that_waits_completes_when_the_server_is_killed_and_started_again(tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    with nexum_server(tmp_path) as server, counting_worker(tmp_path, server.address) as worker:
        calls = {"log": str(log), "gate": str(gate)}
        with submitter(tmp_path, server.address, "effect_then_gate", calls) as process:
            wait_until(lambda: bool(effects(log)), "the tool runs")
            server.process.kill()
            assert server.process.popen.returncode == -9
            worker.wait_for("lost the Nexum server")
            process.wait_for(f"no Nexum server answers on {server.address}: trying for")
            with nexum_server(tmp_path, port=server.port):
                gate.touch()
                assert process.wait() == 0
                assert process.lines[-1] == "RESULT attempt 1"
                assert [len(attempts(one)) for one in recorded(tmp_path, server.address)] == [1]
    assert len(effects(log)) == 1


def test_execution_unknown_to_a_new_database_is_restarted_by_its_key(tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = {"log": str(log), "number": 1}
    (tmp_path / "other").mkdir()
    with (
        nexum_server(tmp_path) as server,
        counting_worker(tmp_path, server.address),
        submitter(tmp_path, server.address, "count_effect", arguments) as one,
    ):
        assert one.wait() == 0
    with nexum_server(tmp_path / "other") as server, counting_worker(tmp_path, server.address):
        with submitter(tmp_path, server.address, "count_effect", arguments) as two:
            assert two.wait() == 0
        assert re.search(r"exec-\S+ \(count_effect\) is unknown to this server: looking it up by its key", two.output)
        with submitter(tmp_path, server.address, "count_effect", arguments) as three:
            assert three.wait() == 0
        assert "already COMPLETED (cached)" in three.output
        assert three.lines[-1] == two.lines[-1] != one.lines[-1]
        assert [result_of(one) for one in recorded(tmp_path, server.address)] == [two.lines[-1].removeprefix("RESULT ")]
    assert len({effect.key for effect in effects(log)}) == 1


def test_console_without_the_check_mark_prints_a_question_mark(tmp_path: Path, server: ServerThread) -> None:
    command = [
        str(ROOT / "tests" / "programs" / "submitter.py"),
        "s",
        "30",
        "fail_until",
        json.dumps({"log": "log", "gate": "gate"}),
    ]
    env = {"NEXUM_ADDRESS": server.address, "PYTHONIOENCODING": "cp1252"}
    with counting_worker(tmp_path, server.address):
        with running(command, cwd=tmp_path, env=env, forked=True) as process:
            assert process.wait() == 1
        assert process.lines[-1] == "ERROR ToolCallFailed fail_until failed: the gate is closed ?"
        (tmp_path / "gate").touch()
        with running(command, cwd=tmp_path, env=env, forked=True) as process:
            assert process.wait() == 0
        assert "(fail_until) done ?" in process.output


@pytest.mark.every_python
def test_one_call_from_the_command_line(server: ServerThread, tmp_path: Path) -> None:
    command = ["submit_task.py", "web_search", '{"query": "population of Tokyo"}', "--offline", "--session-id", "s"]
    with tool_worker(tmp_path, server.address):
        lines = []
        for _ in range(2):
            code, output = run_command(command, tmp_path, server.address)
            assert code == 0, output
            lines.append(output.splitlines())
    assert lines[0][-1] == lines[1][-1]
    assert "offline.example" in lines[0][-1]
    assert lines[1][0].endswith("already COMPLETED (cached) ✓")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["web_search", "[1]"], 2, "the arguments must be a JSON object, not: [1]"),
        (
            ["web_search", '{"query": "x"}', "--nexum", "127.0.0.1:1", "--timeout", "1"],
            2,
            "no Nexum server answers on 127.0.0.1:1",
        ),
        (["web_search", "{}", "--timeout", "nan"], 2, "argument --timeout: 'nan' is not a number of seconds between 0"),
        (["web_search", "{}", "--timeout=-inf"], 2, "argument --timeout: '-inf' is not a number of seconds between 0"),
        (["visit_webpage", '{"url": "http://nowhere.example/"}', "--offline"], 1, "visit_webpage failed: "),
    ],
)
def test_wrong_call_is_a_one_line_error(
    server: ServerThread, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    with tool_worker(tmp_path, server.address):
        found, output = run_command(["submit_task.py", *arguments], tmp_path, server.address)
    assert (found, said in output.splitlines()[-1], "Traceback" in output) == (code, True, False), output


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            ["web_serach", '{"query": "x"}'],
            "error: there is no tool named 'web_serach'; the tools are visit_webpage, web_search",
        ),
        (["web_search"], "error: web_search was called with wrong arguments: query is missing. Call it as web_search("),
    ],
)
def test_wrong_tool_or_argument_is_an_error_before_the_server_is_asked(
    tmp_path: Path, call: list[str], said: str
) -> None:
    code, output = run_command(["submit_task.py", *call], tmp_path, "127.0.0.1:1")
    assert code == 2
    assert len(output.splitlines()) == 1  # no line about a server
    assert output.startswith(said)


def run_command(command: list[str], folder: Path, address: str) -> tuple[int, str]:
    process = Process([str(ROOT / command[0]), *command[1:]], cwd=folder, env={"NEXUM_ADDRESS": address}, forked=True)
    return process.wait(), process.output

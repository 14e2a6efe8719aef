"""Our scripts on a published Nexum server. A stand-in process has that server's protocol and behaviour."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, published_server, tool_worker
from nexum_wire import connected, poll, register, start
from processes import DEMO, counting_worker, effects, run_demo, run_script, submitter

from nexum_engine.client import NexumClient
from nexum_engine.errors import ServerError, ServerUnavailable
from nexum_engine.published import execution
from nexum_engine.records import Task
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.worker import Binding, TaskContext, Worker
from nexum_engine.workflow import workflow

SOON = 20.0  # seconds
ONE = workflow("one").effect("a").build()
CRASH_DEMO = str(ROOT / "crash_demo.py")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with published_server(tmp_path) as running:
        yield running


def test_stand_in_gives_one_task_to_two_polls_at_the_same_moment(address: str) -> None:
    """Check the fault of a published server on which the tests below depend."""
    with connected(address) as stub:
        register(stub, {"a": []})
        start(stub)
        first = stub.PollTask.future(pb.PollRequest(worker_id="w", version_hash="v1"), timeout=SOON)
        assert poll(stub).task_id == first.result().task_id != ""


# ---- Workers and calls -----------------------------------------------------------------------------------------------


def test_worker_runs_every_call_once(tmp_path: Path, address: str) -> None:
    log = tmp_path / "log"
    calls = [{"log": str(log), "number": number} for number in range(60)]
    with counting_worker(tmp_path, address), submitter(tmp_path, address, "count_effect", *calls) as caller:
        assert caller.wait() == 0, caller.output
    assert len(effects(log)) == len({one.key for one in effects(log)}) == 60


def test_waiting_line_without_a_worker_names_the_command_to_start_one(tmp_path: Path, address: str) -> None:
    arguments = {"log": str(tmp_path / "log"), "number": 1}
    with submitter(tmp_path, address, "count_effect", arguments) as caller:
        assert caller.wait_for("waiting:").endswith("start one, unless one runs, with: python worker.py")
        with counting_worker(tmp_path, address):
            assert caller.wait() == 0


def test_task_that_the_server_takes_back_is_not_begun_again(tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    with published_server(tmp_path, take_back_after=0.5) as address, counting_worker(tmp_path, address) as worker:
        calls = {"log": str(log), "gate": str(gate)}
        with submitter(tmp_path, address, "effect_then_gate", calls) as caller:
            worker.wait_for("was handed out again: attempt 1 still runs here")
            gate.touch()
            assert caller.wait() == 0, caller.output
    assert len(effects(log)) == 1


def test_large_output_is_read_by_way_of_its_pointer(tmp_path: Path, address: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with counting_worker(tmp_path, address):
        with submitter(tmp_path, address, "write_much", {"size": 100_000}) as caller:
            assert caller.wait() == 0, caller.output
        assert caller.lines[-1] == f"RESULT {'é' * 100_000}"
        with submitter(elsewhere, address, "write_much", {"size": 100_000}) as caller:
            assert caller.wait() == 1
    assert re.search(
        r"ERROR ServerError the output of node 'tool_call' of execution exec-\S+ \(200,0\d\d bytes\) is in a file of "
        r"the server, \.nexum/blobs/exec-\S+-tool_call\.json in the folder where it was started: run this program in ",
        caller.lines[-1],
    )


@pytest.mark.parametrize("name", ["exec-1-a", "exec-2-a", "../../secret"])
def test_output_that_looks_like_a_pointer_chooses_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.json").write_text('"secret"')
    (tmp_path / ".nexum" / "blobs").mkdir(parents=True)
    (tmp_path / ".nexum" / "blobs" / "exec-2-a.json").write_text('"secret"')
    output = {"__nexum_claim_check__": True, "blob_id": name, "size": 8, "path": str(tmp_path / "secret.json")}
    answer = pb.StatusResponse(status="COMPLETED", completed_nodes_json=json.dumps({"a": output}))
    if name == "exec-1-a":
        with pytest.raises(ServerError, match="is in a file of the server"):
            execution("exec-1", answer)
    else:
        assert json.loads(execution("exec-1", answer).outputs()["a"]) == output


async def test_report_whose_answer_was_lost_counts_as_recorded(address: str, caplog: pytest.LogCaptureFixture) -> None:
    class Lossy(NexumClient):
        lost = False

        async def complete_task(self, *args: Any, **options: Any) -> Task | None:
            await super().complete_task(*args, **options)
            if not self.lost:
                self.lost = True
                raise ServerUnavailable("the connection broke")
            return None

    async def handler(task: TaskContext) -> str:
        return "done"

    lossy = Lossy(address)
    async with lossy:
        await lossy.register_workflow(ONE)
        started = await lossy.start_execution(ONE, {})
        stop = asyncio.Event()
        caplog.set_level("INFO")
        worker = asyncio.create_task(Worker(lossy, [Binding(ONE, {"a": handler})]).run(stop))
        assert (await lossy.get_execution(started.execution_id, wait=SOON)).execution.outputs() == {"a": '"done"'}
        stop.set()
        await asyncio.wait_for(worker, SOON)
    assert lossy.lost
    (line,) = [one.getMessage() for one in caplog.records if one.getMessage().startswith("finished")]
    assert "not reported" not in line


def test_worker_says_once_to_run_one_process_only(tmp_path: Path, address: str) -> None:
    with tool_worker(tmp_path, address) as worker:
        (line,) = worker.lines
    assert "has no WorkerStream: run only one worker process, as two may get the same task" in line


# ---- Scripts ---------------------------------------------------------------------------------------------------------


def tool_calls(output: str) -> list[int]:
    """Return how many tool calls the demo executed, took from the record, and attached to."""
    counts = re.search(r"Tool calls: (\d+) executed, (\d+) cached, (\d+) attached", output)
    assert counts is not None, output
    return [int(count) for count in counts.groups()]


@pytest.mark.parametrize("team", [[], ["--team"]], ids=["agent", "team"])
def test_demo_resumes_from_the_recorded_tool_calls(tmp_path: Path, address: str, team: list[str]) -> None:
    command = ["--offline", "--session-id", "demo1", *team, "--nexum", address]
    with tool_worker(tmp_path, address):
        code, output = run_demo(tmp_path, *command, "--crash-after-step", "1")
        assert code == -9, output
        code, output = run_demo(tmp_path, *command)
        assert code == 0, output
        assert output.count("is a published Nexum server: it records the tool calls, but not the run") == 1
        executed, cached, attached = tool_calls(output)
        assert executed < 4
        assert executed + cached + attached == 4
        code, again = run_demo(tmp_path, *command)
        assert tool_calls(again) == [0, 4, 0]
        assert "Sources:" in again
        listed = run_script(["-m", "nexum_engine", "ps", "--nexum", address], tmp_path)[1]
        assert listed.count("COMPLETED") == 4


@pytest.mark.parametrize(
    ("options", "resumed", "again"),
    [
        ([], "Recorded when worker-1 died: research, validate. Resumed at: summarize.", "No step ran again."),
        (
            ["--crash-during", "summarize"],
            "Recorded when worker-1 died: research, validate. Resumed at: summarize.",
            "Ran again: summarize (attempt 1 lost, effect done; attempt 2 recorded). Its effect happened twice.",
        ),
    ],
    ids=["after a step", "within a step"],
)
def test_crash_demo_resumes_the_pipeline(tmp_path: Path, options: list[str], resumed: str, again: str) -> None:
    with published_server(tmp_path, take_back_after=2.0) as address:
        code, output = run_script([CRASH_DEMO, "--offline", *options, "--nexum", address], tmp_path)
    assert code == 0, output
    assert output.count("is a published Nexum server: it records each step's result, but not its attempts") == 1
    assert "(from the workers' own log)" in output
    assert resumed in output
    assert again in output
    assert "worker-1 died: killed by SIG" in output


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ([DEMO, "--offline", "--fork", "demo1@2", "--session-id", "other"], "error: --fork needs a record of the run"),
        ([CRASH_DEMO, "--offline", "--graphflow"], "which can't record a run: use this project's own server"),
    ],
    ids=["fork", "graphflow"],
)
def test_script_that_needs_recorded_runs_exits_with_2_and_one_line(
    tmp_path: Path, address: str, command: list[str], told: str
) -> None:
    code, output = run_script([*command, "--nexum", address], tmp_path)
    assert code == 2, output
    assert told in output.splitlines()[-1]


def test_show_leaves_out_what_the_server_does_not_show(tmp_path: Path, address: str) -> None:
    with connected(address) as stub:
        register(stub, {"a": []})
        execution_id = start(stub)
        code, output = run_script(["-m", "nexum_engine", "show", execution_id, "--nexum", address], tmp_path)
    assert code == 0
    assert "it shows results, but no attempts, times or reasons of failures" in output
    assert "1970" not in output

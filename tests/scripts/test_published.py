"""This project's scripts on a published Nexum server, which lacks this project's additions to the protocol.

A stand-in process has the protocol and the behavior of a published server.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ROOT, published_server, tool_worker
from lossy_client import LossyClient
from nexum_wire import complete, connected, poll, register, start
from pipelines import QUERY
from processes import DEMO, counting_worker, effects, run_demo, run_script, submitter

from nexum_engine.client import NexumClient
from nexum_engine.embedded import EmbeddedNexum
from nexum_engine.errors import ServerError, TooLarge
from nexum_engine.owner import Owner
from nexum_engine.published import execution
from nexum_engine.wire import nexum_pb2 as pb
from nexum_engine.worker import Binding, TaskContext, Worker
from nexum_engine.workflow import workflow
from support.pipeline.drill import Drill
from support.pipeline.effects import EffectLog
from support.pipeline.evidence import CrashPoint

SOON = 20.0  # seconds
ONE = workflow("one").effect("a").build()
CRASH_DEMO = str(ROOT / "crash_demo.py")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with published_server(tmp_path) as running:
        yield running


def test_stand_in_gives_one_task_to_two_polls_at_the_same_moment(address: str) -> None:
    """A published server has this fault. If the stand-in lacked the fault, the tests below would prove nothing."""

    def two_polls_get_one_task() -> bool:
        start(stub)
        first = stub.PollTask.future(pb.PollRequest(worker_id="w", version_hash="v1"), timeout=SOON)
        return bool(poll(stub).task_id == first.result().task_id != "")

    with connected(address) as stub:
        register(stub, {"a": []})
        # Try again: on a busy machine, the first poll may be over before the second begins.
        assert any(two_polls_get_one_task() for _ in range(20))


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
        assert caller.wait_for("waiting:").endswith("if none runs, start one with: python worker.py")
        with counting_worker(tmp_path, address):
            assert caller.wait() == 0


def test_task_that_the_server_takes_back_is_not_begun_again(tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    with published_server(tmp_path, take_back_after=0.5) as address, counting_worker(tmp_path, address) as worker:
        calls = {"log": str(log), "gate": str(gate)}
        with submitter(tmp_path, address, "effect_then_gate", calls) as caller:
            worker.wait_for("was handed out again: it still runs here")
            gate.touch()
            assert caller.wait() == 0, caller.output
    assert len(effects(log)) == 1


def test_output_above_4_mib_fails_the_call(tmp_path: Path) -> None:
    with published_server(tmp_path, take_back_after=0.5) as address, counting_worker(tmp_path, address) as worker:
        with submitter(tmp_path, address, "write_much", {"size": 2_200_000}) as caller:
            assert caller.wait() == 1
        reason = worker.wait_for("finished write_much")
    assert "refuses a message of this size: send less, or use this project's own server" in reason
    assert "ToolCallFailed write_much failed: the server keeps no reason: see" in caller.lines[-1]
    assert worker.output.count("started ") == 1


async def test_input_above_4_mib_is_refused(address: str) -> None:
    async with NexumClient(address) as client:
        await client.register_workflow(ONE)
        with pytest.raises(TooLarge, match="refuses a message of this size: send less, or use this project's own"):
            await client.start_execution(ONE, {"text": "x" * 5_000_000})


def test_final_failure_is_not_retried(tmp_path: Path, address: str) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    with counting_worker(tmp_path, address) as worker:
        with submitter(tmp_path, address, "fail_until", {"log": str(log), "gate": str(gate)}) as caller:
            assert caller.wait() == 1
        line = worker.wait_for("failed, no retry fail_until")
    assert len(effects(log)) == 1
    assert "attempt" not in line


async def test_worker_looks_for_every_workflow_before_it_pauses(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(task: TaskContext) -> str:
        return "done"

    monkeypatch.setattr("nexum_engine.worker.SHORT_POLL_INTERVAL", 3600.0)
    monkeypatch.setattr("nexum_engine.worker.STOP_PATIENCE", 0.1)
    async with NexumClient(address) as client:
        await client.register_workflow(ONE)
        started = [(await client.start_execution(ONE, {})).execution_id for _ in range(5)]
        stop = asyncio.Event()
        bindings = [Binding(one, {"a": handler}) for one in (workflow("two").effect("a").build(), ONE)]
        worker = asyncio.create_task(Worker(client, bindings).run(stop))
        for execution_id in started:
            assert (await client.get_execution(execution_id, wait=SOON)).execution.status.ended
        stop.set()
        await asyncio.wait_for(worker, SOON)


def test_cancel_refuses_what_has_ended_or_is_unknown(tmp_path: Path, address: str) -> None:
    def cancel(execution_id: str) -> tuple[int, str]:
        return run_script(["-m", "nexum_engine", "cancel", execution_id, "--nexum", address], tmp_path, forked=True)

    with connected(address) as stub:
        register(stub, {"a": []})
        execution_id = start(stub)
        assert cancel(execution_id) == (0, f"{execution_id} is CANCELLED")
        code, output = cancel(execution_id)
        assert (code, output.splitlines()[-1]) == (0, f"already done: {execution_id} was cancelled")
        execution_id = start(stub)
        complete(stub, poll(stub))
        told = f"error: execution {execution_id} is COMPLETED and can't be cancelled any more"
        assert cancel(execution_id) == (1, told)
    assert cancel("exec-1") == (1, "error: no execution 'exec-1' in this server's database")


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


def test_nodes_are_in_one_order() -> None:
    answers = [
        pb.StatusResponse(status="COMPLETED", completed_nodes_json=text) for text in ('{"a":1,"b":2}', '{"b":2,"a":1}')
    ]
    assert [[*execution("exec-1", answer).outputs()] for answer in answers] == [["a", "b"]] * 2


async def test_report_whose_answer_was_lost_counts_as_recorded(address: str, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(task: TaskContext) -> str:
        return "done"

    lossy = LossyClient(address, pb.CompleteRequest)
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
        assert run_demo(tmp_path, "--offline", "--nexum", address)[0] == 0
        (line,) = lines_about_the_server(worker.output)
    assert "is a published Nexum server: run only one worker process, as two may get the same task" in line


# ---- Scripts ---------------------------------------------------------------------------------------------------------


def tool_calls(output: str) -> list[int]:
    """Return the demo's counts of tool calls: executed, taken from the record, and attached to while they ran."""
    counts = re.search(r"Tool calls: (\d+) executed, (\d+) cached, (\d+) attached", output)
    assert counts is not None, output
    return [int(count) for count in counts.groups()]


def lines_about_the_server(output: str) -> list[str]:
    """Return the lines that say what a published server lacks."""
    return [line for line in output.splitlines() if re.search("published Nexum server|GetExecution|no attempts", line)]


@pytest.mark.parametrize("team", [[], ["--team"]], ids=["agent", "team"])
def test_demo_resumes_from_the_recorded_tool_calls(tmp_path: Path, address: str, team: list[str]) -> None:
    command = ["--offline", "--session-id", "demo1", *team, "--nexum", address]
    with tool_worker(tmp_path, address):
        code, output = run_demo(tmp_path, *command, "--crash-after-step", "1")
        assert code == -9, output
        code, output = run_demo(tmp_path, *command)
        assert code == 0, output
        assert lines_about_the_server(output) == [
            f"[demo] {address} is a published Nexum server: it records the tool calls, but not the run, and shows no "
            "attempts, times or reasons of failures. A re-run asks the model again. To record runs, use this project's "
            "own server: python -m nexum_engine"
        ]
        executed, cached, attached = tool_calls(output)
        assert executed < 4
        assert executed + cached + attached == 4
        code, again = run_demo(tmp_path, *command)
        assert tool_calls(again) == [0, 4, 0]
        assert "Sources:" in again
        listed = run_script(["-m", "nexum_engine", "ps", "--nexum", address], tmp_path, forked=True)[1]
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
        code, output = run_script([CRASH_DEMO, "--offline", *options, "--nexum", address], tmp_path, forked=True)
    assert code == 0, output
    assert lines_about_the_server(output) == [
        f"[demo] {address} is a published Nexum server: it records each step's result, but no attempts, times or "
        "reasons of failures. So the timeline is from the workers' log. Another worker gets a dead worker's step after "
        "60 to 90 s"
    ]
    assert "(from the workers' own log)" in output
    assert resumed in output
    assert again in output
    assert "worker-1 died: killed by SIG" in output


async def test_drill_tells_that_a_dead_workers_step_waits_for_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("support.pipeline.drill.SAY_WAITING_EVERY", 0.2)
    effects_log = EffectLog(tmp_path / "effects.jsonl")
    with published_server(tmp_path, take_back_after=2.0) as address:
        async with NexumClient(address) as client:
            point = CrashPoint("research", within=True)
            await Drill(client, QUERY, point, effects_log, offline=True).run()
    assert "research   waits until the server takes it back from worker-1-pid" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        [DEMO, "--offline", "--fork", "demo1@2", "--session-id", "other"],
        [DEMO, "--sessions"],
        [CRASH_DEMO, "--offline", "--graphflow"],
        ["-m", "durable_autogen", "run", DEMO],
        ["-m", "durable_autogen", "show", "demo1"],
    ],
    ids=["fork", "sessions", "graphflow", "run", "show"],
)
def test_command_that_needs_recorded_runs_exits_with_2_and_one_line(
    tmp_path: Path, address: str, command: list[str]
) -> None:
    code, output = run_script(command, tmp_path, {"NEXUM_ADDRESS": address}, forked=True)
    assert code == 2, output
    assert output.splitlines()[-1] == (
        f"error: {address} is a published Nexum server, which can't record runs: use this project's own server (python "
        "-m nexum_engine)"
    )
    assert "AutoGen alone" not in output


async def test_recorded_run_starts_its_own_server_beside_a_published_one(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEXUM_ADDRESS", raising=False)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    for module in ("connection", "host"):
        monkeypatch.setattr(f"nexum_engine.{module}.DEFAULT_ADDRESS", address)
    caplog.set_level("INFO")
    async with EmbeddedNexum(None) as nexum:
        assert (nexum.address, nexum.is_published, nexum.embedded) == (address, True, False)
    async with EmbeddedNexum(None, owners=True) as nexum, NexumClient(nexum.address) as client, Owner(client):
        assert (nexum.is_published, nexum.embedded) == (False, True)
    assert f"{address} is in use: this program opened the database and listens on 127.0.0.1:" in caplog.text


def test_command_line_call_prefixes_every_line_and_names_the_way_out_of_a_lost_task(
    tmp_path: Path, address: str
) -> None:
    command = ["submit_task.py", "web_search", '{"query": "x"}', "--offline", "--timeout", "1", "--nexum", address]
    code, output = run_script([str(ROOT / command[0]), *command[1:]], tmp_path, forked=True)
    *lines, last = output.splitlines()
    assert code == 1
    assert all(line.startswith("[Nexum] ") for line in lines), output
    assert re.search(r"may have lost the task: then cancel .* with python -m nexum_engine cancel exec-\S+$", last), last


def test_show_leaves_out_what_the_server_does_not_show(tmp_path: Path, address: str) -> None:
    with connected(address) as stub:
        register(stub, {"a": []})
        execution_id = start(stub)
        code, output = run_script(
            ["-m", "nexum_engine", "show", execution_id, "--nexum", address], tmp_path, forked=True
        )
    assert code == 0
    assert "it shows results, but no attempts, times or reasons of failures" in output
    assert "1970" not in output

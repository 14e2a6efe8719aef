"""crash_demo.py as a process: its output agrees with the server's records."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, running
from openai_server import OpenAIServer, Reply
from pipelines import (
    CRASH_DEMO,
    PIPELINE_WORKER,
    assert_no_worker_is_left,
    attempts,
    output_of,
    pipelines,
    run_crash_demo,
    start_pipeline,
)
from processes import InProcess, children, is_alive, read_one_line, run_script, send, wait_until
from server_thread import ServerThread

from crash_demo import main as script
from nexum_engine.client import NexumClient
from nexum_engine.errors import InvalidRequest
from pipeline_workflow import STEPS
from support.charges.drill import ChargeDrill

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
ROW = re.compile(
    r"^(research|validate|summarize|report) +(\d+) +(\S+) +\+(\d+\.\d\d) +(\d+\.\d\d)  (\S.*)$", re.MULTILINE
)


def as_planned(crash_after: str) -> list[tuple[str, int, str, str]]:
    """Return the attempts of a run in which no step was repeated."""
    last = STEPS.index(crash_after)
    return [(step, 1, "worker-1" if at <= last else "worker-2", "COMPLETED") for at, step in enumerate(STEPS)]


def assert_timeline_is_the_record(output: str, execution: dict[str, Any]) -> None:
    """Check that the printed timeline has the recorded attempts, and that the recorded report is printed."""
    recorded = sorted(
        (
            (attempt["started_ms"], STEPS.index(node["node_id"]), node["node_id"], attempt)
            for node in execution["nodes"]
            for attempt in node["attempts"]
        ),
        key=lambda row: row[:2],
    )
    begun = recorded[0][0]
    expected = [
        (
            step,
            str(attempt["attempt"]),
            attempt["worker_id"],
            f"{(attempt['started_ms'] - begun) / 1000:.2f}",
            f"{(attempt['ended_ms'] - attempt['started_ms']) / 1000:.2f}",
        )
        for _, _, step, attempt in recorded
    ]
    assert [row[:5] for row in ROW.findall(output)] == expected
    assert output_of(execution, "report")["markdown"].strip() in output


# ---- Crash points ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["research", "summarize"])  # other tests let worker-1 crash after validate
def test_worker_2_runs_exactly_the_remaining_steps_and_every_step_is_recorded_once(
    server: ServerThread, tmp_path: Path, step: str
) -> None:
    code, output = run_crash_demo(tmp_path, "--crash-after", step, "--nexum", server.address)
    assert code == 0, output
    (execution,) = pipelines(tmp_path, server.address)
    assert execution["status"] == "COMPLETED"
    assert attempts(execution) == as_planned(step)
    assert_timeline_is_the_record(output, execution)
    upto = ", ".join(STEPS[: STEPS.index(step) + 1])
    following = STEPS[STEPS.index(step) + 1]
    assert "worker-1 is dead: killed by SIGKILL" in output or sys.platform == "win32"
    assert f"Recorded when worker-1 died: {upto}. Resumed at: {following}.\nNo step ran again." in output
    assert f"--- worker-2 resumes at {following} ---" in output
    assert_no_worker_is_left(output)


@pytest.mark.parametrize("step", ["research", "report"])
def test_kill_within_a_step_is_shown_as_a_repetition(server: ServerThread, tmp_path: Path, step: str) -> None:
    code, output = run_crash_demo(tmp_path, "--crash-during", step, "--nexum", server.address)
    assert code == 0, output
    (execution,) = pipelines(tmp_path, server.address)
    before, after = STEPS[: STEPS.index(step)], STEPS[STEPS.index(step) + 1 :]
    assert attempts(execution) == [
        *((one, 1, "worker-1", "COMPLETED") for one in before),
        (step, 1, "worker-1", "LOST"),
        (step, 2, "worker-2", "COMPLETED"),
        *((one, 1, "worker-2", "COMPLETED") for one in after),
    ]
    assert_timeline_is_the_record(output, execution)
    assert f"Ran again: {step} (attempt 1 lost, effect done; attempt 2 recorded). Its effect happened twice." in output
    assert_no_worker_is_left(output)


@pytest.mark.timeout(240)
def test_option_all_prints_a_verdict_for_each_crash_point(server: ServerThread, tmp_path: Path) -> None:
    code, output = run_crash_demo(tmp_path, "--all", "--nexum", server.address)
    assert code == 0, output
    verdicts = output.partition("crash points, from the server's records:\n")[2].splitlines()
    assert verdicts == [
        "after research    ok: worker-1 ran research; worker-2 ran validate, summarize, report",
        "after validate    ok: worker-1 ran research, validate; worker-2 ran summarize, report",
        "after summarize   ok: worker-1 ran research, validate, summarize; worker-2 ran report",
        "during summarize  ok: worker-1 ran research, validate; worker-2 ran summarize, report; summarize took 2 "
        "attempts, its effect happened twice",
    ]
    executions = pipelines(tmp_path, server.address)
    assert [attempts(one) for one in executions[:3]] == [as_planned(step) for step in STEPS[:-1]]
    assert [one["status"] for one in executions] == ["COMPLETED"] * 4
    assert_no_worker_is_left(output)


@on_linux
def test_crash_demo_without_a_server_leaves_no_process(tmp_path: Path) -> None:
    with running([CRASH_DEMO], cwd=tmp_path, env={"CRASH_AFTER": "report", "CRASH_DURING": "report"}) as demo:
        assert demo.wait() == 0, demo.output
    assert_no_worker_is_left(demo.output)
    (execution,) = pipelines(tmp_path)
    # By default, the crash comes after validate. The demo's workers don't get CRASH_AFTER from the environment.
    assert attempts(execution) == as_planned("validate")
    assert_timeline_is_the_record(demo.output, execution)


def test_page_added_to_the_offline_pages_is_found_and_cited(server: ServerThread, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".*", "tests", "benchmarks"))
    fact = "The zorblax turbine was invented in 1987 by Mira Tannhauser, who ran it on rainwater."
    page = project / "support" / "offline" / "pages" / "zorblax-turbines.md"
    page.write_text(f"# Zorblax turbines\n\n{fact}\n\nIts blades are made of glass.\n", encoding="utf-8")
    command = [str(project / "crash_demo.py"), "--query", "Who invented the zorblax turbine?", "--nexum"]
    code, output = run_script([*command, server.address], tmp_path, {"PYTHONPATH": str(project)})
    assert code == 0, output
    report = output_of(pipelines(tmp_path, server.address)[0], "report")["markdown"]
    assert f"{fact} [1]" in report
    assert "1. Zorblax turbines. <https://offline.example/zorblax-turbines>" in report
    assert report.strip() in output


# ---- Several demos, workers and pipelines ----------------------------------------------------------------------------


def test_pipeline_of_a_killed_demo_does_not_affect_later_demos(server: ServerThread, tmp_path: Path) -> None:
    with running([CRASH_DEMO, "--nexum", server.address], cwd=tmp_path, forked=True) as demo:
        demo.wait_for("validate   recorded")
        demo.kill()
    (leftover,) = pipelines(tmp_path, server.address)
    assert leftover["status"] == "RUNNING"
    code, output = run_crash_demo(tmp_path, "--nexum", server.address)
    assert code == 0, output
    executions = pipelines(tmp_path, server.address)
    assert [one["status"] for one in executions] == ["RUNNING", "COMPLETED"]
    assert {worker for _, _, worker, _ in attempts(executions[0])} == {"worker-1"}
    assert attempts(executions[1]) == as_planned("validate")


def test_drill_leaves_other_pipelines_alone(server: ServerThread, tmp_path: Path) -> None:
    start_pipeline(server.address)
    code, output = run_crash_demo(tmp_path, "--nexum", server.address)
    assert code == 0, output
    waiting, drilled = pipelines(tmp_path, server.address)
    assert (waiting["status"], attempts(waiting)) == ("RUNNING", [])
    assert attempts(drilled) == as_planned("validate")


def test_other_worker_takes_no_step_of_a_drill(server: ServerThread, tmp_path: Path) -> None:
    with running(
        [PIPELINE_WORKER, "--nexum", server.address, "--name", "stranger"], cwd=tmp_path, forked=True
    ) as stranger:
        stranger.wait_for("connected to")
        code, output = run_crash_demo(tmp_path, "--nexum", server.address)
        assert code == 0, output
        start_pipeline(server.address)
        wait_until(lambda: pipelines(tmp_path, server.address)[-1]["status"] == "COMPLETED", "the stranger works")
    drilled, plain = pipelines(tmp_path, server.address)
    assert attempts(drilled) == as_planned("validate")
    assert {worker for _, _, worker, _ in attempts(plain)} == {"stranger"}


def test_two_demos_at_once_have_a_pipeline_and_workers_each(server: ServerThread, tmp_path: Path) -> None:
    with running([CRASH_DEMO, "--nexum", server.address], cwd=tmp_path, forked=True) as first:
        first.wait_for("worker-1 started")
        code, output = run_crash_demo(tmp_path, "--nexum", server.address, "--crash-after", "research")
        assert first.wait() == 0, first.output
    assert code == 0, output
    one, other = pipelines(tmp_path, server.address)
    assert attempts(one) == as_planned("validate")
    assert attempts(other) == as_planned("research")
    assert_timeline_is_the_record(first.output, one)
    assert_timeline_is_the_record(output, other)


# ---- Kills from outside ----------------------------------------------------------------------------------------------


def assert_output_agrees_with_record(output: str, execution: dict[str, Any]) -> None:
    """Check the timeline and the printed repetitions, and that no step was handed out again after it was recorded."""
    assert execution["status"] == "COMPLETED"
    assert_timeline_is_the_record(output, execution)
    for node in execution["nodes"]:
        outcomes = [attempt["outcome"] for attempt in node["attempts"]]
        assert outcomes.count("COMPLETED") == 1
        assert outcomes[-1] == "COMPLETED"
        assert (f"Ran again: {node['node_id']} (" in output) == (len(outcomes) > 1)


@on_linux
@pytest.mark.parametrize("seed", range(4))
def test_worker_killed_from_outside_at_a_random_moment_is_replaced(
    server: ServerThread, tmp_path: Path, seed: int
) -> None:
    # Try again at an earlier moment if the worker had ended before the kill.
    moment = random.Random(seed).uniform(0.0, 1.2)
    name = f"worker-{1 + seed % 2}"
    for _ in range(6):
        output = run_with_a_kill(server, tmp_path, name, moment)
        execution = pipelines(tmp_path, server.address)[-1]
        assert_output_agrees_with_record(output, execution)
        assert_no_worker_is_left(output)
        planned = name == "worker-1" and (STEPS[1], 1, name, "COMPLETED") in attempts(execution)
        if f"{name} is dead: killed by SIGKILL" in output and not planned:
            return
        moment /= 2
    raise AssertionError(f"seed {seed}: no kill hit {name}")


def run_with_a_kill(server: ServerThread, folder: Path, name: str, moment: float) -> str:
    """Run the demo, kill its worker of this name some seconds after the worker's start, and return the output."""
    with running([CRASH_DEMO, "--nexum", server.address], cwd=folder, forked=True) as demo:
        line = demo.wait_for(f"{name} started")
        time.sleep(moment)  # the moment of the kill
        send(int(line.partition("(pid ")[2].partition(")")[0]), signal.SIGKILL)
        assert demo.wait() == 0, f"{name}, {moment:.2f} s: {demo.output}"
    return demo.output


@on_linux
def test_drill_fails_after_too_many_killed_workers(server: ServerThread, tmp_path: Path) -> None:
    killed: set[int] = set()
    with running([CRASH_DEMO, "--nexum", server.address], cwd=tmp_path, forked=True) as demo:

        def kill_and_look() -> bool:
            for pid in filter(is_alive, children(demo.popen.pid).values()):
                send(pid, signal.SIGKILL)
                killed.add(pid)
            return demo.popen.poll() is not None

        wait_until(kill_and_look, "it gives up", timeout=60)
        assert demo.wait() == 1
    assert len(killed) == 12
    assert "error: 12 workers died one after the other; see above how each died" in demo.output
    (execution,) = pipelines(tmp_path, server.address)
    assert execution["status"] == "CANCELLED"


# ---- Ctrl+C ----------------------------------------------------------------------------------------------------------


@on_linux
@pytest.mark.parametrize("moment", ["worker-1 started", "research   recorded", "worker-2 started"])
def test_ctrl_c_cancels_the_execution_and_leaves_no_process(server: ServerThread, tmp_path: Path, moment: str) -> None:
    with running([CRASH_DEMO, "--nexum", server.address], cwd=tmp_path, forked=True) as demo:
        demo.wait_for(moment)
        demo.interrupt()
        assert demo.wait() == 130
    assert "Traceback" not in demo.output
    (execution,) = pipelines(tmp_path, server.address)
    assert execution["status"] == "CANCELLED"
    assert f"Cancelled {execution['execution_id']}" in demo.output
    assert_no_worker_is_left(demo.output)


# ---- Failed checks and errors ----------------------------------------------------------------------------------------


def test_failed_pipeline_exits_with_1_and_the_reason(server: ServerThread, tmp_path: Path) -> None:
    with OpenAIServer([Reply(status=401)]) as model:
        env = {"OPENAI_BASE_URL": model.base_url, "NEXUM_MODEL": "m"}
        code, output = run_crash_demo(tmp_path, "--nexum", server.address, env=env)
    assert code == 1
    assert "research   attempt 1 failed: the model gave no usable answer" in output
    assert "error: crash after validate: the execution is FAILED, not COMPLETED: the model gave no usable" in output
    assert_no_worker_is_left(output)


def test_live_model_runs_the_same_four_steps(server: ServerThread, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        if body["messages"][-1]["role"] == "user":
            return Reply(calls=[("visit_webpage", {"url": "http://10.0.0.1/"})])
        claim = {"statement": "It is so.", "url": "http://10.0.0.1/", "quote": "It is so."}
        return Reply(json.dumps({"claims": [claim]}))

    with OpenAIServer(reply) as model:
        env = {"OPENAI_BASE_URL": model.base_url, "NEXUM_MODEL": "m"}
        code, output = run_crash_demo(tmp_path, "--nexum", server.address, env=env)
    assert code == 0, output
    # visit_webpage refuses the private address, so the claim is dropped.
    assert "validate   recorded after" in output
    assert "0 claims kept, 1 dropped" in output
    assert "10.0.0.1 is not a public address" in output
    assert pipelines(tmp_path, server.address) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--crash-after", "report"], "argument --crash-after: invalid choice: 'report'"),
        (["--crash-after", "publish"], "argument --crash-after: invalid choice"),
        (["--crash-after", "research", "--all"], "not allowed with argument"),
        (["--query", " "], "the query is empty"),
        (["--html", "no-such-folder/page.html"], "give a file name in a folder that exists"),
    ],
)
def test_wrong_argument_exits_with_2(in_process: InProcess, arguments: list[str], told: str) -> None:
    code, output = in_process(script, *arguments)
    assert code == 2
    assert told in output


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("nowhere", "'nowhere' is not the address of a server"),
        ("127.0.0.1:1", "no Nexum server answers on 127.0.0.1:1"),
    ],
)
def test_wrong_address_exits_with_2(tmp_path: Path, address: str, told: str) -> None:
    code, output = run_crash_demo(tmp_path, "--nexum", address)
    assert code == 2
    assert told in output


def test_model_without_its_key_is_refused(in_process: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUM_MODEL", "gpt-x")
    code, output = in_process(script)
    assert code == 2
    assert "NEXUM_MODEL=gpt-x needs OPENAI_API_KEY" in output


def test_offline_option_needs_no_key(server: ServerThread, tmp_path: Path) -> None:
    code, output = run_crash_demo(tmp_path, "--offline", "--nexum", server.address, env={"NEXUM_MODEL": "gpt-x"})
    assert code == 0, output


def test_closed_output_ends_the_script_without_a_traceback(server: ServerThread, tmp_path: Path) -> None:
    line, code, errors = read_one_line([CRASH_DEMO, "--nexum", server.address], tmp_path)
    assert line.startswith("[demo] Model")
    assert (code, errors) == (1, "")
    assert [one["status"] for one in pipelines(tmp_path, server.address)] in ([], ["CANCELLED"])


# ---- Charges ---------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_effects_under_three_policies_are_counted_in_the_ledger(tmp_path: Path) -> None:
    code, output = run_crash_demo(tmp_path, "--effect")
    assert code == 0, output
    rows = re.findall(r"^(charge_\w+) .* (\d+) +(\d+) +(\d+\.\d\d)  (.*)$", output, re.MULTILINE)
    assert rows == [
        ("charge_by_key", "2", "1", "9.90", "LOST, COMPLETED"),
        ("charge_and_find", "1", "1", "9.90", "LOST, COMPLETED"),
        ("charge_once", "1", "1", "9.90", "UNKNOWN, COMPLETED (crash_demo)"),
    ]
    assert output.count("worker 1 is dead: killed by SIGKILL") == 3 or sys.platform == "win32"
    *_, story = output.partition("[demo] 3 of 3: charge_once (effect=once): ")
    order = ["worker 1 started", "worker 1 is dead", "worker 2 started", "$ python -m nexum_engine unknown", "exec-"]
    order += ["UNKNOWN since", "$ python -m nexum_engine resolve exec-", "is COMPLETED", "returns: receipt 4"]
    assert re.search(".*".join(map(re.escape, order)), story, re.DOTALL), output
    assert "[Nexum]" not in story


async def test_charge_whose_call_fails_ends_the_drill(tmp_path: Path, server: ServerThread) -> None:
    async def fail(_: str) -> tuple[str, str]:
        raise InvalidRequest("refused")

    async with NexumClient(server.address) as client:
        with pytest.raises(InvalidRequest, match="refused"):
            await asyncio.wait_for(ChargeDrill(client, fail, "d", tmp_path).run(), 20)

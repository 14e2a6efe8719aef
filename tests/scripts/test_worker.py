"""worker.py as a process: its start, its end, bad tools and SIGKILL."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import KILLED, ROOT, Process, free_port, nexum_server, running, tool_worker
from processes import (
    attempts,
    children,
    counting_worker,
    effects,
    is_alive,
    recorded,
    run_script,
    submitter,
    wait_until,
)
from server_thread import ServerThread

WORKER = str(ROOT / "worker.py")
HAND_OVER_WITHIN_MS = 2000  # after the death of the worker that had the task


# ---- Beginning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--concurrency", "0"], "'0' is not a number between 1 and 1,000"),
        (["--concurrency", "-1"], "'-1' is not a number between 1 and 1,000"),
        (["--concurrency", "many"], "'many' is not a number between 1 and 1,000"),
        (["--nexum", "nonsense"], "'nonsense' is not the address of a server: give HOST:PORT"),
        (["--nexum", "localhost:0"], "is not the address of a server"),
        (["--frob"], "unrecognized arguments: --frob"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    code, output = run_script([WORKER, *arguments], tmp_path, forked=True)
    assert code == 2
    assert "error: " in output.splitlines()[-1]
    assert said in output.splitlines()[-1]


def test_help_imports_neither_autogen_nor_the_search(tmp_path: Path) -> None:
    code, output = run_script(["-X", "importtime", WORKER, "--help"], tmp_path)
    assert code == 0
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in output.splitlines() if "|" in line}
    assert "nexum_engine" in imported
    assert not imported & {"autogen_core", "openai", "ddgs", "selectolax"}


def test_worker_waits_for_a_server_and_prints_how_to_start_one(tmp_path: Path) -> None:
    port = free_port()
    with running([WORKER], cwd=tmp_path, env={"NEXUM_ADDRESS": f"127.0.0.1:{port}"}) as worker:
        line = worker.wait_for("waiting for one")
        assert f"no Nexum server on 127.0.0.1:{port}" in line
        assert "python -m nexum_engine" in line
        with nexum_server(tmp_path, port=port):
            worker.wait_for(f"connected to 127.0.0.1:{port} as worker")


def test_worker_finds_the_server_of_its_folder_and_follows_it_to_another_port(tmp_path: Path) -> None:
    own = {"DATABASE_URL": f"sqlite:///{tmp_path / 'nexum.db'}"}
    with running([WORKER], cwd=tmp_path, env=own) as worker:
        with nexum_server(tmp_path) as first:
            worker.wait_for(f"connected to the server of {tmp_path / 'nexum.db'} as worker")
            first.process.kill()
        with nexum_server(tmp_path) as second:
            assert second.address != first.address
            worker.wait_for(f"reconnected to the server of {tmp_path / 'nexum.db'} as worker")


def test_ctrl_c_ends_a_worker_that_waits_for_a_server(tmp_path: Path) -> None:
    with running([WORKER, "--nexum", f"127.0.0.1:{free_port()}"], cwd=tmp_path) as worker:
        worker.wait_for("waiting for one")
        worker.interrupt()
        assert worker.wait(10) == 0
        assert "Traceback" not in worker.output


# ---- Ending ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [Process.interrupt, Process.terminate], ids=["Ctrl+C", "SIGTERM"])
@pytest.mark.usefixtures("loop_of_processes")
def test_an_idle_worker_ends_at_once(tmp_path: Path, server: ServerThread, end: Callable[[Process], None]) -> None:
    with tool_worker(tmp_path, server.address) as worker:
        end(worker)
        assert worker.wait(5) == 0
        assert "Traceback" not in worker.output


@pytest.mark.every_python
@pytest.mark.usefixtures("loop_of_processes")
def test_ctrl_c_lets_the_task_finish_and_takes_no_other(tmp_path: Path, server: ServerThread) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    held = {"log": str(log), "gate": str(gate)}
    with (
        counting_worker(tmp_path, server.address) as worker,
        submitter(tmp_path, server.address, "effect_then_gate", held) as first,
    ):
        wait_until(lambda: bool(effects(log)), "the tool runs")
        worker.interrupt()
        worker.wait_for("stopping: finishing 1 task(s) first (Ctrl+C again to abandon them)")
        with submitter(tmp_path, server.address, "count_effect", {"log": str(log), "number": 1}) as second:
            second.wait_for("Submitted")
            gate.touch()
            assert first.wait() == 0
            assert worker.wait(10) == 0
    done, queued = recorded(tmp_path, server.address)
    assert [one["outcome"] for one in attempts(done)] == ["COMPLETED"]
    assert attempts(queued) == []
    assert len(effects(log)) == 1


@pytest.mark.every_python
def test_a_second_ctrl_c_leaves_the_task_to_another_worker(tmp_path: Path, server: ServerThread) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    with submitter(tmp_path, server.address, "effect_then_gate", {"log": str(log), "gate": str(gate)}) as process:
        with counting_worker(tmp_path, server.address) as worker:
            wait_until(lambda: bool(effects(log)), "the tool runs")
            worker.interrupt()
            worker.wait_for("stopping: finishing")
            worker.interrupt()
            assert worker.wait(5) == -signal.SIGINT
            assert "Traceback" not in worker.output
        gate.touch()
        with counting_worker(tmp_path, server.address):
            assert process.wait() == 0
    (execution,) = recorded(tmp_path, server.address)
    assert [one["outcome"] for one in attempts(execution)] == ["LOST", "COMPLETED"]


@pytest.mark.every_python
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_worker_ends_with_the_process_that_holds_its_standard_input(tmp_path: Path, server: ServerThread) -> None:
    # A parent process starts the worker and is then killed.
    parent = (
        "import subprocess, sys; "
        f"child = subprocess.Popen([sys.executable, {WORKER!r}, '--nexum', {server.address!r}, "
        "'--until-stdin-closes'], stdin=subprocess.PIPE); child.wait()"
    )
    with running(["-c", parent], cwd=tmp_path) as process:
        process.wait_for("connected to")
        (pid,) = children(process.popen.pid).values()
        process.kill()
        wait_until(lambda: not is_alive(pid), "the worker is gone", timeout=2)


# ---- Failures --------------------------------------------------------------------------------------------------------


@pytest.mark.every_python
def test_hanging_tool_fails_one_attempt_and_does_not_block_the_worker(tmp_path: Path, server: ServerThread) -> None:
    log = tmp_path / "log"
    with counting_worker(tmp_path, server.address) as worker:
        with submitter(tmp_path, server.address, "hang_once", {"log": str(log)}) as process:
            assert process.wait() == 0
            assert process.lines[-1] == "RESULT attempt 2"
        line = worker.wait_for("failed ")
        assert re.search(
            r"hang_once, execution exec-\S+, attempt 1, 0\.\d\d s: .*longer than its time limit of 0\.3 s", line
        )
        worker.interrupt()
        assert worker.wait(5) == 0
    (execution,) = recorded(tmp_path, server.address)
    assert [one["outcome"] for one in attempts(execution)] == ["FAILED", "COMPLETED"]
    assert "longer than its time limit of 0.3 s" in attempts(execution)[0]["error"]
    assert len({effect.key for effect in effects(log)}) == 1


def test_the_log_has_a_line_for_the_begin_and_the_end_of_each_task(tmp_path: Path, server: ServerThread) -> None:
    arguments = {"log": str(tmp_path / "log"), "number": 1}
    with counting_worker(tmp_path, server.address) as worker:
        with submitter(tmp_path, server.address, "count_effect", arguments) as process:
            assert process.wait() == 0
        (execution,) = recorded(tmp_path, server.address)
        what = f"count_effect, execution {execution['execution_id']}, attempt 1"
        assert worker.wait_for("started") == f"started  {what}"
        assert re.fullmatch(rf"finished {what}, 0\.\d\d s", worker.wait_for("finished"))


@pytest.mark.parametrize("held", ["before its effect", "after its effect"])
def test_the_task_of_a_killed_worker_goes_to_a_waiting_one_within_two_seconds(
    tmp_path: Path, server: ServerThread, held: str
) -> None:
    tool = "gate_then_effect" if held == "before its effect" else "effect_then_gate"
    log, arrivals, gate = tmp_path / "log", tmp_path / "arrivals", tmp_path / "gate"
    arguments = {"log": str(log), "gate": str(gate)}
    if tool == "gate_then_effect":
        arguments["arrivals"] = str(arrivals)
    seen = arrivals if tool == "gate_then_effect" else log
    with (
        counting_worker(tmp_path, server.address) as one,
        counting_worker(tmp_path, server.address) as other,
        submitter(tmp_path, server.address, tool, arguments) as process,
    ):
        wait_until(lambda: bool(effects(seen)), "the tool runs")
        victim = one if effects(seen)[0].pid == one.popen.pid else other
        killed_ms = time.time_ns() // 1_000_000
        victim.kill()
        assert victim.popen.returncode in KILLED
        gate.touch()
        assert process.wait() == 0
        assert process.lines[-1] == "RESULT attempt 2"
    (execution,) = recorded(tmp_path, server.address)
    first, second = attempts(execution)
    assert first["outcome"] == "LOST"
    assert second["outcome"] == "COMPLETED"
    assert first["worker_id"] != second["worker_id"]
    assert 0 <= second["started_ms"] - killed_ms <= HAND_OVER_WITHIN_MS
    assert len({effect.key for effect in effects(seen)}) == 1
    assert [effect.attempt for effect in effects(seen)] == [1, 2]
    assert len(effects(log)) == (1 if held == "before its effect" else 2)


def test_worker_lists_the_tools_and_their_policies(tmp_path: Path) -> None:
    code, output = run_script([WORKER, "--tools"], tmp_path)
    assert (code, output.splitlines()) == (
        0,
        [
            "web_search(query: str, max_results: int = 5)",
            "    time_limit=60",
            "visit_webpage(url: str)",
            "    time_limit=90",
        ],
    )

"""The libraries embedded in other programs: in forked processes, and in several event loops of one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from durable_agents import answer
from harness import ROOT
from openai_server import OpenAIServer
from processes import counting_worker, effects, recorded, run_script
from server_thread import ServerThread

PROGRAM = str(ROOT / "tests" / "programs" / "embedding_program.py")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


def embedded(mode: str, folder: Path, server: ServerThread, *more: str) -> list[str]:
    """Run a mode of embedding_program.py; return the lines that it prints. Fail if a line names an error."""
    log = folder / "log"
    code, output = run_script([PROGRAM, mode, str(log), *more], folder, {"NEXUM_ADDRESS": server.address})
    assert code == 0, output
    for word in ("BlockingIOError", "Exception", "Error"):
        assert word not in output, output
    return output.splitlines()


@forks
@pytest.mark.every_python
def test_forked_children_make_calls_of_their_own_and_find_those_of_the_parent(
    tmp_path: Path, server: ServerThread
) -> None:
    with counting_worker(tmp_path, server.address):
        lines = embedded("forked_call", tmp_path, server)
    assert {"GRANDCHILD 0", "CHILDREN 0 0"} <= set(lines)
    results = [line.split()[1:] for line in lines if line.startswith("RESULT")]
    assert [number for _, number, _ in results] == ["1", "1", "2", "3", "4", "5"]
    assert len({pid for pid, _, _ in results}) == 4
    assert results[0][2] == results[1][2]
    assert len(effects(tmp_path / "log")) == 5


@forks
def test_child_makes_a_call_while_a_thread_of_the_parent_waits_for_one(tmp_path: Path, server: ServerThread) -> None:
    with counting_worker(tmp_path, server.address):
        lines = embedded("fork_during_call", tmp_path, server)
    assert {"CHILD 0", "WAITED True", "SLOW attempt 1"} <= set(lines)
    assert len(effects(tmp_path / "log")) == 1


@forks
def test_forked_child_ends_as_a_script_ends(tmp_path: Path, server: ServerThread) -> None:
    with counting_worker(tmp_path, server.address):
        lines = embedded("fork_with_end", tmp_path, server)
    assert "CHILD 0" in lines
    assert sorted(line.split()[1] for line in lines if line.startswith("RESULT")) == ["2", "3"]


@forks
@pytest.mark.every_python
def test_client_of_the_parent_works_in_the_child_while_the_parent_is_connected(
    tmp_path: Path, server: ServerThread
) -> None:
    lines = embedded("fork_with_client", tmp_path, server)
    assert {"OWNED c COMPLETED", "CHILD 0", "OWNED p COMPLETED"} <= set(lines)


@forks
def test_child_writes_a_session_file_that_was_locked_at_the_fork(tmp_path: Path, server: ServerThread) -> None:
    lines = embedded("fork_with_locked_file", tmp_path, server)
    assert {"CHILD 0", "KEYS ['of the child', 'of the parent']"} <= set(lines)


@forks
def test_forked_child_runs_and_replays_durable_runs(tmp_path: Path, server: ServerThread) -> None:
    with OpenAIServer(lambda _: answer("said")) as model:
        lines = embedded("fork_durable", tmp_path, server, model.base_url)
        assert len(model.requests) == 3
    runs = [line for line in lines if line.startswith("RUN")]
    assert "CHILD 0" in lines
    assert (runs[0], runs[2]) == (runs[1], runs[3])
    assert len(set(runs)) == 3


@pytest.mark.every_python
def test_one_client_serves_several_event_loops(tmp_path: Path, server: ServerThread) -> None:
    assert "PINGED" in embedded("loops_one_client", tmp_path, server)


@pytest.mark.timeout(240)
def test_tool_calls_and_durable_runs_share_a_process(tmp_path: Path, server: ServerThread) -> None:
    with counting_worker(tmp_path, server.address), OpenAIServer(lambda _: answer("said")) as model:
        lines = embedded("two_loops", tmp_path, server, model.base_url)
    assert len([line for line in lines if line.startswith("RUN")]) == 3
    assert len(recorded(tmp_path, server.address)) == len(effects(tmp_path / "log")) == 40

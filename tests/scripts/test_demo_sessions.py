"""demo.py's sessions: continued runs, a team, the list of sessions, forks, and drift."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import environment, running, tool_worker
from openai_server import OpenAIServer, Reply
from processes import DEMO, QUESTION, InProcess, answer, recorded, run_demo
from server_thread import ServerThread

from demo import main as script

RUST = "What does Rust change in systems programming?"


@pytest.fixture
def address(server: ServerThread, tmp_path: Path) -> Iterator[str]:
    """Run a server with a worker."""
    with tool_worker(tmp_path, server.address):
        yield server.address


def ask(folder: Path, address: str, *arguments: str) -> tuple[int, str]:
    return run_demo(folder, "--offline", "--nexum", address, *arguments)


def summary(output: str) -> str:
    """Return the two lines with the counts, in one line."""
    return " | ".join(line for line in output.splitlines() if re.match(r"\[\w+\] (Model|Tool) calls: ", line))


def test_team_continues_after_a_crash(tmp_path: Path, address: str) -> None:
    code, _ = ask(tmp_path, address, "--team", "--crash-after-step", "3", QUESTION)
    assert code not in (0, 1, 2)
    code, output = ask(tmp_path, address, "--team", QUESTION)
    assert code == 0
    assert "the previous run died; taking over" in output
    assert "reply 1 of first_researcher: replayed from the record ✓" in output
    assert "Tokyo" in answer(output)
    assert "New York" in answer(output)
    assert len(recorded(tmp_path, address)) == 4
    code, again = ask(tmp_path, address, "--team", QUESTION)
    assert code == 0
    assert "Model calls: 0 executed (0 tokens), 7 cached" in summary(again)
    assert [line for line in again.splitlines() if line.startswith("From the conversation")] == [
        line for line in output.splitlines() if line.startswith("From the conversation")
    ]


def test_ctrl_c_ends_a_team_at_once_and_names_the_session_that_continues(tmp_path: Path, server: ServerThread) -> None:
    command = [DEMO, "--offline", "--nexum", server.address, "--team", "--new-session", QUESTION]
    with running(command, cwd=tmp_path) as process:
        process.wait_for("Submitted")  # without a worker, the call would wait for ever
        begun = time.monotonic()
        process.interrupt()
        assert process.wait() == 130
        assert time.monotonic() - begun < 4
        hint = re.fullmatch(
            r"interrupted; (--session-id \w+) instead of --new-session continues from what is recorded",
            process.lines[-1],
        )
        assert hint
        assert "Traceback" not in process.output
    with tool_worker(tmp_path, server.address):
        code, output = ask(tmp_path, server.address, "--team", *hint[1].split(), QUESTION)
    assert code == 0
    assert "reply 1 of first_researcher: replayed" in output


def test_closed_output_records_no_failure(tmp_path: Path, address: str) -> None:
    command = [sys.executable, DEMO, "--offline", "--nexum", address, "--session-id", "s", QUESTION]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "Submitted" not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()  # as `| head` does, before the result is printed
        assert process.wait(30) == 1
    code, output = ask(tmp_path, address, "--session-id", "s", QUESTION)
    assert code == 0
    assert "Broken pipe" not in output
    assert "[1]" in output  # the answer's first source: the tools returned results


def test_counts_at_the_end_of_a_run_have_one_meaning(tmp_path: Path, address: str) -> None:
    ask(tmp_path, address, "--session-id", "s", "--crash-after-step", "1", QUESTION)
    code, output = ask(tmp_path, address, "--session-id", "s", QUESTION)
    assert code == 0
    # When the first run died, one call's result was on the server, but not in the session's record. So the session
    # makes this call live in the second run, and the demo counts its result as cached.
    counts = re.findall(r"(?:Model|Tool) calls: (\d+) executed(?: \(.*? tokens\))?, (\d+) cached", summary(output))
    (model_calls, cached_replies), (tool_calls, cached_results) = (tuple(map(int, one)) for one in counts)
    assert (model_calls, cached_replies, tool_calls + cached_results) == (2, 1, 4)
    assert cached_results > 0
    assert "tool call(s) live" not in output


def test_team_and_single_agent_have_different_sessions_for_a_question(tmp_path: Path, address: str) -> None:
    _, single = ask(tmp_path, address, QUESTION)
    _, team = ask(tmp_path, address, "--team", QUESTION)
    assert "(new;" in single
    assert "(new;" in team


def test_sessions_are_listed_with_question_model_status_calls_and_age(tmp_path: Path, address: str) -> None:
    code, output = ask(tmp_path, address, "--sessions")
    assert (code, output) == (0, "no session is on record here")
    ask(tmp_path, address, "--session-id", "whole", QUESTION)
    ask(tmp_path, address, "--session-id", "crashed", "--crash-after-step", "1", RUST)
    code, output = ask(tmp_path, address, "--sessions")
    assert code == 0
    lines = output.splitlines()
    assert len(lines) == 6
    assert lines[0].split()[0] == "crashed"
    assert lines[0].split()[1] in ("interrupted", "running")  # a killed owner counts as alive for a second
    assert lines[1].strip() == RUST
    assert lines[3].startswith("whole                  finished     3 model call(s), 4 tool call(s), begun ")
    assert lines[4:] == [f"    {QUESTION}", "    OfflineModel"]


def test_session_continues_with_its_recorded_question(tmp_path: Path, address: str) -> None:
    ask(tmp_path, address, "--session-id", "s", RUST)
    code, output = ask(tmp_path, address, "--session-id", "s")
    assert code == 0
    assert f"[demo] No question given; asking the session's own: {RUST}" in output
    assert re.search("Model calls: 0 executed .* Tool calls: 0 executed", summary(output))


def test_other_question_in_a_session_stops_unless_on_drift_is_continue(tmp_path: Path, address: str) -> None:
    ask(tmp_path, address, "--session-id", "s", QUESTION)
    before = len(recorded(tmp_path, address))
    code, output = ask(tmp_path, address, "--session-id", "s", RUST)
    assert code == 2
    last = output.splitlines()[-1]
    assert last.startswith("error: this program differs from the one recorded in session s: ")
    assert QUESTION in last
    assert RUST in last
    assert "--on-drift continue" in last
    assert len(recorded(tmp_path, address)) == before
    code, output = ask(tmp_path, address, "--session-id", "s", "--on-drift", "continue", RUST)
    assert code == 0
    assert "continues live from here; 7 recorded event(s) are dropped" in output
    assert "Rust" in answer(output)
    code, output = ask(tmp_path, address, "--session-id", "s", RUST)
    assert code == 0
    assert re.search("Model calls: 0 executed .* Tool calls: 0 executed", summary(output))


def test_fork_continues_from_the_first_events_with_a_message_and_another_model(tmp_path: Path, address: str) -> None:
    ask(tmp_path, address, "--session-id", "s", QUESTION)
    seen: list[dict[str, Any]] = []

    def reply(body: dict[str, Any]) -> Reply:
        seen.append(body)
        return Reply("In French: bonjour.")

    with OpenAIServer(reply) as model:
        env = {"OPENAI_BASE_URL": model.base_url, "NEXUM_MODEL": "other"}
        for _ in range(2):
            code, output = run_demo(
                tmp_path, "--nexum", address, "--fork", "s@3", "--session-id", "t", "In French, please", env=env
            )
            assert code == 0, output
            assert "reply 1 of research_assistant: replayed" in output
            assert answer(output).strip() == "In French: bonjour."
    (body,) = seen
    assert body["model"] == "other"
    said = [(message["role"], message["content"]) for message in body["messages"] if message["role"] == "user"]
    assert said == [("user", QUESTION), ("user", "In French, please")]
    assert body["messages"][-1]["content"] == "In French, please"
    _, listed = ask(tmp_path, address, "--sessions")
    assert f"    {QUESTION} / In French, please" in listed.splitlines()


def test_a_fork_after_the_end_asks_the_next_question(tmp_path: Path, address: str) -> None:
    ask(tmp_path, address, "--session-id", "s", QUESTION)
    code, output = ask(tmp_path, address, "--fork", "s@7", "--session-id", "t", RUST)
    assert code == 0
    assert "Model calls: 3 executed" in summary(output)
    assert "Rust" in output.rpartition("\n\n")[0]
    code, other = ask(tmp_path, address, "--session-id", "t", RUST)
    assert code == 2
    assert f"the question was '{QUESTION}', now it is '{RUST}'" in other
    code, again = ask(tmp_path, address, "--session-id", "t")
    assert code == 0
    assert "Model calls: 0 executed (0 tokens), 6 cached" in summary(again)


def test_impossible_fork_is_one_line_and_exit_code_2(tmp_path: Path, address: str) -> None:
    ask(tmp_path, address, "--session-id", "s", QUESTION)
    ask(tmp_path, address, "--session-id", "s2", RUST)
    said = {
        ("--fork", "s", "--session-id", "t"): "'s' must be SESSION@N, for example demo1@2",
        ("--fork", "s@8", "--session-id", "t"): "session 's' has 7 recorded call(s): give 0 to 7, not 8",
        ("--fork", "none@1", "--session-id", "t"): "session 'none' has nothing on record here",
        ("--fork", "s@1", "--session-id", "s2"): "session s2 has recorded other events than s",
    }
    for arguments, words in said.items():
        code, output = ask(tmp_path, address, *arguments)
        assert (code, words in output.splitlines()[-1]) == (2, True), output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fork", "s@1"], "--fork needs the new session's name in --session-id"),
        (["--sessions", RUST], "--sessions only lists the sessions: give no question"),
        (["--sessions", "--team"], "--sessions only lists the sessions: give no question"),
        (["--sessions", "--budget", "0"], "--sessions only lists the sessions: give no question"),
    ],
)
def test_option_that_does_not_fit_is_one_line_and_exit_code_2(
    in_process: InProcess, arguments: list[str], said: str
) -> None:
    code, output = in_process(script, "--offline", "--nexum", "127.0.0.1:1", *arguments)
    assert (code, said in output.splitlines()[-1]) == (2, True), output

"""Helpers for the tests of whole processes: scripts, their children, records and effects."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT, Process, connected_worker, environment, running

from nexum_engine.__main__ import build_parser
from nexum_engine.commands import look
from nexum_engine.connection import DEFAULT_ADDRESS
from submit_task import call_key

DEMO = str(ROOT / "demo.py")
QUESTION = "What is the population of Tokyo vs New York?"


def wait_until(condition: Callable[[], bool], what: str, *, timeout: float = 20) -> None:
    """Return as soon as the condition holds. Raises AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}")
        time.sleep(0.005)


# ---- Scripts ---------------------------------------------------------------------------------------------------------


Command = Callable[..., tuple[int, str]]
"""A function that runs a command with its arguments; it returns the exit code and the output."""
InProcess = Callable[..., tuple[int, str]]
"""A function that runs a script's `main` with arguments; it returns the exit code and the output."""


def run_script(
    command: list[str], folder: Path, env: Mapping[str, str] | None = None, *, forked: bool = False
) -> tuple[int, str]:
    """Run a script to its end; return its exit code and its output, which must hold no traceback."""
    with running(command, cwd=folder, env=env, forked=forked) as process:
        code = process.wait()
    assert "Traceback" not in process.output, process.output
    return code, process.output


def read_one_line(command: list[str], folder: Path) -> tuple[str, int, str]:
    """Run `COMMAND | head -1`; return the line, the command's exit code and its standard error."""
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        return line, process.wait(30), errors


def run_demo(folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    return run_script([DEMO, *arguments], folder, env, forked=True)


@contextmanager
def demo(folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[Process]:
    """Run the demo for the length of a `with`. Then resume its worker: a test may have stopped it with SIGSTOP."""
    with running([DEMO, *arguments], cwd=folder, env=env, forked=True) as process:
        try:
            yield process
        finally:
            for pid in children(process.popen.pid).values():
                send(pid, signal.SIGCONT)


def answer(output: str) -> str:
    """Return the final answer in the demo's output.

    Leave out lines about the server that the demo has logged between two streamed pieces of the answer. Such a line may
    divide a line of the answer in two.
    """
    lines = output.partition("\n\n")[2].splitlines()
    while lines and lines[-1].startswith(("[Nexum] ", "[demo] ")):
        lines.pop()
    return "\n".join(line for line in lines if not line.startswith("[Nexum] "))


def counting_worker(folder: Path, address: str) -> AbstractContextManager[Process]:
    """Run a tests/programs/counting_worker.py that is connected to the server."""
    return connected_worker([str(ROOT / "tests" / "programs" / "counting_worker.py"), address], folder)


def submitter(
    folder: Path, address: str, tool_name: str, *calls: Mapping[str, Any], session: str = "s", timeout: float = 60
) -> AbstractContextManager[Process]:
    """Run tests/programs/submitter.py with these calls."""
    program = str(ROOT / "tests" / "programs" / "submitter.py")
    command = [program, session, str(timeout), tool_name, *map(json.dumps, calls)]
    return running(command, cwd=folder, env={"NEXUM_ADDRESS": address}, forked=True)


# ---- Processes -------------------------------------------------------------------------------------------------------


def children(pid: int) -> dict[str, int]:
    """Return the id of the worker that a process runs, under the key `worker`. Return {} if it runs none."""
    found: dict[str, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = int(stat(int(folder.name))[1])
                command = (folder / "cmdline").read_bytes()
            except (OSError, IndexError):
                continue
            # Until its exec, a forked child still has its parent's command line, so it isn't found yet.
            if parent == pid and b"worker.py" in command:
                found["worker"] = int(folder.name)
    return found


def stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat, beginning with the process's state."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def is_alive(pid: int) -> bool:
    """Return whether the process exists and is not a zombie."""
    try:
        return stat(pid)[0] not in "ZX"
    except (OSError, IndexError):
        return False


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def default_port() -> int:
    """Return the default port of a server."""
    return int(DEFAULT_ADDRESS.rpartition(":")[2])


# ---- Records and effects ---------------------------------------------------------------------------------------------


def command_line(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(list(arguments))


def recorded(
    folder: Path,
    address: str | None = None,
    is_wanted: Callable[[str], bool] = lambda id_: not id_.startswith("agent-"),
) -> list[dict[str, Any]]:
    """Return the executions whose workflow's id is wanted, with nodes and attempts, oldest first.

    By default, those of all tool calls: all but durable runs. Read them from the server at `address`. Without an
    address, read them from the demo's database.
    """
    where = ["--nexum", address] if address else ["--database-url", f"sqlite:///{folder / '.nexum' / 'local.db'}"]
    listed = json.loads(asyncio.run(look(command_line("ps", "--json", "--limit", "1000", *where))))
    ids = [one["execution_id"] for one in reversed(listed) if is_wanted(one["workflow_id"])]
    return [json.loads(asyncio.run(look(command_line("show", one, "--json", *where)))) for one in ids]


def attempts(execution: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = execution["nodes"][0]["attempts"]
    return found


def call_of(execution: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the tool's name and the arguments of an execution."""
    call = json.loads(execution["input_json"])
    return call["tool_name"], call["tool_args"]


def result_of(execution: Mapping[str, Any]) -> str:
    result: str = json.loads(execution["nodes"][0]["output_json"])["result"]
    return result


@dataclass(frozen=True)
class Effect:
    """One line of a tool's log. Each attempt that had its effect wrote a line."""

    at_ms: int
    attempt: int
    pid: int
    key: str


def effects(log: Path) -> list[Effect]:
    if not log.exists():
        return []
    parts = [line.split(" ", 3) for line in log.read_text().splitlines()]
    return [Effect(int(at), int(attempt), int(pid), key) for at, attempt, pid, key in parts]


# ---- Calls under faults ----------------------------------------------------------------------------------------------


class Acknowledged:
    """The results that callers of a counting tool got, by the call's number. A number must never get two results."""

    def __init__(self) -> None:
        self.results: dict[int, str] = {}

    def read(self, caller: Process) -> None:
        """Add the results in the output of a tests/programs/submitter.py."""
        for line in caller.lines:
            if match := re.fullmatch(r"RESULT ((\d+) [0-9a-f-]{36})", line):
                number, result = int(match[2]), match[1]
                assert self.results.setdefault(number, result) == result


def assert_recorded_once(
    records: list[dict[str, Any]], acknowledged: Acknowledged, log: Path, count: int, losses: Container[str]
) -> None:
    """Check that each of `count` calls has one COMPLETED execution, with the result that its callers got.

    No effect happened after its result was recorded, or twice in one attempt. A call was attempted again only after an
    attempt with one of the outcomes `losses`.
    """
    assert {one["status"] for one in records} == {"COMPLETED"}
    by_number = {call_of(one)[1]["number"]: one for one in records}
    assert len(records) == len(by_number) == count
    assert acknowledged.results == {number: result_of(one) for number, one in by_number.items()}
    log_of = defaultdict(list)
    for effect in effects(log):
        log_of[effect.key].append(effect)
    assert len(log_of) == count
    for one in records:
        (key,) = [key for key in log_of if call_key(*call_of(one)) in key]
        outcomes = [attempt["outcome"] for attempt in attempts(one)]
        assert outcomes[-1] == "COMPLETED"
        assert all(outcome in losses for outcome in outcomes[:-1])
        assert len({effect.attempt for effect in log_of[key]}) == len(log_of[key])
        assert max(effect.at_ms for effect in log_of[key]) <= one["ended_ms"]

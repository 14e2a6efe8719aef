"""Budgets of programs that are killed: what a session has spent survives, and so does the question to a person."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import Process, running

KILLED = -signal.SIGKILL if sys.platform != "win32" else 1
RUNS = 10
LIMIT = 3

PROGRAM = """
import asyncio, logging, sys
from autogen_core.models import UserMessage
from autogen_ext.models.replay import ReplayChatCompletionClient
from durable_autogen import Budget, DurableSession
from nexum_engine.errors import NexumError
from support.launcher import kill_this_process

logging.basicConfig(level=logging.INFO, format="%(message)s")
when = sys.argv[1]

class Model(ReplayChatCompletionClient):
    async def create(self, messages, **more):
        with open("calls.log", "a") as log:
            log.write("called\\n")
        if when == "in a call":
            kill_this_process()
        return await super().create(messages, **more)

async def main():
    model = Model(["said"] * 10)
    async with DurableSession("s", budget=Budget(model_calls=3)) as session:
        for number in range(1, 6):
            await model.create([UserMessage(content=f"question {number}", source="user")])
            if when == "after a call" and session.recorder.live:
                kill_this_process()
    print("DONE")

try:
    asyncio.run(main())
except NexumError as error:
    print("ERROR", type(error).__name__, error)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


@contextmanager
def program(folder: Path, when: str = "") -> Iterator[Process]:
    with running(["program.py", when], cwd=folder) as process:
        yield process
    assert "Traceback" not in process.output, process.output


def calls(folder: Path) -> int:
    log = folder / "calls.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def decide(folder: Path, told: str) -> str:
    """Run a command that a program has told; return its output."""
    with running(["-m", *shlex.split(told.strip().removeprefix("python -m "))], cwd=folder) as deciding:
        assert deciding.wait() == 0, deciding.output
    return deciding.output


@pytest.mark.parametrize("when", ["in a call", "after a call"])
def test_program_that_is_killed_at_each_call_stays_within_its_budget(folder: Path, when: str) -> None:
    told = ""
    for number in range(1, RUNS + 1):
        with program(folder, when) as killed:
            if number <= LIMIT:
                assert killed.wait() == KILLED
                assert calls(folder) == number
            else:
                told = killed.wait_for("has used 3 of 3 model calls of its budget")
                killed.kill()
                assert killed.wait() == KILLED
    assert calls(folder) == LIMIT
    raising, _, stopping = told.partition("Raise the budget: ")[2].partition("; or stop the session: ")
    # A decision that is made while no program runs counts.
    assert decide(folder, raising) == "raised the budget of session s to 6 model calls"
    with program(folder) as resumed:
        if when == "after a call":
            assert resumed.wait_for("DONE")
            assert resumed.wait() == 0
            assert calls(folder) == 5
            return
        # The calls that were cut off count, so that 3 of the program's 5 calls are left.
        assert resumed.wait_for("has used 6 of 6 model calls")
        decide(folder, f"{stopping} 'that is enough'")
        assert "that is enough" in resumed.wait_for("ERROR BudgetExceeded")
        assert resumed.wait() == 0
    assert calls(folder) == 6

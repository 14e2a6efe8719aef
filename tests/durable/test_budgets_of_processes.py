"""Budgets of programs that are killed: what a session has spent survives, and so does the question to a person."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import KILLED, Process, running

RUNS = int(os.environ.get("BUDGET_RUNS") or 5)
LIMIT = 3

PROGRAM = """
import asyncio, logging, sys
from autogen_core import CancellationToken
from autogen_core.models import UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.replay import ReplayChatCompletionClient
from durable_autogen import Budget, DurableSession
from nexum_engine.errors import NexumError
from support.processes import kill_this_process

logging.basicConfig(level=logging.INFO, format="%(message)s")
when = sys.argv[1]

def note(text):
    with open("calls.log", "a") as log:
        log.write(text + "\\n")
    if when == "in a call":
        kill_this_process()

class Model(ReplayChatCompletionClient):
    async def create(self, messages, **more):
        note("model")
        return await super().create(messages, **more)

def charge(cents: int) -> str:
    note(f"charge {cents}")
    return "charged"

async def main():
    model, tool, token = Model(["said"] * 10), FunctionTool(charge, "Charge."), CancellationToken()
    async with DurableSession("s", budget=Budget(model_calls=3, tool_calls={"charge": 1})) as session:
        for number in range(5):
            if sys.argv[2] == "model":
                await model.create([UserMessage(content=f"question {number}", source="user")])
            else:
                await tool.run_json({"cents": number}, token)
            if when == "after a call" and session.recorder.live_counts:
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
def program(folder: Path, what: str, when: str = "") -> Iterator[Process]:
    with running(["program.py", when, what], cwd=folder, forked=True) as process:
        yield process
    assert "Traceback" not in process.output, process.output


def calls(folder: Path) -> list[str]:
    """Return all calls that were made, including those without a result."""
    return (folder / "calls.log").read_text().splitlines()


def decide(folder: Path, told: str) -> str:
    """Run a command that a program has printed; return the command's output."""
    command = ["-m", *shlex.split(told.strip().removeprefix("python -m "))]
    with running(command, cwd=folder, forked=True) as deciding:
        assert deciding.wait() == 0, deciding.output
    return deciding.output


@pytest.mark.timeout(240)
def test_program_that_is_killed_at_each_call_stays_within_its_budget(folder: Path) -> None:
    """The test kills five runs, or as many as the environment variable BUDGET_RUNS says."""
    told = ""
    for number in range(1, RUNS + 1):
        # Kill the program in its first call, after its second, in its third, and then at the limit.
        with program(folder, "model", "after a call" if number == 2 else "in a call") as killed:
            if number > LIMIT:
                told = killed.wait_for("has used 3 of 3 model calls of its budget")
                killed.kill()
            assert killed.wait() in KILLED
        assert len(calls(folder)) == min(number, LIMIT)
    raising, _, stopping = told.partition("Raise the budget: ")[2].partition("; or stop the session: ")
    # A decision that is made while no program runs counts.
    assert decide(folder, raising) == "raised the budget of session s to 6 model call(s)"
    with program(folder, "model") as resumed:
        # The limit of 6 includes the two calls that were cut off. So only 4 of the program's 5 calls have a result.
        assert resumed.wait_for("has used 6 of 6 model calls")
        assert decide(folder, f"{stopping} 'that is enough'").startswith("session s stops")
        assert "that is enough" in resumed.wait_for("ERROR BudgetExceeded")
        assert resumed.wait() == 0
    assert len(calls(folder)) == 6
    assert decide(folder, "python -m durable_autogen budget s").startswith("session s has used $0, ")


def test_tool_call_that_is_made_again_after_a_kill_counts_once(folder: Path) -> None:
    with program(folder, "tool", "in a call") as killed:
        assert killed.wait() in KILLED
    with program(folder, "tool") as resumed:
        resumed.wait_for("has used 1 of 1 calls of charge of its budget")
        assert calls(folder) == ["charge 0", "charge 0"]
        # The engine's own commands list and decide this question, too.
        (asked,) = json.loads(decide(folder, "python -m nexum_engine approvals --json"))
        assert json.loads(asked["input_json"])["reason"] == "1 of 1 calls of charge"
        answer = '{"tool_calls": {"charge": 5}}'
        decide(folder, f"python -m nexum_engine approve {asked['execution_id']} --args '{answer}'")
        resumed.wait_for("DONE")
    assert calls(folder) == ["charge 0", *(f"charge {number}" for number in range(5))]

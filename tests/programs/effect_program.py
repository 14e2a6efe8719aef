"""A random program with tools of every policy and a budget: `effect_program.py SESSION SEED LEDGER DEATH [--park]`.

SEED decides which calls the program makes. LEDGER is the world outside: each call that really happens adds a line to
it. At each call, the process kills itself with the probability DEATH, before or after the call's effect. At its end,
the program prints its results as one line: `RESULTS ` and JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autogen_core import CancellationToken
from autogen_core.models import CreateResult, RequestUsage, UserMessage
from autogen_core.tools import BaseTool, FunctionTool
from autogen_ext.models.replay import ReplayChatCompletionClient

from durable_autogen import (
    NOT_DONE,
    Budget,
    BudgetExceeded,
    CallFailed,
    CallRejected,
    DurableSession,
    Parked,
    call_id,
    durable_tool,
)

MODEL = "model"
POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "once": {"effect": "once"},
    "checked": {"effect": "once", "reconcile": "ledger"},
    "asked": {"approval": "always"},
    "asked_once": {"approval": "always", "effect": "once"},
    "asked_checked": {"approval": "always", "effect": "once", "reconcile": "ledger"},
}
"""The policy of each tool, by the tool's name. The tool is named after its policy."""
TOKENS = 5
"""How many tokens a reply takes."""
WIDTH = 3
"""The largest number of calls that are made at once."""

PARKED, STOPPED = 75, 5
"""The exit codes of a run that parked, and of a run that a person stopped at a limit of its budget."""


def calls_of(seed: int) -> list[list[tuple[str, int]]]:
    """Return a program's steps. A step is one to three calls made at once. A call is a tool's name and a number."""
    rng = random.Random(seed)
    numbers = iter(range(1, 100))
    return [
        [(rng.choice([*POLICIES, MODEL, MODEL]), next(numbers)) for _ in range(rng.randint(1, WIDTH))]
        for _ in range(rng.randint(3, 5))
    ]


def budget_of(seed: int) -> Budget:
    """Return the budget of the seed's program. The limits are so low that most programs reach at least one."""
    rng = random.Random(-seed)
    limited = rng.sample(list(POLICIES), 3)
    return Budget(model_calls=rng.randint(0, 3), tool_calls={name: rng.randint(0, 2) for name in limited})


class World:
    """The world outside the program."""

    def __init__(self, ledger: Path, death: float) -> None:
        self._ledger, self._death = ledger, death

    async def act(self, name: str, number: int, amount: int = 0) -> str:
        """Have an effect on the world: add a line to the ledger. The program may die before and after the effect."""
        await asyncio.sleep(random.random() * 0.01)
        self._may_die()
        descriptor = os.open(self._ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, f"{time.time()} {name} {number} {amount} {call_id() or '-'}\n".encode())
        os.close(descriptor)
        self._may_die()
        await asyncio.sleep(random.random() * 0.01)
        return f"{name} {number} {amount}"

    def _may_die(self) -> None:
        if random.random() < self._death:
            os.kill(os.getpid(), signal.SIGKILL)

    def look_up(self, arguments: Mapping[str, Any], key: str) -> Any:
        """Look an effect up in the ledger; return its result, or NOT_DONE."""
        if random.random() < 0.3:
            raise OSError("the ledger can't be read now")
        lines = self._ledger.read_text().splitlines() if self._ledger.exists() else []
        return "found in the ledger" if any(line.split()[4] == key for line in lines) else NOT_DONE


class Model(ReplayChatCompletionClient):
    """A model whose calls add lines to the ledger, as the tools' calls do."""

    world: World

    async def create(self, messages: Any, **_: Any) -> CreateResult:
        text = str(messages[-1].content)
        await self.world.act(MODEL, int(text))
        usage = RequestUsage(prompt_tokens=TOKENS, completion_tokens=0)
        return CreateResult(finish_reason="stop", content=f"reply to {text}", usage=usage, cached=False)


def tool(name: str, world: World) -> BaseTool[Any, Any]:
    """Return the tool of this name with its policy."""

    async def act(number: int, amount: int = 1) -> str:
        return await world.act(name, number, amount)

    policy = POLICIES[name]
    if "reconcile" in policy:
        policy = {**policy, "reconcile": world.look_up}
    return durable_tool(FunctionTool(act, "Act.", name=name), **policy)


async def main(argv: list[str]) -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("session")
    parser.add_argument("seed", type=int)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("death", type=float)
    parser.add_argument("--park", action="store_true")
    args = parser.parse_args(argv)
    world = World(args.ledger, args.death)
    tools = {name: tool(name, world) for name in POLICIES}
    model = Model([])
    model.world = world

    async def make(name: str, number: int) -> str:
        try:
            if name == MODEL:
                return str((await model.create([UserMessage(content=str(number), source="user")])).content)
            return str(await tools[name].run_json({"number": number}, CancellationToken()))
        except (CallRejected, CallFailed) as error:
            return f"{type(error).__name__} {error}"

    results: list[str] = []
    try:
        async with DurableSession(args.session, budget=budget_of(args.seed), park=args.park):
            for step in calls_of(args.seed):
                results += await asyncio.gather(*(make(name, number) for name, number in step))
    except Parked:
        return PARKED
    except BudgetExceeded:
        return STOPPED
    print("RESULTS " + json.dumps(results), flush=True)
    return 0


def run(argv: list[str]) -> int:
    """Run the program in an event loop; return its exit code."""
    return asyncio.run(main(argv))


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    sys.exit(run(sys.argv[1:]))

"""Run random programs with tools of every policy and with budgets; kill them and decide at random; check the world.

python tests/effect_runs.py                    200 programs, eight at a time
python tests/effect_runs.py --programs 20 --seed 7
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))  # as in pytest's settings

from harness import ROOT, nexum_server, running
from programs.effect_program import MODEL, PARKED, POLICIES, STOPPED, budget_of, calls_of

from durable_autogen import Budget
from durable_autogen.record.budget import BUDGET_QUESTION, decide
from nexum_engine.approvals import NODE
from nexum_engine.client import NexumClient
from nexum_engine.errors import Conflict
from nexum_engine.options import count
from nexum_engine.records import UnknownNode

DEATH = 0.12  # the probability that a program kills itself at each of two moments of a call
MAX_DEATHS = 4  # of one program, by default; after these deaths, the program runs undisturbed
TAKE_OVER = 1.0  # seconds, roughly, until the server notices that the killed run is dead, and the next run can begin
MAX_LENGTH = 300.0  # seconds that a program may run
MAX_RUNS = 40  # of one program
AT_ONCE = 8
HITS = (
    *("killed", "parked", "stopped", "raised", "approved", "edited", "rejected"),
    *("resolved: result", "resolved: failed", "resolved: not done", "lied"),
)
"""The random events that are counted."""


@dataclass(frozen=True)
class Starter:
    """A starter of programs. It forks them, so that each start is quick."""

    folder: Path
    address: str

    async def run(self, argv: list[str], *, kill_after: float | None = None) -> tuple[int, str]:
        """Run a program; return its exit code (negative for a signal) and output."""
        program = str(ROOT / "tests" / "programs" / "effect_program.py")
        env = {"NEXUM_ADDRESS": self.address}
        with running([program, *argv], cwd=self.folder, env=env, forked=True) as process:
            killing = None
            if kill_after is not None:
                killing = asyncio.get_running_loop().call_later(kill_after, kill, process.popen.pid)
            code = await asyncio.to_thread(process.wait, MAX_LENGTH)
            if killing is not None:
                killing.cancel()
        return code, process.output


def kill(pid: int) -> None:
    # The program may have just ended. Its id is safe to use: the system doesn't soon give it to another process.
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Entry:
    """A line of the ledger: something that really happened."""

    at: float
    name: str
    number: int
    amount: int
    key: str


@dataclass
class Program:
    """A program, and what people have decided about it."""

    session: str
    seed: int
    ledger: Path
    limits: Budget
    raised: list[tuple[float, Budget]] = field(default_factory=list)
    """The times when the budget was raised, each with the limits before."""
    approved: dict[int, int] = field(default_factory=dict)
    """The amount of each approved call, by the call's number."""
    rejected: set[int] = field(default_factory=set)
    lies: Counter[int] = field(default_factory=Counter)
    """By call number: how often a person said that nothing had happened, although the effect had happened."""
    deciding: asyncio.Lock = field(default_factory=asyncio.Lock)

    def entries(self) -> list[Entry]:
        lines = self.ledger.read_text().splitlines() if self.ledger.exists() else []
        parts = [line.split() for line in lines]
        return [Entry(float(at), name, int(number), int(amount), key) for at, name, number, amount, key in parts]


class People:
    """People who decide the programs' questions at random."""

    def __init__(self, client: NexumClient, hits: Counter[str]) -> None:
        self.client, self.hits = client, hits
        self.programs: dict[str, Program] = {}

    async def work(self) -> None:
        """Keep deciding some questions of all programs."""
        while True:
            await self.look(0.3)
            if random.random() < 0.02 and self.programs:
                await self.raise_budget(random.choice(list(self.programs.values())))
            await asyncio.sleep(random.random() * 0.1)

    async def look(self, probability: float, only: Program | None = None) -> None:
        """Decide each question with this probability. With `only`, leave out the other programs' questions."""
        for one in await self.client.pending_approvals():
            asked = json.loads(one.input_json)
            program = self.programs[asked["session"]]
            if random.random() < probability and only in (None, program):
                if one.workflow_id == BUDGET_QUESTION.workflow_id:
                    await self.decide_budget(program)
                else:
                    await self.decide_call(program, one.execution_id, asked["arguments"])
        for effect in await self.client.unknown():
            made = json.loads(effect.input_json)
            program = self.programs[made["session"]]
            if random.random() < probability and only in (None, program):
                await self.find_out(program, effect, made["arguments"]["number"])

    async def decide_call(self, program: Program, execution: str, arguments: dict[str, Any]) -> None:
        number, amount = arguments["number"], arguments["amount"]
        how = random.choice(["approved", "edited", "rejected"])
        async with program.deciding:
            with suppress(Conflict):  # it was decided in the meantime
                if how == "rejected":
                    await self.client.reject(execution, NODE, approver="ann", reason="no")
                    program.rejected.add(number)
                else:
                    amount += how == "edited"
                    answer = {**arguments, "amount": amount} if how == "edited" else None
                    await self.client.approve(execution, NODE, approver="ann", answer=answer)
                    program.approved[number] = amount
                self.hits[how] += 1

    async def decide_budget(self, program: Program) -> None:
        if random.random() < 0.8:
            await self.raise_budget(program)
            return
        async with program.deciding:
            await decide(self.client, program.session, None, reason="enough")

    async def raise_budget(self, program: Program) -> None:
        """Raise the program's budget, whether it asks for this or not."""
        async with program.deciding:
            assert program.limits.model_calls is not None
            raised = Budget(
                model_calls=program.limits.model_calls + random.randint(1, 3),
                tool_calls={name: limit + random.randint(0, 1) for name, limit in program.limits.tool_calls.items()},
            )
            at = time.time()
            await decide(self.client, program.session, raised)
            program.raised.append((at, program.limits))
            program.limits = raised
            self.hits["raised"] += 1

    async def find_out(self, program: Program, effect: UnknownNode, number: int) -> None:
        """Resolve an effect that may or may not have happened. Mostly say the truth."""
        async with program.deciding:
            has_happened = any(entry.number == number for entry in program.entries())
            how = random.choice(["result", "failed"] if has_happened else ["not done", "not done", "failed"])
            is_lie = has_happened and random.random() < 0.1
            resolve = partial(self.client.resolve, effect.execution_id, effect.node_id, attempt=effect.attempt)
            with suppress(Conflict):
                if how == "not done" or is_lie:
                    await resolve(resolved_by="ann", not_done=True)
                    program.lies[number] += is_lie
                elif how == "failed":
                    await resolve(resolved_by="ann", failed="it went wrong")
                else:
                    await resolve(resolved_by="ann", output="ann has the receipt")
                self.hits["lied" if is_lie else f"resolved: {how}"] += 1


async def run_program(starter: Starter, people: People, program: Program, max_deaths: int) -> list[str]:
    """Run a program to its end, with kills and decisions at random moments; return what is wrong."""
    deaths, hits = 0, people.hits
    argv = [program.session, str(program.seed), str(program.ledger)]
    for _ in range(MAX_RUNS):
        is_killed = deaths < max_deaths
        kill_after = random.random() + TAKE_OVER * (deaths > 0) if is_killed and random.random() < 0.5 else None
        options = [str(DEATH if is_killed else 0), *(["--park"] if random.random() < 0.3 else [])]
        code, output = await starter.run([*argv, *options], kill_after=kill_after)
        if code == 0:
            break
        if code == -signal.SIGKILL:
            deaths += 1
            hits["killed"] += 1
            await people.look(random.choice([0, 0.5]), program)
        elif code == PARKED:
            hits["parked"] += 1
            await people.look(1, program)
        elif code == STOPPED:
            hits["stopped"] += 1
            await people.raise_budget(program)
        else:
            return [f"exit {code}: {output}"]
    else:
        return [f"not over after {MAX_RUNS} runs"]
    happened = program.entries()
    code, again = await starter.run([*argv, "0"])
    problems = await _problems(people.client, program)
    if code != 0 or _results(again) != _results(output):
        problems.append(f"the replay of a finished session differs: {again}, not {output}")
    if program.entries() != happened:
        problems.append("the replay of a finished session had effects")
    return [f"{program.session} (seed {program.seed}): {problem}" for problem in problems]


def _results(output: str) -> list[str]:
    found = next((line for line in output.splitlines() if line.startswith("RESULTS ")), "RESULTS []")
    results: list[str] = json.loads(found.removeprefix("RESULTS "))
    return results


async def _problems(client: NexumClient, program: Program) -> list[str]:
    """Compare the ledger with what the policies, decisions and limits allow; return what is wrong."""
    found: list[str] = []
    entries = program.entries()
    asked = Counter(
        json.loads(one.input_json)["arguments"]["number"]
        for one in await client.list_executions(
            workflow_id="tool-approval", key_prefix=f"{program.session}:approval/", limit=100, with_nodes=True
        )
    )
    for name, number in (call for step in calls_of(program.seed) for call in step):
        mine = [entry for entry in entries if entry.number == number]
        policy = POLICIES.get(name, {})
        if {entry.name for entry in mine} - {name} or (name != MODEL and len({entry.key for entry in mine}) > 1):
            found.append(f"call {number} of {name} has several names or ids: {mine}")
        if policy.get("effect") == "once" and len(mine) > 1 + program.lies[number]:
            found.append(f"call {number} of {name} happened {len(mine)} times")
        if "approval" in policy:
            if asked[number] != 1:
                found.append(f"call {number} of {name} was asked for {asked[number]} times")
            if number in program.rejected and mine:
                found.append(f"call {number} of {name} was rejected and has happened")
            if any(program.approved.get(number) != entry.amount for entry in mine):
                found.append(f"call {number} of {name} was not approved like this: {mine}")
    for at, limits in [*program.raised, (time.time(), program.limits)]:
        before = [entry for entry in entries if entry.at < at]
        used = Counter(name for name, _ in {(entry.name, entry.number) for entry in before if entry.name != MODEL})
        used[MODEL] = sum(entry.name == MODEL for entry in before)
        found += [
            f"{used[name]} calls of {name}, of {limit}"
            for name, limit in {**limits.tool_calls, MODEL: limits.model_calls or 0}.items()
            if used[name] > limit
        ]
    return found


@asynccontextmanager
async def bench(folder: Path, hits: Counter[str]) -> AsyncGenerator[tuple[Starter, People], None]:
    """Yield a starter of programs and the people for the length of a `with`. All programs use one server."""
    with nexum_server(folder) as server:
        starter = Starter(folder, server.address)
        async with NexumClient(server.address) as client:
            people = People(client, hits)
            working = asyncio.create_task(people.work())
            try:
                yield starter, people
            finally:
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)


async def run_programs(
    folder: Path, seeds: list[int], *, max_deaths: int = MAX_DEATHS
) -> tuple[list[str], Counter[str]]:
    """Run a program for each seed, AT_ONCE at a time; return what is wrong, and how often each thing happened."""
    hits = Counter(dict.fromkeys(HITS, 0))
    turns = asyncio.Semaphore(AT_ONCE)
    async with bench(folder, hits) as (starter, people):

        async def run(number: int, seed: int) -> list[str]:
            async with turns:
                program = Program(f"s{number}", seed, folder / f"ledger-{number}", budget_of(seed))
                people.programs[program.session] = program
                return await run_program(starter, people, program, max_deaths)

        problems = await asyncio.gather(*(run(number, seed) for number, seed in enumerate(seeds)))
    return [problem for some in problems for problem in some], hits


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--programs", type=count(), default=200, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=count(0), metavar="N", help="of the first program (default: a random one)")
    args = parser.parse_args()
    first = random.randrange(1_000_000) if args.seed is None else args.seed
    with tempfile.TemporaryDirectory() as folder:
        problems, hits = asyncio.run(run_programs(Path(folder), list(range(first, first + args.programs))))
    print(
        f"{args.programs} programs, seeds from {first}: {', '.join(f'{n} {what}' for what, n in sorted(hits.items()))}"
    )
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

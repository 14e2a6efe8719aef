"""Kill a worker between a tool's charge and the record of this charge, under three policies, and count the charges.

Every number is read from the ledger, and the attempts are read from the server's record.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from nexum_engine.client import NexumClient
from nexum_engine.embedded import Child, start_child
from nexum_engine.records import Execution
from support.charges.ledger import Ledger, Request
from support.charges.tools import CRASH, LEDGER, charge_and_find, charge_by_key, charge_once, drill_workflow
from support.console import say
from support.processes import ROOT, DrillFailed, death_in_words
from support.tools import Tool
from workflow import workflow_of

LOOK_INTERVAL = 0.1  # seconds between two looks for an unknown effect
PERSON = "crash_demo"

Call = Callable[[str], Awaitable[tuple[str, str]]]
"""A function that calls a tool by its name, and returns the tool's text and the id of the call's execution."""

SECOND_ATTEMPTS = {
    charge_by_key: "the service books each key once, so a second attempt charges nobody twice",
    charge_and_find: "charges can be looked up, so the next worker finds out whether it has to charge",
    charge_once: "no worker can look charges up, so the call waits for a person",
}
"""The tools, each with what its second attempt does."""


@dataclass(frozen=True)
class Charged:
    """One tool call that has ended: its requests in the ledger, and its recorded execution."""

    tool: Tool
    requests: tuple[Request, ...]
    execution: Execution

    @property
    def attempts(self) -> str:
        """The outcomes of the recorded attempts, with the name of the person behind a decision."""
        (node,) = self.execution.nodes
        return ", ".join(
            f"{one.outcome.value} ({one.worker_id})" if one.worker_id == PERSON else one.outcome.value
            for one in node.attempts
        )

    @property
    def row(self) -> str:
        """One line of the table."""
        keys = len({one.reference for one in self.requests})
        paid = sum(one.cents for one in self.requests if one.is_booked) / 100
        policy = _policy(self.tool)
        return f"{self.tool.name:<16} {policy:<36} {len(self.requests):>8} {keys:>5} {paid:>6.2f}  {self.attempts}"

    @property
    def problem(self) -> str:
        """What differs from the policy's promise, or ""."""
        expected = 1 if self.tool.policy.is_once else 2
        booked = sum(one.is_booked for one in self.requests)
        if len(self.requests) == expected and booked == 1:
            return ""
        return f"{self.tool.name}: the ledger has {len(self.requests)} request(s), of which {booked} are booked"


HEADING = f"{'tool':<16} {'policy':<36} {'requests':>8} {'keys':>5} {'paid':>6}  attempts"


class ChargeDrill:
    """Calls of the three charging tools. Each call's first worker dies between its charge and its report."""

    def __init__(self, client: NexumClient, call: Call, name: str, folder: Path) -> None:
        self._client = client
        self._call = call
        self._name = name
        self._ledger = Ledger(folder / "ledger.jsonl")

    async def run(self) -> list[Charged]:
        """Make the calls, one after the other."""
        charged: list[Charged] = []
        for tool, why in SECOND_ATTEMPTS.items():
            say(f"\n[demo] {len(charged) + 1} of {len(SECOND_ATTEMPTS)}: {tool.name} ({_policy(tool)}): {why}")
            charged.append(await self._charge(tool))
        return charged

    async def _charge(self, tool: Tool) -> Charged:
        before = len(self._ledger.requests())
        calling = asyncio.ensure_future(self._call(tool.name))
        workers: list[Child] = []
        try:
            workers.append(await self._start_worker(1))
            await self._until_it_dies(workers[0], before, calling)
            workers.append(await self._start_worker(2))
            if tool is charge_once:
                await self._resolve(calling)
            text, execution_id = await calling
        except BaseException:
            await self._cancel(tool)  # cancel before ending the workers, so that none runs the tool
            raise
        finally:
            calling.cancel()
            await asyncio.gather(*(one.end() for one in workers))
        say(f"[demo] the call {execution_id} returns: {text}")
        found = await self._client.get_execution(execution_id, with_attempts=True)
        return Charged(tool, tuple(self._ledger.requests()[before:]), found.execution)

    async def _cancel(self, tool: Tool) -> None:
        for one in await self._client.list_executions(workflow_id=self._workflow_id(tool), status="RUNNING"):
            await self._client.cancel_execution(one.execution_id)
            say(f"[demo] Cancelled {one.execution_id}")

    def _workflow_id(self, tool: Tool) -> str:
        return workflow_of(tool.name, tool.policy, drill_workflow(self._name)).workflow_id

    async def _start_worker(self, number: int) -> Child:
        """Start a worker. Worker 1 kills itself after its charge."""
        child = await start_child(
            ["-m", "support.charges.worker", "--drill", self._name, "--nexum", self._client.address],
            env={LEDGER: str(self._ledger.path), CRASH: "1" if number == 1 else ""},
        )
        fate = ", to be killed between its charge and the report" if number == 1 else ""
        say(f"[demo] worker {number} started (pid {child.process.pid}){fate}")
        return child

    async def _until_it_dies(self, worker: Child, before: int, calling: asyncio.Future[tuple[str, str]]) -> None:
        dying = asyncio.ensure_future(worker.process.wait())
        await asyncio.wait((dying, calling), return_when=asyncio.FIRST_COMPLETED)
        if calling.done():
            calling.result()  # raises the call's error, if any: the worker would then get no call, and never die
        death = death_in_words(await dying)
        charged = self._ledger.requests()[before:]
        if len(charged) != 1:
            raise DrillFailed(f"the worker ended ({death}) after {len(charged)} charges instead of one")
        say(f"[demo] worker 1 is dead: {death}. The ledger has its charge of {charged[0].cents / 100:.2f}")

    async def _resolve(self, calling: asyncio.Future[tuple[str, str]]) -> None:
        """Do what a person does about an unknown effect: list it, look it up in the ledger, and give the result."""
        own = self._workflow_id(charge_once)
        while not (unknown := [one for one in await self._client.unknown() if one.workflow_id == own]):
            await asyncio.wait({calling}, timeout=LOOK_INTERVAL)
            if calling.done():
                return
        execution_id = unknown[0].execution_id
        await self._command("unknown")
        receipt = f"receipt {len(self._ledger.requests())}"
        await self._command("resolve", execution_id, "--result", json.dumps(receipt), "--by", PERSON)

    async def _command(self, *arguments: str) -> None:
        """Run a command as a person would, and print it with its output."""
        say(f"[demo] $ python -m nexum_engine {shlex.join(arguments)}")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "nexum_engine", *arguments, "--nexum", self._client.address),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        output, _ = await process.communicate()
        say(output.decode("utf-8", "replace").rstrip())
        if process.returncode != 0:
            raise DrillFailed(f"nexum {arguments[0]} ended with exit code {process.returncode}")


def _policy(tool: Tool) -> str:
    policy = tool.policy.described() or {"effect": tool.policy.effect}
    return ", ".join(f"{name}={value}" for name, value in policy.items())

"""Rates and concurrency of tools and models in durable runs: the server holds them, over all processes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from autogen_core import CancellationToken
from durable_agents import QUESTION, Scripted
from harness import Process, logged, running
from server_thread import ServerThread

from durable_autogen import DurableSession, Policy, durable_tool
from nexum_engine.client import NexumClient
from nexum_engine.records import Attempt, ExecutionStatus
from nexum_engine.workflow import RetryPolicy

SOON = RetryPolicy(max_attempts=3, first_delay_seconds=0.01)
PROGRAM = """
import asyncio, sys
from autogen_core import CancellationToken
from durable_autogen import DurableSession, durable_tool

session, address, effect, hangs = sys.argv[1:]

async def work() -> str:
    "Work."
    print("AT WORK", flush=True)
    if hangs == "hangs":
        await asyncio.Event().wait()
    return "done"

async def main():
    tool = durable_tool(work, concurrency=1, effect=effect)
    async with DurableSession(session, nexum=address):
        print("BEGINS", flush=True)
        print("GOT", await tool.run_json({}, CancellationToken()), flush=True)

asyncio.run(main())
"""


@contextmanager
def program(folder: Path, *arguments: str) -> Iterator[Process]:
    (folder / "program.py").write_text(PROGRAM)
    with running(["program.py", *arguments], cwd=folder, forked=True) as process:
        yield process


async def slots(server: ServerThread, name: str) -> list[Attempt]:
    """Return the attempts that the limits of a tool or model let begin: one for each call or retry, in order."""
    found: list[Attempt] = []
    async with NexumClient(server.address) as client:
        for one in await client.list_executions(workflow_id=f"limited-call:{name}"):
            execution = (await client.get_execution(one.execution_id, with_attempts=True)).execution
            assert execution.status is ExecutionStatus.COMPLETED
            found += execution.nodes[0].attempts
    return sorted(found, key=lambda one: one.started_ms)


async def running_slots(server: ServerThread, count: int) -> None:
    """Wait until at least `count` calls of `work` run, or wait because of its limits."""
    async with NexumClient(server.address) as client:
        while len(await client.list_executions(workflow_id="limited-call:work", status="RUNNING")) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_rate_and_concurrency_of_a_tool_count_its_calls_and_retries(server: ServerThread) -> None:
    at_work, most = 0, 0
    calls: list[int] = []

    async def work(number: int) -> int:
        """Work."""
        nonlocal at_work, most
        calls.append(number)
        at_work += 1
        most = max(most, at_work)
        try:
            await asyncio.sleep(0.05)
            if calls.count(1) == 1 and number == 1:
                raise OSError("try again")
            return number
        finally:
            at_work -= 1

    tool = durable_tool(work, rate="2/0.4s", concurrency=2, retry=SOON)
    async with DurableSession("s", nexum=server.address) as session:

        async def call(number: int) -> object:
            with session.agent(f"a{number}"):
                return await tool.run_json({"number": number}, CancellationToken())

        assert await asyncio.gather(*map(call, range(5))) == list(range(5))
    assert (sorted(calls), most) == ([0, 1, 1, 2, 3, 4], 2)
    found = await slots(server, "work")
    assert len(found) == 6
    for first, later in enumerate(found[2:]):
        # The rate is 2 in 0.4 s: two calls may begin at once, and then one every 0.2 s.
        assert later.started_ms - found[first].started_ms >= 200 - 1
    async with DurableSession("s", nexum=server.address) as session:
        assert await asyncio.gather(*map(call, range(5))) == list(range(5))
    assert len(await slots(server, "work")) == 6, "a replayed call took a slot"


async def test_rate_of_a_model_counts_over_sessions(server: ServerThread) -> None:
    lines: list[str] = []
    policies = {"model": Policy(rate="1/3s")}
    with logged(lines):
        for session in ("one", "two"):
            model = Scripted([], "hello", name="m")
            async with DurableSession(session, nexum=server.address, policies=policies):
                assert (await model.create(QUESTION)).content == "hello"
    found = await slots(server, "Scripted")
    assert all(later.started_ms - earlier.started_ms >= 2999 for earlier, later in pairwise(found))
    assert len(found) == 2
    assert [line for line in lines if "waits" in line] == ["reply 1 of the program waits, because of its rate of 1/3s"]


@pytest.mark.parametrize("effect", ["idempotent", "once"])
async def test_killed_process_gives_its_slot_back(server: ServerThread, tmp_path: Path, effect: str) -> None:
    with program(tmp_path, "one", server.address, effect, "hangs") as holder:
        holder.wait_for("AT WORK")
        with program(tmp_path, "two", server.address, effect, "works") as waiting:
            waiting.wait_for("BEGINS")
            await running_slots(server, 2)
            assert not any("AT WORK" in line for line in waiting.lines)
            holder.kill()
            assert waiting.wait_for("GOT") == "GOT done"
    async with NexumClient(server.address) as client:
        found = await client.list_executions(workflow_id="limited-call:work")
    assert {one.status for one in found} == {ExecutionStatus.COMPLETED, ExecutionStatus.RUNNING}


async def test_run_killed_while_it_waits_has_made_no_call(server: ServerThread, tmp_path: Path) -> None:
    with program(tmp_path, "one", server.address, "once", "hangs") as holder:
        holder.wait_for("AT WORK")
        with program(tmp_path, "two", server.address, "once", "works") as waiting:
            await running_slots(server, 2)
            waiting.kill()
        holder.kill()
    with program(tmp_path, "two", server.address, "once", "works") as again:
        assert again.wait_for("GOT") == "GOT done"  # the killed run had not begun the effect, so it is not UNKNOWN
    async with NexumClient(server.address) as client:
        found = await client.list_executions(workflow_id="limited-call:work")
    assert len(found) == 2, "the second run took another slot than the first one"


@pytest.mark.parametrize("name", ["a\tb", "\udc80", "a" * 300])
async def test_limited_call_of_a_branch_with_any_name_takes_a_slot(server: ServerThread, name: str) -> None:
    async def work() -> str:
        """Work."""
        return "done"

    tool = durable_tool(work, concurrency=1)
    async with DurableSession("s", nexum=server.address) as session:
        with session.agent(name):
            assert await tool.run_json({}, CancellationToken()) == "done"
    assert len(await slots(server, "work")) == 1

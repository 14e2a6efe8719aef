"""Make durable calls of each kind, and print the counts of one call: `counted_calls.py ADDRESS FOLDER ROUNDS CALLS`.

The calls are made one after the other, in rounds. Each printed count is the lowest count of all rounds: on a busy
machine, some rounds do additional work, for instance when a poll's wait runs out. The output is one line of JSON.

The folder has the counts of all processes (`counted.py`), the server's database, and strace's list of the server's
fsyncs, if strace runs.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from autogen_core import CancellationToken
from autogen_core.models import UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.replay import ReplayChatCompletionClient
from counted import Counts

from durable_autogen import DurableSession
from nexum_engine.client import NexumClient
from nexum_engine.owner import Owner
from submit_task import Session
from workflow import TOOL_CALL, ToolCallInput, ToolCallOutput

REST = 0.03  # seconds; if no count changes for so long, all processes are idle
PATIENCE = 2.0  # seconds to wait until all processes are idle
LOOP = ("loop turns", "loop callbacks")

Call = Callable[[], Awaitable[object]]


class Watch:
    """The counts of all processes."""

    def __init__(self, folder: Path) -> None:
        self._counts = {name: Counts(folder / f"{name}.counts") for name in ("wire", "server", "worker", "client")}
        self._log = folder / "nexum.db-wal"
        self._fsyncs = folder / "server.fsyncs"

    async def cost(self, call: Call, calls: int) -> dict[str, float]:
        """Make the calls one after the other; return the average costs of one call (turns of the loop, ...) by name."""
        before = await self._when_idle() | self._read_own()
        for _ in range(calls):
            await call()
        # Read the counts before the wait: the wait itself adds turns of the event loop.
        own = self._read_own()
        after = await self._when_idle() | own
        if after["number of the log"] != before["number of the log"]:
            del after["WAL pages"]  # don't count the pages: a checkpoint has restarted the log
        del after["number of the log"]
        return {name: (after[name] - before[name]) / calls for name in after}

    async def _when_idle(self) -> dict[str, int]:
        """Wait until the counts of the other processes no longer change; return the counts."""
        give_up = time.monotonic() + PATIENCE
        before: dict[str, int] = {}
        while (now := self._read_others()) != before and time.monotonic() < give_up:
            before = now
            await asyncio.sleep(REST)
        return now

    def _read_others(self) -> dict[str, int]:
        wire, server, worker = (self._counts[name].read() for name in ("wire", "server", "worker"))
        found = {name: wire[name] for name in ("RPCs", "messages")}
        found |= {name: server[name] for name in ("statements", "commits")}
        found["number of the log"], found["WAL pages"] = _pages(self._log)
        if self._fsyncs.exists():
            found["server's fsyncs"] = self._fsyncs.read_bytes().count(b"sync(")
        found |= {f"server's {name}": server[name] for name in LOOP}
        return found | {f"worker's {name}": worker[name] for name in LOOP}

    def _read_own(self) -> dict[str, int]:
        own = self._counts["client"].read()
        return {"client's fsyncs": own["Python's fsyncs"]} | {f"client's {name}": own[name] for name in LOOP}


def _pages(log: Path) -> tuple[int, int]:
    """Return the salt and the number of pages of a write-ahead log. Each restart of the log changes its salt.

    https://www.sqlite.org/fileformat.html#walformat
    """
    header_bytes, frame_header_bytes = 32, 24
    content = log.read_bytes()
    page_bytes, salt = int.from_bytes(content[8:12], "big"), content[16:24]
    frame_bytes = frame_header_bytes + page_bytes
    pages = 0
    for start in range(header_bytes, len(content) - frame_bytes + 1, frame_bytes):
        if content[start + 8 : start + 16] != salt:
            break  # a page of an earlier log
        pages += 1
    return int.from_bytes(salt, "big"), pages


async def main(address: str, folder: str, rounds: int, calls: int) -> None:
    """Make the calls of each kind, and print their counts."""
    watch = Watch(Path(folder))
    numbers = iter(range(1_000_000))

    async with Session("s", nexum=address, tell=lambda _: None) as session:

        async def tool_call(number: int | None = None) -> None:
            scope = str(next(numbers) if number is None else number)
            assert len((await session.call("write_much", {"size": 500}, scope=scope)).text) == 500

        found = {"tool call": await _least(watch, tool_call, rounds, calls)}
        found["replayed call"] = await _least(watch, partial(tool_call, 0), rounds, calls)

    async with NexumClient(address) as client, Owner(client) as owner:

        async def owned_call() -> None:
            number = next(numbers)
            input = ToolCallInput(tool_name="own", tool_args={"number": number, "argument": "x" * 280})
            started = await owner.start(TOOL_CALL, input, idempotency_key=f"own:{number}")
            assert started.task is not None
            await owner.complete(started.task, ToolCallOutput(result="y" * 1024))

        found["owned call"] = await _least(watch, owned_call, rounds, calls)

    model = ReplayChatCompletionClient(["y" * 1024] * (rounds + 1) * calls)
    tool = FunctionTool(_tool, description="Return a text.")
    async with DurableSession("s", nexum=address) as session_of_agent:

        async def reply() -> None:
            await model.create([UserMessage(content="x" * 280, source="user")])

        async def recorded_tool_call() -> None:
            await tool.run_json({"argument": "x" * 280}, CancellationToken())

        with session_of_agent.agent("agent"):
            found["recorded reply"] = await _least(watch, reply, rounds, calls)
            found["recorded tool call"] = await _least(watch, recorded_tool_call, rounds, calls)
    print(json.dumps(found), flush=True)


async def _tool(argument: str) -> str:
    return "y" * 1024


async def _least(watch: Watch, call: Call, rounds: int, calls: int) -> dict[str, float]:
    for _ in range(calls):  # not counted: the first calls connect, register and import
        await call()
    costs = [await watch.cost(call, calls) for _ in range(rounds)]
    names = dict.fromkeys(name for cost in costs for name in cost)
    return {name: min(cost[name] for cost in costs if name in cost) for name in names}


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))

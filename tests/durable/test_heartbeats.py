"""The `heartbeat` of a policy: an attempt without progress for longer than this ends, as at its time limit."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from autogen_core import CancellationToken
from autogen_core.models import CreateResult
from autogen_core.tools import BaseStreamTool
from durable_agents import QUESTION, Scripted, reply
from harness import logged
from pydantic import BaseModel
from server_thread import ServerThread

from durable_autogen import DurableSession, Parked, Policy, durable_tool, heartbeat
from durable_autogen.record.attempts import TookTooLong
from nexum_engine.workflow import RetryPolicy

LIMIT = 1.0  # seconds; the busy tools and models need longer than this, and show progress much more often
RETRY = RetryPolicy(max_attempts=2, first_delay_seconds=0.01)
SILENT = "sent no heartbeat for 1 s"


async def worked(steps: int = 30) -> None:
    for _ in range(steps):
        await asyncio.sleep(LIMIT / 20)


async def test_tool_that_sends_heartbeats_may_go_on_and_a_silent_one_is_stopped(server: ServerThread) -> None:
    stopped = threading.Event()

    def busy() -> str:
        """Work in a thread."""
        until = time.monotonic() + 1.5 * LIMIT
        while time.monotonic() < until:
            heartbeat()
            stopped.wait(LIMIT / 20)
        return "done"

    async def silent() -> str:
        """Begin, then hang."""
        heartbeat()
        await asyncio.Event().wait()
        return "never"

    async with DurableSession("s", nexum=server.address):
        assert await durable_tool(busy, heartbeat=LIMIT).run_json({}, CancellationToken()) == "done"
        with pytest.raises(TookTooLong, match=rf"^silent {SILENT}$"):
            await durable_tool(silent, heartbeat=LIMIT).run_json({}, CancellationToken())


async def test_silent_once_tool_is_unknown(server: ServerThread) -> None:
    async def pay() -> str:
        """Pay, then hang."""
        await asyncio.Event().wait()
        return "never"

    with pytest.raises(Parked, match=rf"may or may not have happened \(pay {SILENT}\)"):
        async with DurableSession("s", nexum=server.address, park=True):
            await durable_tool(pay, heartbeat=LIMIT, effect="once").run_json({}, CancellationToken())


class NoArguments(BaseModel):
    pass


class Item(BaseModel):
    name: str


class Listing(BaseStreamTool[NoArguments, Item, Item]):
    """A tool whose items come one after another, and together take longer than the limit."""

    def __init__(self) -> None:
        super().__init__(NoArguments, Item, "listing", "List.")

    async def run(self, args: NoArguments, cancellation_token: CancellationToken) -> Item:
        raise AssertionError("it is streamed")

    async def run_stream(self, args: NoArguments, cancellation_token: CancellationToken) -> AsyncGenerator[Item, None]:
        for number in range(3):
            await worked(10)
            yield Item(name=str(number))
        yield Item(name="all")


async def test_items_of_a_stream_are_heartbeats(server: ServerThread) -> None:
    async with DurableSession("s", nexum=server.address):
        tool = durable_tool(Listing(), heartbeat=LIMIT)
        assert isinstance(tool, Listing)
        items = [item async for item in tool.run_json_stream({}, CancellationToken())]
    assert [item.name for item in items] == ["0", "1", "2", "all"]


class Slow(Scripted):
    """A model that needs longer than the limit for a reply. Its first stream hangs before the first piece."""

    streams = 0

    async def create(self, messages: Any, **_: Any) -> CreateResult:
        await worked()
        return reply("whole")

    async def create_stream(self, messages: Any, **_: Any) -> AsyncGenerator[str | CreateResult, None]:
        self.streams += 1
        if self.streams == 1:
            await asyncio.Event().wait()
        for piece in ("a ", "b ", "c "):
            await worked(10)
            yield piece
        yield reply("a b c ")


async def test_pieces_of_a_reply_are_heartbeats_and_a_whole_reply_needs_none(server: ServerThread) -> None:
    model, lines = Slow([]), list[str]()
    policies = {"model": Policy(heartbeat=LIMIT, retry=RETRY)}
    with logged(lines):
        async with DurableSession("s", nexum=server.address, policies=policies):
            assert (await model.create(QUESTION)).content == "whole"
            pieces = [piece async for piece in model.create_stream(QUESTION)]
    assert pieces[:-1] == ["a ", "b ", "c "]
    (line,) = (line for line in lines if "retrying" in line)
    assert line == f"reply 2 of the program failed (attempt 1), retrying in 0.01 s: reply 2 of the program {SILENT}"

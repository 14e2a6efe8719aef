"""Sessions whose run somebody cancels from outside, to stop their program."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from autogen_core import CancellationToken
from autogen_core.tools import FunctionTool
from autogen_ext.models.replay import ReplayChatCompletionClient
from durable_agents import TIMEOUT, asked
from harness import nexum_server
from server_thread import ServerThread

from durable_autogen import DurableSession, RunCancelled, list_sessions
from durable_autogen.__main__ import main
from durable_autogen.record.sent_events import send
from durable_autogen.recorded_sessions import cancel_session
from nexum_engine.client import NexumClient
from nexum_engine.policy import Policy


async def _wait_for_ever(reason: str) -> str:
    await asyncio.sleep(3600)
    return reason


STUCK = FunctionTool(_wait_for_ever, description="Never returns.", name="stuck")
GUARDED = FunctionTool(_wait_for_ever, description="Needs an approval.", name="guarded")
WAITS: dict[str, Callable[[DurableSession], Awaitable[Any]]] = {
    "a sleep": lambda session: session.sleep(3600),
    "an event": lambda session: session.wait_for_event("payment"),
    "a tool": lambda _: STUCK.run_json({"reason": "r"}, CancellationToken()),
    "an approval": lambda _: GUARDED.run_json({"reason": "r"}, CancellationToken()),
}


async def cancel(address: str, session: str = "s", by: str = "ann") -> None:
    async with NexumClient(address) as client:
        await cancel_session(client, session, by=by)


@pytest.mark.parametrize("what", WAITS)
async def test_run_that_waits_ends_when_its_session_is_cancelled(what: str, server: ServerThread) -> None:
    name = what.replace(" ", "-")
    waiting = asyncio.Event()

    async def work() -> None:
        policies = {"guarded": Policy(approval="always")}
        async with DurableSession(name, nexum=server.address, policies=policies) as session:
            await asked(ReplayChatCompletionClient(["hello"]))
            waiting.set()
            await WAITS[what](session)

    async with NexumClient(server.address) as client:
        running = asyncio.create_task(work())
        await asyncio.wait_for(waiting.wait(), TIMEOUT)
        await cancel_session(client, name, by="ann")
        with pytest.raises(RunCancelled, match=f"the run of session {name} was cancelled by ann; run it again"):
            await asyncio.wait_for(running, TIMEOUT)
        (info,) = [one for one in await list_sessions(client) if one.session == name]
        assert info.status == "stopped"


async def test_cancelled_session_continues_when_it_runs_again(server: ServerThread) -> None:
    waiting = asyncio.Event()

    async def work(reply: str) -> list[str]:
        async with DurableSession("again", nexum=server.address) as session:
            text = await asked(ReplayChatCompletionClient([reply]))
            waiting.set()
            return [text, await session.wait_for_event("payment")]

    running = asyncio.create_task(work("one"))
    await asyncio.wait_for(waiting.wait(), TIMEOUT)
    await cancel(server.address, "again")
    with pytest.raises(RunCancelled):
        await asyncio.wait_for(running, TIMEOUT)
    async with NexumClient(server.address) as client:
        await send(client, "again", "payment", "paid")
    assert await asyncio.wait_for(work("another"), TIMEOUT) == ["one", "paid"]


async def test_waiting_run_ends_when_it_is_cancelled_after_a_restart_of_the_server(tmp_path: Path) -> None:
    waiting = asyncio.Event()

    async def work(address: str) -> None:
        async with DurableSession("s", nexum=address) as session:
            waiting.set()
            await session.wait_for_event("payment")

    with nexum_server(tmp_path) as first:
        running = asyncio.create_task(work(first.address))
        await asyncio.wait_for(waiting.wait(), TIMEOUT)
        await asyncio.to_thread(first.process.kill)
    with nexum_server(tmp_path, port=first.port) as second:
        await cancel(second.address)
        with pytest.raises(RunCancelled):
            await asyncio.wait_for(running, TIMEOUT)


async def test_next_call_of_a_cancelled_run_is_refused(server: ServerThread) -> None:
    async def work(*replies: str) -> list[str]:
        model = ReplayChatCompletionClient(list(replies))
        async with DurableSession("s", nexum=server.address):
            texts = [await asked(model)]
            if replies == ("one", "two"):
                await cancel(server.address)
            return [*texts, await asked(model)]

    with pytest.raises(RunCancelled, match="was cancelled by ann"):
        await asyncio.wait_for(work("one", "two"), TIMEOUT)
    assert (await work("three", "four"))[0] == "one"


async def test_run_that_is_cancelled_at_its_end_is_not_finished(server: ServerThread) -> None:
    async def work() -> None:
        async with DurableSession("s", nexum=server.address):
            await asked(ReplayChatCompletionClient(["one"]))
            await cancel(server.address)

    with pytest.raises(RunCancelled):
        await work()
    async with NexumClient(server.address) as client:
        assert [one.status for one in await list_sessions(client)] == ["stopped"]


async def test_command_says_what_it_has_cancelled(server: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(["cancel", *arguments, "--nexum", server.address])
        return code, *capsys.readouterr()

    with pytest.raises(RunCancelled, match="cancelled by bob"):
        async with DurableSession("s", nexum=server.address):
            said = await asyncio.to_thread(command, "s", "--by", "bob")
    done = "the run of session s is cancelled: its program ends. Then run it again to continue\n"
    assert said == (0, done, "")
    # The answer to the first command may have been lost.
    done = "already done: the run of session s was cancelled by bob 0 s ago\n"
    assert await asyncio.to_thread(command, "s", "--by", "ann") == (0, done, "")
    async with DurableSession("s", nexum=server.address):
        pass
    assert await asyncio.to_thread(command, "s") == (2, "", "error: nothing runs session s\n")
    code, _, error = await asyncio.to_thread(command, "unknown")
    assert (code, "session 'unknown' has nothing on record here" in error) == (2, True)

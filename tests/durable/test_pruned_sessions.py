"""What pruning does to durable sessions: all of a session is kept, or all of it is deleted."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from autogen_core.models import UserMessage
from durable_agents import Scripted, answer, asked, client, named
from harness import Process
from openai_server import OpenAIServer
from server_thread import ServerThread

from durable_autogen import DurableSession, fork_session, question_of
from durable_autogen.__main__ import build_parser
from durable_autogen.budget_command import run_command
from durable_autogen.record.effects import TOOL_EFFECT
from durable_autogen.recorded_sessions import list_sessions, show_session
from nexum_engine.client import NexumClient
from nexum_engine.errors import InvalidRequest
from nexum_engine.records import Execution


async def test_session_is_kept_while_it_runs_and_pruned_as_a_whole_later(server: ServerThread) -> None:
    async def program(*, pruning: bool) -> list[str]:
        replies = []
        async with DurableSession("s", nexum=server.address):
            durable = named(client(model), "me")
            for question in ("one", "two", "three"):
                reply = await durable.create([UserMessage(content=question, source="user")])
                replies.append(str(reply.content))
                if pruning:
                    assert (await nexum.prune(0)).executions == 0
        return replies

    with OpenAIServer(lambda _: answer("yes")) as model:
        async with NexumClient(server.address) as nexum:
            first = await program(pruning=True)
            assert await program(pruning=True) == first
            assert len(model.requests) == 3
            recorded = len(await nexum.list_executions(limit=100))
            assert (await nexum.prune(3600, session="s")).executions == 0

            dry = await nexum.prune(0, session="s", dry_run=True)
            pruned = await nexum.prune(0, session="s")
            assert (pruned.executions, pruned.sessions) == (dry.executions, dry.sessions) == (recorded, 1)
            assert await list_sessions(nexum) == []

            again = await program(pruning=False)
            assert len(model.requests) == 6
            assert set(again).isdisjoint(first)
            assert await program(pruning=False) == again
            assert len(model.requests) == 6


async def test_sessions_are_listed_although_one_is_pruned_between_two_pages(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    for session in ("old", "new"):
        async with DurableSession(session, nexum=server.address):
            pass
    async with NexumClient(server.address) as nexum:
        list_executions, pruned = nexum.list_executions, 0

        async def list_while_pruning(**query: Any) -> list[Execution]:
            nonlocal pruned
            if query["before"] and not pruned:
                pruned = (await nexum.prune(0, session="old")).executions
            return await list_executions(**query)

        monkeypatch.setattr(nexum, "list_executions", list_while_pruning)
        assert [one.session for one in await list_sessions(nexum)] == ["new"]
        assert pruned == 1


KILLED_IN_A_CALL = """
import asyncio, os
from autogen_core import CancellationToken
from autogen_core.tools import FunctionTool
from durable_autogen import DurableSession

def die() -> str:
    os._exit(9)

async def main():
    async with DurableSession("s"):
        await FunctionTool(die, description="Die.").run_json({}, CancellationToken())

asyncio.run(main())
"""


async def test_killed_session_is_pruned_after_its_running_executions_are_cancelled(
    server: ServerThread, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(KILLED_IN_A_CALL)
    run = Process(["program.py"], cwd=tmp_path, env={"NEXUM_ADDRESS": server.address}, forked=True)
    assert await asyncio.to_thread(run.wait) == 9
    async with NexumClient(server.address) as nexum:
        left = await nexum.list_executions(status="RUNNING", key_prefix="s")
        assert [one.workflow_id for one in left] == ["agent-event", "agent-run"]  # the call in flight, and the run
        for one in left:
            assert (await nexum.prune(0, session="s")).executions == 0
            await nexum.cancel_execution(one.execution_id)
        assert (await nexum.prune(0, session="s")).sessions == 1


def budget_report(session: str) -> argparse.Namespace:
    return build_parser().parse_args(["budget", session])


@pytest.mark.parametrize(
    "read",
    [
        lambda nexum: show_session(nexum, "s"),
        lambda nexum: fork_session(nexum, "s", 1, "f"),
        lambda nexum: run_command(nexum, budget_report("s")),
    ],
    ids=["show", "fork", "budget"],
)
async def test_session_that_is_pruned_between_two_pages_is_named(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch, read: Callable[[NexumClient], Awaitable[object]]
) -> None:
    monkeypatch.setattr("nexum_engine.client.PAGE", 1)
    async with DurableSession("s", nexum=server.address):
        await asked(Scripted([]))
        await asked(Scripted([]))
    async with NexumClient(server.address) as nexum:
        list_executions, pruned = nexum.list_executions, 0

        async def list_while_pruning(**query: Any) -> list[Execution]:
            nonlocal pruned
            if query["before"] and not pruned:
                pruned = (await nexum.prune(0)).executions
            return await list_executions(**query)

        monkeypatch.setattr(nexum, "list_executions", list_while_pruning)
        with pytest.raises(InvalidRequest, match=r"session 's' has nothing on record here: .*pruned"):
            await read(nexum)
        assert pruned == 3
        assert await question_of(nexum, "s") is None


async def test_fork_of_a_session_that_is_pruned_before_its_effects_are_read_is_refused(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with DurableSession("s", nexum=server.address):
        await asked(Scripted([]))
    async with NexumClient(server.address) as nexum:
        list_executions, pruned = nexum.list_executions, 0

        async def list_after_pruning(**query: Any) -> list[Execution]:
            nonlocal pruned
            if query.get("workflow_id") == TOOL_EFFECT.workflow_id and not pruned:
                pruned = (await nexum.prune(0)).executions
            return await list_executions(**query)

        monkeypatch.setattr(nexum, "list_executions", list_after_pruning)
        with pytest.raises(InvalidRequest, match="session 's' has nothing on record here"):
            await fork_session(nexum, "s", 1, "f")
        assert pruned == 2
        monkeypatch.undo()
        assert await list_sessions(nexum) == []

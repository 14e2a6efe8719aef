"""What pruning does to durable sessions: all of a session is kept, or all of it is deleted."""

from __future__ import annotations

from typing import Any

import pytest
from autogen_core.models import UserMessage
from durable_agents import answer, client, named
from openai_server import OpenAIServer
from server_thread import ServerThread

from durable_autogen import DurableSession
from durable_autogen.recorded_sessions import list_sessions
from nexum_engine.client import NexumClient
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

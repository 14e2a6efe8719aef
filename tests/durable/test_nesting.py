"""Calls inside recorded calls, and calls in parallel with them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from autogen_agentchat.teams import DiGraphBuilder, GraphFlow
from autogen_agentchat.tools import AgentTool
from autogen_core import CancellationToken
from autogen_core.models import UserMessage
from autogen_core.tools import FunctionTool, ToolResult
from durable_agents import (
    QUESTION,
    Own,
    Scripted,
    agent,
    answer,
    bench,
    client,
    is_after_a_tool,
    run,
    texts,
    whole,
)
from openai_server import OpenAIServer, Reply
from server_thread import ServerThread

from durable_autogen import DriftError, DurableSession, NotDurable
from durable_autogen.record.events import Kind, read_record
from nexum_engine.client import NexumClient


async def test_model_call_inside_tool_is_not_recorded_separately(server: ServerThread) -> None:
    def build() -> Own:
        async def digest(text: str) -> str:
            reply = await own.llm.create([UserMessage(content=text, source="user")])  # type: ignore[attr-defined]
            return f"digest: {reply.content}"

        async def ask(said: str) -> str:
            first = await own.llm.create([UserMessage(content=said, source="user")])  # type: ignore[attr-defined]
            result = await own.inner.run(task=str(first.content))  # type: ignore[attr-defined]
            last = await own.llm.create([UserMessage(content=result.messages[-1].to_text(), source="user")])  # type: ignore[attr-defined]
            return str(last.content)

        own = Own("own", ask)
        own.llm = client(model, "llm")  # type: ignore[attr-defined]
        own.inner = agent(model, "inner", [digest])  # type: ignore[attr-defined]
        return own

    def reply(body: dict[str, Any]) -> Reply:
        if body["model"] == "inner" and not is_after_a_tool(body):
            return Reply(calls=[("digest", {"text": "it"})])
        return answer(body["model"])

    with OpenAIServer(reply) as model:
        first = await run(server, build)
        assert [request.body["model"] for request in model.requests] == ["llm", "inner", "llm", "inner", "llm"]
        assert texts(await run(server, build)) == texts(first)
        assert len(model.requests) == 5


@pytest.mark.parametrize("is_slow_first", [True, False])
async def test_graph_members_end_turns_in_recorded_order(server: ServerThread, is_slow_first: bool) -> None:
    pause = 0.0

    async def read(_: str) -> str:
        await asyncio.sleep(pause)
        return "the file says 42"

    def build() -> GraphFlow:
        a, b, c, d = agent(model, "a"), Own("b", read), agent(model, "c"), agent(model, "d")
        builder = DiGraphBuilder()
        for one in (a, b, c, d):
            builder.add_node(one)
        builder.add_edge(a, b).add_edge(a, c).add_edge(b, d).add_edge(c, d)
        return GraphFlow([a, b, c, d], builder.build())

    with OpenAIServer(lambda body: answer(body["model"])) as model:
        pause = 0.5 if is_slow_first else 0.0
        first = await run(server, build)
        (asked,) = (request.body for request in model.requests if request.body["model"] == "d")
        order = [str(message["content"]) for message in asked["messages"]]
        slow_is_last = max(n for n, text in enumerate(order) if "42" in text) > max(
            n for n, text in enumerate(order) if text.startswith("c ")
        )
        assert slow_is_last == is_slow_first
        pause = 0.0 if is_slow_first else 0.5
        assert texts(await run(server, build)) == texts(first)
        assert len(model.requests) == 3


async def test_changed_text_of_graph_member_raises_drift_error(server: ServerThread) -> None:
    said = "the file says 42"

    async def read(_: str) -> str:
        return said

    def build() -> GraphFlow:
        a, b = Own("a", read), agent(model, "b")
        return GraphFlow([a, b], DiGraphBuilder().add_node(a).add_node(b).add_edge(a, b).build())

    with OpenAIServer(lambda _: answer("yes")) as model:
        await run(server, build)
        said = "the file says 43"
        with pytest.raises(DriftError, match=r"turn 1 of a .* the text was the file says 42, now it is .* 43"):
            await run(server, build)
        assert len(model.requests) == 1


async def test_tool_call_inside_tool_is_not_recorded_separately(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.1)
    noted = 0

    async def note() -> str:
        nonlocal noted
        noted += 1
        return f"noted {noted}"

    async def program() -> list[str]:
        async with DurableSession("s", nexum=server.address):

            async def outer() -> str:
                within = [await tools.call_tool("note", {})]
                helped = tools.call_tool_stream("helper", {"task": "help"})
                within += [item async for item in helped if isinstance(item, ToolResult)]
                return " | ".join(one.to_text() for one in within)

            tools = bench([outer, note, AgentTool(agent(model, "helper"))])
            return [(await tools.call_tool(name, {})).to_text() for name in ("outer", "note")]

    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await whole(program)
        assert first[0].startswith("noted 1 | helper: yes")
        assert first[1] == "noted 2"
        assert await whole(program) == first
        assert (noted, len(model.requests)) == (2, 1)


async def test_call_of_outer_session_in_session_of_tool_is_not_recorded_separately(server: ServerThread) -> None:
    asked: list[str] = []
    refused: list[str] = []

    async def work() -> str:
        """Use both sessions."""
        async with DurableSession("inner", nexum=server.address):
            with outer.agent("helper"):
                said = str((await Scripted(asked).create(QUESTION)).content)
            try:
                await outer.sleep(0)
            except NotDurable as error:
                refused.append(str(error))
        return said

    results = []
    for _ in range(2):
        async with DurableSession("outer", nexum=server.address) as outer:
            results.append(await FunctionTool(work, "Work.").run_json({}, CancellationToken()))
    assert results[0] == results[1]
    assert asked == ["model"]
    assert len(refused) == 1
    async with NexumClient(server.address) as client:
        assert [event.kind for event in (await read_record(client, "outer")).events] == [Kind.TOOL]

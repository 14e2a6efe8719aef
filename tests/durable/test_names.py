"""The names of agents and calls in the record, and the messages that a fork adds to a session."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_agentchat.tools import TeamTool
from autogen_core import FunctionCall
from autogen_core.models import ChatCompletionClient, CreateResult, RequestUsage, UserMessage
from durable_agents import (
    TIMEOUT,
    Own,
    agent,
    answer,
    client,
    is_after_a_tool,
    named,
    run,
    said,
    texts,
    whole,
)
from openai_server import OpenAIServer, Reply
from server_thread import ServerThread

from durable_autogen import DurableSession, fork_session
from durable_autogen.autogen.session_state import AgentState
from nexum_engine.client import NexumClient
from nexum_engine.errors import InvalidRequest


async def test_two_agents_of_one_name_have_two_recorded_names(server: ServerThread) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        if body["model"] == "outer" and not is_after_a_tool(body):
            return Reply(calls=[("crew_one", {"task": "a"}), ("crew_two", {"task": "b"})])
        return answer(body["messages"][-1]["content"])

    def build() -> AssistantAgent:
        crews = [
            TeamTool(RoundRobinGroupChat([agent(model, "member")], max_turns=2), name, f"Ask {name}.")
            for name in ("crew_one", "crew_two")
        ]
        return agent(model, "outer", crews)

    with OpenAIServer(reply) as model:
        first = await run(server, build)
        assert len(model.requests) == 6
        assert texts(await run(server, build)) == texts(first)
        assert len(model.requests) == 6


async def test_parallel_agents_of_one_name_keep_their_calls_separate(server: ServerThread) -> None:
    def build() -> Own:
        async def both(_: str) -> str:
            found = await asyncio.gather(*(one.run(task=str(n)) for n, one in enumerate(own.writers)))  # type: ignore[attr-defined]
            return " | ".join(result.messages[-1].to_text() for result in found)

        own = Own("own", both)
        own.writers = [agent(model, "writer", [note]), agent(model, "writer", [note])]  # type: ignore[attr-defined]
        return own

    done: list[str] = []

    def note(text: str) -> str:
        done.append(text)
        return f"noted {text} {random.random()}"

    def reply(body: dict[str, Any]) -> Reply:
        asked = body["messages"][-1]["content"] if not is_after_a_tool(body) else ""
        return Reply(calls=[("note", {"text": asked})]) if asked else answer("end")

    with OpenAIServer(reply) as model:
        first = await run(server, build)
        assert texts(await run(server, build)) == texts(first)
        assert len(model.requests) == 4
    assert sorted(done) == ["0", "1"]


@dataclass
class Kept:
    """An object in which a program keeps its client."""

    deeper: dict[str, list[ChatCompletionClient]] = field(default_factory=dict)


@pytest.mark.parametrize("place", ["list", "dict", "object"])
async def test_clients_and_agents_are_recorded_wherever_agent_keeps_them(server: ServerThread, place: str) -> None:
    def build() -> Own:
        async def ask(said: str) -> str:
            kept: Any = own
            found = {
                "list": lambda: kept.kept[1],
                "dict": lambda: kept.kept["it"],
                "object": lambda: kept.kept.deeper["it"][0],
            }[place]()
            inner = await kept.helpers["one"].run(task=said)
            reply = await found.create([UserMessage(content=inner.messages[-1].to_text(), source="user")])
            return str(reply.content)

        own = Own("own", ask)
        it = client(model)
        own.kept = {"list": ["no", it], "dict": {"it": it}, "object": Kept({"it": [it]})}[place]  # type: ignore[attr-defined]
        own.helpers = {"one": agent(model, "helper")}  # type: ignore[attr-defined]
        return own

    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await run(server, build)
        assert texts(await run(server, build)) == texts(first)
        assert len(model.requests) == 2


async def test_run_without_recorded_calls_is_reported(server: ServerThread) -> None:
    async def nothing(_: str) -> str:
        return "said on its own"

    lines: list[str] = []
    await run(server, lambda: Own("own", nothing), logs=lines)
    assert "nothing was recorded" in lines[-1]


async def test_second_run_of_running_team_is_refused(server: ServerThread) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> str:
        begun.set()
        await go_on.wait()
        return "waited"

    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if is_after_a_tool(body) else Reply(calls=[("wait", {})])

    with OpenAIServer(reply) as model:
        team = agent(model, "one", [wait])
        running = asyncio.ensure_future(run(server, lambda: team))
        await asyncio.wait_for(begun.wait(), TIMEOUT)
        with pytest.raises(InvalidRequest, match="one is already running in session s: build a new one"):
            await run(server, lambda: team, session="other")
        go_on.set()
        assert "end" in texts(await running)[-1]


async def test_agent_that_has_run_before_is_refused(server: ServerThread) -> None:
    with OpenAIServer(lambda _: answer("yes")) as model:
        one = agent(model, "one")
        await run(server, lambda: one)
        for session in ("s", "other"):
            with pytest.raises(InvalidRequest, match="one has run before, and its memory of that run isn't recorded"):
                await run(server, lambda: one, session=session)
        assert len(model.requests) == 1


def replies(*asked: Sequence[tuple[str, str]]) -> AgentState:
    """Return an agent's state after replies that requested these tool calls. A call is given as its id and name."""
    found = AgentState()
    for number, calls in enumerate(asked, 1):
        content = [FunctionCall(id=id, name=name, arguments="{}") for id, name in calls]
        usage = RequestUsage(prompt_tokens=0, completion_tokens=0)
        result = CreateResult(finish_reason="function_calls", content=content, usage=usage, cached=False)
        found.received(f"reply/{number}", result, replayed=False)
    return found


@pytest.mark.parametrize(
    ("asked", "calls", "places"),
    [
        # Two calls of one name, made in reverse order.
        ([[("1", "note"), ("2", "note")]], [("2", "note"), ("1", "note")], ["1/tool/2", "1/tool/1"]),
        # Equal ids in two replies, and a call that was never made.
        ([[("1", "note"), ("2", "look")], [("1", "note")]], [("1", "note"), ("2", "look")], ["2/tool/1", "1/tool/2"]),
        # No ids at all.
        ([[("", "look"), ("", "note"), ("", "note")]], [("", "note")] * 2, ["1/tool/2", "1/tool/3"]),
        ([[("1", "note"), ("2", "note")]], [(None, "note")] * 2, ["1/tool/1", "1/tool/2"]),
        ([[("", "note")], [("", "note")]], [("", "note")] * 2, ["2/tool/1", "1/tool/1"]),
        # Two calls with one id.
        ([[("1", "note"), ("1", "look")]], [("1", "look"), ("1", "note")], ["1/tool/2", "1/tool/1"]),
        # A call that no reply asked for.
        ([[("1", "note")], [("1", "note"), ("2", "note")]], [("3", "look")] * 2, ["2/tool/3", "2/tool/4"]),
        ([], [("1", "look")] * 2, ["0/tool/1", "0/tool/2"]),
    ],
)
def test_tool_call_has_position_of_reply_that_asked_for_it(
    asked: list[list[tuple[str, str]]], calls: list[tuple[str | None, str]], places: list[str]
) -> None:
    agents = replies(*asked)
    assert [agents.position_of_call(*call) for call in calls] == [f"reply/{place}" for place in places]


async def test_added_messages_keep_order_if_agent_forgets_messages(server: ServerThread) -> None:
    async def program(name: str) -> None:
        async with DurableSession(name, nexum=server.address):
            llm = named(client(model), "a")
            for prompt in (["1"], ["1", "2"], ["1", "2", "3"], ["4"]):
                await llm.create(said(*prompt))

    with OpenAIServer(lambda _: answer("yes")) as model:
        await whole(lambda: program("s"))
        async with NexumClient(server.address) as nexum:
            await fork_session(nexum, "s", 1, "f1", "A")
            await whole(lambda: program("f1"))
            await fork_session(nexum, "f1", 2, "f2", "B")
            await whole(lambda: program("f2"))
        prompts = ["".join(one["content"] for one in request.body["messages"]) for request in model.requests]
        assert prompts == [*("1", "12", "123", "4"), *("12A", "12A3", "4A"), *("12A3B", "4AB")]


async def test_added_message_is_in_all_requests_after_drift(server: ServerThread) -> None:
    def build() -> RoundRobinGroupChat:
        return RoundRobinGroupChat([agent(model, "a")], max_turns=2)

    with OpenAIServer(lambda _: answer("yes")) as model:
        await run(server, build)
        async with NexumClient(server.address) as nexum:
            await fork_session(nexum, "s", 2, "f", "Shorter")
        changed = await run(server, build, "R", "f", on_drift="continue")
        heard = [[one["content"] for one in request.body["messages"]].count("Shorter") for request in model.requests]
        assert heard == [0, 0, 1, 1]
        assert texts(await run(server, build, "R", "f")) == texts(changed)
        assert len(model.requests) == 4

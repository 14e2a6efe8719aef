"""The counts of a session: calls, tokens and usage."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from autogen_agentchat.agents import AssistantAgent, UserProxyAgent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core.models import RequestUsage
from durable_agents import (
    answer,
    client,
    is_after_a_tool,
    whole,
)
from harness import logged
from openai_server import OpenAIServer, Reply
from server_thread import ServerThread

from durable_autogen import DurableSession


async def test_live_and_replayed_calls_are_counted_separately(server: ServerThread) -> None:
    def note() -> str:
        return "noted"

    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if is_after_a_tool(body) else Reply(calls=[("note", {}), ("note", {})])

    async def program() -> tuple[list[RequestUsage], str]:
        lines: list[str] = []
        async with AsyncExitStack() as stack:
            stack.enter_context(logged(lines))
            await stack.enter_async_context(DurableSession("s", nexum=server.address))
            user = UserProxyAgent("user", input_func=lambda _: "on")
            inner = client(model)
            one = AssistantAgent("one", inner, tools=[note], max_tool_iterations=3)
            team = RoundRobinGroupChat([one, user], max_turns=2)
            llm = one._model_client
            await team.run(task="Q")
            usage = [llm.actual_usage(), llm.total_usage()]
        return usage, lines[-1]

    with OpenAIServer(reply) as model:
        (paid, total), line = await whole(program)
        tokens = paid.prompt_tokens + paid.completion_tokens
        assert (paid == total, paid.prompt_tokens > 0, paid.completion_tokens > 0) == (True, True, True)
        did = f"2 model call(s) ({tokens} tokens), 2 tool call(s), 1 input(s)"
        did_not = "0 model call(s) (0 tokens), 0 tool call(s)"
        assert line == f"session s, live: {did}; replayed from the record: {did_not}"
        again, line = await whole(program)
        assert again == [paid, total]  # a program may decide by its usage, so a replay returns the same usage
        assert line == f"session s, live: {did_not}; replayed from the record: {did}"

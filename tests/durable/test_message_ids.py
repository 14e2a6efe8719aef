"""The ids and times of messages are the same in every run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from datetime import datetime, timezone
from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import (
    BaseChatMessage,
    ModelClientStreamingChunkEvent,
    TextMessage,
)
from autogen_core import CancellationToken
from autogen_core.models import CreateResult
from autogen_core.tools import BaseStreamTool
from durable_agents import (
    Own,
    agent,
    answer,
    bench,
    is_after_a_tool,
    run,
)
from openai_server import OpenAIServer, Reply
from pydantic import BaseModel
from server_thread import ServerThread

from durable_autogen import run_durable_stream
from support.models.live import LiveModel


async def test_values_set_by_program_in_message_are_kept(server: ServerThread) -> None:
    made = datetime(2020, 1, 2, tzinfo=timezone.utc)

    def build() -> AssistantAgent:
        return agent(model, "a")

    with OpenAIServer(lambda _: answer("yes")) as model:
        results = [
            await run(server, build, TextMessage(content="Q", source="alice", created_at=made, metadata={"k": "v"})),
            await run(server, build, TextMessage(content="Q", source="alice", created_at=made, metadata={"k": "v"})),
            await run(server, build, None),
        ]
        question = results[0].messages[0]
        assert (question.created_at, question.metadata) == (made, {"k": "v"})
        assert [one.model_dump() for one in results] == [results[0].model_dump()] * 3


async def test_chunk_without_message_id_gets_none(server: ServerThread) -> None:
    class Pieces(Own):
        async def on_messages_stream(
            self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken
        ) -> AsyncGenerator[Any, None]:
            yield ModelClientStreamingChunkEvent(content="y", source=self.name)
            yield await self.on_messages(messages, cancellation_token)

    async def yes(_: str) -> str:
        return "yes"

    stream = run_durable_stream(lambda: Pieces("own", yes), task="Q", session_id="s", nexum=server.address)
    pieces = [item async for item in stream if isinstance(item, ModelClientStreamingChunkEvent)]
    assert [(piece.content, piece.full_message_id) for piece in pieces] == [("y", None)]


class Streaming(LiveModel):
    """A model that streams pieces that aren't in its reply."""

    async def create_stream(self, *args: Any, **more: Any) -> AsyncGenerator[str | CreateResult, None]:
        for piece in ("hm", "so"):
            yield piece
        yield await self.create(*args, **more)


async def test_messages_keep_ids_if_streamed_pieces_are_not_in_reply(server: ServerThread) -> None:
    def note() -> str:
        return "noted"

    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if is_after_a_tool(body) else Reply(calls=[("note", {})])

    def build() -> AssistantAgent:
        llm = Streaming(vendor="v", model="m", base_url=model.base_url, api_key="k")
        return AssistantAgent("one", llm, tools=[note], max_tool_iterations=3, model_client_stream=True)

    with OpenAIServer(reply) as model:
        live = await run(server, build)
        assert (await run(server, build)).model_dump() == live.model_dump()
        assert len(model.requests) == 2


class Name(BaseModel):
    name: str


class Steps(BaseStreamTool[Name, TextMessage, Name]):
    """A tool that streams two messages. Parallel calls stream their first messages before their second ones."""

    component_type = "tool"

    def __init__(self) -> None:
        super().__init__(Name, Name, "steps", "Steps.")
        self.streamed = 0
        self.both_streamed = {1: asyncio.Event(), 2: asyncio.Event()}

    async def run(self, args: Name, cancellation_token: CancellationToken) -> Name:
        raise AssertionError("it is streamed")

    async def run_stream(
        self, args: Name, cancellation_token: CancellationToken, call_id: str | None = None
    ) -> AsyncGenerator[TextMessage | Name, None]:
        for number in (1, 2):
            yield TextMessage(content=f"step {number} of {args.name}", source="steps")
            self.streamed += 1
            if self.streamed == 2 * number:
                self.both_streamed[number].set()
            await self.both_streamed[number].wait()
        yield args


async def test_messages_that_parallel_tools_stream_keep_their_ids(server: ServerThread) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if is_after_a_tool(body) else Reply(calls=[("steps", {"name": name}) for name in "xy"])

    def build() -> AssistantAgent:
        return agent(model, "one", workbench=bench([Steps()]))

    with OpenAIServer(reply) as model:
        results = [await run(server, build), await run(server, build)]
    streamed = [[one for one in result.messages if one.source == "steps"] for result in results]
    ids = [{one.to_text(): one.id for one in messages} for messages in streamed]
    # The calls ran in parallel.
    assert {one.to_text() for one in streamed[0][:2]} == {"step 1 of x", "step 1 of y"}
    assert len(set(ids[0].values())) == 4
    assert ids[1] == ids[0]

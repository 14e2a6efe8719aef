"""The ids and times of messages are the same in every run."""

from __future__ import annotations

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
from durable_agents import (
    Own,
    agent,
    answer,
    is_after_a_tool,
    run,
)
from openai_server import OpenAIServer, Reply
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

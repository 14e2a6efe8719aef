"""Replays of streamed messages, and of exceptions whose classes the program defines."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core.models import CreateResult, UserMessage
from autogen_ext.models.replay import ReplayChatCompletionClient
from durable_agents import (
    answer,
    client,
    named,
    run,
)
from openai_server import OpenAIServer, Reply
from server_thread import ServerThread

from durable_autogen import DurableSession
from support.models.live import LiveModel


class InPieces(LiveModel):
    """A model whose stream begins with `pieces`."""

    pieces: Sequence[str] = ()

    async def create_stream(self, *args: Any, **more: Any) -> AsyncGenerator[str | CreateResult, None]:
        for piece in self.pieces:
            yield piece
        yield await self.create(*args, **more)


@pytest.mark.parametrize("pieces", [("hm", "so"), ()])
@pytest.mark.parametrize("iterations", [1, 3])
async def test_streamed_messages_keep_their_ids_in_replay(
    server: ServerThread, pieces: Sequence[str], iterations: int
) -> None:
    def note() -> str:
        return "noted"

    def reply(_: dict[str, Any]) -> Reply:
        return answer("end") if len(model.requests) == 2 else Reply(calls=[("note", {})])

    def build() -> RoundRobinGroupChat:
        llm = InPieces(vendor="v", model="m", base_url=model.base_url, api_key="k")
        llm.pieces = pieces
        one = AssistantAgent("one", llm, tools=[note], max_tool_iterations=iterations, model_client_stream=True)
        return RoundRobinGroupChat([one], max_turns=2)

    with OpenAIServer(reply) as model:
        live = await run(server, build)
        assert (await run(server, build)).model_dump() == live.model_dump()


class Refused(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.headers: dict[str, str] = {}


class Refusing(LiveModel):
    async def create(self, *args: Any, **more: Any) -> Any:
        raise Refused("no")


async def test_replayed_failure_has_values_made_by_its_constructor(server: ServerThread) -> None:
    async def program() -> str:
        async with DurableSession("s", nexum=server.address):
            llm = Refusing(vendor="v", model="m", base_url=model.base_url, api_key="k")
            try:
                await named(llm, "a").create([UserMessage(content="Q", source="user")])
            except Refused as error:
                wait = error.headers.get("retry-after", "1")
            reply = await named(client(model), "b").create([UserMessage(content=wait, source="user")])
            return str(reply.content)

    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await program()
        assert await program() == first


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_replay_client_goes_on_behind_the_replayed_replies(server: ServerThread, is_streamed: bool) -> None:
    async def program(*, fails: bool) -> list[str]:
        client = ReplayChatCompletionClient(["one", "two", "three"])
        found: list[str] = []
        async with DurableSession("s", nexum=server.address):
            for question in ("1", "2", "3"):
                messages = [UserMessage(content=question, source="user")]
                if is_streamed:
                    pieces = [piece async for piece in client.create_stream(messages)]
                    found.append(str(pieces[-1].content))  # type: ignore[union-attr]
                else:
                    found.append(str((await client.create(messages)).content))
                if fails and question == "2":
                    raise RuntimeError("as in a crash")
        return found

    with pytest.raises(RuntimeError, match="as in a crash"):
        await program(fails=True)
    for _ in range(2):
        assert await program(fails=False) == ["one", "two", "three"]

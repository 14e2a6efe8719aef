"""What the tests of durable runs in this process share: models that word each reply differently, and how to run."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

from autogen_agentchat.agents import AssistantAgent, BaseChatAgent
from autogen_agentchat.base import Response, TaskResult
from autogen_agentchat.messages import BaseChatMessage, TextMessage
from autogen_core import CancellationToken
from autogen_core.models import ChatCompletionClient, CreateResult
from autogen_core.tools import BaseTool, FunctionTool, StaticStreamWorkbench
from harness import Server
from openai_server import OpenAIServer, Reply

from durable_autogen import run_durable
from durable_autogen.record.place import Place, at, current, steps_at
from durable_autogen.record.session import Session
from models.live import LiveModel

TIMEOUT = 20  # seconds in which everything here has ended, or hangs


def answer(text: str) -> Reply:
    """A reply that is never the same twice."""
    return Reply(f"{text} {random.random()}")


def client(model: OpenAIServer, name: str = "m") -> LiveModel:
    """The real client, pointed at the local server."""
    return LiveModel(vendor="OpenAI-compatible server", model=name, base_url=model.base_url, api_key="k")


async def run(server: Server, build: Callable[[], Any], task: Any = "Q", session: str = "s", **more: Any) -> TaskResult:
    """`run_durable`, which may not hang."""
    return await asyncio.wait_for(
        run_durable(build, task=task, session_id=session, nexum=server.address, **more), TIMEOUT
    )


def texts(result: TaskResult) -> list[str]:
    """What was said."""
    return [message.to_text() for message in result.messages]


def agent(model: OpenAIServer, name: str, tools: Sequence[Any] = (), **more: Any) -> AssistantAgent:
    """An agent whose name is its model's, too."""
    return AssistantAgent(
        name,
        client(model, name),
        description=name,
        tools=list(tools) or None,
        max_tool_iterations=5,
        **more,
    )


def is_after_a_tool(body: dict[str, Any]) -> bool:
    """Whether the model is told a tool's result."""
    return bool(body["messages"][-1]["role"] == "tool")


class Own(BaseChatAgent):
    """An agent of the program's own."""

    def __init__(self, name: str, act: Callable[[str], Awaitable[str]]) -> None:
        super().__init__(name, "of one's own")
        self.act = act

    @property
    def produced_message_types(self) -> Sequence[type[BaseChatMessage]]:
        return (TextMessage,)

    async def on_messages(self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken) -> Response:
        said = await self.act(messages[-1].to_text() if messages else "")
        return Response(chat_message=TextMessage(content=said, source=self.name))

    async def on_reset(self, cancellation_token: CancellationToken) -> None: ...


class Named:
    """A client that an agent of this name asks: for a test that plays the agent itself."""

    def __init__(self, client: ChatCompletionClient, name: str) -> None:
        self.client = client
        self.place = Place(session(), agent=name, path=name)

    async def create(self, *args: Any, **more: Any) -> CreateResult:
        with at(self.place):
            return await self.client.create(*args, **more)

    async def create_stream(self, *args: Any, **more: Any) -> AsyncGenerator[str | CreateResult, None]:
        async for piece in steps_at(self.place, self.client.create_stream(*args, **more)):
            yield piece


def named(client: ChatCompletionClient, name: str) -> Any:
    """The client as an agent of this name asks it."""
    return Named(client, name)


def session() -> Session:
    """The session that is open here."""
    place = current.get()
    assert place is not None
    return place.session


def bench(tools: Sequence[BaseTool[Any, Any] | Callable[..., Any]]) -> StaticStreamWorkbench:
    """Tools and plain functions as a workbench."""
    return StaticStreamWorkbench(
        [tool if isinstance(tool, BaseTool) else FunctionTool(tool, description=tool.__doc__ or "") for tool in tools]
    )

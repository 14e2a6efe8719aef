"""Helpers of the tests of durable runs: agents, models whose replies all differ, and ways to run a program."""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Protocol

from autogen_agentchat.agents import AssistantAgent, BaseChatAgent
from autogen_agentchat.base import Response, TaskResult
from autogen_agentchat.messages import BaseChatMessage, TextMessage
from autogen_core import CancellationToken, FunctionCall
from autogen_core.models import ChatCompletionClient, CreateResult, ModelInfo, RequestUsage, UserMessage
from autogen_core.tools import BaseTool, FunctionTool, StaticStreamWorkbench
from harness import Server, logged
from openai_server import OpenAIServer, Reply
from pydantic import BaseModel

from durable_autogen import DurableSession, run_durable
from durable_autogen.record.place import Place, at, current, steps_at
from durable_autogen.record.session import Session
from support.models.live import LiveModel

TIMEOUT = 20  # seconds after which a program counts as hanging


def answer(text: str) -> Reply:
    """Return a reply with a new text at each call."""
    return Reply(f"{text} {random.random()}")


def client(model: OpenAIServer, name: str = "m") -> LiveModel:
    """Return a real client of the local server."""
    return LiveModel(vendor="OpenAI-compatible server", model=name, base_url=model.base_url, api_key="k")


class HasAddress(Protocol):
    """A server, in a process or in a thread."""

    address: str


async def run(
    server: HasAddress,
    build: Callable[[], Any],
    task: Any = "Q",
    session: str = "s",
    logs: list[str] | None = None,
    **more: Any,
) -> TaskResult:
    """Run `run_durable` with a timeout; return its result."""
    with logged([] if logs is None else logs):
        return await asyncio.wait_for(
            run_durable(build, task=task, session_id=session, nexum=server.address, **more), TIMEOUT
        )


def texts(result: TaskResult) -> list[str]:
    """Return the texts of a result's messages."""
    return [message.to_text() for message in result.messages]


def agent(model: OpenAIServer, name: str, tools: Sequence[Any] = (), **more: Any) -> AssistantAgent:
    """Return an agent whose model has the same name."""
    return AssistantAgent(
        name,
        client(model, name),
        description=name,
        tools=list(tools) or None,
        max_tool_iterations=5,
        **more,
    )


def is_after_a_tool(body: dict[str, Any]) -> bool:
    """Return whether a request ends with a tool's result."""
    return bool(body["messages"][-1]["role"] == "tool")


class Own(BaseChatAgent):
    """A custom agent that answers with what `act` returns."""

    def __init__(self, name: str, act: Callable[[str], Awaitable[str]]) -> None:
        super().__init__(name, "a custom agent")
        self.act = act

    @property
    def produced_message_types(self) -> Sequence[type[BaseChatMessage]]:
        return (TextMessage,)

    async def on_messages(self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken) -> Response:
        said = await self.act(messages[-1].to_text() if messages else "")
        return Response(chat_message=TextMessage(content=said, source=self.name))

    async def on_reset(self, cancellation_token: CancellationToken) -> None: ...


class Named:
    """A client whose calls are recorded under an agent's name, for a test that plays the agent."""

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
    """Return a wrapper of the client whose calls are recorded under this agent name."""
    return Named(client, name)


def session() -> Session:
    """Return the session inside which the caller runs."""
    place = current.get()
    assert place is not None
    assert isinstance(place.session, Session)
    return place.session


def bench(tools: Sequence[BaseTool[Any, Any] | Callable[..., Any]]) -> StaticStreamWorkbench:
    """Return a workbench of tools and plain functions."""
    return StaticStreamWorkbench(
        [tool if isinstance(tool, BaseTool) else FunctionTool(tool, description=tool.__doc__ or "") for tool in tools]
    )


# ---- Without HTTP ----------------------------------------------------------------------------------------------------

QUESTION = [UserMessage(content="what now?", source="user")]


def word() -> str:
    """Return a new text at each call."""
    return f"word {uuid.uuid4().hex[:8]}"


def call(name: str, **arguments: Any) -> FunctionCall:
    """Return a model's tool call."""
    return FunctionCall(id=uuid.uuid4().hex, name=name, arguments=json.dumps(arguments))


def reply(content: Any = None, **more: Any) -> CreateResult:
    """Return a model's result with a text or tool calls; by default with a new text."""
    content = word() if content is None else content
    reason = "stop" if isinstance(content, str) else "function_calls"
    usage = RequestUsage(prompt_tokens=2, completion_tokens=3)
    return CreateResult(**{"finish_reason": reason, "content": content, "usage": usage, "cached": False, **more})


class Scripted(ChatCompletionClient):
    """A model in this process. It notes each request, and answers from its script, then with new texts.

    An entry of the script is a text, tool calls, a whole result, an error to raise, or an async function to call.
    """

    component_type = "model"
    component_config_schema = BaseModel

    def __init__(self, happened: list[str], *script: Any, name: str = "model") -> None:
        self.happened, self.script, self.name, self.requests = happened, list(script), name, 0

    async def create(self, messages: Sequence[Any], **_: Any) -> CreateResult:
        self.happened.append(self.name)
        self.requests += 1
        said = self.script.pop(0) if self.script else None
        if callable(said):
            said = await said()
        if isinstance(said, Exception):
            raise said
        return said if isinstance(said, CreateResult) else reply(said)

    async def create_stream(self, messages: Sequence[Any], **_: Any) -> AsyncGenerator[str | CreateResult, None]:
        result = await self.create(messages)
        for piece in result.content.split() if isinstance(result.content, str) else []:
            yield f"{piece} "
        yield result

    async def close(self) -> None: ...

    def actual_usage(self) -> RequestUsage:
        return RequestUsage(prompt_tokens=2 * self.requests, completion_tokens=3 * self.requests)

    total_usage = actual_usage

    def count_tokens(self, messages: Any, *, tools: Any = ()) -> int:
        return 1

    def remaining_tokens(self, messages: Any, *, tools: Any = ()) -> int:
        return 1000

    @property
    def model_info(self) -> ModelInfo:
        return ModelInfo(vision=True, function_calling=True, json_output=True, structured_output=True, family="unknown")

    @property
    def capabilities(self) -> Any:
        return self.model_info


async def asked(client: ChatCompletionClient) -> str:
    """Ask a model directly; return its text."""
    return str((await client.create(QUESTION)).content)


def new_session() -> str:
    """Return an unused session id."""
    return f"s-{uuid.uuid4().hex[:12]}"


async def inside(
    server: HasAddress,
    program: Callable[[], Awaitable[Any]],
    session: str,
    logs: list[str] | None = None,
    **more: Any,
) -> Any:
    """Run a program in a session; return its result as plain values."""

    async def body() -> Any:
        async with DurableSession(session, nexum=server.address, **more):
            return plain(await program())

    with logged([] if logs is None else logs):
        return await asyncio.wait_for(body(), TIMEOUT)


async def twice(server: Server, program: Callable[[], Awaitable[Any]], happened: list[str], **more: Any) -> Any:
    """Run a program twice in a new session; check that the second run has the same result and no live call."""
    session = new_session()
    happened.clear()
    first = await inside(server, program, session, **more)
    before = list(happened)
    assert before, "nothing happened: this program tests nothing"
    again = await inside(server, program, session, **more)
    assert happened == before
    assert again == first
    return first


def plain(value: Any) -> Any:
    """Return AutoGen's results as plain values, with ids and times."""
    if type(value) in (list, tuple):
        return type(value)(plain(one) for one in value)
    return value.model_dump() if isinstance(value, (TaskResult, CreateResult)) else value


# ---- Programs that ask a model themselves -------------------------------------------------------------------------


def said(*texts: str) -> list[UserMessage]:
    return [UserMessage(content=text, source="user") for text in texts]


async def ask(llm: ChatCompletionClient, text: str = "Q") -> str:
    return str((await llm.create(said(text))).content)


class Offline(Exception):
    """The error of a failing client."""


class Failing(LiveModel):
    """A client that raises the error that `fails` returns. If `fails` returns None, the client asks its model."""

    def __init__(self, model: OpenAIServer, name: str, fails: Callable[[], Exception | None]) -> None:
        super().__init__(vendor="v", model=name, base_url=model.base_url, api_key="k")
        self.fails = fails

    async def create(self, *args: Any, **more: Any) -> Any:
        if (error := self.fails()) is not None:
            raise error
        return await super().create(*args, **more)


async def whole(program: Callable[[], Any]) -> Any:
    """Run a program with a timeout; return its result."""
    return await asyncio.wait_for(program(), TIMEOUT)


async def all_of(*asking: Any) -> list[Any]:
    """Wait until all awaitables have ended; return their results, or raise the first error among them."""
    found = await asyncio.gather(*asking, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found

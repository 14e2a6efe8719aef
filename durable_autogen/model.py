"""A model client whose replies are recorded before the agent sees them."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

from autogen_core import CancellationToken, FunctionCall
from autogen_core.models import ChatCompletionClient, CreateResult, LLMMessage, ModelInfo, RequestUsage, UserMessage
from autogen_core.tools import Tool, ToolSchema
from pydantic import BaseModel

from durable_autogen.events import Kind
from durable_autogen.quiet import in_recorded_call
from durable_autogen.recorder import Outcome, Recorder
from durable_autogen.request import describe_model_call

MAX_OPEN_CALLS = 1000  # calls that replies asked for and nobody made, as for a handoff

ToolChoice = Tool | Literal["auto", "required", "none"]


class Replies:
    """How far one agent is: its replies are counted, and each tool call belongs to the reply that asked for it."""

    def __init__(self) -> None:
        self.count = 0
        self.replayed = False
        """Whether the last reply came from the record."""
        self._calls: deque[tuple[str, FunctionCall]] = deque(maxlen=MAX_OPEN_CALLS)
        self._last = 0
        self._unasked = 0

    def next(self) -> int:
        """The number of the reply that is asked for now."""
        self.count += 1
        return self.count

    def seen(self, number: int, result: CreateResult, *, replayed: bool) -> None:
        """The agent gets this reply now."""
        calls = [] if isinstance(result.content, str) else result.content
        # The newest first, in the order of the reply.
        self._calls.extendleft((f"reply/{number}/tool/{n}", call) for n, call in reversed(list(enumerate(calls, 1))))
        self._last, self._unasked = number, len(calls)
        self.replayed = replayed

    def position_of_call(self, call_id: str | None, name: str) -> str:
        """Where a tool call stands: with the reply that asked for this id, else for this name."""
        same_name = [one for one in self._calls if one[1].name == name]
        same_id = [one for one in same_name if one[1].id == call_id]
        for found in (*same_id, *same_name):
            self._calls.remove(found)
            return found[0]
        # No reply asked for it, as in an agent of one's own that runs a tool by itself.
        self._unasked += 1
        return f"reply/{self._last}/tool/{self._unasked}"


class DurableModelClient(ChatCompletionClient):
    """Wraps any client for one agent of one run.

    What is asked within a recorded call, as by a tool, is not recorded by itself: the call's result stands for it.
    """

    component_type = "model"
    component_config_schema = BaseModel

    def __init__(self, inner: ChatCompletionClient, recorder: Recorder, agent: str, replies: Replies) -> None:
        self.inner = inner
        self.recorder = recorder
        self._agent = agent
        self._replies = replies
        self._replayed_usage = RequestUsage(prompt_tokens=0, completion_tokens=0)
        self._added_at: dict[int, int] = {}

    async def create(
        self,
        messages: Sequence[LLMMessage],
        *,
        tools: Sequence[Tool | ToolSchema] = (),
        tool_choice: ToolChoice = "auto",
        json_output: bool | type[BaseModel] | None = None,
        extra_create_args: Mapping[str, Any] | None = None,
        cancellation_token: CancellationToken | None = None,
    ) -> CreateResult:
        """The recorded reply, or the model's, recorded."""

        async def ask() -> CreateResult:
            return await self.inner.create(
                messages,
                tools=tools,
                tool_choice=tool_choice,
                json_output=json_output,
                extra_create_args=extra_create_args or {},
                cancellation_token=cancellation_token,
            )

        async def perform() -> dict[str, Any]:
            return (await ask()).model_dump(mode="json")

        if in_recorded_call.get():
            return self._counted(await ask(), self.recorder.live)
        number = self._replies.next()
        messages = self._with_added(messages, f"reply/{number}")
        request = describe_model_call(
            self.inner, messages, tools, _options(tool_choice, json_output, extra_create_args)
        )
        return self._seen(number, await self._event(number, request, perform, cancellation_token))

    async def create_stream(
        self,
        messages: Sequence[LLMMessage],
        *,
        tools: Sequence[Tool | ToolSchema] = (),
        tool_choice: ToolChoice = "auto",
        json_output: bool | type[BaseModel] | None = None,
        extra_create_args: Mapping[str, Any] | None = None,
        cancellation_token: CancellationToken | None = None,
    ) -> AsyncGenerator[str | CreateResult, None]:
        """Pieces as they come, the last one when the reply is recorded; a recorded reply in one piece."""

        def stream() -> AsyncGenerator[str | CreateResult, None]:
            return self.inner.create_stream(
                messages,
                tools=tools,
                tool_choice=tool_choice,
                json_output=json_output,
                extra_create_args=extra_create_args or {},
                cancellation_token=cancellation_token,
            )

        if in_recorded_call.get():
            async for piece in stream():
                yield self._counted(piece, self.recorder.live) if isinstance(piece, CreateResult) else piece
            return
        number = self._replies.next()
        messages = self._with_added(messages, f"reply/{number}")
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        last: list[str] = []

        async def perform() -> dict[str, Any]:
            result: CreateResult | None = None
            said = ""
            async for piece in stream():
                if isinstance(piece, CreateResult):
                    result = piece
                    continue
                if last:
                    pieces.put_nowait(last.pop())
                last.append(piece)
                said += piece
            if result is None:
                raise RuntimeError("the model's stream ended without a result")
            # Beside the reply only where the stream said something else.
            return {**result.model_dump(mode="json"), **({} if said == _text_of(result) else {"streamed": said})}

        request = describe_model_call(
            self.inner, messages, tools, _options(tool_choice, json_output, extra_create_args)
        )
        event = asyncio.ensure_future(self._event(number, request, perform, cancellation_token))
        event.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (text := await pieces.get()) is not None:
                yield text
            outcome = await event
        finally:
            event.cancel()
        result = self._seen(number, outcome)
        if outcome.replayed:
            # The same messages are announced by a piece as in the live run.
            last = [outcome.content.get("streamed", _text_of(result))]
        for text in filter(None, last):
            yield text
        yield result

    def _with_added(self, messages: Sequence[LLMMessage], position: str) -> Sequence[LLMMessage]:
        """With the messages that forks have added, each where this agent first met it."""
        for added in self.recorder.messages:
            if added.seq in self._added_at or self.recorder.comes_before(f"{self._agent}/{position}", added):
                continue
            if added.seq not in self.recorder.as_task:
                self._added_at[added.seq] = len(messages)
                self.recorder.delivered.add(added.seq)
        whole = list(messages)
        for added in reversed(self.recorder.messages):
            if added.seq in self._added_at:
                at = min(self._added_at[added.seq], len(messages))
                whole.insert(at, UserMessage(content=added.content["text"], source="user"))
        return whole

    async def _event(
        self,
        number: int,
        request: Mapping[str, Any],
        perform: Callable[[], Awaitable[dict[str, Any]]],
        cancellation_token: CancellationToken | None,
    ) -> Outcome:
        position = f"reply/{number}"
        return await self.recorder.event(Kind.REPLY, self._agent, position, request, perform, cancellation_token)

    def _seen(self, number: int, outcome: Outcome) -> CreateResult:
        result = CreateResult.model_validate({**outcome.content, "cached": outcome.replayed})
        self._replies.seen(number, result, replayed=outcome.replayed)
        self._counted(result, self.recorder.replayed if outcome.replayed else self.recorder.live)
        if outcome.replayed:
            self._replayed_usage = _sum(self._replayed_usage, result.usage)
            self.recorder.tell(f"[Nexum] reply {number} of {self._agent}: replayed from the record ✓")
        return result

    def _counted(self, result: CreateResult, counts: Counter[str]) -> CreateResult:
        tokens = result.usage.prompt_tokens + result.usage.completion_tokens
        counts.update({"model calls": 1, "tokens": tokens})
        return result

    async def close(self) -> None:
        await self.inner.close()

    def actual_usage(self) -> RequestUsage:
        """What this run paid for."""
        return self.inner.actual_usage()

    def total_usage(self) -> RequestUsage:
        """The same with what was replayed."""
        return _sum(self.inner.total_usage(), self._replayed_usage)

    def count_tokens(self, messages: Sequence[LLMMessage], *, tools: Sequence[Tool | ToolSchema] = ()) -> int:
        return self.inner.count_tokens(messages, tools=tools)

    def remaining_tokens(self, messages: Sequence[LLMMessage], *, tools: Sequence[Tool | ToolSchema] = ()) -> int:
        return self.inner.remaining_tokens(messages, tools=tools)

    @property
    def capabilities(self) -> Any:
        """The deprecated name of `model_info`."""
        return self.inner.model_info

    @property
    def model_info(self) -> ModelInfo:
        return self.inner.model_info


def _text_of(result: CreateResult) -> str:
    """What a stream of it says: a tool call's text is its thought."""
    return result.content if isinstance(result.content, str) else result.thought or ""


def _sum(one: RequestUsage, other: RequestUsage) -> RequestUsage:
    return RequestUsage(
        prompt_tokens=one.prompt_tokens + other.prompt_tokens,
        completion_tokens=one.completion_tokens + other.completion_tokens,
    )


def _options(
    tool_choice: ToolChoice, json_output: bool | type[BaseModel] | None, extra: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "tool_choice": None if tool_choice == "auto" else tool_choice,
        "json_output": json_output,
        "extra_create_args": dict(extra or {}),
    }

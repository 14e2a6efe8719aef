"""Any workbench, made durable for one agent: a tool's result is recorded, and so is its failure."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, Mapping
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

from autogen_agentchat.tools import AgentTool, TeamTool
from autogen_core import CancellationToken
from autogen_core.tools import (
    BaseTool,
    StaticStreamWorkbench,
    StaticWorkbench,
    TextResultContent,
    ToolResult,
    ToolSchema,
    Workbench,
)

from durable_autogen.events import Kind
from durable_autogen.failures import is_being_cancelled, made_ordinary, ordinary
from durable_autogen.model import Replies
from durable_autogen.quiet import in_recorded_call
from durable_autogen.recorder import Recorder
from durable_autogen.request import describe_arguments
from nexum_engine.errors import InvalidRequest
from nexum_engine.jsontext import MAX_PAYLOAD_BYTES, check_size, dump

MAX_RESULT_BYTES = MAX_PAYLOAD_BYTES // 2  # of one tool call; its arguments stand beside it on record


@runtime_checkable
class HearsOfReplays(Protocol):
    """A tool that wants to know when a result of its own is replayed."""

    def replayed(self, text: str, notes: Mapping[str, str]) -> str:
        """It was, with the notes that the call had left; the line that says so."""
        ...


call_scope: ContextVar[str] = ContextVar("call_scope", default="")
"""The recorded call that a tool runs for: it tells two equal calls apart that are meant to run twice."""


call_notes: ContextVar[dict[str, str] | None] = ContextVar("call_notes", default=None)
"""Where a tool may leave what should stand beside its result on record."""

ON_RECORD = "on record"
"""The note that a worker had recorded the result before this session could: nothing was executed for it again."""
UNTOLD = "untold"
"""The note that the tool could not print its progress; its value says why."""


class DurableWorkbench(StaticStreamWorkbench):
    """Wraps any workbench for one agent of one run.

    It is a StaticStreamWorkbench because AutoGen takes a stream from no other class, and an agent that is used as a
    tool streams what it says. Such a tool isn't recorded as one: what its agent does is.
    """

    def __init__(self, inner: Workbench, recorder: Recorder, agent: str, replies: Replies) -> None:
        super().__init__([])
        self.inner = inner
        self._recorder = recorder
        self._agent = agent
        self._replies = replies
        self._agents_as_tools: set[str] = set()
        self._contained = inner
        if isinstance(inner, StaticWorkbench):
            tools = inner._tools
            self._agents_as_tools = {tool.name for tool in tools if isinstance(tool, (AgentTool, TeamTool))}
            kind = StaticStreamWorkbench if isinstance(inner, StaticStreamWorkbench) else StaticWorkbench
            self._contained = kind([_contained(tool) for tool in tools], inner._tool_overrides)

    async def list_tools(self) -> list[ToolSchema]:
        return await ordinary(self.inner.list_tools(), f"the tools of {self._agent}")

    async def call_tool(
        self,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        cancellation_token: CancellationToken | None = None,
        call_id: str | None = None,
    ) -> ToolResult:
        """The recorded result, or the tool's, recorded. It never raises: AutoGen would wait for ever."""
        if in_recorded_call.get():
            return await self.inner.call_tool(name, arguments, cancellation_token, call_id)
        position = self._replies.position_of_call(call_id, name)
        scope = f"{self._recorder.journal.epoch or ''}{self._agent}/{position}"

        async def perform() -> dict[str, Any]:
            call_scope.set(scope)
            notes: dict[str, str] = {}
            call_notes.set(notes)
            try:
                result = await ordinary(self._contained.call_tool(name, arguments, cancellation_token, call_id), name)
            except Exception as error:  # noqa: BLE001 - the tool's failure is its result
                result = _failure(name, error)
            if UNTOLD in notes:
                # The tool did not fail: nobody reads what it says of itself, and that ends the run.
                self._recorder.stop(BrokenPipeError(notes[UNTOLD]))
                raise BrokenPipeError(notes[UNTOLD])
            content = {**result.model_dump(mode="json"), "notes": notes}
            if (why := _unrecordable(content)) is None:
                return content
            # It ran: recorded as a failure, it does not run again when the session is continued.
            failure = _failure(name, ValueError(f"{name} ran, but its result can't be recorded: {why}"))
            return {**failure.model_dump(mode="json"), "notes": notes}

        try:
            outcome = await self._recorder.event(
                Kind.TOOL,
                self._agent,
                position,
                describe_arguments(name, arguments or {}),
                perform,
                cancellation_token,
            )
        except asyncio.CancelledError:
            if cancellation_token is None or not cancellation_token.is_cancelled():
                raise
            return _failure(name, RuntimeError(f"the call of {name} was cancelled"))
        except Exception as error:  # noqa: BLE001 - the run fails by `Recorder.failed`
            return _failure(name, error)
        notes = outcome.content.get("notes") or {}
        counts = self._recorder.replayed if outcome.replayed or ON_RECORD in notes else self._recorder.live
        counts["tool calls"] += 1
        result = ToolResult.model_validate(outcome.content)
        if outcome.replayed:
            self._tell_replayed(name, result, notes)
        return result

    def _tell_replayed(self, name: str, result: ToolResult, notes: Mapping[str, str]) -> None:
        tools = self.inner._tools if isinstance(self.inner, StaticWorkbench) else []
        for tool in tools:
            if tool.name == name and notes and isinstance(tool, HearsOfReplays):
                self._recorder.tell(tool.replayed(result.to_text(), notes))
                return
        self._recorder.tell(f"[Nexum] {name} for {self._agent}: replayed from the record ✓")

    async def call_tool_stream(
        self,
        name: str,
        arguments: Mapping[str, Any] | None = None,
        cancellation_token: CancellationToken | None = None,
        call_id: str | None = None,
    ) -> AsyncGenerator[Any | ToolResult, None]:
        if (
            name in self._agents_as_tools
            and not in_recorded_call.get()
            and isinstance(self._contained, StaticStreamWorkbench)
        ):
            self._replies.position_of_call(call_id, name)
            async for event in self._contained.call_tool_stream(name, arguments, cancellation_token, call_id):
                yield event
            return
        yield await self.call_tool(name, arguments, cancellation_token, call_id)

    async def start(self) -> None:
        await self.inner.start()

    async def stop(self) -> None:
        await self.inner.stop()

    async def reset(self) -> None:
        await self.inner.reset()

    async def save_state(self) -> Mapping[str, Any]:
        return await self.inner.save_state()

    async def load_state(self, state: Mapping[str, Any]) -> None:
        await self.inner.load_state(state)


def _unrecordable(content: Mapping[str, Any]) -> str | None:
    try:
        check_size(dump(content, "it"), "it", max_bytes=MAX_RESULT_BYTES)
    except InvalidRequest as error:
        return str(error)
    return None


def _failure(name: str, error: BaseException) -> ToolResult:
    return ToolResult(name=name, result=[TextResultContent(content=str(error) or type(error).__name__)], is_error=True)


def _contained(tool: BaseTool[Any, Any]) -> BaseTool[Any, Any]:
    """The same tool; whatever it raises, it is an ordinary error. The workbench gives each tool a task of its own, out
    of which SystemExit would end the event loop."""
    twin = copy.copy(tool)

    async def run_json(args: Mapping[str, Any], token: CancellationToken, call_id: str | None = None) -> Any:
        try:
            return await tool.run_json(args, token, call_id=call_id)
        except Exception:
            raise
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and is_being_cancelled():
                raise
            raise made_ordinary(error, tool.name) from error

    object.__setattr__(twin, "run_json", run_json)
    return twin

"""AutoGen's methods that are wrapped while a session is open, and their wrappers.

Outside a session and inside a recorded call, a wrapped method calls the original, so only the outermost call is
recorded. `ENTRY_POINTS` names each method with its wrapper.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from autogen_agentchat.agents import CodeExecutorAgent, UserProxyAgent
from autogen_agentchat.base import ChatAgent, Team, TerminationCondition
from autogen_agentchat.teams._group_chat._base_group_chat_manager import BaseGroupChatManager
from autogen_agentchat.teams._group_chat._chat_agent_container import ChatAgentContainer
from autogen_core import AgentRuntime, BaseAgent
from autogen_core.code_executor import CodeExecutor, CodeResult
from autogen_core.memory import ListMemory, Memory, MemoryQueryResult
from autogen_core.models import ChatCompletionClient
from autogen_core.tools import BaseTool, StaticWorkbench, Workbench
from pydantic import BaseModel

from durable_autogen.autogen import conditions
from durable_autogen.autogen.agent_at_work import AtWork
from durable_autogen.autogen.calls import Calls
from durable_autogen.autogen.fingerprints import plain
from durable_autogen.autogen.policies import ToolCall, inside_a_call, static_tool
from durable_autogen.autogen.session_state import total
from durable_autogen.autogen.wrapping import Methods, Original, Wrapper, wrapped
from durable_autogen.record.events import Kind
from durable_autogen.record.log import LOG
from durable_autogen.record.place import Place, at, current, recording_place, steps_at
from durable_autogen.record.session import Session
from durable_autogen.record.tasks import closing, ordinary
from durable_autogen.record.while_open import while_open

# ---- Calls that are recorded -----------------------------------------------------------------------------------------


Recording = Callable[[Calls, Any, Original], Any]
"""A function that records a call. Its parameters are the `Calls`, the object whose method is called, and the
`Original`. It returns an awaitable or a stream."""


def _recorded(recording: Recording) -> Wrapper:
    """Return a method's wrapper. It calls `recording` if a session records the call, else the original method."""

    def wrapper(self: Any, original: Original) -> Any:
        place = recording_place()
        if place is None:
            if current.get() is None:
                _warn_once(self)
            return original()
        return recording(Calls(place), self, original)

    return wrapper


_has_warned = False


def _warn_once(called: Any) -> None:
    """Warn of the first call that is made outside the open sessions: the program may mean it to be inside one.

    Don't warn of each call: a program may well work outside a session while another of its tasks has one open.
    """
    global _has_warned
    if not _has_warned and not isinstance(called, StaticWorkbench):  # name the tool in the workbench instead
        _has_warned = True
        LOG.warning(
            "a call of %s was made outside every session, so the call is not recorded. A session holds the code inside "
            "`async with DurableSession(...)`, or the coroutine that a script passes to asyncio.run, and the tasks "
            "that this code starts. A task that was started before the session is outside, and so are another cell of "
            "a notebook and the event loop of run_forever. (Further such calls are not reported.)",
            called.name if isinstance(called, BaseTool) else type(called).__name__,
        )


def _reply(stream: bool) -> Recording:
    def recording(calls: Calls, client: Any, original: Original) -> Any:
        messages = original.given(0, "messages")

        def ask(whole: Any) -> Any:
            return (original if whole is messages else original.with_argument(0, "messages", whole))()

        return (calls.streamed_reply if stream else calls.reply)(client, ask, messages, original.kwargs)

    return recording


def _workbench_tool(stream: bool) -> Recording:
    def recording(calls: Calls, workbench: Any, original: Original) -> Any:
        name = original.given(0, "name")
        call = ToolCall(
            name,
            original.given(1, "arguments") or {},
            original.given(2, "cancellation_token"),
            original.given(3, "call_id"),
            static_tool(workbench, name),
            workbench,
        )
        if calls.is_recorded_inside(call.tool, call.name):
            place = calls.agent_as_tool(call)
            return steps_at(place, original()) if stream else original()

        def run(edited: Mapping[str, Any] | None) -> Any:
            return (original if edited is None else original.with_argument(1, "arguments", edited))()

        return (calls.tool_stream if stream else calls.tool)(run, call)

    return recording


def _tool(stream: bool) -> Recording:
    def recording(calls: Calls, tool: Any, original: Original) -> Any:
        if calls.is_recorded_inside(tool, tool.name):
            return original()
        # `run_json` gets the tool's arguments as a mapping, and `run` gets them as a pydantic model.
        args = original.given(0, "args")
        arguments = args.model_dump(mode="json") if isinstance(args, BaseModel) else args or {}
        call = ToolCall(
            tool.name, arguments, original.given(1, "cancellation_token"), original.given(2, "call_id"), tool
        )

        def run(edited: Mapping[str, Any] | None) -> Any:
            if edited is None:
                return original()
            value = tool.args_type().model_validate(edited) if isinstance(args, BaseModel) else edited
            return original.with_argument(0, "args", value)()

        return (calls.tool_stream if stream else calls.tool)(run, call)

    return recording


def _tool_list(calls: Calls, workbench: Any, original: Original) -> Any:
    # Don't record the tool list of a StaticWorkbench: the program itself defines these tools.
    if isinstance(workbench, StaticWorkbench) and type(workbench).list_tools is StaticWorkbench.list_tools:
        return original()
    return calls.other(Kind.TOOLS, workbench, {"workbench": type(workbench).__name__}, original, None)


def _read(method: str) -> Recording:
    def recording(calls: Calls, workbench: Any, original: Original) -> Any:
        # Workbench doesn't define these methods. A custom workbench may use their names for ordinary functions.
        if not inspect.iscoroutinefunction(original.method):
            return original()
        arguments = plain([list(original.args), original.kwargs])
        request = {"workbench": type(workbench).__name__, "method": method, "arguments": arguments}
        return calls.other(Kind.TOOLS, workbench, request, original, None)

    return recording


_MCP_READS = ("list_prompts", "get_prompt", "list_resources", "list_resource_templates", "read_resource")
"""The methods of AutoGen's McpWorkbench that read something else than a tool from the MCP server."""


def _input(calls: Calls, _: Any, original: Original) -> Any:
    return calls.input(original, original.given(0, "prompt"), original.given(1, "cancellation_token"))


def _code(calls: Calls, executor: Any, original: Original) -> Any:
    code = "\n".join(block.code for block in original.given(0, "code_blocks"))
    token = original.given(1, "cancellation_token")
    return calls.other(Kind.CODE, executor, {"code": code}, original, CodeResult, token)


def _memory(calls: Calls, memory: Any, original: Original) -> Any:
    # Don't record queries of a ListMemory: the program itself fills this memory.
    if type(memory) is ListMemory:
        return original()
    request = {"memory": type(memory).__name__, "query": plain(original.given(0, "query"))}
    token = original.given(1, "cancellation_token")
    return calls.other(Kind.MEMORY, memory, request, original, MemoryQueryResult, token)


_recorded_tool, _recorded_tool_stream = _recorded(_tool(stream=False)), _recorded(_tool(stream=True))


async def _tool_itself(self: Any, original: Original) -> Any:
    place = current.get()
    if place is not None and place.in_call:
        with inside_a_call(self, place):
            # Turn SystemExit into an ordinary exception. StaticWorkbench runs the tool in a task, and SystemExit in a
            # task would end the event loop.
            return await ordinary(original(), self.name)
    return await _recorded_tool(self, original)


def _tool_stream_itself(self: Any, original: Original) -> Any:
    place = current.get()
    if place is not None and place.in_call:
        return _stream_inside_a_call(self, place, original())
    return _recorded_tool_stream(self, original)


async def _stream_inside_a_call(tool: Any, place: Place, stream: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
    async with closing(stream) as items:
        with inside_a_call(tool, place):
            async for item in items:
                yield item


async def _check(self: Any, original: Original) -> Any:
    place = recording_place()
    if place is None or type(self) in conditions.MESSAGES_ALONE or place.at_work is self:
        return await original()

    async def ask() -> Any:
        # Set the condition as `at_work`, so that its call of the base class's method doesn't count as a second check.
        with at(replace(place, at_work=self)):
            return await original()

    return await conditions.check(self, place, ask)


def _terminated(self: Any, original: Original) -> Any:
    place = current.get()
    return original() or (place is not None and place.session.state.stopped.get(id(self)) is self)


async def _reset_condition(self: Any, original: Original) -> Any:
    place = current.get()
    if place is not None and place.session.state.stopped.pop(id(self), None) is not None:
        conditions.set_terminated(self, False)
    return await original()


def _usage(self: Any, original: Original) -> Any:
    place = current.get()
    if place is None or place.in_call or place.session.is_over:
        return original()
    with at(replace(place, in_call=True)):
        usage = original()
    # Add the usage of replayed replies: a program may decide by the usage, and a replay must decide the same.
    return total(usage, place.session.state.replayed_usage_of(self))


async def _preparation(self: Any, original: Original) -> Any:
    """Start, stop or reset a workbench or executor. Neither record this call nor report its connections."""
    place = current.get()
    with at(None if place is None else replace(place, in_call=True)):
        return await original()


# ---- Agents and teams at work ----------------------------------------------------------------------------------------


def _at_work(
    method: Callable[[AtWork, Any, Any], Any], also: Callable[[Original], Any], *, is_team: bool = False
) -> Wrapper:
    """Return a wrapper for a turn or a run of an agent or team. In a session, it calls the AtWork method `method`.

    The method gets the original and what `also` returns: the token of a turn, or the task of a run.
    """

    def wrapper(self: Any, original: Original) -> Any:
        place = recording_place()
        if place is None or place.at_work is self:  # outside a session, or the object calls its own method
            return original()
        return method(AtWork(place, self, is_team=is_team), original, also(original))

    return wrapper


def _token(original: Original) -> Any:
    return original.given(1, "cancellation_token")


def _task(original: Original) -> Any:
    return original.kwargs.get("task")  # the task of a run is always passed by name


async def _on_message(self: Any, original: Original) -> Any:
    place = _place_of(original.given(0, "message"))
    if place is None or place.in_call or place.session.is_over:
        return await original()
    if not isinstance(self, (ChatAgentContainer, BaseGroupChatManager)):
        # Record a core agent under its agent type. AgentChat's containers and managers keep the sender's place.
        name = place.session.state.names.of(self, self.id.type)
        place = Place(place.session, agent=name, path=name, at_work=self, around=place.around)
    with at(place):
        return await original()


_sent: dict[int, tuple[Any, Place]] = {}
"""Messages sent inside a session, each with the `Place` of its sender. The key is the message object's `id()`."""
MAX_SENT = 10_000  # messages; the oldest are dropped: AutoGen doesn't tell when all receivers have a message


def _place_of(message: Any) -> Place | None:
    """Return the place of the message's sender, or else the current place.

    The current place isn't enough: a runtime that was started before the session delivers messages without a place.
    """
    sent = _sent.get(id(message))
    return sent[1] if sent is not None and sent[0] is message else current.get()


async def _send(self: Any, original: Original) -> Any:
    place = current.get()
    if place is not None and not place.session.is_over:
        message = original.given(0, "message")
        _sent[id(message)] = (message, place)
        while len(_sent) > MAX_SENT:
            _sent.pop(next(iter(_sent)), None)  # another thread may have dropped it
    return await original()


# ---- The entry points ------------------------------------------------------------------------------------------------

ENTRY_POINTS: tuple[tuple[type, Methods], ...] = (
    (
        ChatCompletionClient,
        {
            "create": _recorded(_reply(stream=False)),
            "create_stream": _recorded(_reply(stream=True)),
            **dict.fromkeys(("actual_usage", "total_usage"), _usage),
        },
    ),
    (
        Workbench,
        {
            "call_tool": _recorded(_workbench_tool(stream=False)),
            "call_tool_stream": _recorded(_workbench_tool(stream=True)),
            "list_tools": _recorded(_tool_list),
            **{method: _recorded(_read(method)) for method in _MCP_READS},
            **dict.fromkeys(("start", "stop", "reset"), _preparation),
        },
    ),
    (
        BaseTool,
        {
            **dict.fromkeys(("run_json", "run"), _tool_itself),
            **dict.fromkeys(("run_json_stream", "run_stream"), _tool_stream_itself),
        },
    ),
    (UserProxyAgent, {"_get_input": _recorded(_input)}),
    (CodeExecutorAgent, {"execute_code_block": _recorded(_code)}),
    (
        CodeExecutor,
        {
            "execute_code_blocks": _recorded(_code),
            **dict.fromkeys(("start", "stop", "restart"), _preparation),
        },
    ),
    (Memory, {"query": _recorded(_memory)}),
    (TerminationCondition, {"__call__": _check, "terminated": _terminated, "reset": _reset_condition}),
    (
        ChatAgent,
        {
            "on_messages": _at_work(AtWork.whole_turn, _token),
            "on_messages_stream": _at_work(AtWork.turn, _token),
            "run": _at_work(AtWork.whole_run, _task),
            "run_stream": _at_work(AtWork.run, _task),
        },
    ),
    (Team, {"run_stream": _at_work(AtWork.team_run, _task, is_team=True)}),
    (BaseAgent, {"on_message_impl": _on_message}),
    (AgentRuntime, dict.fromkeys(("send_message", "publish_message"), _send)),
)
"""The recorded methods of each base class. They are wrapped in every subclass that defines them."""


@contextmanager
def entry_points(session: Session) -> Iterator[None]:
    """Record calls of AutoGen's methods inside a `with` block. The blocks of several sessions may overlap."""
    log = logging.getLogger("autogen_core")

    def is_news(_: logging.LogRecord) -> bool:
        # AutoGen logs a traceback for each agent of a failed run. Drop the tracebacks: the run itself raises the error.
        place = current.get()
        return place is None or place.session is not session or not session.recorder.failed.done()

    log.addFilter(is_news)
    try:
        with wrapped_classes():
            yield
    finally:
        log.removeFilter(is_news)
        for key in [key for key, (_, place) in list(_sent.items()) if place.session is session]:
            _sent.pop(key, None)


@while_open
def wrapped_classes() -> Iterator[None]:
    """Wrap AutoGen's methods, for the length of a `with`. Calls inside a session are recorded, others reported."""
    with wrapped(ENTRY_POINTS):
        yield

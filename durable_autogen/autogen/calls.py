"""Recording of AutoGen's calls. A replay gives the caller the same value as the live call."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.tools import AgentTool, TeamTool
from autogen_core import CancellationToken
from autogen_core.models import ChatCompletionClient, CreateResult, LLMMessage
from autogen_core.tools import Tool, ToolResult, ToolSchema
from pydantic import PydanticUserError, ValidationError

from durable_autogen.autogen.fingerprints import call_fingerprint, fingerprint_of, hash_of
from durable_autogen.autogen.policies import (
    CallUnderPolicy,
    ToolCall,
    call_under_policy,
    with_note,
)
from durable_autogen.autogen.session_state import AgentState, SessionState
from durable_autogen.autogen.streams import AskStreamed, ReplyStream, Stream
from durable_autogen.autogen.values import (
    failed_result,
    is_broken,
    reply_again,
    unrecorded_value,
    value_again,
    written_pieces,
    written_reply,
    written_value,
)
from durable_autogen.errors import CallFailed, CallRejected
from durable_autogen.record.attempts import Attempts, ToolError
from durable_autogen.record.console import skip_answer
from durable_autogen.record.events import Call, Content, GivenUp, Kind, Raised, Returned
from durable_autogen.record.guard import Guard, GuardedCall
from durable_autogen.record.pending_call import Answer, Performed
from durable_autogen.record.place import Place, at, current_call_id
from durable_autogen.record.recorder import Recorder
from durable_autogen.record.storable import representable
from durable_autogen.record.tasks import cancel_and_wait, closing, items_of, ordinary
from nexum_engine.approvals import noted_by
from nexum_engine.deadline import heartbeat
from nexum_engine.errors import FinalError, InvalidRequest, first_problem
from nexum_engine.jsontext import MAX_PAYLOAD_BYTES, check_size, dump, escaped
from nexum_engine.policy import Policy

MAX_RESULT_BYTES = MAX_PAYLOAD_BYTES // 2  # for one call's result; the other half is for the call's fingerprint


_NOTHING = object()


RunTool = Callable[[Mapping[str, Any] | None], Awaitable[Any]]
"""A function that calls the original method. Its parameter is the edited arguments; None means the original ones."""


class Calls:
    """The recorded calls of one agent in one session."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._session_state: SessionState = place.session.state
        self._recorder: Recorder = place.session.recorder
        self._guard: Guard = place.session.guard
        self._agent = place.agent
        self._agent_state: AgentState = self._session_state.agent(place.agent)
        self._task = asyncio.current_task()
        self._recorder.cleanup.notice()
        self._must_not_raise = isinstance(place.at_work, AssistantAgent)
        """Whether the agent would wait for ever if a tool raised an error."""

    # ---- Models ------------------------------------------------------------------------------------------------------

    async def reply(
        self,
        client: ChatCompletionClient,
        ask: Callable[[Sequence[LLMMessage]], Awaitable[CreateResult]],
        messages: Sequence[LLMMessage],
        options: Mapping[str, Any],
    ) -> CreateResult:
        """Return the recorded reply, or ask the model and record its reply."""
        messages, call = self._reply_call(client, messages, options)
        model = self._agent_state.conversation.model
        # No heartbeat can come from a reply that isn't streamed.
        policy = self._guard.of_model(model).model_copy(update={"heartbeat": None})

        async def perform(call: Call) -> Performed:
            replied = await Attempts(self._recorder, call, model, policy).make(lambda: ask(messages))
            written, result = written_reply(replied)
            return Performed(result, Returned(value=written, is_broken=is_broken(result)))

        token = options.get("cancellation_token")
        answer = await self._recorder.call(call, perform, caller=self._task, token=token)
        return self._received(client, answer)

    async def streamed_reply(
        self,
        client: ChatCompletionClient,
        ask: AskStreamed,
        messages: Sequence[LLMMessage],
        options: Mapping[str, Any],
    ) -> AsyncGenerator[str | CreateResult, None]:
        """Yield a reply's pieces, live or from the record. The last piece is held back until the reply is recorded."""
        messages, call = self._reply_call(client, messages, options)
        model = self._agent_state.conversation.model
        policy = self._guard.of_model(model)
        stream = ReplyStream()

        async def perform(call: Call) -> Performed:
            attempts = Attempts(self._recorder, call, model, policy)
            # If the agent has received a piece, don't retry: the agent would receive the beginning twice.
            result = await attempts.make(lambda: stream.read(ask, messages), lambda: not stream.produced)
            written, result = written_reply(result)
            pieces = written_pieces(stream.produced, result)
            return Performed(result, Returned(value=written, streamed=pieces, is_broken=is_broken(result)))

        token = options.get("cancellation_token")
        running = asyncio.ensure_future(
            self._recorder.call(
                call,
                perform,
                caller=self._task,
                token=token,
                streamed=stream.written,
                on_replay=stream.replay,
                early=True,
            )
        )
        has_to_mark = self._place.passes_on_late
        async with closing(items_of(running, stream.items)) as pieces:
            async for piece in pieces:
                stream.passed_on.append(piece)
                if has_to_mark:
                    has_to_mark = False
                    # With this piece, AutoGen passes on the agent's previous message. The mark gives that moment a
                    # place in the order of events, so that a replay keeps it among parallel agents.
                    await self._recorder.mark(self._agent, f"{call.position}/begun", {})
                yield piece
        result = self._received(client, await running)
        for text in filter(None, stream.held):
            yield text
        yield result

    def _reply_call(
        self, client: ChatCompletionClient, messages: Sequence[LLMMessage], options: Mapping[str, Any]
    ) -> tuple[Sequence[LLMMessage], Call]:
        position = self._recorder.next_position(self._agent, "reply")
        messages = self._session_state.added.inserted_into(self._agent, position, messages)
        self._guard.offers(_name(tool) for tool in options.get("tools") or ())
        choice = options.get("tool_choice", "auto")
        request, whole = self._agent_state.conversation.request(
            position,
            client,
            messages,
            options.get("tools") or (),
            {
                "tool_choice": None if choice == "auto" else choice,
                "json_output": options.get("json_output"),
                "extra_create_args": dict(options.get("extra_create_args") or {}),
            },
        )
        return messages, Call(Kind.REPLY, self._agent, position, request, whole)

    def _received(self, client: ChatCompletionClient, answer: Answer) -> CreateResult:
        assert isinstance(answer.content, Returned)
        result: CreateResult = reply_again(answer.content.value) if answer.replayed else answer.value
        self._agent_state.received(answer.position, result, replayed=answer.replayed)
        if answer.replayed:
            _skip_scripted_reply(client)
            if not result.cached:
                self._session_state.used(client, result.usage)
        return result

    # ---- Tools -------------------------------------------------------------------------------------------------------

    async def tool(self, run_tool: RunTool, tool_call: ToolCall, stream: Stream | None = None) -> Any:
        """Return the recorded result of a tool, or call the tool and record its result."""
        must_not_raise = self._must_not_raise and tool_call.workbench is not None
        try:
            answer = await self._tool(run_tool, tool_call, stream or Stream())
        except asyncio.CancelledError:
            if tool_call.token is None or not tool_call.token.is_cancelled() or not must_not_raise:
                raise
            return failed_result(tool_call.name, RuntimeError(f"the call of {tool_call.name} was cancelled"))
        except Exception as error:
            if not must_not_raise:
                raise
            return failed_result(tool_call.name, error)
        value = self._value(answer, tool_call.result_type)
        is_error = isinstance(value, ToolResult) and value.is_error
        if answer.replayed and not is_error and _writes_to_canvas(tool_call.tool):
            # Write again: the canvas is only in this process's memory, and later prompts contain its text. If this
            # fails, the next prompt differs from the recorded one, and the replay says so.
            with at(dataclasses.replace(self._place, in_call=True)), contextlib.suppress(Exception):
                await run_tool(None)
        return value

    def tool_stream(
        self, run_tool: Callable[[Mapping[str, Any] | None], AsyncIterator[Any]], tool_call: ToolCall
    ) -> AsyncGenerator[Any, None]:
        """Yield the items of a streaming tool, then the tool's result. Record the items and the result.

        In a workbench's stream, the result is the ToolResult. In a tool's own stream, the result is the last item.
        """
        stream = Stream()

        async def last(edited: Mapping[str, Any] | None) -> Any:
            result: Any = _NOTHING
            async for item in run_tool(edited):
                heartbeat()
                may_be_result = tool_call.workbench is None or isinstance(item, ToolResult)
                piece = result if may_be_result else item
                if piece is not _NOTHING:
                    # Set a message's lasting id and time before the message is recorded or passed on. Count the
                    # messages of each call separately: a replay may mix the messages of parallel calls otherwise.
                    self._session_state.transcript.settle(stream.call, piece)
                    stream.produced.append(piece)
                    stream.items.put_nowait(piece)
                if may_be_result:
                    result = item
            if result is _NOTHING:
                raise RuntimeError(f"the stream of {tool_call.name} ended without a result")
            return result

        return _passed_on(stream, self.tool(last, tool_call, stream))

    async def _tool(self, run_tool: RunTool, tool_call: ToolCall, stream: Stream) -> Answer:
        name, token = tool_call.name, tool_call.token
        position = self._agent_state.position_of_call(tool_call.call_id, name)
        policy = self._guard.of_tool(*tool_call.names, own=tool_call.own_policy)
        called = tool_call.tool if tool_call.workbench is None else tool_call.workbench
        request = self._numbered(called, call_fingerprint(name, tool_call.arguments))
        call = Call(Kind.TOOL, self._agent, position, request, has_policy=policy is not None)
        stream.call = call.address

        async def attempt(edited: Mapping[str, Any] | None = None) -> Any:
            # Run the tool in a separate task. Otherwise a CancelledError that the tool raises would look as if the
            # caller were cancelled.
            running = asyncio.ensure_future(ordinary(run_tool(edited), name))
            try:
                await asyncio.wait({running})
            finally:
                await cancel_and_wait(running)
            if not running.cancelled():
                return running.result()
            if token is not None and token.is_cancelled():
                raise asyncio.CancelledError
            raise RuntimeError(f"{name} ended with CancelledError")

        async def perform(call: Call) -> Performed:
            journal = self._recorder.journal
            current_call_id.set(journal.recorded.call_id_of(journal.session, call))
            # The tool may submit a call to a worker, and that call may wait for a person. Then this run waits, too.
            noted_by.set(partial(self._recorder.questions.waiting, call.address))
            try:
                if policy is None:
                    value = await attempt()
                else:
                    value = await self._under_policy(policy, call, tool_call, attempt, stream.produced)
                return Performed(value, self._returned(tool_call, value, stream.produced))
            except Exception as error:
                is_refused = isinstance(error, (CallRejected, CallFailed))
                if tool_call.result_type is not ToolResult or not (self._must_not_raise or is_refused):
                    raise
                # Record the tool's error as a result. The tool ran, and the next run must not call it again.
                failed = failed_result(name, error)
                return Performed(failed, self._returned(tool_call, failed, []))

        def replayed(content: Content) -> None:
            if isinstance(content, (Returned, Raised, GivenUp)):
                for one in content.streamed:
                    item = value_again(one)
                    self._session_state.transcript.settle(stream.call, item, made_before=True)
                    stream.items.put_nowait(item)

        return await self._recorder.call(
            call, perform, caller=self._task, token=token, streamed=stream.written, on_replay=replayed
        )

    async def _under_policy(
        self,
        policy: Policy,
        call: Call,
        tool_call: ToolCall,
        attempt: Callable[[Mapping[str, Any] | None], Awaitable[Any]],
        streamed: Sequence[Any],
    ) -> Any:
        """Make a tool call under its policy; return its result."""
        name, guard = tool_call.name, self._guard
        will_run = policy.approval is not None or policy.is_once
        arguments = await tool_call.checked(tool_call.arguments, will_run=will_run)
        reason = self._agent_state.reason_for(call.position)
        guarded = GuardedCall(
            call, policy, arguments, tool_call, lambda value: self._returned(tool_call, value, []).value, reason
        )
        if policy.is_once:
            is_reused, value = await guard.reused_result(guarded)
            if is_reused:
                return value
        shown, note = None, ""
        try:
            is_asked = policy.needs_approval(name, arguments)
        except FinalError as error:
            self._recorder.journal.log.warning("%s", error)
            raise
        if is_asked:
            guarded, answer, by = await guard.approved(guarded)
            if answer is not None:
                edited, note = await self._edited(tool_call, answer, by or "the person who approved this call")
                guarded = dataclasses.replace(guarded, arguments=edited)
            shown = guarded.arguments

        async def attempt_or_raise(arguments: Mapping[str, Any] | None) -> Any:
            under = CallUnderPolicy(frozenset(tool_call.names))
            call_under_policy.set(under)
            value = await attempt(arguments)
            if isinstance(value, ToolResult) and value.is_error:
                raise ToolError(value.to_text(), value) from (under.raised[-1] if under.raised else None)
            return value

        try:
            if policy.is_once:
                value = await guard.once(guarded, attempt_or_raise)
            else:
                attempts = Attempts(self._recorder, call, name, policy)
                value = await attempts.make(partial(attempt_or_raise, shown), lambda: not streamed)
        except ToolError as error:
            value = error.value
        return with_note(value, note)

    async def _edited(self, tool_call: ToolCall, answer: Any, by: str) -> tuple[Mapping[str, Any], str]:
        """Validate the arguments that a person has edited; return them, and a line that tells the model about the edit.

        Raises CallRejected if the edited arguments don't fit the tool.
        """
        try:
            if not isinstance(answer, dict):
                raise InvalidRequest("they must be a JSON object")
            edited = await tool_call.checked(answer, will_run=True)
        except ValueError as error:
            why = first_problem(error) if isinstance(error, ValidationError) else error
            raise CallRejected(f"{by} changed the arguments, but they don't fit {tool_call.name}: {why}") from error
        shown = json.dumps(edited, ensure_ascii=False)
        line = f"{tool_call.name}: {by} changed the arguments to {shown}"
        self._recorder.journal.log.warning("%s", escaped(line))
        return edited, f"({by} changed the arguments to {shown})"

    def _returned(self, tool_call: ToolCall, value: Any, streamed: Sequence[Any]) -> Returned:
        """Return a tool's value in the form that is recorded. Raises ValueError if the value has no such form."""
        try:
            written = written_value(value)
        except (ValueError, PydanticUserError) as error:
            if tool_call.result_type is ToolResult:
                raise ValueError(f"{tool_call.name} ran, but its result can't be recorded: {error}") from error
            self._recorder.journal.log.warning(
                "%s returned a %s, which can't be recorded: a replay will stop here. Return a Pydantic model, a "
                "dataclass or plain values",
                tool_call.name,
                type(value).__name__,
            )
            written = unrecorded_value(value)
        try:
            content = Returned(value=written, streamed=[written_value(item) for item in streamed])
            check_size(dump(content, "it"), "it", max_bytes=MAX_RESULT_BYTES)
        except ValueError as error:
            raise ValueError(f"{tool_call.name} ran, but its result can't be recorded: {error}") from error
        return content

    def is_recorded_inside(self, tool: object, name: str) -> bool:
        """Return whether `tool` is an agent or team. Calls inside such a tool are recorded, but not the tool's result.

        Raises InvalidRequest if the session has a policy for such a tool.
        """
        if not isinstance(tool, (AgentTool, TeamTool)):
            return False
        if self._guard.of_tool(name) is not None:
            raise InvalidRequest(f"{name} is an agent or team as a tool: give the policies to the tools inside it")
        return True

    def agent_as_tool(self, tool_call: ToolCall) -> Place:
        """Return the place for an agent or team that a reply calls as a tool.

        The calls that the agent or team makes are recorded under its own name.
        """
        self._agent_state.position_of_call(tool_call.call_id, tool_call.name)
        return dataclasses.replace(self._place, passes_on_late=self._place.is_beside_others)

    # ---- People, code, memory ----------------------------------------------------------------------------------------

    async def input(self, original: Callable[[], Awaitable[str]], prompt: str, token: CancellationToken | None) -> str:
        """Return a person's recorded input, or ask the person and record the input."""
        position = self._recorder.next_position(self._agent, "input")
        call = Call(Kind.INPUT, self._agent, position, fingerprint_of({"prompt": prompt}))
        # Start the callback that asks the person at once, because the recorder may have to send requests first. If the
        # callback started later than AutoGen's announcement of the request, UserInputManager would wait for ever.
        asking = None
        if self._recorder.replay.event_for(call.address) is None:
            with at(dataclasses.replace(self._place, in_call=True)):
                asking = asyncio.ensure_future(original())

        async def perform(_: Call) -> Performed:
            said = representable(str(await (asking or original())))
            return Performed(said, Returned(value=said))

        try:
            answer = await self._recorder.call(call, perform, caller=self._task, token=token)
        finally:
            if asking is not None:
                await cancel_and_wait(asking)
        said = str(self._value(answer, str))
        if answer.replayed:
            skip_answer(said)
        return said

    def _numbered(self, called: object, fingerprint: dict[str, Any]) -> dict[str, Any]:
        """Return the fingerprint of a call of `called`: a tool, a workbench, a memory or a code executor.

        If the agent has made the same call of another object, the fingerprint has a number. So a replay tells the calls
        of two objects apart, even if the agent makes them at the same time.
        """
        wanted = f"{self._agent}/{fingerprint['hash']}"
        number = self._session_state.names.of(called, wanted).removeprefix(wanted)
        if not number:
            return fingerprint
        return {**fingerprint, "hash": hash_of([fingerprint["hash"], number]), "unnumbered": fingerprint["hash"]}

    async def other(
        self,
        kind: Kind,
        called: object,
        request: Mapping[str, Any],
        original: Callable[[], Awaitable[Any]],
        declared: Any,
        token: CancellationToken | None = None,
    ) -> Any:
        """Return the recorded value of a call of another kind, or make the call and record its value.

        `called` is the object that is called. `declared` is the value's type, if the value isn't plain JSON.
        """

        async def perform(_: Call) -> Performed:
            value = await original()
            return Performed(value, Returned(value=representable(written_value(value))))

        position = self._recorder.next_position(self._agent, kind.value)
        call = Call(kind, self._agent, position, self._numbered(called, fingerprint_of(request)))
        answer = await self._recorder.call(call, perform, caller=self._task, token=token)
        return self._value(answer, declared)

    def _value(self, answer: Answer, declared: Any) -> Any:
        if not answer.replayed:
            return answer.value
        assert isinstance(answer.content, Returned)
        return value_again(answer.content.value, declared)


def _skip_scripted_reply(client: Any) -> None:
    """Let AutoGen's ReplayChatCompletionClient, which takes its replies from a list, skip a replayed reply.

    Otherwise its next live reply after a crash would be the first one of its list.
    """
    if any(kind.__name__ == "ReplayChatCompletionClient" for kind in type(client).__mro__):
        client._current_index += 1


def _writes_to_canvas(tool: object) -> bool:
    """Return whether this is one of the two tools that change the text of AutoGen's TextCanvasMemory.

    Compare the module's name: to import the module needs a package that may be missing.
    """
    return any(kind.__module__ == "autogen_ext.memory.canvas._canvas_writer" for kind in type(tool).__mro__)


async def _passed_on(stream: Stream, call: Coroutine[Any, Any, Any]) -> AsyncGenerator[Any, None]:
    """Yield the streamed items of `call`, then the result of `call`."""
    running = asyncio.ensure_future(call)
    async with closing(items_of(running, stream.items)) as items:
        async for item in items:
            stream.passed_on.append(item)
            yield item
    yield await running


def _name(tool: Tool | ToolSchema) -> str:
    return tool["name"] if isinstance(tool, dict) else tool.name

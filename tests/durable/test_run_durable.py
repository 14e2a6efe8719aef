"""`run_durable` in this process: replays, refused runs, and errors that end a run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent, CodeExecutorAgent
from autogen_agentchat.base import ChatAgent, TaskResult, Team
from autogen_agentchat.conditions import MaxMessageTermination, TimeoutTermination
from autogen_agentchat.messages import ModelClientStreamingChunkEvent, ToolCallExecutionEvent
from autogen_agentchat.teams import RoundRobinGroupChat, SelectorGroupChat
from autogen_agentchat.tools import AgentTool
from autogen_core import CancellationToken
from autogen_core.code_executor import CodeBlock, CodeExecutor, CodeResult
from autogen_core.models import ModelFamily, ModelInfo
from autogen_core.tools import FunctionTool, TextResultContent, ToolResult, ToolSchema, Workbench
from autogen_ext.models.openai import OpenAIChatCompletionClient
from durable_agents import TIMEOUT, answer, client, run, texts
from harness import tool_worker
from openai import AsyncOpenAI
from openai_server import OpenAIServer, Reply
from server_thread import ServerThread

import demo
from durable_autogen import (
    DriftError,
    NotDurable,
    RunCancelled,
    SessionBusy,
    run_durable,
    run_durable_stream,
)
from nexum_engine.client import NexumClient
from nexum_engine.errors import InvalidRequest, ServerUnavailable
from submit_task import Session
from workflow import OFFLINE_TOOL_CALL


def agent(model: OpenAIServer, tools: Sequence[Any] = (), *, name: str = "writer", **more: Any) -> AssistantAgent:
    arguments = {"system_message": "Be brief.", "max_tool_iterations": 5, **more}
    if tools:
        arguments["tools"] = list(tools)
    return AssistantAgent(name, arguments.pop("model_client", None) or client(model), **arguments)


async def test_finished_session_is_replayed_without_live_call(server: ServerThread) -> None:
    done: list[str] = []
    lines: list[str] = []

    def note(text: str) -> str:
        done.append(text)
        return f"noted {random.random()}"

    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if body["messages"][-1]["role"] == "tool" else Reply(calls=[("note", {"text": "x"})] * 2)

    with OpenAIServer(reply) as model:
        first = await run(server, lambda: agent(model, [note]))
        again = await run(server, lambda: agent(model, [note]), logs=lines)
    assert texts(again) == texts(first)
    assert len(model.requests) == 2
    assert done == ["x", "x"]  # the model's reply requests two equal calls, and both ran
    assert [line for line in lines if "is finished: its record is replayed" in line] == lines[:1]
    assert "reply 1 of writer: replayed from the record ✓" in lines
    assert "live: 0 model call(s) (0 tokens), 0 tool call(s); replayed from the record: 2 model call(s)" in lines[-1]


async def test_task_can_be_omitted_if_session_has_one(server: ServerThread) -> None:
    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await run(server, lambda: agent(model))
        assert texts(await run(server, lambda: agent(model), None)) == texts(first)
        with pytest.raises(InvalidRequest, match="give it a task"):
            await run(server, lambda: agent(model), None, "other")


async def test_failed_tool_result_is_replayed_as_failure(server: ServerThread) -> None:
    count = 0

    def fails() -> str:
        nonlocal count
        count += 1
        raise ValueError(f"no {count}")

    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if body["messages"][-1]["role"] == "tool" else Reply(calls=[("fails", {})])

    with OpenAIServer(reply) as model:
        for _ in range(2):
            result = await run(server, lambda: agent(model, [fails]))
            (event,) = (m for m in result.messages if isinstance(m, ToolCallExecutionEvent))
            assert event.content[0].is_error
            assert event.content[0].content == "no 1"
    assert count == 1


@pytest.mark.parametrize(
    ("result", "why"), [("a\udc80", "surrogates not allowed"), ("x" * 9_000_000, "the limit is 8")]
)
async def test_result_that_cannot_be_recorded_is_recorded_failure(server: ServerThread, result: str, why: str) -> None:
    count = 0

    def returns() -> str:
        nonlocal count
        count += 1
        return result

    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if body["messages"][-1]["role"] == "tool" else Reply(calls=[("returns", {})])

    with OpenAIServer(reply) as model:
        for _ in range(2):
            ended = await run(server, lambda: agent(model, [returns]))
            (event,) = (m for m in ended.messages if isinstance(m, ToolCallExecutionEvent))
            assert event.content[0].is_error
            assert "returns ran, but its result can't be recorded" in event.content[0].content
            assert why in event.content[0].content
    assert count == 1


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("is_async", [True, False])
async def test_tool_that_raises_anything_returns_error(
    server: ServerThread, error: type[BaseException], is_async: bool
) -> None:
    async def in_the_loop() -> str:
        raise error

    def in_a_thread() -> str:
        raise error

    chosen: Callable[..., Any] = in_the_loop if is_async else in_a_thread
    ends = FunctionTool(chosen, "End.", name="ends")

    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if body["messages"][-1]["role"] == "tool" else Reply(calls=[("ends", {})])

    with OpenAIServer(reply) as model:
        for _ in range(2):
            result = await run(server, lambda: agent(model, [ends]))
            (event,) = (m for m in result.messages if isinstance(m, ToolCallExecutionEvent))
            assert event.content[0].is_error
            assert error.__name__ in event.content[0].content
    assert len(model.requests) == 2


@pytest.mark.parametrize("place", ["tool", "model"])
async def test_cancelled_run_ends_at_once_and_resumes(server: ServerThread, place: str) -> None:
    token = CancellationToken()
    begun = asyncio.Event()
    slow = True

    async def wait() -> str:
        begun.set()
        await asyncio.sleep(3600 if slow else 0)
        return "waited"

    def reply(body: dict[str, Any]) -> Reply:
        if body["messages"][-1]["role"] == "tool":
            return answer("end")
        if place == "model" and slow:
            loop.call_soon_threadsafe(begun.set)
            time.sleep(1)
        return Reply(calls=[("wait", {})])

    loop = asyncio.get_running_loop()
    with OpenAIServer(reply) as model:
        running = asyncio.ensure_future(
            run(server, lambda: RoundRobinGroupChat([agent(model, [wait])], max_turns=1), cancellation_token=token)
        )
        await asyncio.wait_for(begun.wait(), TIMEOUT)
        token.cancel()
        with pytest.raises(RunCancelled):
            await running
        slow = False
        assert "end" in texts(await run(server, lambda: RoundRobinGroupChat([agent(model, [wait])], max_turns=1)))[-1]


async def test_cancelled_task_ends_at_once(server: ServerThread) -> None:
    begun = asyncio.Event()

    async def wait() -> str:
        begun.set()
        await asyncio.sleep(3600)
        return ""

    with OpenAIServer([Reply(calls=[("wait", {})])]) as model:
        running = asyncio.ensure_future(run(server, lambda: RoundRobinGroupChat([agent(model, [wait])], max_turns=1)))
        await asyncio.wait_for(begun.wait(), TIMEOUT)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, TIMEOUT)


async def test_failed_model_call_is_retried_by_next_run(server: ServerThread) -> None:
    with OpenAIServer([Reply(status=400), answer("better")]) as model:
        with pytest.raises(Exception, match="the model gave no usable answer"):
            await run(server, lambda: agent(model))
        assert "better" in texts(await run(server, lambda: agent(model)))[-1]


async def test_stream_is_recorded_whole_and_replayed(server: ServerThread) -> None:
    async def streamed() -> tuple[list[str], str]:
        pieces, last = [], ""
        stream = run_durable_stream(
            lambda: agent(model, model_client_stream=True), task="Q", session_id="s", nexum=server.address
        )
        async for item in stream:
            if isinstance(item, ModelClientStreamingChunkEvent):
                pieces.append(item.content)
            elif isinstance(item, TaskResult):
                last = item.messages[-1].to_text()
        return pieces, last

    with OpenAIServer([Reply("one two three")]) as model:
        pieces, last = await streamed()
        assert len(pieces) > 1
        assert "".join(pieces) == last
        assert await streamed() == (pieces, last)  # a replay has the same pieces
    assert len(model.requests) == 1


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("Q", {"system_message": "Be long."}, "the system message was 'Be brief.', now it is 'Be long.'"),
    ("Q", {"name": "editor"}, "the team was AssistantAgent: writer, now it is AssistantAgent: editor"),
    ("Q", {"tools": ["other"]}, "the tools: note is gone; other is new"),
    ("Q", {"tools": ["described"]}, "the tools: note has another description or other parameters"),
    ("Q", {"model": "n"}, "the model was m, now it is n"),
    ("Q?", {}, "the question was 'Q', now it is 'Q?'"),
]


@pytest.mark.parametrize(("question", "change", "said"), CHANGES)
@pytest.mark.parametrize("on_drift", ["stop", "continue"])
async def test_drift_error_names_the_difference(
    server: ServerThread,
    question: str,
    change: dict[str, Any],
    said: str,
    on_drift: str,
) -> None:
    def tool(kind: str) -> FunctionTool:
        def note() -> str:
            return "noted"

        return FunctionTool(
            note, "Note more." if kind == "described" else "Note.", name="other" if kind == "other" else "note"
        )

    def build() -> AssistantAgent:
        more = {key: value for key, value in change.items() if key not in ("tools", "model")}
        tools = [tool(kind) for kind in change.get("tools", ["note"])]
        return agent(model, tools, model_client=client(model, change.get("model", "m")), **more)

    with OpenAIServer(lambda _: answer("yes")) as model:
        await run(server, lambda: agent(model, [tool("note")]))
        if on_drift == "stop":
            with pytest.raises(DriftError) as error:
                await run(server, build, question)
            assert said in str(error.value)
            assert len(model.requests) == 1
            return
        lines: list[str] = []
        changed = await run(server, build, question, on_drift="continue", logs=lines)
        assert any(said in line for line in lines)
        assert len(model.requests) == 2
        # The record now belongs to the changed program: a further run of this program is a replay.
        assert texts(await run(server, build, question)) == texts(changed)
        assert len(model.requests) == 2


@pytest.mark.filterwarnings("ignore:Resolved model mismatch")
@pytest.mark.parametrize("change", ["streaming", "order of tools", "description", "timeout"])
async def test_change_that_no_reply_depends_on_is_no_drift(server: ServerThread, change: str) -> None:
    def first() -> str:
        """Do one thing."""
        return "one"

    def second() -> str:
        """Do another thing."""
        return "another"

    def build(change: str = "") -> AssistantAgent:
        tools = [second, first] if change == "order of tools" else [first, second]
        return AssistantAgent(
            "writer",
            settings(model, **({"timeout": 3} if change == "timeout" else {})),
            tools=list[Any](tools),
            description="an editor" if change == "description" else "a writer",
            model_client_stream=change == "streaming",
        )

    with OpenAIServer(lambda _: answer("yes")) as model:
        recorded = texts(await run(server, build))
        assert texts(await run(server, lambda: build(change))) == recorded
        assert len(model.requests) == 1


@pytest.mark.filterwarnings("ignore:Resolved model mismatch")
async def test_drift_error_names_a_setting_of_the_model(server: ServerThread) -> None:
    with OpenAIServer(lambda _: answer("yes")) as model:
        await run(server, lambda: AssistantAgent("writer", settings(model)))
        with pytest.raises(DriftError, match=r"the option temperature was none, now it is 0\.2"):
            await run(server, lambda: AssistantAgent("writer", settings(model, temperature=0.2)))
        assert len(model.requests) == 1


@pytest.mark.filterwarnings("ignore:Resolved model mismatch")
async def test_drift_error_names_a_description_that_the_model_sees(server: ServerThread) -> None:
    def build(description: str) -> Team:
        members: list[ChatAgent | Team] = [
            AssistantAgent(name, settings(model), description=description) for name in ("one", "two")
        ]
        return SelectorGroupChat(
            members, model_client=settings(model), max_turns=1, selector_prompt="Choose from:\n{roles}"
        )

    with OpenAIServer(lambda _: Reply("one")) as model:
        await run(server, lambda: build("a writer"))
        with pytest.raises(DriftError, match=r"the messages, from number 1 on: .*a writer.* now it is .*an editor"):
            await run(server, lambda: build("an editor"))


def settings(model: OpenAIServer, **more: Any) -> OpenAIChatCompletionClient:
    """Return AutoGen's own client for the local model server, with these settings."""
    info = ModelInfo(
        vision=False, function_calling=True, json_output=True, structured_output=False, family=ModelFamily.UNKNOWN
    )
    return OpenAIChatCompletionClient(model="m", base_url=model.base_url, api_key="k", model_info=info, **more)


async def test_run_with_fewer_calls_raises_drift_error(server: ServerThread) -> None:
    with OpenAIServer(lambda _: answer("yes")) as model:
        await run(server, lambda: RoundRobinGroupChat([agent(model)], max_turns=2))
        with pytest.raises(DriftError, match="the run ended without asking for reply 2 of writer"):
            await run(server, lambda: RoundRobinGroupChat([agent(model)], max_turns=1))


async def test_run_with_more_calls_than_recorded_raises_drift_error(server: ServerThread) -> None:
    def build(turns: int) -> RoundRobinGroupChat:
        return RoundRobinGroupChat([agent(model)], max_turns=turns)

    with OpenAIServer(lambda _: answer("yes")) as model:
        await run(server, lambda: build(1))
        with pytest.raises(
            DriftError, match=r"was over \(Maximum number of turns 1 reached.\), and this one asks for reply 2"
        ):
            await run(server, lambda: build(2))
        assert len(model.requests) == 1
        longer = await run(server, lambda: build(2), on_drift="continue")
        assert texts(await run(server, lambda: build(2))) == texts(longer)
        assert len(model.requests) == 2


async def test_timeout_ends_replay_where_it_ended_run(server: ServerThread) -> None:
    async def wait() -> str:
        await asyncio.sleep(0.5)
        return "waited"

    def reply(body: dict[str, Any]) -> Reply:
        return answer("on") if body["messages"][-1]["role"] == "tool" else Reply(calls=[("wait", {})])

    def build() -> RoundRobinGroupChat:
        limit = TimeoutTermination(1.2) | MaxMessageTermination(100)
        return RoundRobinGroupChat([agent(model, [wait])], termination_condition=limit)

    with OpenAIServer(reply) as model:
        first = await run(server, build)
        asked = len(model.requests)
        assert "Timeout of 1.2 seconds reached" in str(first.stop_reason)
        again = await run(server, build)
        assert (texts(again), again.stop_reason) == (texts(first), first.stop_reason)
        assert len(model.requests) == asked


async def test_timeout_does_not_count_time_between_runs(server: ServerThread) -> None:
    count = 0

    def reply(body: dict[str, Any]) -> Reply:
        nonlocal count
        count += 1
        return Reply(status=400) if count == 2 else answer("on")

    def build() -> RoundRobinGroupChat:
        return RoundRobinGroupChat([agent(model)], max_turns=3, termination_condition=TimeoutTermination(1.5))

    with OpenAIServer(reply) as model:
        with pytest.raises(Exception, match="no usable answer"):
            await run(server, build)
        await asyncio.sleep(1.6)  # longer than the timeout of 1.5 s; this time must not count
        ended = await run(server, build)
        assert ended.stop_reason == "Maximum number of turns 3 reached."


async def test_second_process_gets_session_busy_with_owners_name(server: ServerThread) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> str:
        begun.set()
        await go_on.wait()
        return "waited"

    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if body["messages"][-1]["role"] == "tool" else Reply(calls=[("wait", {})])

    with OpenAIServer(reply) as model:
        running = asyncio.ensure_future(run(server, lambda: agent(model, [wait])))
        await asyncio.wait_for(begun.wait(), TIMEOUT)
        with pytest.raises(SessionBusy, match=f"session s is being run: .* is in use by .*-{os.getpid()}-"):
            await run(server, lambda: agent(model, [wait]))
        go_on.set()
        await running


class Mailbox(Workbench):
    """A custom workbench with state."""

    component_type = "workbench"

    def __init__(self) -> None:
        self.sent: list[str] = []

    async def list_tools(self) -> list[ToolSchema]:
        parameters: Any = {"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]}
        return [ToolSchema(name="send", description="Send.", parameters=parameters)]

    async def call_tool(
        self,
        name: str,
        arguments: Any = None,
        cancellation_token: CancellationToken | None = None,
        call_id: str | None = None,
    ) -> ToolResult:
        self.sent.append(arguments["to"])
        return ToolResult(name=name, result=[TextResultContent(content=f"sent {len(self.sent)}")])

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def reset(self) -> None: ...
    async def save_state(self) -> dict[str, Any]:
        return {}

    async def load_state(self, state: Any) -> None: ...


async def test_custom_workbench_is_recorded(server: ServerThread) -> None:
    mailbox = Mailbox()

    def reply(body: dict[str, Any]) -> Reply:
        return (
            answer("end")
            if body["messages"][-1]["role"] == "tool"
            else Reply(calls=[("send", {"to": "a"}), ("send", {"to": "b"})])
        )

    with OpenAIServer(reply) as model:
        first = await run(server, lambda: agent(model, workbench=mailbox))
        assert texts(await run(server, lambda: agent(model, workbench=mailbox))) == texts(first)
    assert sorted(mailbox.sent) == ["a", "b"]  # the calls of a reply run at the same time, so in any order


async def test_calls_of_agent_tool_are_recorded(server: ServerThread) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        if body["model"] == "outer" and body["messages"][-1]["role"] != "tool":
            return Reply(calls=[("helper", {"task": "help"})])
        return answer(body["model"])

    def build() -> AssistantAgent:
        helper = agent(model, name="helper", model_client=client(model, "inner"), description="Helps.")
        return agent(model, [AgentTool(helper)], model_client=client(model, "outer"))

    with OpenAIServer(reply) as model:
        first = await run(server, build)
        assert len(model.requests) == 3
        assert texts(await run(server, build)) == texts(first)
        assert len(model.requests) == 3


class Shell(CodeExecutor):
    """An executor that notes the code instead of running it."""

    component_type = "code_executor"

    def __init__(self) -> None:
        self.ran: list[str] = []

    async def execute_code_blocks(
        self, code_blocks: list[CodeBlock], cancellation_token: CancellationToken
    ) -> CodeResult:
        self.ran += [block.code for block in code_blocks]
        return CodeResult(exit_code=0, output=f"ran {random.random()}")

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def restart(self) -> None: ...


async def test_executed_code_is_recorded(server: ServerThread) -> None:
    shell = Shell()
    task = "```python\nprint(1)\n```"

    def build() -> CodeExecutorAgent:
        return CodeExecutorAgent("coder", code_executor=shell)

    first = await run(server, build, task)
    lines: list[str] = []
    again = await run(server, build, task, logs=lines)
    assert again.model_dump() == first.model_dump()
    assert [code.strip() for code in shell.ran] == ["print(1)"]
    assert "code 1 of coder: replayed from the record ✓" in lines


@pytest.mark.parametrize("on_unrecorded", ["tell", "stop"])
async def test_connection_of_custom_agent_is_reported(server: ServerThread, on_unrecorded: Any) -> None:
    # Import this only here: the import takes a second, and each process of pytest-xdist imports this file.
    from autogen_ext.agents.openai import OpenAIAgent

    lines: list[str] = []

    def build() -> OpenAIAgent:
        vendor = AsyncOpenAI(api_key="k", base_url=model.base_url, max_retries=0)
        return OpenAIAgent("own", "acts on its own", vendor, "m", "Be brief.")

    async def running() -> None:
        await run(server, build, logs=lines, on_unrecorded=on_unrecorded)

    with OpenAIServer(lambda _: answer("yes")) as model:
        target = model.base_url.partition("//")[2].partition("/")[0]
        named = f"own connected to {target} outside the record: a re-run does it again, unless you make it a tool"
        if on_unrecorded == "stop":
            with pytest.raises(NotDurable) as error:
                await running()
            assert named in str(error.value)
            assert not model.requests
            return
        with contextlib.suppress(Exception):  # the local server doesn't speak this agent's protocol
            await running()
        assert named in lines
        assert any(line.startswith("session s: outside the record: own connected to") for line in lines)


async def test_run_leaves_agent_unchanged(server: ServerThread) -> None:
    with OpenAIServer(lambda _: answer("yes")) as model:
        plain = agent(model)
        before = dict(vars(plain))
        await run(server, lambda: plain)
        assert {name: vars(plain)[name] for name in ("_model_client", "_workbench")} == {
            name: before[name] for name in ("_model_client", "_workbench")
        }


async def test_missing_server_error_says_how_to_start_one() -> None:
    with pytest.raises(ServerUnavailable, match="python -m nexum_engine"):
        await run_durable(lambda: None, task="Q", session_id="s", nexum="127.0.0.1:1")  # type: ignore[arg-type, return-value]


async def test_same_call_made_twice_on_purpose_runs_twice_in_worker(server: ServerThread, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        searches = [("web_search", {"query": "Tokyo"})] * 2
        return answer("end") if body["messages"][-1]["role"] == "tool" else Reply(calls=searches)

    async def searched() -> list[str]:
        session = Session("s", nexum=server.address, workflow=OFFLINE_TOOL_CALL)
        try:
            tools = demo.DurableCalls(session, crash_after=None).tools()
            return texts(await run(server, lambda: agent(model, tools)))
        finally:
            await session.close()

    with tool_worker(tmp_path, server.address), OpenAIServer(reply) as model:
        assert await searched() == await searched()
    async with NexumClient(server.address) as nexum:
        executions = await nexum.list_executions(workflow_id=OFFLINE_TOOL_CALL.workflow_id)
    calls = [one.idempotency_key.rpartition(":")[2] for one in executions]
    assert sorted(call.rpartition("/")[0] for call in calls) == [
        "s/writer/reply/1/tool/1",
        "s/writer/reply/1/tool/2",
    ]

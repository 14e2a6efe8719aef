"""`DurableSession`: programs that run their agents themselves, and the ids and times of messages in replays."""

from __future__ import annotations

import random
import subprocess
import sys
from datetime import datetime, timezone
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent, UserProxyAgent
from autogen_agentchat.base import ChatAgent, TaskResult, Team
from autogen_agentchat.messages import BaseChatMessage, ModelClientStreamingChunkEvent, TextMessage, ThoughtEvent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_agentchat.tools import TeamTool
from autogen_core.models import CreateResult, UserMessage
from autogen_core.tools import FunctionTool
from durable_agents import Scripted, answer, bench, client, named
from harness import ROOT
from openai_server import OpenAIServer, Reply
from server_thread import ServerThread

from durable_autogen import (
    DriftError,
    DurableSession,
    SessionBusy,
    list_sessions,
    run_durable,
    run_durable_stream,
    send_event,
)
from nexum_engine.client import NexumClient
from nexum_engine.errors import InvalidRequest
from support.models.vendors import ModelFailed

pytestmark = pytest.mark.every_python


def said(text: str) -> list[UserMessage]:
    return [UserMessage(content=text, source="user")]


async def test_calls_of_bare_model_client_are_recorded(server: ServerThread) -> None:
    async def program() -> list[str]:
        async with DurableSession("s", nexum=server.address):
            durable = named(client(model), "me")
            replies = [await durable.create(said(question)) for question in ("one", "two")]
            return [str(reply.content) for reply in replies]

    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await program()
        assert first[0] != first[1]
        assert await program() == first
        assert len(model.requests) == 2


@pytest.mark.parametrize(("code", "status"), [(0, "finished"), (None, "finished"), (3, "stopped"), ("no", "stopped")])
async def test_session_that_sys_exit_ends_is_finished_if_the_code_means_success(
    server: ServerThread, code: Any, status: str
) -> None:
    async def program() -> None:
        async with DurableSession("s", nexum=server.address):
            await named(client(model), "me").create(said("Q"))
            sys.exit(code)

    with OpenAIServer(lambda _: answer("yes")) as model:
        for _ in range(2):
            with pytest.raises(SystemExit):
                await program()
        assert len(model.requests) == 1
    async with NexumClient(server.address) as nexum:
        assert [one.status for one in await list_sessions(nexum)] == [status]


async def test_failure_before_sys_exit_is_retried(server: ServerThread) -> None:
    async def program() -> None:
        async with DurableSession("s", nexum=server.address):
            try:
                await named(client(model), "me").create(said("Q"))
            except ModelFailed:
                sys.exit()

    replies = iter([Reply(status=400), answer("yes")])
    with OpenAIServer(lambda _: next(replies)) as model:
        with pytest.raises(SystemExit):
            await program()
        await program()
        assert len(model.requests) == 2


async def test_streamed_reply_is_recorded_before_its_last_piece(server: ServerThread) -> None:
    async def program(*, leave: bool) -> str:
        async with DurableSession("s", nexum=server.address):
            durable = named(client(model), "me")
            pieces = [piece async for piece in durable.create_stream(said("one"))]
            assert isinstance(pieces[-1], CreateResult)
            assert "".join(str(piece) for piece in pieces[:-1]) == pieces[-1].content
            if leave:
                raise LookupError("the program ends here")
            return str(pieces[-1].content)

    with OpenAIServer(lambda _: answer("one two three")) as model:
        with pytest.raises(LookupError):
            await program(leave=True)
        assert await program(leave=False) == await program(leave=False)
        assert len(model.requests) == 1


async def test_program_that_runs_agents_itself_continues_after_crash(server: ServerThread) -> None:
    done: list[str] = []

    def plain(text: str) -> str:
        done.append(text)
        return f"noted {random.random()}"

    def wrapped(text: str) -> str:
        done.append(text)
        return f"kept {random.random()}"

    def reply(body: dict[str, Any]) -> Reply:
        if body["messages"][-1]["role"] == "tool":
            return answer("end")
        return Reply(calls=[("plain", {"text": "a"}), ("wrapped", {"text": "b"}), ("plain", {"text": "a"})])

    async def program(*, dies: bool) -> list[str]:
        async with DurableSession("s", nexum=server.address):
            one = AssistantAgent(
                "one",
                client(model),
                workbench=bench([plain, FunctionTool(wrapped, "Keep it.")]),
                max_tool_iterations=3,
            )
            first = await one.run(task="Q")
            if dies:
                raise LookupError("the program dies here")
            other = RoundRobinGroupChat([AssistantAgent("two", client(model))], max_turns=1)
            second = await other.run(task=first.messages[-1].to_text())
            return [message.to_text() for message in [*first.messages, *second.messages]]

    with OpenAIServer(reply) as model:
        with pytest.raises(LookupError):
            await program(dies=True)
        assert sorted(done) == ["a", "a", "b"]  # the reply requests two equal calls with "a", and both ran
        first = await program(dies=False)
        assert await program(dies=False) == first
        assert len(model.requests) == 3
    assert sorted(done) == ["a", "a", "b"]


async def test_drift_error_names_the_difference(server: ServerThread) -> None:
    async def program(question: str, *, ask: bool = True) -> None:
        async with DurableSession("s", nexum=server.address):
            if ask:
                await AssistantAgent("one", client(model)).run(task=question)

    with OpenAIServer(lambda _: answer("yes")) as model:
        await program("Q")
        with pytest.raises(DriftError, match=r"it was 'Q' .*, now it is 'R'"):
            await program("R")
        with pytest.raises(DriftError, match="ended without asking for reply 1 of one"):
            await program("Q", ask=False)
        await program("Q")
        assert len(model.requests) == 1


async def test_session_has_one_owner_and_is_entered_once(server: ServerThread) -> None:
    with pytest.raises(InvalidRequest):
        DurableSession("not/an/id")
    session = DurableSession("s", nexum=server.address)
    with pytest.raises(RuntimeError, match="inside `async with`"):
        _ = session.recorder
    async with session:
        with pytest.raises(SessionBusy, match="session s is being run") as busy:
            async with DurableSession("s", nexum=server.address):
                pass
        assert str(busy.value).endswith(
            "wait until the execution has ended, or end that process. Or use another session"
        )


@pytest.mark.parametrize("stream", [False, True])
async def test_replay_has_ids_and_times_of_first_run(server: ServerThread, stream: bool) -> None:
    def note() -> str:
        return "noted"

    def reply(body: dict[str, Any]) -> Reply:
        if body["messages"][-1]["role"] == "tool":
            return answer("one two three")
        return Reply("thinking aloud", calls=[("note", {})])

    def build() -> AssistantAgent:
        return AssistantAgent("one", client(model), tools=[note], max_tool_iterations=3, model_client_stream=stream)

    async def program(task: str | BaseChatMessage) -> tuple[list[Any], TaskResult]:
        *items, result = [
            item async for item in run_durable_stream(build, task=task, session_id="s", nexum=server.address)
        ]
        assert isinstance(result, TaskResult)
        return items, result

    begun = datetime.now(timezone.utc)
    with OpenAIServer(reply) as model:
        live_items, live = await program("Q")
        items, replayed = await program("Q")
        assert len(model.requests) == 2
        assert replayed.model_dump() == live.model_dump()
        assert len({message.id for message in live.messages}) == len(live.messages)
        times = [message.created_at for message in live.messages]
        assert times == sorted(times)
        assert times[-1] > begun
        assert times[-1] > times[0]
        assert any(isinstance(message, ThoughtEvent) for message in live.messages)
        for found, mark in ((live_items, {}), (items, {"nexum": "replayed"})):
            assert [one.metadata for one in found if one.source == "one" and hasattr(one, "to_model_text")] == [mark]
            chunks = [one.full_message_id for one in found if isinstance(one, ModelClientStreamingChunkEvent)]
            assert {*chunks} <= {message.id for message in live.messages}
            assert bool(chunks) == stream
        own = TextMessage(content="Q", source="user", id="my own")
        again = (await program(own))[1]
        assert [message.id for message in again.messages] == ["my own", *(message.id for message in live.messages[1:])]


async def test_other_sessions_and_programs_have_other_ids(server: ServerThread) -> None:
    def build(system: str = "Be brief.") -> AssistantAgent:
        return AssistantAgent("one", client(model), system_message=system)

    async def last_id(system: str, session: str) -> str:
        result = await run_durable(
            lambda: build(system), task="Q", session_id=session, nexum=server.address, on_drift="continue"
        )
        return result.messages[-1].id

    with OpenAIServer(lambda _: answer("yes")) as model:
        ids = [await last_id(system, session) for system, session in (("a", "s"), ("a", "r"), ("b", "s"))]
        assert len({*ids}) == 3
        assert await last_id("b", "s") == ids[2]


async def test_replay_has_same_transcript(server: ServerThread) -> None:
    begun = datetime.now(timezone.utc)

    async def program() -> list[Any]:
        async with DurableSession("s", nexum=server.address):
            one = AssistantAgent("one", client(model))
            pair = RoundRobinGroupChat([AssistantAgent("two", client(model))], max_turns=2)
            assert pair is pair
            results = [await one.run(task="Q"), await pair.run(task="Q"), await pair.run(task="R")]
            streamed = [item async for item in one.run_stream(task="R")]
            return [*(one.model_dump() for one in results), streamed[-1].model_dump()]

    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await program()
        assert await program() == first
        assert len(model.requests) == 6
        messages = [message for result in first for message in result["messages"]]
        assert len({message["id"] for message in messages}) == len(messages) == 10
        assert min(message["created_at"] for message in messages) >= begun


async def test_streams_of_agents_in_tool_have_same_transcript_in_replay(server: ServerThread) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        if body["model"] == "outer" and body["messages"][-1]["role"] != "tool":
            return Reply(calls=[("crew", {"task": "help"})])
        return answer("one two three four")

    def build() -> AssistantAgent:
        members: list[ChatAgent | Team] = [
            AssistantAgent(name, client(model, name), model_client_stream=True) for name in ("a", "b")
        ]
        crew = TeamTool(RoundRobinGroupChat(members, max_turns=3), "crew", "Ask the crew.")
        outer = client(model, "outer")
        return AssistantAgent("outer", outer, tools=[crew], max_tool_iterations=3, model_client_stream=True)

    async def program() -> dict[str, Any]:
        return (await run_durable(build, task="Q", session_id="s", nexum=server.address)).model_dump()

    with OpenAIServer(reply) as model:
        first = await program()
        assert await program() == first
        assert len(model.requests) == 5


async def test_input_requests_have_same_transcript_in_replay(server: ServerThread) -> None:
    def build() -> RoundRobinGroupChat:
        return RoundRobinGroupChat([UserProxyAgent("user", input_func=lambda _: "go on")], max_turns=2)

    async def program() -> dict[str, Any]:
        return (await run_durable(build, task="Q", session_id="s", nexum=server.address)).model_dump()

    first = await program()
    assert await program() == first
    requests = [message["request_id"] for message in first["messages"] if "request_id" in message]
    assert len({*requests}) == 2


def test_session_or_event_under_another_event_loop_says_that_it_needs_asyncio() -> None:
    async def entered() -> None:
        async with DurableSession("s"):
            pass

    ran = run_durable(lambda: AssistantAgent("a", Scripted([])), task="x", session_id="s")
    for program in (entered(), ran, send_event("s", "paid")):
        with pytest.raises(InvalidRequest, match="needs asyncio"):
            program.send(None)  # as trio does, without an event loop of asyncio


def test_program_may_have_module_named_tools() -> None:
    code = (
        "import sys, durable_autogen; print({'tools', 'submit_task', 'workflow', 'models', 'worker'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

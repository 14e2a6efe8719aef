"""Durable runs of programs that are harder than most: what they share, survive, wait for, or keep out of sight."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent, UserProxyAgent
from autogen_agentchat.conditions import ExternalTermination, MaxMessageTermination, TimeoutTermination
from autogen_agentchat.messages import (
    MultiModalMessage,
    TextMessage,
    ToolCallExecutionEvent,
)
from autogen_agentchat.teams import DiGraphBuilder, GraphFlow, RoundRobinGroupChat
from autogen_agentchat.tools import AgentTool, TeamTool
from autogen_agentchat.ui import Console, UserInputManager
from autogen_core import CancellationToken
from autogen_core.models import ChatCompletionClient, UserMessage
from autogen_core.tools import StaticWorkbench, ToolResult, ToolSchema, Workbench
from durable_agents import TIMEOUT, Own, agent, answer, bench, client, is_after_a_tool, named, run, texts
from harness import Server
from openai_server import OpenAIServer, Reply

from durable_autogen import DriftError, DurableSession, SessionBusy, run_durable_stream
from durable_autogen.record.events import Kind, read_record
from nexum_engine.client import NexumClient
from nexum_engine.errors import InvalidRequest
from support.models.live import LiveModel

# ---- Names and places ------------------------------------------------------------------------------------------------


async def test_two_agents_of_one_name_have_two_places_in_the_record(server: Server) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        if body["model"] == "outer" and not is_after_a_tool(body):
            return Reply(calls=[("crew_one", {"task": "a"}), ("crew_two", {"task": "b"})])
        return answer(body["messages"][-1]["content"])

    def build() -> AssistantAgent:
        crews = [
            TeamTool(RoundRobinGroupChat([agent(model, "member")], max_turns=2), name, f"Ask {name}.")
            for name in ("crew_one", "crew_two")
        ]
        return agent(model, "outer", crews)

    with OpenAIServer(reply) as model:
        first = await run(server, build)
        assert len(model.requests) == 6
        assert texts(await run(server, build)) == texts(first)
        assert len(model.requests) == 6


async def test_agents_of_one_name_that_work_at_once_do_not_mix(server: Server) -> None:
    def build() -> Own:
        async def both(_: str) -> str:
            found = await asyncio.gather(*(one.run(task=str(n)) for n, one in enumerate(own.writers)))  # type: ignore[attr-defined]
            return " | ".join(result.messages[-1].to_text() for result in found)

        own = Own("own", both)
        own.writers = [agent(model, "writer", [note]), agent(model, "writer", [note])]  # type: ignore[attr-defined]
        return own

    done: list[str] = []

    def note(text: str) -> str:
        """Note it."""
        done.append(text)
        return f"noted {text} {random.random()}"

    def reply(body: dict[str, Any]) -> Reply:
        asked = body["messages"][-1]["content"] if not is_after_a_tool(body) else ""
        return Reply(calls=[("note", {"text": asked})]) if asked else answer("end")

    with OpenAIServer(reply) as model:
        first = await run(server, build)
        assert texts(await run(server, build)) == texts(first)
        assert len(model.requests) == 4
    assert sorted(done) == ["0", "1"]


@dataclass
class Kept:
    """Where a program may keep what it calls."""

    deeper: dict[str, list[ChatCompletionClient]] = field(default_factory=dict)


@pytest.mark.parametrize("place", ["list", "dict", "object"])
async def test_clients_and_agents_are_found_wherever_an_agent_keeps_them(server: Server, place: str) -> None:
    def build() -> Own:
        async def ask(said: str) -> str:
            kept: Any = own
            found = {
                "list": lambda: kept.kept[1],
                "dict": lambda: kept.kept["it"],
                "object": lambda: kept.kept.deeper["it"][0],
            }[place]()
            inner = await kept.helpers["one"].run(task=said)
            reply = await found.create([UserMessage(content=inner.messages[-1].to_text(), source="user")])
            return str(reply.content)

        own = Own("own", ask)
        it = client(model)
        own.kept = {"list": ["no", it], "dict": {"it": it}, "object": Kept({"it": [it]})}[place]  # type: ignore[attr-defined]
        own.helpers = {"one": agent(model, "helper")}  # type: ignore[attr-defined]
        return own

    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await run(server, build)
        assert texts(await run(server, build)) == texts(first)
        assert len(model.requests) == 2


async def test_a_run_that_records_nothing_says_so(server: Server) -> None:
    async def nothing(_: str) -> str:
        return "said by itself"

    lines: list[str] = []
    await run(server, lambda: Own("own", nothing), logs=lines)
    assert "nothing was recorded" in lines[-1]


async def test_one_team_is_in_one_run_at_a_time(server: Server) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> str:
        """Wait."""
        begun.set()
        await go_on.wait()
        return "waited"

    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if is_after_a_tool(body) else Reply(calls=[("wait", {})])

    with OpenAIServer(reply) as model:
        team = agent(model, "one", [wait])
        running = asyncio.ensure_future(run(server, lambda: team))
        await asyncio.wait_for(begun.wait(), TIMEOUT)
        with pytest.raises(InvalidRequest, match="one is at work in session s: build another one"):
            await run(server, lambda: team, session="other")
        go_on.set()
        assert "end" in texts(await running)[-1]


# ---- Failures --------------------------------------------------------------------------------------------------------


class Flaky(Exception):
    """The model's own."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(f"{why} ({status})")
        self.status = status


async def test_a_failure_that_the_program_survives_is_replayed_as_that_failure(server: Server) -> None:
    seen: list[tuple[type[BaseException], str, object]] = []

    class Failing(LiveModel):
        async def create(self, *args: Any, **more: Any) -> Any:
            if len(tried) < 2:
                tried.append(1)
                raise Flaky(500 + len(tried), "busy")
            return await super().create(*args, **more)

    tried: list[int] = []

    def build() -> Own:
        async def again_and_again(said: str) -> str:
            while True:
                try:
                    reply = await own.llm.create([UserMessage(content=said, source="user")])  # type: ignore[attr-defined]
                    return str(reply.content)
                except Flaky as error:
                    seen.append((type(error), str(error), error.status))

        own = Own("own", again_and_again)
        own.llm = Failing(vendor="v", model="m", base_url=model.base_url, api_key="k")  # type: ignore[attr-defined]
        return own

    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await run(server, build)
        live, seen[:] = list(seen), []
        assert live == [(Flaky, "busy (501)", 501), (Flaky, "busy (502)", 502)]
        assert texts(await run(server, build)) == texts(first)
        assert seen == live
        assert len(model.requests) == 1


async def test_a_failure_of_an_agent_that_is_a_tool_is_replayed(server: Server) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        if body["model"] == "helper":
            return Reply(status=400)
        return answer("end") if is_after_a_tool(body) else Reply(calls=[("helper", {"task": "help"})])

    with OpenAIServer(reply) as model:

        def build() -> AssistantAgent:
            return agent(model, "outer", [AgentTool(agent(model, "helper"))])

        first = await run(server, build)
        (event,) = (m for m in first.messages if isinstance(m, ToolCallExecutionEvent))
        assert event.content[0].is_error
        asked = len(model.requests)
        assert texts(await run(server, build)) == texts(first)
        assert len(model.requests) == asked


async def test_a_failure_that_ends_the_run_is_asked_again_although_others_went_on(server: Server) -> None:
    failing = True

    def reply(body: dict[str, Any]) -> Reply:
        if body["model"] == "b" and failing:
            return Reply(status=400)
        if body["model"] == "c" and not is_after_a_tool(body):
            return Reply(calls=[("slow", {})])
        return answer(body["model"])

    async def slow() -> str:
        """Take a while."""
        await asyncio.sleep(0.3)
        return "done"

    def build() -> GraphFlow:
        a, b, c, d = agent(model, "a"), agent(model, "b"), agent(model, "c", [slow]), agent(model, "d")
        builder = DiGraphBuilder()
        for one in (a, b, c, d):
            builder.add_node(one)
        builder.add_edge(a, b).add_edge(a, c).add_edge(b, d).add_edge(c, d)
        return GraphFlow([a, b, c, d], builder.build())

    with OpenAIServer(reply) as model:
        for _ in range(2):
            with pytest.raises(Exception, match="the model gave no usable answer"):
                await run(server, build)
        failing = False
        first = await run(server, build)
        assert texts(await run(server, build)) == texts(first)
        asked = [request.body["model"] for request in model.requests]
    assert asked.count("a") == 1
    assert asked.count("c") == 2  # its second reply came after the failure of b, and counts
    assert asked.count("d") == 1


class EndsBadly(Workbench):
    """A workbench of one's own whose call ends as no call should."""

    component_type = "workbench"

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    async def list_tools(self) -> list[ToolSchema]:
        parameters: Any = {"type": "object", "properties": {}}
        return [ToolSchema(name="end", description="End.", parameters=parameters)]

    async def call_tool(
        self,
        name: str,
        arguments: Any = None,
        cancellation_token: CancellationToken | None = None,
        call_id: str | None = None,
    ) -> ToolResult:
        self.calls += 1
        raise self.error

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def reset(self) -> None: ...
    async def save_state(self) -> dict[str, Any]:
        return {}

    async def load_state(self, state: Any) -> None: ...


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt(), SystemExit(), ValueError("no")])
async def test_however_a_workbench_ends_it_is_a_recorded_failure(server: Server, error: BaseException) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if is_after_a_tool(body) else Reply(calls=[("end", {})])

    with OpenAIServer(reply) as model:
        bench = EndsBadly(error)

        def build() -> AssistantAgent:
            return AssistantAgent("one", client(model), workbench=bench, max_tool_iterations=3)

        first = await run(server, build)
        (event,) = (m for m in first.messages if isinstance(m, ToolCallExecutionEvent))
        assert event.content[0].is_error
        assert texts(await run(server, build)) == texts(first)
        assert (len(model.requests), bench.calls) == (2, 1)


class Hopeless(BaseException):
    """What nobody expects."""


@pytest.mark.parametrize("error", [asyncio.CancelledError, Hopeless] if sys.version_info >= (3, 11) else [Hopeless])
async def test_whatever_ends_an_agent_of_ones_own_is_an_error_and_no_hang(
    server: Server, error: type[BaseException]
) -> None:
    async def ends(_: str) -> str:
        raise error

    with pytest.raises(RuntimeError, match=rf"one ended with {error.__name__}"):
        await run(server, lambda: RoundRobinGroupChat([Own("one", ends)], max_turns=1))


@pytest.mark.parametrize("error", [asyncio.CancelledError, Hopeless])
async def test_a_workbench_that_can_not_list_its_tools_is_an_error_and_no_hang(
    server: Server, error: type[BaseException]
) -> None:
    class Unlisted(StaticWorkbench):
        async def list_tools(self) -> list[ToolSchema]:
            raise error

    def build() -> RoundRobinGroupChat:
        return RoundRobinGroupChat([AssistantAgent("one", client(model), workbench=Unlisted([]))], max_turns=1)

    with OpenAIServer(lambda _: answer("yes")) as model:
        with pytest.raises(RuntimeError, match=rf"the tools of one ended with {error.__name__}"):
            await run(server, build)
        assert not model.requests


async def test_a_tool_in_a_thread_that_finds_nothing_is_an_error_and_no_hang(server: Server) -> None:
    def look() -> str:
        """Look."""
        return next(row for row in ("a", "b") if row == "c")

    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if is_after_a_tool(body) else Reply(calls=[("look", {})])

    with OpenAIServer(reply) as model:
        for _ in range(2):
            result = await run(server, lambda: agent(model, "one", [look]))
            (event,) = (m for m in result.messages if isinstance(m, ToolCallExecutionEvent))
            assert (event.content[0].is_error, "StopIteration" in event.content[0].content) == (True, True)
        assert len(model.requests) == 2


async def test_half_a_surrogate_pair_in_a_reply_is_replaced_and_not_paid_for_again(server: Server) -> None:
    with OpenAIServer(lambda _: Reply("a\ud83d")) as model:
        for _ in range(2):
            assert texts(await run(server, lambda: agent(model, "one")))[-1] == "a\ufffd"
        assert len(model.requests) == 1


# ---- Failures that are hard to judge ---------------------------------------------------------------------------------


class Offline(Exception):
    """What every failing client here says."""


class Scripted(LiveModel):
    """Fails as long as `fails` says so."""

    def __init__(self, model: OpenAIServer, name: str, fails: Callable[[], Exception | None]) -> None:
        super().__init__(vendor="v", model=name, base_url=model.base_url, api_key="k")
        self.fails = fails

    async def create(self, *args: Any, **more: Any) -> Any:
        if (error := self.fails()) is not None:
            raise error
        return await super().create(*args, **more)


class Caller(Own):
    """Asks its model through a function of its own."""

    llm: ChatCompletionClient

    async def ask(self, said: str = "Q") -> str:
        return str((await self.llm.create([UserMessage(content=said, source="user")])).content)


def caller(name: str, llm: ChatCompletionClient, act: Callable[[Caller], Awaitable[str]]) -> Caller:
    async def acting(_: str) -> str:
        return await act(own)

    own = Caller(name, acting)
    own.llm = llm
    return own


def fan(middle: Sequence[Any], first: Any, last: Any) -> GraphFlow:
    builder = DiGraphBuilder().add_node(first).add_node(last)
    for one in middle:
        builder.add_node(one).add_edge(first, one).add_edge(one, last)
    return GraphFlow([first, *middle, last], builder.build())


async def test_a_survived_failure_is_not_taken_for_one_of_the_same_words(server: Server) -> None:
    broken = True

    async def falls_back(own: Caller) -> str:
        try:
            return await own.ask()
        except Offline:
            return "from the cache"

    def build() -> RoundRobinGroupChat:
        one = caller("one", Scripted(model, "one", lambda: Offline("Connection error.")), falls_back)
        three = caller(
            "three", Scripted(model, "three", lambda: Offline("Connection error.") if broken else None), Caller.ask
        )
        return RoundRobinGroupChat([one, agent(model, "two"), three], max_turns=3)

    with OpenAIServer(lambda body: answer(body["model"])) as model:
        with pytest.raises(Offline):
            await run(server, build)
        broken = False
        first = await run(server, build)
        assert texts(first)[1] == "from the cache"
        assert texts(await run(server, build)) == texts(first)
        assert [request.body["model"] for request in model.requests] == ["two", "three"]


async def test_a_failure_that_is_raised_after_others_were_heard_is_asked_again(server: Server) -> None:
    failures = [Offline("no")]

    async def all_or_nothing(own: Caller) -> str:
        found = await asyncio.gather(*(own.ask(str(n)) for n in range(3)), return_exceptions=True)
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return " | ".join(map(str, found))

    def build() -> Caller:
        return caller("one", Scripted(model, "m", lambda: failures.pop() if failures else None), all_or_nothing)

    with OpenAIServer(lambda _: answer("yes")) as model:
        with pytest.raises(Offline):
            await run(server, build)
        first = await run(server, build)
        assert texts(await run(server, build)) == texts(first)
        assert len(model.requests) == 3


async def test_who_gave_up_while_others_went_on_tries_again(server: Server) -> None:
    broken = True
    heard = asyncio.Event()

    async def three_times(own: Caller) -> str:
        for _ in range(3):
            try:
                return await own.ask()
            except Offline:
                await asyncio.sleep(0.05)
        await asyncio.wait_for(heard.wait(), TIMEOUT)
        raise RuntimeError("gave up")

    def reply(body: dict[str, Any]) -> Reply:
        if body["model"] == "c":
            loop.call_soon_threadsafe(heard.set)
        return answer(body["model"])

    def build() -> GraphFlow:
        b = caller("b", Scripted(model, "b", lambda: Offline("busy") if broken else None), three_times)
        return fan([b, agent(model, "c")], agent(model, "a"), agent(model, "d"))

    loop = asyncio.get_running_loop()
    with OpenAIServer(reply) as model:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="gave up"):
                await run(server, build)
        broken = False
        first = await run(server, build)
        assert texts(await run(server, build)) == texts(first)
        asked = [request.body["model"] for request in model.requests]
    assert sorted(asked) == ["a", "b", "c", "d"]


async def test_a_failure_is_asked_again_although_another_branch_was_at_work_for_long(server: Server) -> None:
    failures = [Offline("busy")]

    async def works(_: str) -> str:
        await asyncio.sleep(1.5)
        return "worked"

    def build() -> GraphFlow:
        b = caller("b", Scripted(model, "b", lambda: failures.pop() if failures else None), Caller.ask)
        return fan([b, Own("c", works)], agent(model, "a"), agent(model, "d"))

    with OpenAIServer(lambda body: answer(body["model"])) as model:
        with pytest.raises(Exception, match="busy"):
            await run(server, build)
        first = await run(server, build)
        assert texts(await run(server, build)) == texts(first)
        assert sorted(request.body["model"] for request in model.requests) == ["a", "b", "d"]


async def test_a_finished_session_replays_a_failure_at_its_very_end(server: Server) -> None:
    tried: list[int] = []

    def failing() -> Exception:
        tried.append(1)
        return Offline("no")

    async def program() -> str:
        async with DurableSession("s", nexum=server.address):
            llm = named(Scripted(model, "m", failing), "one")
            with pytest.raises(Offline):
                await llm.create([UserMessage(content="one", source="user")])
        return "done"

    with OpenAIServer(lambda _: answer("yes")) as model:
        assert [await program(), await program()] == ["done", "done"]
    assert tried == [1]


async def test_an_error_of_the_programs_own_is_the_one_that_is_told(server: Server) -> None:
    async def survives(own: Caller) -> str:
        try:
            return await own.ask()
        except TimeoutError:
            return "never mind"

    async def bug(_: str) -> str:
        raise ValueError("the real problem")

    def build() -> RoundRobinGroupChat:
        one = caller("one", Scripted(model, "m", TimeoutError), survives)
        return RoundRobinGroupChat([one, agent(model, "two"), Own("three", bug)], max_turns=3)

    with OpenAIServer(lambda _: answer("yes")) as model:
        for _ in range(2):
            with pytest.raises(Exception, match="the real problem"):
                await run(server, build)
        assert len(model.requests) == 1


class Stated(Exception):
    """With a constructor, a status and a text of its own."""

    def __init__(self, status: int, *, why: str) -> None:
        super().__init__()
        self.status = status
        self.why = why
        self.where = object()

    def __str__(self) -> str:
        return f"{self.status}: {self.why}"


class Unsayable(Exception):
    def __str__(self) -> str:
        raise LookupError


FAILURES: list[Exception] = [
    KeyError("x"),
    FileNotFoundError(2, "no such thing", "file"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    TimeoutError(),
    Stated(503, why="busy"),
    ValueError("half \ud83d"),
    ValueError("x" * 2_000_000),
    OverflowError(float("nan")),
    Unsayable(),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
async def test_a_failure_comes_back_as_its_own_class(server: Server, error: Exception) -> None:
    seen: list[tuple[str, object, object]] = []
    failures = [error]

    async def tries_again(own: Caller) -> str:
        try:
            return await own.ask()
        except type(error) as failed:
            seen.append((type(failed).__name__, getattr(failed, "status", None), getattr(failed, "errno", None)))
        return await own.ask()

    def build() -> Caller:
        return caller("one", Scripted(model, "m", lambda: failures.pop() if failures else None), tries_again)

    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await run(server, build)
        assert texts(await run(server, build)) == texts(first)
        assert len(model.requests) == 1
    assert seen == [seen[0]] * 2


async def test_a_failure_within_a_team_that_is_a_tool_reads_the_same_in_a_replay(server: Server) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        if body["model"] == "inner":
            return Reply(status=400)
        return answer("end") if is_after_a_tool(body) else Reply(calls=[("crew", {"task": "help"})])

    def build() -> AssistantAgent:
        crew = RoundRobinGroupChat([agent(model, "inner")], max_turns=1)
        return agent(model, "outer", [TeamTool(crew, "crew", "Ask the crew.")])

    with OpenAIServer(reply) as model:
        first = await run(server, build)
        asked = len(model.requests)
        assert texts(await run(server, build)) == texts(first)
        assert len(model.requests) == asked


async def test_agents_that_share_a_name_do_not_mix_their_calls(server: Server) -> None:
    def note(text: str) -> str:
        """Note it."""
        return f"noted {text} {random.random()}"

    def reply(body: dict[str, Any]) -> Reply:
        asked = body["messages"][-1]["content"] if not is_after_a_tool(body) else ""
        return Reply(calls=[("note", {"text": asked})]) if asked else answer("end")

    async def program() -> list[str]:
        async with DurableSession("s", nexum=server.address):

            async def work(n: int) -> str:
                worker = AssistantAgent(
                    "worker",
                    client(model),
                    workbench=bench([note]),
                    max_tool_iterations=3,
                )
                return "\n".join(texts(await worker.run(task=f"Q{n}")))

            return list(await asyncio.gather(*(work(n) for n in range(5))))

    with OpenAIServer(reply) as model:
        first = await program()
        assert await program() == first
        assert len(model.requests) == 10


async def test_a_branch_that_takes_its_time_is_no_drift_while_a_call_was_in_flight(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.5)
    stop = True
    asked = asyncio.Event()

    async def works(_: str) -> str:
        await asyncio.sleep(1.5)
        return "worked"

    def reply(body: dict[str, Any]) -> Reply:
        if body["model"] == "c" and stop:
            loop.call_soon_threadsafe(asked.set)
            hold.wait(TIMEOUT)
        return answer(body["model"])

    def build() -> GraphFlow:
        return fan([Own("b", works), agent(model, "c")], agent(model, "a"), agent(model, "d"))

    loop = asyncio.get_running_loop()
    hold = threading.Event()
    with OpenAIServer(reply) as model:
        running = asyncio.ensure_future(run(server, build))
        await asyncio.wait_for(asked.wait(), TIMEOUT)
        async with NexumClient(server.address) as nexum:
            while not any(  # noqa: ASYNC110 - another process writes it
                event.kind is Kind.TURN and event.agent == "b" for event in (await read_record(nexum, "s")).events
            ):
                await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        stop = False
        hold.set()
        first = await run(server, build)
        assert texts(await run(server, build)) == texts(first)


async def test_a_time_limit_ends_a_team_that_makes_no_call(server: Server) -> None:
    async def waits(_: str) -> str:
        await asyncio.sleep(0.2)
        return "on"

    def build() -> RoundRobinGroupChat:
        limit = TimeoutTermination(0.7) | MaxMessageTermination(30)
        return RoundRobinGroupChat([Own("one", waits)], termination_condition=limit)

    first = await run(server, build)
    assert "Timeout of 0.7" in str(first.stop_reason)
    assert texts(await run(server, build)) == texts(first)


async def test_a_stop_that_comes_during_a_replay_stops_what_comes_after_it(server: Server) -> None:
    stop = ExternalTermination()

    def build(turns: int) -> RoundRobinGroupChat:
        return RoundRobinGroupChat([agent(model, "one")], max_turns=turns, termination_condition=stop)

    with OpenAIServer(lambda _: answer("on")) as model:
        running = asyncio.ensure_future(run(server, lambda: build(50)))
        while len(model.requests) < 3:  # noqa: ASYNC110 - the server is a thread
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        stop.set()
        ended = await run(server, lambda: build(50))
        assert ended.stop_reason == "External termination requested"
        asked = len(model.requests)
        assert asked <= 5
        stop = ExternalTermination()
        assert texts(await run(server, lambda: build(50))) == texts(ended)
        assert len(model.requests) == asked


# ---- Within a call, and beside it ------------------------------------------------------------------------------------


async def test_what_a_tool_asks_for_is_part_of_its_result(server: Server) -> None:
    def build() -> Own:
        async def digest(text: str) -> str:
            """Digest it."""
            reply = await own.llm.create([UserMessage(content=text, source="user")])  # type: ignore[attr-defined]
            return f"digest: {reply.content}"

        async def ask(said: str) -> str:
            first = await own.llm.create([UserMessage(content=said, source="user")])  # type: ignore[attr-defined]
            result = await own.inner.run(task=str(first.content))  # type: ignore[attr-defined]
            last = await own.llm.create([UserMessage(content=result.messages[-1].to_text(), source="user")])  # type: ignore[attr-defined]
            return str(last.content)

        own = Own("own", ask)
        own.llm = client(model, "llm")  # type: ignore[attr-defined]
        own.inner = agent(model, "inner", [digest])  # type: ignore[attr-defined]
        return own

    def reply(body: dict[str, Any]) -> Reply:
        if body["model"] == "inner" and not is_after_a_tool(body):
            return Reply(calls=[("digest", {"text": "it"})])
        return answer(body["model"])

    with OpenAIServer(reply) as model:
        first = await run(server, build)
        assert [request.body["model"] for request in model.requests] == ["llm", "inner", "llm", "inner", "llm"]
        assert texts(await run(server, build)) == texts(first)
        assert len(model.requests) == 5


@pytest.mark.parametrize("is_slow_first", [True, False])
async def test_members_of_a_graph_end_in_the_recorded_order_whatever_they_wait_for(
    server: Server, is_slow_first: bool
) -> None:
    pause = 0.0

    async def read(_: str) -> str:
        await asyncio.sleep(pause)
        return "the file says 42"

    def build() -> GraphFlow:
        a, b, c, d = agent(model, "a"), Own("b", read), agent(model, "c"), agent(model, "d")
        builder = DiGraphBuilder()
        for one in (a, b, c, d):
            builder.add_node(one)
        builder.add_edge(a, b).add_edge(a, c).add_edge(b, d).add_edge(c, d)
        return GraphFlow([a, b, c, d], builder.build())

    with OpenAIServer(lambda body: answer(body["model"])) as model:
        pause = 0.5 if is_slow_first else 0.0
        first = await run(server, build)
        (asked,) = (request.body for request in model.requests if request.body["model"] == "d")
        order = [str(message["content"]) for message in asked["messages"]]
        slow_is_last = max(n for n, text in enumerate(order) if "42" in text) > max(
            n for n, text in enumerate(order) if text.startswith("c ")
        )
        assert slow_is_last == is_slow_first
        pause = 0.0 if is_slow_first else 0.5
        assert texts(await run(server, build)) == texts(first)
        assert len(model.requests) == 3


async def test_a_member_of_a_graph_that_says_something_else_is_told(server: Server) -> None:
    said = "the file says 42"

    async def read(_: str) -> str:
        return said

    def build() -> GraphFlow:
        a, b = Own("a", read), agent(model, "b")
        return GraphFlow([a, b], DiGraphBuilder().add_node(a).add_node(b).add_edge(a, b).build())

    with OpenAIServer(lambda _: answer("yes")) as model:
        await run(server, build)
        said = "the file says 43"
        with pytest.raises(DriftError, match=r"turn 1 of a .* what it said was the file says 42, now it is .* 43"):
            await run(server, build)
        assert len(model.requests) == 1


# ---- People, stops and questions -------------------------------------------------------------------------------------


async def test_autogens_user_input_manager_gets_and_replays_its_answer(server: Server) -> None:
    asked = 0

    async def person(prompt: str, cancellation_token: CancellationToken | None) -> str:
        nonlocal asked
        asked += 1
        return f"I say {random.random()}"

    async def program() -> list[str]:
        manager = UserInputManager(person)
        user = UserProxyAgent("user", input_func=manager.get_wrapped_callback())

        def build() -> RoundRobinGroupChat:
            return RoundRobinGroupChat([agent(model, "one"), user], max_turns=4)

        stream = run_durable_stream(build, task="Q", session_id="s", nexum=server.address)
        return texts(await asyncio.wait_for(Console(stream, user_input_manager=manager), TIMEOUT))

    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await program()
        assert await program() == first
        assert (len(model.requests), asked) == (2, 2)


async def test_a_stop_from_outside_is_replayed_where_it_was(server: Server) -> None:
    stop = ExternalTermination()
    count = 0

    def reply(_: dict[str, Any]) -> Reply:
        nonlocal count
        count += 1
        if count == 3:
            stop.set()
        return answer("on")

    def build() -> RoundRobinGroupChat:
        limit = stop | MaxMessageTermination(10)
        return RoundRobinGroupChat([agent(model, "one"), agent(model, "two")], termination_condition=limit)

    with OpenAIServer(reply) as model:
        first = await run(server, build)
        assert first.stop_reason == "External termination requested"
        stop = ExternalTermination()
        again = await run(server, build)
        assert (texts(again), again.stop_reason) == (texts(first), first.stop_reason)
        assert len(model.requests) == 3


@pytest.mark.parametrize(
    "task",
    [
        TextMessage(content="Q", source="alice"),
        [TextMessage(content="Q", source="alice"), TextMessage(content="R", source="bob")],
        MultiModalMessage(content=["Q", "R"], source="alice"),
    ],
)
async def test_any_question_can_be_left_out_where_the_session_has_one(server: Server, task: Any) -> None:
    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await run(server, lambda: agent(model, "one"), task)
        again = await run(server, lambda: agent(model, "one"), None)
        assert again.model_dump() == first.model_dump()
        assert len(model.requests) == 1


async def test_the_question_may_be_left_out_of_the_messages(server: Server) -> None:
    with OpenAIServer(lambda _: answer("yes")) as model:
        result = await run(server, lambda: agent(model, "one"), output_task_messages=False)
        assert [message.source for message in result.messages] == ["one"]


async def test_a_misspelt_on_drift_is_refused(server: Server) -> None:
    with pytest.raises(InvalidRequest, match="on_drift is 'Stop': give one of stop, continue"):
        await run(server, lambda: None, on_drift="Stop")


async def test_library_logs_and_prints_nothing(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    with OpenAIServer(lambda _: answer("yes")) as model:
        for _ in range(2):
            await run(server, lambda: agent(model, "one"), logs=lines)
    assert capsys.readouterr().out == ""
    assert "reply 1 of one: replayed from the record ✓" in lines


# ---- Owners ----------------------------------------------------------------------------------------------------------


async def test_a_run_that_was_stopped_can_be_run_again_at_once(server: Server) -> None:
    """However it was stopped: what it had begun at that moment is no obstacle."""

    def build() -> RoundRobinGroupChat:
        return RoundRobinGroupChat([agent(model, "one")], max_turns=20)

    stopped = 0
    with OpenAIServer(lambda _: answer("on")) as model:
        for _ in range(12):
            running = asyncio.ensure_future(run(server, build))
            seen = len(model.requests)
            while len(model.requests) < seen + 1 and not running.done():  # noqa: ASYNC110 - at a random moment after one
                await asyncio.sleep(random.random() * 0.01)
            stopped += running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        first = await run(server, build)
        assert texts(await run(server, build)) == texts(first)
    assert stopped


async def test_who_lost_the_session_records_nothing_more(server: Server) -> None:
    """As a process that was stopped (SIGSTOP) past its lease, and goes on after another one has taken over."""

    async def program() -> None:
        async with DurableSession("s", nexum=server.address) as stopped:
            asking = named(client(model), "me")
            await asking.create([UserMessage(content="one", source="user")])
            await stopped.recorder.journal._owner.__aexit__()  # no sign of life from it any more
            async with DurableSession("s", nexum=server.address):
                again = named(client(model), "me")
                await again.create([UserMessage(content="one", source="user")])
                with pytest.raises(SessionBusy):
                    await asking.create([UserMessage(content="two", source="user")])
                await again.create([UserMessage(content="two", source="user")])

    with OpenAIServer(lambda _: answer("yes")) as model:
        with pytest.raises(SessionBusy, match="session s is not this process's any more"):
            await program()
        async with NexumClient(server.address) as nexum:
            record = await read_record(nexum, "s")
        assert [event.address for event in record.events if event.kind is Kind.REPLY] == ["me/reply/1", "me/reply/2"]
        assert not record.begun
        assert len(model.requests) == 2


async def test_a_finished_session_stays_finished_after_an_attempt_that_was_refused(server: Server) -> None:
    from durable_autogen import list_sessions

    def build(turns: int = 1) -> RoundRobinGroupChat:
        return RoundRobinGroupChat([agent(model, "one")], max_turns=turns)

    with OpenAIServer(lambda _: answer("yes")) as model:
        await run(server, build)
        with pytest.raises(DriftError):
            await run(server, build, "R")
        async with NexumClient(server.address) as nexum:
            (info,) = await list_sessions(nexum)
        assert info.status == "finished"
        with pytest.raises(DriftError, match="the recorded run was over"):
            await run(server, lambda: build(2))
        assert len(model.requests) == 1

"""Failures are recorded at once and raised again by a replay. Failures that ended a run are revoked."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import ExternalTermination, MaxMessageTermination, TimeoutTermination
from autogen_agentchat.messages import (
    ToolCallExecutionEvent,
)
from autogen_agentchat.teams import DiGraphBuilder, GraphFlow, RoundRobinGroupChat
from autogen_agentchat.tools import AgentTool, TeamTool
from autogen_core import CancellationToken
from autogen_core.models import ChatCompletionClient, UserMessage
from autogen_core.tools import FunctionTool, StaticWorkbench, ToolResult, ToolSchema, Workbench
from durable_agents import (
    TIMEOUT,
    Failing,
    Offline,
    Own,
    agent,
    answer,
    bench,
    client,
    is_after_a_tool,
    named,
    run,
    texts,
)
from openai_server import OpenAIServer, Reply
from server_thread import ServerThread

from durable_autogen import DurableSession, call_id
from durable_autogen.record.events import Kind, read_record
from durable_autogen.record.recorder import OnDrift
from nexum_engine import clock
from nexum_engine.client import NexumClient
from support.models.live import LiveModel


class Flaky(Exception):
    """An error of the model client."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(f"{why} ({status})")
        self.status = status


async def test_survived_failure_is_replayed(server: ServerThread) -> None:
    seen: list[tuple[type[BaseException], str, object]] = []

    class FailsTwice(LiveModel):
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
        own.llm = FailsTwice(vendor="v", model="m", base_url=model.base_url, api_key="k")  # type: ignore[attr-defined]
        return own

    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await run(server, build)
        live, seen[:] = list(seen), []
        assert live == [(Flaky, "busy (501)", 501), (Flaky, "busy (502)", 502)]
        assert texts(await run(server, build)) == texts(first)
        assert seen == live
        assert len(model.requests) == 1


async def test_failure_of_agent_tool_is_replayed(server: ServerThread) -> None:
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


async def test_failure_that_ended_run_is_retried_although_other_agents_continued(server: ServerThread) -> None:
    failing = True

    def reply(body: dict[str, Any]) -> Reply:
        if body["model"] == "b" and failing:
            return Reply(status=400)
        if body["model"] == "c" and not is_after_a_tool(body):
            return Reply(calls=[("slow", {})])
        return answer(body["model"])

    async def slow() -> str:
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
    assert asked.count("c") == 2  # c's second reply, recorded after b's failure, is kept
    assert asked.count("d") == 1


class EndsBadly(Workbench):
    """A custom workbench whose call raises an unusual exception."""

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
async def test_workbench_that_raises_anything_is_recorded_failure(server: ServerThread, error: BaseException) -> None:
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
    """An exception that doesn't derive from Exception."""


@pytest.mark.parametrize("error", [asyncio.CancelledError, Hopeless] if sys.version_info >= (3, 11) else [Hopeless])
async def test_custom_agent_that_raises_anything_ends_run_with_error(
    server: ServerThread, error: type[BaseException]
) -> None:
    async def ends(_: str) -> str:
        raise error

    with pytest.raises(RuntimeError, match=rf"one ended with {error.__name__}"):
        await run(server, lambda: RoundRobinGroupChat([Own("one", ends)], max_turns=1))


@pytest.mark.parametrize("error", [asyncio.CancelledError, Hopeless])
async def test_workbench_that_fails_to_list_tools_ends_run_with_error(
    server: ServerThread, error: type[BaseException]
) -> None:
    class Unlisted(StaticWorkbench):
        async def list_tools(self) -> list[ToolSchema]:
            raise error

    def build() -> RoundRobinGroupChat:
        return RoundRobinGroupChat([AssistantAgent("one", client(model), workbench=Unlisted([]))], max_turns=1)

    with OpenAIServer(lambda _: answer("yes")) as model:
        with pytest.raises(RuntimeError, match=rf"tools 1 of one ended with {error.__name__}"):
            await run(server, build)
        assert not model.requests


async def test_stop_iteration_of_tool_in_thread_is_recorded_failure(server: ServerThread) -> None:
    def look() -> str:
        return next(row for row in ("a", "b") if row == "c")

    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if is_after_a_tool(body) else Reply(calls=[("look", {})])

    with OpenAIServer(reply) as model:
        for _ in range(2):
            result = await run(server, lambda: agent(model, "one", [look]))
            (event,) = (m for m in result.messages if isinstance(m, ToolCallExecutionEvent))
            assert (event.content[0].is_error, "StopIteration" in event.content[0].content) == (True, True)
        assert len(model.requests) == 2


async def test_half_surrogate_pair_in_reply_is_replaced(server: ServerThread) -> None:
    with OpenAIServer(lambda _: Reply("a\ud83d")) as model:
        for _ in range(2):
            assert texts(await run(server, lambda: agent(model, "one")))[-1] == "a\ufffd"
        assert len(model.requests) == 1


class Caller(Own):
    """A custom agent that asks its model itself."""

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


async def test_survived_failure_is_kept_if_later_failure_has_same_text(server: ServerThread) -> None:
    broken = True

    async def falls_back(own: Caller) -> str:
        try:
            return await own.ask()
        except Offline:
            return "from the cache"

    def build() -> RoundRobinGroupChat:
        one = caller("one", Failing(model, "one", lambda: Offline("Connection error.")), falls_back)
        three = caller(
            "three", Failing(model, "three", lambda: Offline("Connection error.") if broken else None), Caller.ask
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


async def test_failure_raised_after_other_results_is_retried(server: ServerThread) -> None:
    failures = [Offline("no")]

    async def all_or_nothing(own: Caller) -> str:
        found = await asyncio.gather(*(own.ask(str(n)) for n in range(3)), return_exceptions=True)
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return " | ".join(map(str, found))

    def build() -> Caller:
        return caller("one", Failing(model, "m", lambda: failures.pop() if failures else None), all_or_nothing)

    with OpenAIServer(lambda _: answer("yes")) as model:
        with pytest.raises(Offline):
            await run(server, build)
        first = await run(server, build)
        assert texts(await run(server, build)) == texts(first)
        assert len(model.requests) == 3


async def test_agent_that_failed_while_others_continued_is_retried(server: ServerThread) -> None:
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
        b = caller("b", Failing(model, "b", lambda: Offline("busy") if broken else None), three_times)
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


async def test_failure_is_retried_although_other_branch_worked_longer(server: ServerThread) -> None:
    failures = [Offline("busy")]

    async def works(_: str) -> str:
        await asyncio.sleep(1.5)
        return "worked"

    def build() -> GraphFlow:
        b = caller("b", Failing(model, "b", lambda: failures.pop() if failures else None), Caller.ask)
        return fan([b, Own("c", works)], agent(model, "a"), agent(model, "d"))

    with OpenAIServer(lambda body: answer(body["model"])) as model:
        with pytest.raises(Exception, match="busy"):
            await run(server, build)
        first = await run(server, build)
        assert texts(await run(server, build)) == texts(first)
        assert sorted(request.body["model"] for request in model.requests) == ["a", "b", "d"]


async def test_finished_session_replays_failure_at_its_end(server: ServerThread) -> None:
    tried: list[int] = []

    def failing() -> Exception:
        tried.append(1)
        return Offline("no")

    async def program() -> str:
        async with DurableSession("s", nexum=server.address):
            llm = named(Failing(model, "m", failing), "one")
            with pytest.raises(Offline):
                await llm.create([UserMessage(content="one", source="user")])
        return "done"

    with OpenAIServer(lambda _: answer("yes")) as model:
        assert [await program(), await program()] == ["done", "done"]
    assert tried == [1]


async def test_programs_own_error_is_raised_unchanged(server: ServerThread) -> None:
    async def survives(own: Caller) -> str:
        try:
            return await own.ask()
        except TimeoutError:
            return "never mind"

    async def bug(_: str) -> str:
        raise ValueError("the real problem")

    def build() -> RoundRobinGroupChat:
        one = caller("one", Failing(model, "m", TimeoutError), survives)
        return RoundRobinGroupChat([one, agent(model, "two"), Own("three", bug)], max_turns=3)

    with OpenAIServer(lambda _: answer("yes")) as model:
        for _ in range(2):
            with pytest.raises(Exception, match="the real problem"):
                await run(server, build)
        assert len(model.requests) == 1


@pytest.mark.parametrize("is_team", [False, True])
async def test_error_that_ends_the_run_says_where_the_client_raised_it_and_why(
    server: ServerThread, is_team: bool
) -> None:
    class Faulty(LiveModel):
        async def create(self, *args: Any, **more: Any) -> Any:
            try:
                return self.choices({})
            except KeyError as error:
                raise LookupError("a bad answer") from error

        def choices(self, answer: dict[str, Any]) -> Any:
            return answer["choices"]

    one: Any = AssistantAgent("one", Faulty(vendor="v", model="m", base_url="http://localhost", api_key="k"))
    with pytest.raises(Exception, match="a bad answer") as caught:
        async with DurableSession("s", nexum=server.address, tell=lambda _: None):
            await (RoundRobinGroupChat([one], max_turns=1) if is_team else one).run(task="Q")
    error = caught.value.__cause__ if is_team else caught.value
    assert isinstance(error, LookupError)
    assert traceback.extract_tb(error.__traceback__)[-1].name == "create"
    assert isinstance(error.__cause__, KeyError)
    assert traceback.extract_tb(error.__cause__.__traceback__)[-1].name == "choices"


class Stated(Exception):
    """An error with its own constructor, status and text."""

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
async def test_replayed_failure_has_its_class(server: ServerThread, error: Exception) -> None:
    seen: list[tuple[str, object, object]] = []
    failures = [error]

    async def tries_again(own: Caller) -> str:
        try:
            return await own.ask()
        except type(error) as failed:
            seen.append((type(failed).__name__, getattr(failed, "status", None), getattr(failed, "errno", None)))
        return await own.ask()

    def build() -> Caller:
        return caller("one", Failing(model, "m", lambda: failures.pop() if failures else None), tries_again)

    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await run(server, build)
        assert texts(await run(server, build)) == texts(first)
        assert len(model.requests) == 1
    assert seen == [seen[0]] * 2


async def test_failure_in_team_tool_has_same_text_in_replay(server: ServerThread) -> None:
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


async def test_agents_with_same_name_keep_their_calls_separate(server: ServerThread) -> None:
    def note(text: str) -> str:
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


async def test_slow_branch_is_no_drift_if_killed_run_had_call_in_flight(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
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
            while not any(  # noqa: ASYNC110 - nothing sets an event
                event.kind is Kind.TURN and event.agent == "b" for event in (await read_record(nexum, "s")).events
            ):
                await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        stop = False
        hold.set()
        first = await run(server, build)
        assert texts(await run(server, build)) == texts(first)


async def test_timeout_ends_team_without_calls(server: ServerThread) -> None:
    async def waits(_: str) -> str:
        await asyncio.sleep(0.2)
        return "on"

    def build() -> RoundRobinGroupChat:
        limit = TimeoutTermination(0.7) | MaxMessageTermination(30)
        return RoundRobinGroupChat([Own("one", waits)], termination_condition=limit)

    first = await run(server, build)
    assert "Timeout of 0.7" in str(first.stop_reason)
    assert texts(await run(server, build)) == texts(first)


async def test_stop_during_replay_stops_live_part(server: ServerThread) -> None:
    stop = ExternalTermination()

    def build(turns: int) -> RoundRobinGroupChat:
        return RoundRobinGroupChat([agent(model, "one")], max_turns=turns, termination_condition=stop)

    with OpenAIServer(lambda _: answer("on")) as model:
        running = asyncio.ensure_future(run(server, lambda: build(50)))
        while len(model.requests) < 3:  # noqa: ASYNC110 - nothing sets an event
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


async def test_call_made_again_after_its_failure_keeps_its_id(server: ServerThread) -> None:
    ids: list[str] = []

    async def charge() -> str:
        ids.append(call_id())
        if len(ids) == 1:
            raise TimeoutError("the money may have moved")
        return "charged"

    async def program() -> Any:
        async with DurableSession("s", nexum=server.address):
            return await FunctionTool(charge, "Charge.").run_json({}, CancellationToken())

    with pytest.raises(TimeoutError):
        await program()
    assert await program() == "charged"
    assert await program() == "charged"
    assert len(ids) == 2
    assert ids[0] == ids[1] != ""


async def test_failure_that_a_task_kept_during_other_calls_is_retried_with_them(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.5)
    monkeypatch.setattr("durable_autogen.record.recorder.DRIFT_PATIENCE", 0.5)
    charges: list[str] = []
    notes: list[str] = []
    hung: list[str] = []

    async def look() -> str:
        return "seen"

    async def charge() -> str:
        charges.append(call_id())
        if len(charges) < 3:
            raise TimeoutError("the money may have moved")
        return "charged"

    async def hangs_once() -> str:
        hung.append(call_id())
        if len(hung) == 1:
            await asyncio.Event().wait()
        return "answered"

    async def note(number: int) -> str:
        notes.append(call_id())
        return f"noted {number}"

    async def call(one: Callable[..., Awaitable[str]], **arguments: int) -> Any:
        return await FunctionTool(one, "A tool.").run_json(arguments, CancellationToken())

    async def program() -> list[Any]:
        async with DurableSession("s", nexum=server.address):
            hanging = asyncio.create_task(call(hangs_once))
            both = await asyncio.gather(call(look), call(charge), return_exceptions=True)
            if any(isinstance(one, BaseException) for one in both):
                hanging.cancel()
            noted = [await call(note, number=1), await call(note, number=2)]
            for one in both:
                if isinstance(one, BaseException):
                    raise one
            return [*both, *noted, await hanging]

    for _ in range(2):
        with pytest.raises(TimeoutError):
            await program()
    for _ in range(2):
        assert await program() == ["seen", "charged", "noted 1", "noted 2", "answered"]
    assert len(charges) == 3
    assert len(notes) % 2 == 0
    assert len(hung) == 2
    for ids in (charges, notes[::2], notes[1::2], hung):
        assert len(set(ids)) == 1
        assert "" not in ids


async def test_waits_for_calls_that_may_depend_on_a_retried_failure_do_not_add_up(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.5)
    waits: list[tuple[float, float]] = []  # the beginning and the latest end of each wait
    wait_until_set = clock.wait_until_set

    async def observed(event: asyncio.Event, seconds: float) -> None:
        now = asyncio.get_running_loop().time()
        waits.append((now, now + seconds))
        await wait_until_set(event, seconds)

    monkeypatch.setattr("durable_autogen.record.replay.wait_until_set", observed)
    is_down = True
    notes: list[int] = []

    async def charge() -> str:
        if is_down:
            raise TimeoutError("no answer")
        return "charged"

    async def note(number: int) -> str:
        notes.append(number)
        return "noted"

    async def call(one: Callable[..., Awaitable[str]], **arguments: int) -> Any:
        return await FunctionTool(one, "A tool.").run_json(arguments, CancellationToken())

    async def program() -> Any:
        async with DurableSession("s", nexum=server.address):
            ends: Any = await asyncio.gather(call(charge), return_exceptions=True)
            for number in range(5):
                await call(note, number=number)
            if isinstance(ends[0], BaseException):
                raise ends[0]
            return ends[0]

    with pytest.raises(TimeoutError):
        await program()
    is_down = False
    assert await program() == "charged"
    assert notes == [*range(5), *range(5)]
    # Five waits that add up would take 2.5 s. One wait takes a little more than 0.5 s if the recorded calls were slow.
    assert max(end for _, end in waits) - min(begin for begin, _ in waits) < 4 * 0.5


async def test_other_tool_after_a_retried_failure_takes_the_place_of_a_call_that_was_cut_off(
    server: ServerThread,
) -> None:
    ids: list[str] = []
    began = asyncio.Event()

    async def first() -> str:
        if not ids:
            raise ConnectionError("offline")
        return "first"

    async def without_first() -> str:
        ids.append(call_id())
        began.set()
        await asyncio.Event().wait()  # the end of the run cuts it off
        return "never"

    async def after_first() -> str:
        ids.append(call_id())
        return "after first"

    async def call(one: Callable[[], Awaitable[str]]) -> Any:
        return await FunctionTool(one, "A tool.").run_json({}, CancellationToken())

    async def program() -> list[Any]:
        async with DurableSession("s", nexum=server.address):
            earlier = asyncio.create_task(call(first))
            await asyncio.wait({earlier})
            if earlier.exception() is not None:
                later = asyncio.create_task(call(without_first))
                await began.wait()
                earlier.result()  # raises the failure that the task has kept
                await later
            return [earlier.result(), await call(after_first)]

    with pytest.raises(ConnectionError):
        await program()
    for _ in range(2):
        assert await asyncio.wait_for(program(), TIMEOUT) == ["first", "after first"]
    assert len(set(ids)) == len(ids) == 2


async def test_cancelled_call_that_is_made_again_keeps_its_id(server: ServerThread) -> None:
    ids: list[str] = []
    gave_up = asyncio.Event()

    async def charge() -> str:
        ids.append(call_id())
        if len(ids) == 1:
            await asyncio.Event().wait()  # cancelled here: the money may have moved
        return "charged"

    async def look() -> str:
        return "seen"

    async def program() -> Any:
        async with DurableSession("s", nexum=server.address) as session:

            async def call(one: Callable[[], Awaitable[str]]) -> Any:
                return await FunctionTool(one, "A tool.").run_json({}, CancellationToken())

            async def pays() -> Any:
                with session.agent("clerk"), contextlib.suppress(asyncio.TimeoutError):
                    return await asyncio.wait_for(call(charge), 0.5)
                gave_up.set()
                return None

            async def looks() -> Any:
                with session.agent("scout"):
                    await gave_up.wait()
                    # The call of `look` records that `charge` was given up.
                    seen = await call(look)
                    if has_fault:
                        raise LookupError("this error of the program ends the run")
                    return seen

            return await asyncio.gather(pays(), looks())

    has_fault = True
    with pytest.raises(LookupError):
        await program()
    has_fault = False
    assert await program() == ["charged", "seen"]
    assert len(ids) == 2
    assert ids[0] == ids[1] != ""


async def test_call_of_another_program_gets_another_id(server: ServerThread) -> None:
    ids: list[str] = []

    async def charge(cents: int) -> str:
        ids.append(call_id())
        return "charged"

    async def program(cents: int, on_drift: OnDrift = "stop") -> None:
        async with DurableSession("s", nexum=server.address, on_drift=on_drift):
            await FunctionTool(charge, "Charge.").run_json({"cents": cents}, CancellationToken())

    await program(1)
    await program(2, "continue")
    await program(2)
    assert len(set(ids)) == len(ids) == 2

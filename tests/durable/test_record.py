"""What a session's record has to get right in its details: places, failures, counts, and what is left open."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent, UserProxyAgent
from autogen_agentchat.messages import BaseChatMessage, ModelClientStreamingChunkEvent, TextMessage
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_agentchat.tools import AgentTool
from autogen_core import CancellationToken, FunctionCall
from autogen_core.models import ChatCompletionClient, CreateResult, RequestUsage, UserMessage
from autogen_core.tools import FunctionTool, ToolResult
from durable_agents import TIMEOUT, Own, agent, answer, bench, client, is_after_a_tool, named, run, texts
from harness import Server, logged, nexum_server
from openai_server import OpenAIServer, Reply

from durable_autogen import DriftError, DurableSession, SessionBusy, fork_session, list_sessions, run_durable_stream
from durable_autogen.autogen.work import Asker
from durable_autogen.record.events import AGENT_EVENT, Call, GivenUp, Kind, Raised, Returned, read_record
from durable_autogen.record.failures import MAX_TEXT, Failure, RecordedFailure
from durable_autogen.record.journal import Journal
from durable_autogen.record.recorder import OnDrift
from nexum_engine.client import NexumClient, Started
from nexum_engine.owner import Owner
from nexum_engine.records import Task
from support.models.live import LiveModel

HOURS = 10_000.0  # seconds, for a patience that must not run out


def said(*texts: str) -> list[UserMessage]:
    return [UserMessage(content=text, source="user") for text in texts]


async def ask(llm: ChatCompletionClient, text: str = "Q") -> str:
    return str((await llm.create(said(text))).content)


class Offline(Exception):
    """What every failing client here says."""


class Failing(LiveModel):
    """Raises instead of asking, as long as it is told to."""

    def __init__(self, model: OpenAIServer, name: str, fails: Callable[[], Exception | None]) -> None:
        super().__init__(vendor="v", model=name, base_url=model.base_url, api_key="k")
        self.fails = fails

    async def create(self, *args: Any, **more: Any) -> Any:
        if (error := self.fails()) is not None:
            raise error
        return await super().create(*args, **more)


async def whole(program: Callable[[], Any]) -> Any:
    """Its result; it may not hang."""
    return await asyncio.wait_for(program(), TIMEOUT)


async def all_of(*asking: Any) -> list[Any]:
    """What all of them come to; raises what the first failed one has raised, but only when all have ended."""
    found = await asyncio.gather(*asking, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


# ---- Who survived a failure ------------------------------------------------------------------------------------------


async def test_whoever_an_agent_works_for_shows_that_its_failure_was_survived(server: Server) -> None:

    async def program() -> str:
        async with DurableSession("s", nexum=server.address):
            helper = named(Failing(model, "m", lambda: Offline("no")), "boss/helper")
            with pytest.raises(Offline):
                await ask(helper)
            first = await ask(named(client(model), "boss"))
            raise LookupError(first)  # so that the session is not finished

    with OpenAIServer(lambda _: answer("yes")) as model:
        with pytest.raises(LookupError) as live:
            await whole(program)
        with pytest.raises(LookupError) as again:
            await whole(program)
        assert str(again.value) == str(live.value)
        assert len(model.requests) == 1


async def test_an_agent_whose_name_only_begins_alike_says_nothing_of_a_failure(server: Server) -> None:
    broken = True

    async def program() -> list[Any]:
        async with DurableSession("s", nexum=server.address):
            fails = Failing(model, "worker", lambda: Offline("no") if broken and worked else None)
            worker, work = (
                named(fails, "worker"),
                named(client(model), "work"),
            )
            worked: list[str] = []
            worked.append(await ask(worker))

            async def works() -> str:
                first = await ask(work)
                await asyncio.sleep(0.05)  # its own
                return first + await ask(work)

            return await all_of(ask(worker), works())

    with OpenAIServer(lambda _: answer("yes")) as model:
        with pytest.raises(Offline):
            await whole(program)
        broken = False
        first = await whole(program)
        assert await whole(program) == first
        assert len(model.requests) == 4


async def test_survived_failure_is_kept_and_the_one_that_ended_the_run_is_called_again(server: Server) -> None:
    broken = True

    async def program() -> list[Any]:
        async with DurableSession("s", nexum=server.address):
            cache = named(Failing(model, "x", lambda: Offline("survived")), "cache")
            other = named(client(model), "other")
            ends = Failing(model, "z", lambda: Offline("ends the run") if broken else None)

            async def falls_back() -> str:
                with pytest.raises(Offline):
                    await ask(cache)
                await asyncio.sleep(0.05)  # work of its own
                return await ask(other)

            return await all_of(falls_back(), ask(named(ends, "ends")))

    with OpenAIServer(lambda _: answer("yes")) as model:
        with pytest.raises(Offline, match="ends the run"):
            await whole(program)
        broken = False
        first = await whole(program)
        assert await whole(program) == first
        assert len(model.requests) == 2


# ---- What is no drift, and what is -----------------------------------------------------------------------------------


async def test_the_programs_own_work_is_not_taken_from_the_patience_with_what_it_asks_next(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.5)

    async def program(*, more: bool) -> str:
        async with DurableSession("s", nexum=server.address):
            recorded, new = (named(client(model), name) for name in ("a", "b"))
            asking = []
            if more:
                await asyncio.sleep(1.2)  # work of its own, for longer than drift may take
                asking = [asyncio.ensure_future(ask(new))]
                await asyncio.sleep(0.05)
            found = await ask(recorded)
            await asyncio.gather(*asking)
            return found

    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await whole(lambda: program(more=False))
        assert await whole(lambda: program(more=True)) == first
        assert len(model.requests) == 2


async def test_what_no_run_has_asked_for_is_not_waited_for_as_what_was_in_flight(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.1)
    monkeypatch.setattr("durable_autogen.record.replay.TRIED_PATIENCE", HOURS)

    async def program(name: str) -> str:
        async with DurableSession("s", nexum=server.address):
            return await ask(named(client(model), name))

    with OpenAIServer(lambda _: answer("yes")) as model:
        await whole(lambda: program("a"))
        with pytest.raises(DriftError, match="nobody asked for it; the run asks for reply 1 of b"):
            await whole(lambda: program("b"))
        assert len(model.requests) == 1


async def test_a_program_that_goes_on_live_is_told_so_once(server: Server) -> None:
    lines: list[str] = []

    def build(system: str) -> RoundRobinGroupChat:
        return RoundRobinGroupChat([AssistantAgent("a", client(model), system_message=system)], max_turns=3)

    with OpenAIServer(lambda _: answer("yes")) as model:
        await run(server, lambda: build("Be brief."))
        changed = await run(server, lambda: build("Be long."), on_drift="continue", logs=lines)
        assert ["continues live from here" in line for line in lines].count(True) == 1
        assert texts(await run(server, lambda: build("Be long."))) == texts(changed)
        assert len(model.requests) == 6


async def test_a_replay_knows_where_its_session_went_on_as_another_program(server: Server) -> None:
    def build(system: str) -> RoundRobinGroupChat:
        one, other = client(model), client(model)
        return RoundRobinGroupChat(
            [AssistantAgent("a", one), AssistantAgent("b", other, system_message=system)], max_turns=3
        )

    with OpenAIServer(lambda _: answer("yes")) as model:
        before = await run(server, lambda: build("Be brief."))
        live = await run(server, lambda: build("Be long."), on_drift="continue")
        again = await run(server, lambda: build("Be long."))
        assert again.model_dump() == live.model_dump()
        ids, left = ([message.id for message in result.messages] for result in (live, before))
        assert [one == other for one, other in zip(ids, left, strict=True)] == [True, True, False, False]
        assert len(model.requests) == 5


async def test_a_failure_that_is_held_back_where_the_run_leaves_the_record_is_asked_again(server: Server) -> None:
    broken = True

    async def program(prompt: str, on_drift: OnDrift = "stop") -> list[Any]:
        async with DurableSession("s", nexum=server.address, on_drift=on_drift):
            failing = named(Failing(model, "x", lambda: Offline("no") if broken else None), "x")
            return await all_of(ask(failing), ask(named(client(model), "y"), prompt))

    with OpenAIServer(lambda _: answer("yes")) as model:
        with pytest.raises(Offline):
            await whole(lambda: program("1"))
        broken = False
        changed = await whole(lambda: program("2", "continue"))
        assert await whole(lambda: program("2")) == changed
        assert len(model.requests) == 3


async def test_a_session_that_went_on_after_its_end_is_not_finished(server: Server) -> None:
    broken = True

    def build(turns: int) -> RoundRobinGroupChat:
        return RoundRobinGroupChat([agent(model, "a")], max_turns=turns)

    def reply(_: dict[str, Any]) -> Reply:
        return Reply(status=400) if broken and len(model.requests) == 3 else answer("on")

    with OpenAIServer(reply) as model:
        await run(server, lambda: build(1))
        with pytest.raises(Exception, match="no usable answer"):
            await run(server, lambda: build(3), on_drift="continue")
        async with NexumClient(server.address) as nexum:
            assert [one.status for one in await list_sessions(nexum)] == ["stopped"]
        broken = False
        ended = await run(server, lambda: build(3))  # as the session's own run, and no drift from the first one
        assert len(ended.messages) == 4
        assert len(model.requests) == 4
        async with NexumClient(server.address) as nexum:
            assert [one.status for one in await list_sessions(nexum)] == ["finished"]


# ---- What is begun, and left -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", ["before the end", "during the end"])
async def test_what_was_begun_for_an_asker_that_gave_up_is_closed(
    server: Server, monkeypatch: pytest.MonkeyPatch, answers: str
) -> None:
    start = Owner.start
    begun, hold = asyncio.Event(), asyncio.Event()

    async def slow(self: Owner, workflow: Any, input: Any, **more: Any) -> Started:
        started = await start(self, workflow, input, **more)
        if getattr(input, "position", "") == "reply/0/tool/1":
            begun.set()  # on the server; its answer takes a while
            await hold.wait()
        return started

    ran: list[str] = []

    async def note() -> None:
        """Note."""
        ran.append("note")

    monkeypatch.setattr(Owner, "start", slow)
    loop = asyncio.get_running_loop()
    async with DurableSession("s", nexum=server.address):
        tool = FunctionTool(note, description="Note.")
        asking = asyncio.create_task(tool.run_json({}, CancellationToken()))
        await asyncio.wait_for(begun.wait(), TIMEOUT)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        if answers == "before the end":
            hold.set()
        else:
            loop.call_later(0.3, hold.set)
    async with NexumClient(server.address) as nexum:
        record = await read_record(nexum, "s")
    assert not record.begun
    (left,) = (event for event in record.events if event.kind is Kind.TOOL)
    assert isinstance(left.content, GivenUp)
    assert not ran


@asynccontextmanager
async def killed(server: Server) -> AsyncIterator[Journal]:
    """A journal whose process gives no sign of life any more at the end of the `with`."""
    async with NexumClient(server.address) as nexum, AsyncExitStack() as stack:
        journal = await stack.enter_async_context(Journal(nexum, "s"))
        yield journal
        await journal._owner.__aexit__()
        stack.pop_all()


@asynccontextmanager
async def next_run(server: Server) -> AsyncIterator[Journal]:
    """The journal of the run after it."""
    async with NexumClient(server.address) as nexum, Journal(nexum, "s") as journal:
        yield journal
        await journal.release()


REPLIES = [Call(Kind.REPLY, "a", f"reply/{number}") for number in range(1, 4)]
TOOL = Call(Kind.TOOL, "a", "reply/1/tool/1")


async def test_a_reply_is_recorded_in_one_round_trip_and_a_tool_call_is_begun(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    start, complete = NexumClient.start_execution, NexumClient.complete_task

    async def started(self: NexumClient, workflow: Any, input: Any, **more: Any) -> Started:
        sent.append(f"start {getattr(input, 'position', 'run')}")
        return await start(self, workflow, input, **more)

    async def completed(self: NexumClient, task_id: str, output_json: str, **more: Any) -> Task | None:
        sent.append("complete")
        return await complete(self, task_id, output_json, **more)

    monkeypatch.setattr(NexumClient, "start_execution", started)
    monkeypatch.setattr(NexumClient, "complete_task", completed)

    def note() -> str:
        """Note."""
        return "noted"

    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if is_after_a_tool(body) else Reply(calls=[("note", {})])

    with OpenAIServer(reply) as model:
        for session in ("registers the workflows", "s"):
            sent.clear()
            async with DurableSession(session.replace(" ", "-"), nexum=server.address):
                await agent(model, "a", [note]).run(task="Q")
    tool = ["start reply/1/tool/1", "complete"]
    assert sent == ["start run", "start begin", "start reply/1", *tool, "start reply/2", "complete"]


async def test_a_failure_at_the_end_of_a_killed_run_is_asked_again(server: Server) -> None:
    async with killed(server) as dead:
        await dead.record(REPLIES[0], Returned(value="yes"))
        assert await dead.before(REPLIES[1]) is None
        await dead.record(REPLIES[1], Raised(failure=Failure.of(Offline("no"))))
    async with next_run(server) as journal:
        assert [event.position for event in journal.events if event.kind is Kind.REPLY] == ["reply/1"]


async def test_a_failure_after_which_a_killed_run_made_another_call_is_kept(server: Server) -> None:
    async with killed(server) as dead:
        await dead.record(REPLIES[0], Raised(failure=Failure.of(Offline("no"))))
        assert await dead.before(REPLIES[1]) is not None, "its beginning shows that the run has survived the failure"
    async with killed(server) as again:
        assert [event.position for event in again.events] == ["reply/1"]
        assert await again.before(REPLIES[1]) is not None
    async with next_run(server) as journal:
        assert [event.position for event in journal.events] == ["reply/1"]
        assert journal.was_tried(REPLIES[1].address)
        # Recorded under the beginning that the dead runs left.
        await journal.record(REPLIES[1], Returned(value="yes"))
    async with NexumClient(server.address) as nexum:
        record = await read_record(nexum, "s")
    assert [event.position for event in record.events] == ["reply/1", "reply/2"]
    assert not record.begun


async def test_what_a_killed_run_was_asking_for_is_known_if_anything_was_recorded_meanwhile(server: Server) -> None:
    async with killed(server) as dead:
        for call in REPLIES:
            assert await dead.before(call) is None
        await dead.record(REPLIES[1], Returned(value="yes"))
        await dead.record(Call(Kind.TURN, "a", "turn/1"), Returned())
        assert await dead.before(TOOL) is not None
    async with next_run(server) as journal:
        tried = [call.position for call in (*REPLIES, TOOL) if journal.was_tried(call.address)]
        assert tried == ["reply/1", "reply/3", TOOL.position]
        assert [event.under_way for event in journal.events] == [["a/reply/1", "a/reply/3"], []]


async def test_the_server_is_asked_before_a_reply_is_paid_for_if_the_session_may_be_lost(server: Server) -> None:
    async with NexumClient(server.address) as nexum, Journal(nexum, "s") as hung:
        assert await hung.before(REPLIES[0]) is None
        await hung._owner.__aexit__()
        async with next_run(server):
            with pytest.raises(SessionBusy, match="is not this process's any more"):
                await hung.before(REPLIES[1])
            with pytest.raises(SessionBusy, match="is not this process's any more"):
                await hung.record(REPLIES[1], Returned(value="yes"))
    async with NexumClient(server.address) as nexum:
        assert not (await read_record(nexum, "s")).events


async def test_what_a_dead_run_had_begun_and_nobody_asked_for_again_says_so(server: Server) -> None:
    async with NexumClient(server.address) as nexum, Journal(nexum, "s") as dead:
        await dead.begin(Call(Kind.REPLY, "a", "reply/1"))
        await dead._owner.__aexit__()  # no sign of life from it any more
        async with Journal(nexum, "s") as journal:
            await journal.end("done", live={}, replayed={})
        (left,) = await nexum.list_executions(workflow_id=AGENT_EVENT.workflow_id, key_prefix="s/")
        assert left.error == "event: the run that asked for it died, and a later one did not ask again"


@pytest.mark.parametrize("when", ["between calls", "during a call", "before the end"])
async def test_a_run_goes_on_although_its_server_was_replaced_by_an_empty_one(tmp_path: Path, when: str) -> None:
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    lines: list[str] = []
    moved: list[bool] = []

    def reply(_: dict[str, Any]) -> Reply:
        if when == "during a call" and len(model.requests) == 2:
            replace()
        return answer("yes")

    def replace() -> None:
        moved.append(True)
        server.process.kill()
        stack.enter_context(nexum_server(folders[1], port=server.port))

    async def program() -> list[str]:
        async with DurableSession("s", nexum=server.address):
            llm = named(client(model), "a")
            first = await ask(llm)
            if when == "between calls" and not moved:
                replace()
            found = [first, await ask(llm), await ask(llm)]
            if when == "before the end" and not moved:
                replace()
            return found

    with ExitStack() as stack, OpenAIServer(reply) as model:
        server = stack.enter_context(nexum_server(folders[0]))
        with logged(lines):
            live = await whole(program)
        number = 3 if when == "before the end" else 1
        assert f"session s is unknown to this server: recording its {number} event(s) again" in lines
        async with NexumClient(server.address) as nexum:
            assert not (await read_record(nexum, "s")).begun
            assert [one.status for one in await list_sessions(nexum)] == ["finished"]
        assert await whole(program) == live
        assert len(model.requests) == 3


# ---- Places and prompts ----------------------------------------------------------------------------------------------


def replies(*asked: Sequence[tuple[str, str]]) -> Asker:
    """An agent whose replies have asked for these calls, each an id and a name."""
    found = Asker()
    for calls in asked:
        content = [FunctionCall(id=id, name=name, arguments="{}") for id, name in calls]
        usage = RequestUsage(prompt_tokens=0, completion_tokens=0)
        result = CreateResult(finish_reason="function_calls", content=content, usage=usage, cached=False)
        found.received(found.next("reply"), result, replayed=False)
    return found


@pytest.mark.parametrize(
    ("asked", "calls", "places"),
    [
        # Two of one name, made in the other order.
        ([[("1", "note"), ("2", "note")]], [("2", "note"), ("1", "note")], ["1/tool/2", "1/tool/1"]),
        # Ids that begin anew with each reply, and a call that nobody made.
        ([[("1", "note"), ("2", "look")], [("1", "note")]], [("1", "note"), ("2", "look")], ["2/tool/1", "1/tool/2"]),
        # No ids at all.
        ([[("", "look"), ("", "note"), ("", "note")]], [("", "note")] * 2, ["1/tool/2", "1/tool/3"]),
        ([[("1", "note"), ("2", "note")]], [(None, "note")] * 2, ["1/tool/1", "1/tool/2"]),
        ([[("", "note")], [("", "note")]], [("", "note")] * 2, ["2/tool/1", "1/tool/1"]),
        # An id that is another call's.
        ([[("1", "note"), ("1", "look")]], [("1", "look"), ("1", "note")], ["1/tool/2", "1/tool/1"]),
        # What no reply has asked for.
        ([[("1", "note")], [("1", "note"), ("2", "note")]], [("3", "look")] * 2, ["2/tool/3", "2/tool/4"]),
        ([], [("1", "look")] * 2, ["0/tool/1", "0/tool/2"]),
    ],
)
def test_a_tool_call_stands_with_the_reply_that_asked_for_it(
    asked: list[list[tuple[str, str]]], calls: list[tuple[str | None, str]], places: list[str]
) -> None:
    agents = replies(*asked)
    assert [agents.position_of_call(*call) for call in calls] == [f"reply/{place}" for place in places]


async def test_what_the_user_has_added_keeps_its_order_where_the_agent_forgets(server: Server) -> None:
    async def program(name: str) -> None:
        async with DurableSession(name, nexum=server.address):
            llm = named(client(model), "a")
            for prompt in (["1"], ["1", "2"], ["1", "2", "3"], ["4"]):
                await llm.create(said(*prompt))

    with OpenAIServer(lambda _: answer("yes")) as model:
        await whole(lambda: program("s"))
        async with NexumClient(server.address) as nexum:
            await fork_session(nexum, "s", 1, "f1", "A")
            await whole(lambda: program("f1"))
            await fork_session(nexum, "f1", 2, "f2", "B")
            await whole(lambda: program("f2"))
        prompts = ["".join(one["content"] for one in request.body["messages"]) for request in model.requests]
        assert prompts == [*("1", "12", "123", "4"), *("12A", "12A3", "4A"), *("12A3B", "4AB")]


async def test_what_the_user_has_added_is_said_to_another_program_from_its_beginning(server: Server) -> None:
    def build() -> RoundRobinGroupChat:
        return RoundRobinGroupChat([agent(model, "a")], max_turns=2)

    with OpenAIServer(lambda _: answer("yes")) as model:
        await run(server, build)
        async with NexumClient(server.address) as nexum:
            await fork_session(nexum, "s", 2, "f", "Shorter")
        changed = await run(server, build, "R", "f", on_drift="continue")
        heard = [[one["content"] for one in request.body["messages"]].count("Shorter") for request in model.requests]
        assert heard == [0, 0, 1, 1]
        assert texts(await run(server, build, "R", "f")) == texts(changed)
        assert len(model.requests) == 4


# ---- Counts ----------------------------------------------------------------------------------------------------------


async def test_what_was_paid_for_and_what_was_replayed_are_counted_apart(server: Server) -> None:
    def note() -> str:
        """Note it."""
        return "noted"

    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if is_after_a_tool(body) else Reply(calls=[("note", {}), ("note", {})])

    async def program() -> tuple[list[RequestUsage], str]:
        lines: list[str] = []
        async with AsyncExitStack() as stack:
            stack.enter_context(logged(lines))
            await stack.enter_async_context(DurableSession("s", nexum=server.address))
            user = UserProxyAgent("user", input_func=lambda _: "on")
            inner = client(model)
            one = AssistantAgent("one", inner, tools=[note], max_tool_iterations=3)
            team = RoundRobinGroupChat([one, user], max_turns=2)
            llm = one._model_client
            await team.run(task="Q")
            usage = [llm.actual_usage(), llm.total_usage()]
        return usage, lines[-1]

    with OpenAIServer(reply) as model:
        (paid, total), line = await whole(program)
        tokens = paid.prompt_tokens + paid.completion_tokens
        assert (paid == total, paid.prompt_tokens > 0, paid.completion_tokens > 0) == (True, True, True)
        did = f"2 model call(s) ({tokens} tokens), 2 tool call(s), 1 input(s)"
        did_not = "0 model call(s) (0 tokens), 0 tool call(s)"
        assert line == f"session s: {did} live, {did_not} replayed from the record"
        again, line = await whole(program)
        assert again == [paid, total]  # a program may decide by it: it is the same in a replay
        assert line == f"session s: {did_not} live, {did} replayed from the record"


# ---- Failures --------------------------------------------------------------------------------------------------------


async def test_a_failure_that_has_much_to_say_does_not_end_the_run(server: Server) -> None:
    async def program() -> list[str]:
        async with DurableSession("s", nexum=server.address):
            failing = Failing(model, "m", lambda: LookupError("x" * 20_000_000))
            with pytest.raises(LookupError) as raised:
                await ask(named(failing, "a"))
            found = await ask(named(client(model), "b"))
            return [found, str(raised.value)[:MAX_TEXT], str(raised.value)[MAX_TEXT:][:10]]

    with OpenAIServer(lambda _: answer("yes")) as model:
        live = await whole(program)
        assert await whole(program) == [*live[:2], " [cut]"]
        assert len(model.requests) == 1


class Plain(Exception):
    """Made with what it keeps."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text, status)
        self.status = status


class Stated(Exception):
    """Made with what it doesn't keep as its arguments."""

    def __init__(self, *, status: int) -> None:
        self.status = status

    def __str__(self) -> str:
        return f"status {self.status}"


class Kept(Exception):
    """Made with more than its arguments."""

    def __init__(self, text: str, *, status: int) -> None:
        super().__init__(text)
        self.status = status


class Caused(Exception):
    """Its text comes from what is not in it."""

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.__cause__}"


class Listed(Exception):
    """Its text comes from what is not plain."""

    status = 0

    def __init__(self, *whys: object) -> None:
        super().__init__(*whys)
        self.whys: list[object] = []

    def __str__(self) -> str:
        return f"for {len(getattr(self, 'whys', ()))} reasons"


class Final(Listed, LookupError):
    """The same, and nothing may be derived from it."""

    def __init_subclass__(cls) -> None:
        raise TypeError("nothing may be derived from it")


def caused() -> Caused:
    error = Caused("no")
    error.__cause__ = ValueError("why")
    return error


def with_whys(error: Listed) -> Listed:
    error.whys += ["a", "b"]
    error.status = 503
    return error


def changed(error: Plain) -> Plain:
    error.status = 504
    return error


def again(error: Exception) -> Exception:
    """As it is raised again from the record."""
    return Failure.model_validate_json(Failure.of(error).model_dump_json()).again()


@pytest.mark.parametrize(
    "error",
    [
        Plain("no", 503),
        changed(Plain("no", 503)),
        Stated(status=503),
        Kept("no", status=503),
        KeyError("x"),
        FileNotFoundError(2, "no such thing", "file"),
        json.JSONDecodeError("no", "text", 3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_recorded_failure_is_of_its_own_class(error: Exception) -> None:
    found = again(error)
    assert type(found) is type(error)
    assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))
    names = ("errno", "filename")
    assert [getattr(found, name, None) for name in names] == [getattr(error, name, None) for name in names]


@pytest.mark.parametrize(
    ("error", "base", "args"),
    [
        (with_whys(Listed("a")), Listed, ("a",)),
        (with_whys(Listed(object())), Listed, ("for 2 reasons",)),
        (with_whys(Final("a")), Listed, ("a",)),
        (caused(), Caused, ("no",)),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), UnicodeDecodeError, None),
    ],
    ids=["plain arguments", "other arguments", "final", "caused", "bytes"],
)
def test_a_failure_that_cant_be_made_again_is_of_a_class_like_its_own(
    error: Exception, base: type[Exception], args: tuple[object, ...] | None
) -> None:
    found = again(error)
    assert isinstance(found, base)
    assert (type(found).__name__, type(found).__module__) == (type(error).__name__, type(error).__module__)
    assert (str(found), found.args) == (str(error), args or (str(error),))
    assert getattr(found, "status", None) == getattr(error, "status", None)


def test_a_failure_whose_class_is_not_there_has_its_name_and_text() -> None:
    class Hidden(Exception):
        pass

    found = again(Hidden("no"))
    assert (type(found), str(found), found.args) == (Hidden, "no", ("no",))  # a function's own class is found, too
    for module, name in (("builtins", "print"), ("builtins", "int"), ("builtins", "SystemExit"), ("not.there", "Gone")):
        found = Failure(module=module, name=name, text="no", attributes={"status": 1}).again()
        assert isinstance(found, RecordedFailure)
        assert (type(found).__name__, str(found), vars(found)) == (name, "no", {"status": 1})


# ---- Within a recorded call ------------------------------------------------------------------------------------------


async def test_a_tool_that_a_tool_calls_is_part_of_its_result(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("durable_autogen.record.replay.DRIFT_PATIENCE", 0.1)
    noted = 0

    async def note() -> str:
        """Note it."""
        nonlocal noted
        noted += 1
        return f"noted {noted}"

    async def program() -> list[str]:
        async with DurableSession("s", nexum=server.address):

            async def outer() -> str:
                """Do it with others."""
                within = [await tools.call_tool("note", {})]
                helped = tools.call_tool_stream("helper", {"task": "help"})
                within += [item async for item in helped if isinstance(item, ToolResult)]
                return " | ".join(one.to_text() for one in within)

            tools = bench([outer, note, AgentTool(agent(model, "helper"))])
            return [(await tools.call_tool(name, {})).to_text() for name in ("outer", "note")]

    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await whole(program)
        assert first[0].startswith("noted 1 | helper: yes")
        assert first[1] == "noted 2"
        assert await whole(program) == first
        assert (noted, len(model.requests)) == (2, 1)


# ---- What messages are called ----------------------------------------------------------------------------------------


async def test_what_the_program_has_set_in_its_own_message_stays(server: Server) -> None:
    made = datetime(2020, 1, 2, tzinfo=timezone.utc)

    def build() -> AssistantAgent:
        return agent(model, "a")

    with OpenAIServer(lambda _: answer("yes")) as model:
        results = [
            await run(server, build, TextMessage(content="Q", source="alice", created_at=made, metadata={"k": "v"})),
            await run(server, build, TextMessage(content="Q", source="alice", created_at=made, metadata={"k": "v"})),
            await run(server, build, None),
        ]
        question = results[0].messages[0]
        assert (question.created_at, question.metadata) == (made, {"k": "v"})
        assert [one.model_dump() for one in results] == [results[0].model_dump()] * 3


async def test_a_piece_of_a_message_that_has_no_name_gets_none(server: Server) -> None:
    class Pieces(Own):
        async def on_messages_stream(
            self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken
        ) -> AsyncGenerator[Any, None]:
            yield ModelClientStreamingChunkEvent(content="y", source=self.name)
            yield await self.on_messages(messages, cancellation_token)

    async def yes(_: str) -> str:
        return "yes"

    stream = run_durable_stream(lambda: Pieces("own", yes), task="Q", session_id="s", nexum=server.address)
    pieces = [item async for item in stream if isinstance(item, ModelClientStreamingChunkEvent)]
    assert [(piece.content, piece.full_message_id) for piece in pieces] == [("y", None)]


class Streaming(LiveModel):
    """Streams what is not in its reply."""

    async def create_stream(self, *args: Any, **more: Any) -> AsyncGenerator[str | CreateResult, None]:
        for piece in ("hm", "so"):
            yield piece
        yield await self.create(*args, **more)


async def test_messages_have_the_same_names_again_where_fewer_pieces_announce_them(server: Server) -> None:
    def note() -> str:
        """Note it."""
        return "noted"

    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if is_after_a_tool(body) else Reply(calls=[("note", {})])

    def build() -> AssistantAgent:
        llm = Streaming(vendor="v", model="m", base_url=model.base_url, api_key="k")
        return AssistantAgent("one", llm, tools=[note], max_tool_iterations=3, model_client_stream=True)

    with OpenAIServer(reply) as model:
        live = await run(server, build)
        assert (await run(server, build)).model_dump() == live.model_dump()
        assert len(model.requests) == 2


# ---- Streams and exceptions of the program's own ---------------------------------------------------------------------


class InPieces(LiveModel):
    """Its stream begins with these pieces."""

    pieces: Sequence[str] = ()

    async def create_stream(self, *args: Any, **more: Any) -> AsyncGenerator[str | CreateResult, None]:
        for piece in self.pieces:
            yield piece
        yield await self.create(*args, **more)


@pytest.mark.parametrize("pieces", [("hm", "so"), ()])
@pytest.mark.parametrize("iterations", [1, 3])
async def test_messages_have_the_same_names_again_whatever_was_streamed(
    server: Server, pieces: Sequence[str], iterations: int
) -> None:
    def note() -> str:
        """Note it."""
        return "noted"

    def reply(_: dict[str, Any]) -> Reply:
        return answer("end") if len(model.requests) == 2 else Reply(calls=[("note", {})])

    def build() -> RoundRobinGroupChat:
        llm = InPieces(vendor="v", model="m", base_url=model.base_url, api_key="k")
        llm.pieces = pieces
        one = AssistantAgent("one", llm, tools=[note], max_tool_iterations=iterations, model_client_stream=True)
        return RoundRobinGroupChat([one], max_turns=2)

    with OpenAIServer(reply) as model:
        live = await run(server, build)
        assert (await run(server, build)).model_dump() == live.model_dump()


class Refused(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.headers: dict[str, str] = {}


class Refusing(LiveModel):
    async def create(self, *args: Any, **more: Any) -> Any:
        raise Refused("no")


async def test_what_a_failures_constructor_makes_is_there_again(server: Server) -> None:
    async def program() -> str:
        async with DurableSession("s", nexum=server.address):
            llm = Refusing(vendor="v", model="m", base_url=model.base_url, api_key="k")
            try:
                await named(llm, "a").create([UserMessage(content="Q", source="user")])
            except Refused as error:
                wait = error.headers.get("retry-after", "1")
            reply = await named(client(model), "b").create([UserMessage(content=wait, source="user")])
            return str(reply.content)

    with OpenAIServer(lambda _: answer("yes")) as model:
        first = await program()
        assert await program() == first

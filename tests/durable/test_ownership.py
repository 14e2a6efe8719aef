"""Ownership of a session by one run, and calls that a dead run had begun."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import CancellationToken
from autogen_core.models import UserMessage
from autogen_core.tools import FunctionTool
from durable_agents import (
    TIMEOUT,
    Offline,
    agent,
    answer,
    ask,
    client,
    is_after_a_tool,
    named,
    run,
    texts,
    whole,
)
from faulty_proxy import FaultyProxy
from harness import cancelled_at_each_await, logged, nexum_server
from openai_server import OpenAIServer, Reply
from proxy import DIRECTIONS, TO_SERVER
from server_thread import ServerThread

from durable_autogen import (
    NOT_DONE,
    Budget,
    DriftError,
    DurableSession,
    SessionBusy,
    call_id,
    durable_tool,
    list_sessions,
)
from durable_autogen.autogen.fingerprints import call_fingerprint
from durable_autogen.record.events import (
    AGENT_EVENT,
    Call,
    GivenUp,
    Kind,
    Mark,
    Raised,
    Returned,
    latest_run,
    read_record,
)
from durable_autogen.record.failures import Failure
from durable_autogen.record.journal import Journal
from nexum_engine.client import NexumClient, Started
from nexum_engine.owner import Owner
from nexum_engine.policy import Policy
from nexum_engine.records import Execution
from nexum_engine.workflow import Workflow


async def test_stopped_run_can_resume_at_once(server: ServerThread) -> None:
    """Wherever a run was stopped, the calls that it had begun don't block the next run."""

    def build() -> RoundRobinGroupChat:
        return RoundRobinGroupChat([agent(model, "one")], max_turns=20)

    stopped = 0
    with OpenAIServer(lambda _: answer("on")) as model:
        for _ in range(12):
            running = asyncio.ensure_future(run(server, build))
            seen = len(model.requests)
            while len(model.requests) < seen + 1 and not running.done():  # noqa: ASYNC110 - nothing sets an event
                await asyncio.sleep(random.random() * 0.01)
            stopped += running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        first = await run(server, build)
        assert texts(await run(server, build)) == texts(first)
    assert stopped


async def test_run_that_is_cancelled_again_and_again_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel scope of anyio cancels a task at each of its awaits, until the task has ended."""
    monkeypatch.chdir(tmp_path)  # the program opens the database itself
    monkeypatch.delenv("NEXUM_ADDRESS", raising=False)
    waiting = asyncio.Event()

    async def program() -> None:
        async with DurableSession("s"):
            waiting.set()
            await asyncio.Event().wait()

    running = asyncio.create_task(program())
    await waiting.wait()
    assert await cancelled_at_each_await(running) > 1
    lines: list[str] = []
    with logged(lines):
        async with DurableSession("s"):
            pass
    assert not [line for line in lines if "is in use by another run" in line]


class Late(Journal):
    """The journal of a process that looks for the session's latest run before other processes run the session."""

    def __init__(self, client: NexumClient, seen: Execution | None) -> None:
        super().__init__(client, "s")
        self.seen = [seen]

    async def __aenter__(self) -> Journal:
        with patch("durable_autogen.record.journal.latest_run", self._latest_run):
            return await super().__aenter__()

    async def _latest_run(self, client: NexumClient, session: str, *, status: str = "") -> Execution | None:
        return self.seen.pop() if self.seen else await latest_run(client, session, status=status)


async def failed_run(client: NexumClient) -> Execution | None:
    """Run the session once, and let the run record a reply and fail. Return the run as seen while it was under way."""
    async with Journal(client, "s") as journal:
        seen = await latest_run(client, "s")
        await journal.record(Call(Kind.REPLY, "", "reply/1"), Returned(value="yes"))
    return seen


async def test_process_that_saw_an_earlier_run_does_not_run_the_session_beside_a_later_one(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durable_autogen.record.journal.TAKE_OVER_PATIENCE", 0.3)
    async with NexumClient(server.address) as client:
        late = Late(client, await failed_run(client))
        async with Journal(client, "s"):
            with pytest.raises(SessionBusy, match="is being run"):
                await late.__aenter__()
            assert not late.seen


async def test_process_that_saw_an_earlier_run_does_not_keep_later_ones_from_the_session(server: ServerThread) -> None:
    async with NexumClient(server.address) as client:
        late = Late(client, await failed_run(client))
        for one in (Journal(client, "s"), late, Journal(client, "s")):
            async with one as journal:
                await journal.end()
        assert not late.seen


async def test_process_that_saw_no_run_reads_what_another_one_has_recorded(server: ServerThread) -> None:
    async with NexumClient(server.address) as client:
        await failed_run(client)
        async with Late(client, None) as late:
            assert [event.position for event in late.events] == ["reply/1"]


async def test_process_that_lost_session_records_nothing(server: ServerThread) -> None:
    """Simulate a process that SIGSTOP stops for longer than its lease, while another process takes over its session."""

    async def program() -> None:
        async with DurableSession("s", nexum=server.address) as stopped:
            asking = named(client(model), "me")
            await asking.create([UserMessage(content="one", source="user")])
            await stopped.recorder.journal.owner.__aexit__()  # this owner sends no more heartbeats
            async with DurableSession("s", nexum=server.address):
                again = named(client(model), "me")
                await again.create([UserMessage(content="one", source="user")])
                with pytest.raises(SessionBusy):
                    await asking.create([UserMessage(content="two", source="user")])
                await again.create([UserMessage(content="two", source="user")])

    with OpenAIServer(lambda _: answer("yes")) as model:
        with pytest.raises(SessionBusy, match="session s: another process has taken over"):
            await program()
        async with NexumClient(server.address) as nexum:
            record = await read_record(nexum, "s")
        assert [event.address for event in record.events if event.kind is Kind.REPLY] == ["me/reply/1", "me/reply/2"]
        assert not record.unfinished
        assert len(model.requests) == 2


async def test_process_that_lost_session_executes_no_tool(server: ServerThread, sent: list[str]) -> None:
    """The process doesn't notice that its connection is broken, while another process takes over its session."""
    ran: list[str] = []

    async def note(text: str) -> None:
        ran.append(text)

    tool = FunctionTool(note, description="Note.")

    async def program(proxy: FaultyProxy) -> None:
        async with DurableSession("s", nexum=proxy.address) as cut_off:
            with cut_off.agent("me"):
                await tool.run_json({"text": "one"}, CancellationToken())
            proxy.hold(*DIRECTIONS)
            proxy.break_connections(TO_SERVER)
            async with DurableSession("s", nexum=server.address) as again:
                with again.agent("me"):
                    await tool.run_json({"text": "one"}, CancellationToken())
                assert cut_off.recorder.journal.owner._heartbeat.is_holding, "it doesn't notice"
                requests = len(sent)
                with cut_off.agent("me"):
                    late = asyncio.create_task(tool.run_json({"text": "two, too late"}, CancellationToken()))
                while len(sent) == requests:  # noqa: ASYNC110 - nothing sets an event
                    await asyncio.sleep(0.01)
                proxy.release()
                with pytest.raises(SessionBusy):
                    await late
                with again.agent("me"):
                    await tool.run_json({"text": "two"}, CancellationToken())

    with FaultyProxy(server.address) as proxy, pytest.raises(SessionBusy, match="another process has taken over"):
        await program(proxy)
    assert ran == ["one", "two"]


WAITING = {
    "approval": {"approval": "always"},
    "retry": {"retry": {"max_attempts": 2, "first_delay_seconds": 0.01}},
    "once": {
        "retry": {"max_attempts": 2, "first_delay_seconds": 0.01},
        "effect": "once",
        "reconcile": lambda *_: NOT_DONE,
    },
}


@pytest.mark.parametrize("policy", WAITING.values(), ids=WAITING)
async def test_process_that_lost_session_while_its_call_waited_executes_no_tool(
    server: ServerThread, policy: dict[str, Any]
) -> None:
    """The call waits for a person or for a retry, while another process takes over the session and makes the call."""
    ran: list[str] = []
    has_failed, may_fail = asyncio.Event(), asyncio.Event()

    async def act() -> str:
        if "retry" in policy and not has_failed.is_set():
            has_failed.set()
            await may_fail.wait()
            raise Offline("no")
        ran.append("act")
        return "done"

    tool = durable_tool(FunctionTool(act, description="Act."), **policy)

    async def program(nexum: NexumClient) -> None:
        async with DurableSession("s", nexum=server.address) as former:
            with former.agent("me"):
                waiting = asyncio.create_task(tool.run_json({}, CancellationToken()))
            while not (has_failed.is_set() or await nexum.pending_approvals()):  # noqa: ASYNC110 - nothing sets an event
                await asyncio.sleep(0.01)
            await former.recorder.journal.owner.__aexit__()  # this owner sends no more heartbeats
            async with DurableSession("s", nexum=server.address) as again:
                with again.agent("me"):
                    asking = asyncio.create_task(tool.run_json({}, CancellationToken()))
                for question in await nexum.pending_approvals():
                    await nexum.approve(question.execution_id, question.node_id)
                assert await asking == "done"
                may_fail.set()
                with pytest.raises(SessionBusy):
                    await waiting

    async with NexumClient(server.address) as nexum:
        with pytest.raises(SessionBusy, match="another process has taken over"):
            await program(nexum)
    assert ran == ["act"]


async def test_finished_session_stays_finished_after_refused_run(server: ServerThread) -> None:
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


@pytest.mark.parametrize("answers", ["before the end", "during the end"])
async def test_begun_event_of_cancelled_caller_is_closed(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch, answers: str
) -> None:
    start = Owner.start
    begun, hold = asyncio.Event(), asyncio.Event()

    async def slow(self: Owner, workflow: Any, input: Any, **more: Any) -> Started:
        started = await start(self, workflow, input, **more)
        if getattr(input, "position", "") == "reply/0/tool/1":
            begun.set()  # the server has recorded that the call began: hold back the server's answer
            await hold.wait()
        return started

    ran: list[str] = []

    async def note() -> None:
        ran.append("note")

    monkeypatch.setattr(Owner, "start", slow)
    loop = asyncio.get_running_loop()
    async with DurableSession("s", nexum=server.address, policies={"note": Policy(timeout=TIMEOUT)}):
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
    assert not record.unfinished
    (left,) = (event for event in record.events if event.kind is Kind.TOOL)
    assert isinstance(left.content, GivenUp)
    assert not ran


@asynccontextmanager
async def killed(server: ServerThread) -> AsyncIterator[Journal]:
    """Yield a journal. At the end of the `with`, its heartbeats stop, as when its process is killed."""
    async with NexumClient(server.address) as nexum, AsyncExitStack() as stack:
        journal = await stack.enter_async_context(Journal(nexum, "s"))
        yield journal
        await journal.owner.__aexit__()
        stack.pop_all()


@asynccontextmanager
async def next_run(server: ServerThread) -> AsyncIterator[Journal]:
    """Yield the journal of the next run."""
    async with NexumClient(server.address) as nexum, Journal(nexum, "s") as journal:
        yield journal


REPLIES = [Call(Kind.REPLY, "a", f"reply/{number}") for number in range(1, 4)]
TOOL = Call(Kind.TOOL, "a", "reply/1/tool/1")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets a line for each request of the test's sessions."""
    lines: list[str] = []
    start, complete = NexumClient.start_execution, NexumClient.complete_task

    async def started(self: NexumClient, workflow: Any, input: Any, **more: Any) -> Started:
        lines.append(f"start {getattr(input, 'position', 'run')}")
        return await start(self, workflow, input, **more)

    async def completed(self: NexumClient, task_id: str, output_json: str, **more: Any) -> None:
        lines.append("complete")
        await complete(self, task_id, output_json, **more)

    monkeypatch.setattr(NexumClient, "start_execution", started)
    monkeypatch.setattr(NexumClient, "complete_task", completed)
    return lines


@pytest.mark.parametrize(
    ("options", "tool"),
    [
        ({}, ["start reply/1/tool/1"]),
        ({"policies": {"note": Policy(timeout=TIMEOUT)}}, ["start reply/1/tool/1", "complete"]),
        ({"budget": Budget(tool_calls={"note": 1})}, ["start reply/1/tool/1", "complete"]),
    ],
    ids=["plain", "policy", "budget"],
)
async def test_only_call_that_next_run_must_know_is_begun_first(
    server: ServerThread, sent: list[str], options: dict[str, Any], tool: list[str]
) -> None:
    def note() -> str:
        return "noted"

    def reply(body: dict[str, Any]) -> Reply:
        return answer("end") if is_after_a_tool(body) else Reply(calls=[("note", {})])

    with OpenAIServer(reply) as model:
        async with DurableSession("registers-the-workflows", nexum=server.address):
            await agent(model, "a", [note]).run(task="Q")
        sent.clear()
        async with DurableSession("s", nexum=server.address, **options):
            await agent(model, "a", [note]).run(task="Q")
    at = sent.index(tool[0])
    assert sent[at : at + len(tool)] == tool
    assert sent[:2] == ["start run", "start begin"]
    if not options:
        assert sent == ["start run", "start begin", "start reply/1", *tool, "start reply/2", "complete"]


async def test_simultaneous_calls_and_calls_without_agent_are_begun_first(
    server: ServerThread, sent: list[str]
) -> None:
    at_work: list[int] = []

    async def note(number: int) -> None:
        at_work.append(number)
        await asyncio.sleep(0)

    tool = FunctionTool(note, description="Note.")

    async def call(number: int) -> None:
        await tool.run_json({"number": number}, CancellationToken())

    async with DurableSession("registers-the-workflows", nexum=server.address):
        await call(0)
    sent.clear()
    async with DurableSession("s", nexum=server.address) as session:
        with session.agent("named"):
            await call(1)
            await asyncio.gather(call(2), call(3))
        await call(4)
    assert sorted(at_work) == [0, 1, 2, 3, 4]
    assert [line for line in sent if "tool" in line or line == "complete"] == [
        "start reply/0/tool/1",
        *["start reply/0/tool/2", "start reply/0/tool/3", "complete", "complete"],
        *["start reply/0/tool/1", "complete"],
        "complete",  # the run
    ]


async def test_simultaneous_calls_in_another_order_keep_their_ids_after_a_kill(server: ServerThread) -> None:
    ids: dict[str, str] = {}

    async def note(letter: str) -> None:
        ids[letter] = call_id()

    async with killed(server) as dead:
        begun = {
            letter: Call(Kind.TOOL, "", f"reply/0/tool/{number}", call_fingerprint("note", {"letter": letter}))
            for number, letter in enumerate("AB", 1)
        }
        for call in begun.values():
            await dead.begin(call)
        expected = {letter: dead.recorded.call_id_of(dead.session, call) for letter, call in begun.items()}
    tool = FunctionTool(note, description="Note.")
    async with DurableSession("s", nexum=server.address):
        await asyncio.gather(*(tool.run_json({"letter": letter}, CancellationToken()) for letter in "BA"))
    assert ids == expected


async def test_failure_at_end_of_killed_run_is_retried(server: ServerThread) -> None:
    async with killed(server) as dead:
        await dead.record(REPLIES[0], Returned(value="yes"))
        await dead.begin_if_needed(REPLIES[1])
        await dead.record(REPLIES[1], Raised(failure=Failure.of(Offline("no"))))
    async with next_run(server) as journal:
        assert [event.position for event in journal.events if event.kind is Kind.REPLY] == ["reply/1"]


async def test_failure_followed_by_call_of_killed_run_is_kept(server: ServerThread) -> None:
    async with killed(server) as dead:
        await dead.record(REPLIES[0], Raised(failure=Failure.of(Offline("no"))))
        await dead.begin_if_needed(REPLIES[1])  # its beginning shows that the run continued after the failure
    async with killed(server) as again:
        assert [event.position for event in again.events] == ["reply/1"]
        await again.begin_if_needed(REPLIES[1])
    async with next_run(server) as journal:
        assert [event.position for event in journal.events] == ["reply/1"]
        assert [one.position for one in journal.recorded.unfinished] == ["reply/2"]
        # The reply is recorded in the execution that the last dead run had begun.
        await journal.record(REPLIES[1], Returned(value="yes"))
    async with NexumClient(server.address) as nexum:
        record = await read_record(nexum, "s")
    assert [event.position for event in record.events] == ["reply/1", "reply/2"]
    assert not record.unfinished


async def test_begin_is_recorded_before_reply_if_session_may_be_lost(server: ServerThread) -> None:
    async with NexumClient(server.address) as nexum, Journal(nexum, "s") as hung:
        await hung.begin_if_needed(REPLIES[0])
        await hung.owner.__aexit__()
        async with next_run(server):
            with pytest.raises(SessionBusy, match="another process has taken over"):
                await hung.begin_if_needed(REPLIES[1])
            with pytest.raises(SessionBusy, match="another process has taken over"):
                await hung.record(REPLIES[1], Returned(value="yes"))
    async with NexumClient(server.address) as nexum:
        assert not (await read_record(nexum, "s")).events


async def test_begun_event_of_dead_run_fails_if_not_called_again(server: ServerThread) -> None:
    async with NexumClient(server.address) as nexum, Journal(nexum, "s") as dead:
        await dead.begin_if_needed(Call(Kind.REPLY, "a", "reply/1"), must_be_known=True)
        await dead.owner.__aexit__()  # this owner sends no more heartbeats
        async with Journal(nexum, "s") as journal:
            await journal.end()
        (left,) = await nexum.list_executions(workflow_id=AGENT_EVENT.workflow_id, key_prefix="s/")
        assert left.error == "event: the run that made this call died, and a later run did not make it again"


async def test_begun_event_of_another_version_is_refused_with_the_reason(server: ServerThread) -> None:
    async with NexumClient(server.address) as nexum, Journal(nexum, "s") as dead:
        # An earlier version recorded no digest.
        input = {"session": "s", "agent": "a", "position": "reply/1", "kind": "reply", "tool": ""}
        event = replace(AGENT_EVENT, input=None)
        await dead.under_this_run(dead.owner.start, event, input, idempotency_key="s/a/reply/1")
        await dead.owner.__aexit__()
        with pytest.raises(DriftError, match=r"an unfinished call of another version.*Continue .* with that version"):
            async with Journal(nexum, "s"):
                pass


@pytest.mark.parametrize("when", ["between calls", "during a call", "before the end"])
async def test_run_continues_after_server_is_replaced_by_empty_one(tmp_path: Path, when: str) -> None:
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
            assert not (await read_record(nexum, "s")).unfinished
            assert [one.status for one in await list_sessions(nexum)] == ["finished"]
        assert await whole(program) == live
        assert len(model.requests) == 3


CALLS = 3  # calls in parallel


async def test_parallel_calls_continue_after_server_is_replaced_by_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    done: list[int] = []
    asked: list[str] = []
    journals: list[Journal] = []
    recorded_again = asyncio.Event()
    start, record = Owner.start, Owner.record

    async def starts(owner: Owner, workflow: Workflow, input: Any, **options: Any) -> Started:
        if workflow is AGENT_EVENT and len(done) == 1:
            # The first of the parallel calls reaches the new server. Hold the other calls back until an event is
            # recorded there, as a slow reconnection would.
            asked.append(str(input))
            if len(asked) > 1:
                await recorded_again.wait()
        return await start(owner, workflow, input, **options)

    async def records(owner: Owner, workflow: Workflow, *args: Any, **options: Any) -> None:
        await record(owner, workflow, *args, **options)
        if asked and not recorded_again.is_set():
            recorded_again.set()
            # The other calls must wait until all events are recorded again. If a call doesn't wait, it has one second
            # to record its event too early.
            loop, events = asyncio.get_running_loop(), journals[-1].events
            end = loop.time() + 1
            while len(events) == 1 and loop.time() < end:  # noqa: ASYNC110 - nothing sets an event
                await asyncio.sleep(0.01)

    monkeypatch.setattr(Owner, "start", starts)
    monkeypatch.setattr(Owner, "record", records)

    async def note(number: int) -> str:
        """Note a number."""
        done.append(number)
        return f"{number} {random.random()}"

    async def program() -> list[str]:
        async with DurableSession("s", nexum=server.address) as session:
            journals.append(session.recorder.journal)
            tool = FunctionTool(note, "Note.")
            found = [await tool.run_json({"number": 0}, CancellationToken())]
            if len(done) == 1:
                server.process.kill()
                stack.enter_context(nexum_server(folders[1], port=server.port))
            calls = (tool.run_json({"number": number}, CancellationToken()) for number in range(1, CALLS + 1))
            return [*found, *await asyncio.gather(*calls)]

    with ExitStack() as stack:
        server = stack.enter_context(nexum_server(folders[0]))
        live = await whole(program)
        assert len(asked) >= CALLS
        assert await whole(program) == live
        assert sorted(done) == list(range(CALLS + 1))


async def test_record_that_is_read_while_a_long_call_ends_lacks_no_earlier_event(
    server: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexum_engine.client.PAGE", 1)
    async with NexumClient(server.address) as nexum, Journal(nexum, "s") as journal:
        await journal.begin(TOOL)
        await journal.record(REPLIES[0], Mark())
        list_executions, pages = nexum.list_executions, 0

        async def list_while_recording(**query: Any) -> list[Execution]:
            nonlocal pages
            pages += 1
            if pages == 2:  # the first page has the newest event, and the second one the tool's call
                await journal.record(REPLIES[1], Mark())
                await journal.record(TOOL, Mark())
                await journal.record(REPLIES[2], Mark())
            return await list_executions(**query)

        monkeypatch.setattr(nexum, "list_executions", list_while_recording)
        record = await read_record(nexum, "s")
        assert [event.seq for event in record.events] == [1, 2, 3]
        assert [event.seq for event in (await read_record(nexum, "s")).events] == [1, 2, 3, 4]

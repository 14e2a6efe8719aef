"""A session records `sleep` and `wait_for_event`, so a process may end while it waits."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import TaskResult
from autogen_agentchat.teams import DiGraphBuilder, GraphFlow, RoundRobinGroupChat
from durable_agents import Own, Scripted, asked, call, inside, new_session, run, session, texts, twice
from harness import Server, free_port, logged, nexum_server

from durable_autogen import (
    DriftError,
    DurableSession,
    NotDurable,
    current_session,
    fork_session,
    list_sessions,
    send_event,
)
from durable_autogen.__main__ import main
from durable_autogen.record import replay, waits
from durable_autogen.record.events import Event, Kind, Received, TimedOut, Waiting, read_record
from durable_autogen.record.sent_events import SENT_EVENT
from durable_autogen.recorded_sessions import show_session
from durable_autogen.session_report import details, events_as_json
from nexum_engine.client import NexumClient
from nexum_engine.errors import IdempotencyConflict, InvalidRequest, ServerUnavailable
from nexum_engine.records import ExecutionStatus

LONG = 3600.0  # seconds: longer than any test takes
SHORT = 0.3  # seconds


class Died(Exception):
    """An error that ends a run, so that its session stays unfinished."""


@pytest.fixture
async def client(shared_server: Server) -> AsyncIterator[NexumClient]:
    async with NexumClient(shared_server.address) as found:
        yield found


async def send(server: Server, session: str, name: str = "payment", payload: Any = None, key: str = "") -> None:
    await send_event(session, name, payload, idempotency_key=key, nexum=server.address)


async def recorded(client: NexumClient, session: str, kind: Kind) -> list[Event]:
    return [event for event in (await read_record(client, session)).events if event.kind is kind]


async def until_recorded(client: NexumClient, session: str, kind: Kind, count: int = 1) -> None:
    """Wait until the session has recorded `count` events of this kind."""
    give_up = time.monotonic() + 20
    while len(await recorded(client, session, kind)) < count:
        assert time.monotonic() < give_up, f"no {count} {kind.value} event(s) within 20 s"
        await asyncio.sleep(0.02)


async def cancelled_while_waiting(
    server: Server, client: NexumClient, name: str, program: Callable[[], Awaitable[Any]]
) -> None:
    """Run a program in a session. When the program waits, cancel it as Ctrl+C does."""
    running = asyncio.create_task(inside(server, program, name))
    await until_recorded(client, name, Kind.WAIT)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


# ---- Sleeping --------------------------------------------------------------------------------------------------------


async def test_sleep_is_never_early_and_takes_no_time_in_replay(shared_server: Server, client: NexumClient) -> None:
    name = new_session()
    slept = []

    async def program() -> None:
        before = time.time()
        await session().sleep(SHORT)
        slept.append(time.time() - before)

    await inside(shared_server, program, name)
    assert slept[0] >= SHORT
    (wait,) = await recorded(client, name, Kind.WAIT)
    (end,) = await recorded(client, name, Kind.SLEEP)
    assert isinstance(wait.content, Waiting)
    assert wait.content.until_ms is not None
    assert end.recorded_ms >= wait.content.until_ms

    async def longer() -> None:  # a replay that slept again would take an hour
        await session().sleep(LONG)

    await inside(shared_server, longer, name)


@pytest.mark.every_python
async def test_cancelled_sleep_ends_at_the_recorded_time_in_next_run(
    shared_server: Server, client: NexumClient
) -> None:
    name, logs = new_session(), list[str]()
    woke = []

    async def program(seconds: float) -> None:
        await session().sleep(seconds)
        woke.append(time.time())

    await cancelled_while_waiting(shared_server, client, name, lambda: program(1.0))
    (wait,) = await recorded(client, name, Kind.WAIT)
    assert isinstance(wait.content, Waiting)
    assert wait.content.until_ms is not None
    assert not woke
    await inside(shared_server, lambda: program(LONG), name, logs)
    assert woke[0] * 1000 >= wait.content.until_ms
    assert "sleep 1 of the program: the recorded time counts (1 s), not the program's new one (3600 s)" in logs
    assert [event.content for event in await recorded(client, name, Kind.WAIT)] == [wait.content]


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf, 1e12, "3", timedelta(hours=1)])
async def test_wrong_number_of_seconds_is_refused(shared_server: Server, seconds: Any) -> None:
    async def program() -> None:
        with pytest.raises(InvalidRequest, match="seconds must be a number from 0 to"):
            await session().sleep(seconds)
        with pytest.raises(InvalidRequest, match="timeout must be a number from 0 to"):
            await session().wait_for_event("payment", seconds)

    await inside(shared_server, program, new_session())


async def test_sleep_that_reads_the_clock_is_no_drift(shared_server: Server) -> None:
    end = time.time() + SHORT
    happened: list[str] = []

    async def program() -> str:
        await session().sleep(max(0.0, end - time.time()))
        return await asked(Scripted(happened))

    await twice(shared_server, program, happened)


@pytest.mark.every_python
async def test_sleep_given_up_by_the_program_is_given_up_in_replay(shared_server: Server) -> None:
    happened: list[str] = []

    async def program() -> str:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(session().sleep(LONG), SHORT)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(session().wait_for_event("never"), SHORT)
        return await asked(Scripted(happened))

    await twice(shared_server, program, happened)


async def test_graph_with_a_sleeping_agent_has_the_same_order_in_replay(
    shared_server: Server, client: NexumClient
) -> None:
    happened: list[str] = []
    name = new_session()
    dies = True

    async def sleepy(_: str) -> str:
        await current_session().sleep(SHORT)
        return "woke"

    async def talks(_: str) -> str:
        first = await asked(Scripted(happened, name="first"))
        if dies:
            await until_recorded(client, name, Kind.SLEEP)
        return f"{first} {await asked(Scripted(happened, name='second'))}"

    async def joins(said: str) -> str:
        if dies:
            raise Died
        return await asked(Scripted(happened, name="last"))

    def build() -> GraphFlow:
        begin, one, other, join = Own("begin", _begun), Own("sleepy", sleepy), Own("talks", talks), Own("joins", joins)
        graph = DiGraphBuilder()
        for agent in (begin, one, other, join):
            graph.add_node(agent)
        graph.add_edge(begin, one).add_edge(begin, other).add_edge(one, join).add_edge(other, join)
        return GraphFlow([begin, one, other, join], graph.build())

    with pytest.raises((Died, RuntimeError)):
        await run(shared_server, build, session=name)
    dies = False
    first = texts(await run(shared_server, build, session=name))
    assert texts(await run(shared_server, build, session=name)) == first
    assert happened == ["first", "second", "last"]


async def _begun(_: str) -> str:
    return "begun"


@pytest.mark.every_python
async def test_program_wakes_in_recorded_order(shared_server: Server, client: NexumClient) -> None:
    happened: list[str] = []
    name = new_session()

    async def program(*, is_first: bool) -> list[str]:
        log = []

        async def sleeps() -> None:
            with session().agent("sleepy"):
                await session().sleep(SHORT)
                log.append("woke")

        async def talks() -> None:
            with session().agent("talks"):
                log.append(await asked(Scripted(happened)))
                if is_first:
                    await until_recorded(client, name, Kind.SLEEP)
                log.append(await asked(Scripted(happened)))

        await asyncio.gather(sleeps(), talks())
        return log

    first = await inside(shared_server, lambda: program(is_first=True), name)
    assert first[1] == "woke"
    assert await inside(shared_server, lambda: program(is_first=False), name) == first
    assert len(happened) == 2


async def test_sleeping_branch_blocks_no_other_branch(shared_server: Server, client: NexumClient) -> None:
    happened: list[str] = []
    name = new_session()

    async def program(calls: int) -> list[str]:
        async def sleeps() -> None:
            with session().agent("sleepy"):
                await session().sleep(LONG)

        async def talks() -> list[str]:
            with session().agent("talks"):
                return [await asked(Scripted(happened)) for _ in range(calls)]

        sleeping = asyncio.create_task(sleeps())
        said = await talks()
        assert not sleeping.done()
        if calls == 2:
            raise Died
        return said

    with pytest.raises(Died):
        await inside(shared_server, lambda: program(2), name)
    # The sleep is not over, so its end is not recorded. The next run replays the branch `talks`, and continues it.
    said = await inside(shared_server, lambda: program(4), name)
    assert happened == ["model"] * 4
    assert await inside(shared_server, lambda: program(4), name) == said
    assert happened == ["model"] * 4


# ---- Waiting for events ----------------------------------------------------------------------------------------------


async def test_events_sent_early_are_received_in_order(shared_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    name = new_session()
    payloads = [{"amount": 990, "items": ["a", None, 1.5]}, "text", None]
    for payload in payloads:
        await send(shared_server, name, payload=payload)

    async def program() -> list[Any]:
        return [await session().wait_for_event("payment", LONG) for _ in payloads]

    assert await inside(shared_server, program, name) == payloads

    def asks(*_: Any, **__: Any) -> None:
        raise AssertionError("a replay asks the server for an event")

    monkeypatch.setattr(waits, "expect", asks)
    assert await inside(shared_server, program, name) == payloads


async def test_event_is_received_while_the_program_waits_and_told_once(
    shared_server: Server, client: NexumClient
) -> None:
    name, logs = new_session(), list[str]()

    async def program() -> Any:
        return await session().wait_for_event("payment")

    running = asyncio.create_task(inside(shared_server, program, name, logs))
    await until_recorded(client, name, Kind.WAIT)
    await send(shared_server, name, payload={"amount": 1})
    assert await running == {"amount": 1}
    command = f"python -m durable_autogen send --nexum {shared_server.address} {name} payment"
    assert [line for line in logs if "waiting for" in line] == [f"waiting for event 'payment' (send it: {command})"]


async def test_event_sent_while_no_process_runs_is_received_by_next_run(
    shared_server: Server, client: NexumClient
) -> None:
    name = new_session()

    async def program() -> Any:
        return await session().wait_for_event("payment", 1.0)

    await cancelled_while_waiting(shared_server, client, name, program)
    await send(shared_server, name, payload="in time")
    (wait,) = await recorded(client, name, Kind.WAIT)
    await _until_over(wait)
    assert await inside(shared_server, program, name) == "in time"  # the event was sent in time


async def _until_over(wait: Event) -> None:
    """Sleep until a recorded wait has reached its time limit."""
    assert isinstance(wait.content, Waiting)
    assert wait.content.until_ms is not None
    await asyncio.sleep(max(0.0, wait.content.until_ms / 1000 - time.time()) + 0.01)


@pytest.mark.every_python
async def test_timeout_is_not_extended_by_a_crash_and_replayed(shared_server: Server, client: NexumClient) -> None:
    name = new_session()

    async def program() -> Any:
        first = session().wait_for_event("payment", timeout)
        with pytest.raises(TimeoutError, match="no event 'payment' was sent within 1 s"):
            await first
        return await session().wait_for_event("payment", LONG)

    timeout = 1.0
    await cancelled_while_waiting(shared_server, client, name, program)
    (wait,) = await recorded(client, name, Kind.WAIT)
    await _until_over(wait)
    await send(shared_server, name, payload="late")
    timeout = LONG
    for _ in range(2):
        assert await inside(shared_server, program, name) == "late"  # the next wait for this name receives the event
    ends = [event.content for event in await recorded(client, name, Kind.SENT_EVENT)]
    assert isinstance(ends[0], TimedOut)
    assert ends[1] == Received(event="payment", number=1, payload="late")


async def test_event_in_time_is_received_although_the_servers_clock_is_ahead(
    shared_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = new_session()

    async def program() -> None:
        monkeypatch.setattr(waits, "time", SimpleNamespace(time=lambda: time.time() - 3600))
        await send(shared_server, name, payload=5)
        assert await session().wait_for_event("payment", 60) == 5

    await inside(shared_server, program, name)


async def test_timeout_that_ends_the_run_is_raised_again(shared_server: Server) -> None:
    name = new_session()

    async def program() -> Any:
        return await session().wait_for_event("payment", 0)

    for _ in range(2):
        with pytest.raises(TimeoutError, match="no event 'payment' was sent within 0 s"):
            await inside(shared_server, program, name)
        await send(shared_server, name)


async def test_event_with_one_key_is_received_once(shared_server: Server) -> None:
    name = new_session()

    async def program(count: int) -> list[Any]:
        return [await session().wait_for_event("payment", LONG) for _ in range(count)]

    await send(shared_server, name, payload=1, key="one")
    assert await inside(shared_server, lambda: program(1), name) == [1]
    await asyncio.gather(*(send(shared_server, name, payload=2, key="two") for _ in range(5)))
    await send(shared_server, name, payload=1, key="one")
    await send(shared_server, name, payload=3)
    with pytest.raises(IdempotencyConflict, match="idempotency key 'one' belongs to another event"):
        await send(shared_server, name, payload="another", key="one")
    assert await inside(shared_server, lambda: program(3), name) == [1, 2, 3]


@pytest.mark.every_python
async def test_parallel_waits_for_one_name_receive_one_event_each(shared_server: Server, client: NexumClient) -> None:
    name = new_session()
    count = 5

    async def program() -> list[Any]:
        async def branch(number: int) -> Any:
            with session().agent(f"branch{number}"):
                return await session().wait_for_event("payment", LONG)

        return await asyncio.gather(*map(branch, range(count)))

    running = asyncio.create_task(inside(shared_server, program, name))
    await until_recorded(client, name, Kind.WAIT, count)
    await asyncio.gather(*(send(shared_server, name, payload=number) for number in range(count)))
    first = await running
    assert sorted(first) == list(range(count))
    assert await inside(shared_server, program, name) == first


async def test_unnamed_branches_may_wait_for_names_in_another_order(shared_server: Server) -> None:
    name = new_session()
    await send(shared_server, name, "one", 1)
    await send(shared_server, name, "two", 2)

    async def program(order: list[str]) -> dict[str, Any]:
        found = await asyncio.gather(*(session().wait_for_event(one) for one in order))
        return dict(zip(order, found, strict=True))

    first = await inside(shared_server, lambda: program(["one", "two"]), name)
    assert first == {"one": 1, "two": 2}
    assert await inside(shared_server, lambda: program(["two", "one"]), name) == first


async def test_event_is_sent_again_with_the_key_of_the_error(
    shared_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, on_server = new_session(), NexumClient.send_event

    async def answer_is_lost(*args: Any, **options: Any) -> None:
        await on_server(*args, **options)
        raise ServerUnavailable("the server ended before it answered")

    with monkeypatch.context() as patched:
        patched.setattr(NexumClient, "send_event", answer_is_lost)
        with pytest.raises(ServerUnavailable) as caught:
            await send(shared_server, name, payload=1)
    found = re.search(r"give it the key (\w+) \(--key\)", str(caught.value))
    assert found is not None
    await send(shared_server, name, payload=1, key=found[1])
    await send(shared_server, name, payload=2)

    async def program() -> Any:
        return [await session().wait_for_event("payment") for _ in range(2)]

    assert await inside(shared_server, program, name) == [1, 2]


@pytest.mark.every_python
async def test_event_of_a_given_up_wait_is_kept(shared_server: Server) -> None:
    name = new_session()

    async def program() -> Any:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(session().wait_for_event("payment"), SHORT)
        await send(shared_server, name, payload="kept", key="k")
        return await session().wait_for_event("payment")

    for _ in range(2):
        assert await inside(shared_server, program, name) == "kept"


async def test_wait_survives_a_kill_of_the_server(tmp_path: Path) -> None:
    name, port = new_session(), free_port()

    async def program() -> Any:
        await session().sleep(SHORT)
        return await session().wait_for_event("payment")

    with nexum_server(tmp_path, port=port) as server:
        running = asyncio.create_task(inside(server, program, name))
        async with NexumClient(server.address) as client:
            await until_recorded(client, name, Kind.WAIT, 2)
        server.process.kill()
    assert not running.done()
    with nexum_server(tmp_path, port=port) as server:
        await send(server, name, payload="paid")
        assert await running == "paid"


async def test_finished_session_has_no_running_execution_and_can_be_pruned(
    shared_server: Server, client: NexumClient
) -> None:
    name = new_session()

    async def program() -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(session().wait_for_event("payment"), SHORT)
        with pytest.raises(TimeoutError):
            await session().wait_for_event("refund", SHORT)

    async def longer() -> Any:
        await program()
        return await session().wait_for_event("payment")

    await inside(shared_server, program, name)

    async def expected() -> list[ExecutionStatus]:
        found = await client.list_executions(workflow_id=SENT_EVENT.workflow_id, key_prefix=f"{name}/")
        return [execution.status for execution in found]

    assert await expected() == [ExecutionStatus.CANCELLED] * 2
    await send(shared_server, name, payload="later")
    assert await inside(shared_server, longer, name) == "later"
    pruned = await client.prune(older_than=0, session=name)
    assert (pruned.sessions, pruned.kept) == (1, 0)
    assert await expected() == []


async def test_fork_has_sent_events_of_its_own(shared_server: Server, client: NexumClient) -> None:
    name, fork = new_session(), new_session()

    async def program(count: int) -> list[Any]:
        return [await session().wait_for_event("payment", LONG) for _ in range(count)]

    await send(shared_server, name, payload="first")
    await send(shared_server, name, payload="second")
    assert await inside(shared_server, lambda: program(2), name) == ["first", "second"]
    await fork_session(client, name, 1, fork)
    await send(shared_server, fork, payload="of the fork")
    assert await inside(shared_server, lambda: program(2), fork) == ["first", "of the fork"]


async def test_another_event_than_recorded_is_drift(shared_server: Server) -> None:
    name = new_session()

    async def program(event: str) -> Any:
        return await session().wait_for_event(event, LONG)

    await send(shared_server, name, payload="paid")
    await send(shared_server, name, "refund", "refunded")
    assert await inside(shared_server, lambda: program("payment"), name) == "paid"
    with pytest.raises(DriftError, match=r"event 1 of the program is not .*: the event was payment, now it is refund"):
        await inside(shared_server, lambda: program("refund"), name)
    assert await inside(shared_server, lambda: program("refund"), name, on_drift="continue") == "refunded"
    # The run before dropped the event `payment`, so that the next wait for `payment` receives the event again.
    assert await inside(shared_server, lambda: program("payment"), name, on_drift="continue") == "paid"


async def test_program_that_does_not_sleep_any_more_is_drift(
    shared_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = new_session()
    happened: list[str] = []

    async def program(*, sleeps: bool) -> None:
        if sleeps:
            await session().sleep(0)
        await asked(Scripted(happened))

    await inside(shared_server, lambda: program(sleeps=True), name)
    monkeypatch.setattr(replay, "DRIFT_PATIENCE", 0.1)
    with pytest.raises(DriftError, match="sleep 1 of the program is next on record, but this run asks for"):
        await inside(shared_server, lambda: program(sleeps=False), name)


@pytest.mark.parametrize("method", ["sleep", "wait_for_event"])
async def test_wait_inside_a_tool_is_refused_in_words(shared_server: Server, method: str) -> None:
    happened: list[str] = []
    waiting = []

    async def tool() -> str:
        """Wait."""
        current = current_session()
        try:
            await (current.sleep(1) if method == "sleep" else current.wait_for_event("payment"))
        except NotDurable as error:
            waiting.append(str(error))
            raise
        return "waited"

    def build() -> RoundRobinGroupChat:
        script = Scripted(happened, [call("tool")])
        return RoundRobinGroupChat([AssistantAgent("one", script, tools=[tool])], max_turns=1)

    name = new_session()
    result: TaskResult = await run(shared_server, build, session=name)
    assert waiting == [
        f"{method} of session {name} can't be recorded inside a tool or another recorded call: "
        + ("use asyncio.sleep in the tool" if method == "sleep" else "return, and wait in the program or an agent")
    ]
    assert waiting[0] in texts(result)[-1]


async def test_waits_outside_a_session_are_refused(shared_server: Server) -> None:
    with pytest.raises(NotDurable, match="outside a session"):
        current_session()
    unopened = DurableSession(new_session(), nexum=shared_server.address)
    with pytest.raises(RuntimeError, match="the session is not open: use it inside"):
        await unopened.sleep(1)
    async with unopened:
        pass
    with pytest.raises(NotDurable, match="has ended"):
        await unopened.sleep(1)


async def test_wrong_names_and_payloads_are_refused(shared_server: Server) -> None:
    async def program() -> None:
        wrong: Any
        for wrong in ("a/b", 1):
            with pytest.raises(InvalidRequest, match=f"{wrong!r} is not an event's name"):
                await session().wait_for_event(wrong)

    await inside(shared_server, program, new_session())
    with pytest.raises(InvalidRequest, match="'' is not an event's name"):
        await send(shared_server, new_session(), "")
    wrong: Any
    for wrong in ("a/b", 4711):
        with pytest.raises(InvalidRequest, match=f"^{wrong!r} is not a session id: use a text of up to 64 letters"):
            await send(shared_server, wrong)
    with pytest.raises(InvalidRequest, match="the payload can't be written as JSON"):
        await send(shared_server, new_session(), payload=math.nan)
    with pytest.raises(InvalidRequest, match=r"the payload is .* bytes; the limit is 1,048,576 bytes"):
        await send(shared_server, new_session(), payload="x" * 1024 * 1024)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["s", "payment", "{"],
            "error: the payload is not valid JSON: EOF while parsing an object at line 1 column 1\n",
        ),
        (["a/b", "payment"], "error: 'a/b' is not a session id"),
        (["s", "a b"], "error: 'a b' is not an event's name"),
    ],
)
def test_command_send_refuses_wrong_arguments_in_words(
    shared_server: Server, capsys: pytest.CaptureFixture[str], arguments: list[str], error: str
) -> None:
    assert main(["send", "--nexum", shared_server.address, *arguments]) == 2
    assert capsys.readouterr().err.startswith(error)


def test_command_refuses_an_argument_that_is_not_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["send", "s", "payment", "--key", "caf\udce9"])
    assert r"error: the argument 'caf\udce9' is not text in UTF-8" in capsys.readouterr().err


def test_command_send_tells_that_a_session_has_not_begun(
    shared_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    name = new_session()
    command = ["send", "--nexum", shared_server.address, name, "payment", '"early"', "--key", "k"]
    sent = f"sent event 'payment' to session {name}"

    async def program() -> Any:
        return await session().wait_for_event("payment", 0)

    assert main(command) == 0
    assert capsys.readouterr().out == f"{sent}, which has not begun: the event is kept for it\n"
    assert asyncio.run(inside(shared_server, program, name)) == "early"
    assert main(command) == 0
    assert capsys.readouterr().out == f"{sent}\n"


# ---- Showing waits ---------------------------------------------------------------------------------------------------


async def test_reports_show_what_a_session_waits_for(shared_server: Server, client: NexumClient) -> None:
    name = new_session()

    async def program() -> None:
        await session().sleep(0)
        with contextlib.suppress(TimeoutError):
            await session().wait_for_event("refund", 0)
        await asyncio.gather(session().wait_for_event("payment"), session().sleep(SHORT))

    running = asyncio.create_task(inside(shared_server, program, name))
    await until_recorded(client, name, Kind.WAIT, 4)
    await until_recorded(client, name, Kind.SLEEP, 2)
    shown = await show_session(client, name)
    (wait,) = shown.info.waits
    assert wait.content == Waiting(event="payment")
    text = details(shown, wait.recorded_ms / 1000 + 120)
    assert "\n    the program waits for event 'payment' (began 2 min ago)\n" in text
    assert '"waits": [\n    {\n      "agent": "",\n' in events_as_json(shown)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    (info,) = [one for one in await list_sessions(client) if one.session == name]
    assert info.waits == (wait,)
    await send(shared_server, name, payload={"amount": 5})
    with logged([]):
        await inside(shared_server, program, name)
    shown = await show_session(client, name)
    assert shown.info.status == "finished"
    assert shown.info.waits == ()
    lines = details(shown, time.time()).splitlines()
    assert [line for line in lines if line.endswith("""end of event 2 of the program     'payment': {"amount": 5}""")]
    assert [line for line in lines if line.endswith("end of event 1 of the program     no event came in time")]
    assert sum(line.endswith("of the program     it is over") for line in lines) == 2

"""On asyncio and uvloop, a session's events are delivered when the session is idle, whatever else runs."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import importlib
import logging
import math
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar, cast

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import TaskResult
from autogen_agentchat.teams import DiGraphBuilder, GraphFlow
from autogen_agentchat.tools import AgentTool
from autogen_core import CancellationToken
from autogen_core.code_executor import CodeBlock, CodeExecutor, CodeResult
from autogen_core.memory import ListMemory, MemoryContent, MemoryMimeType, MemoryQueryResult
from autogen_core.models import UserMessage
from autogen_core.tools import FunctionTool, StaticWorkbench, TextResultContent, ToolResult, ToolSchema
from durable_agents import Own, Scripted, asked, call, inside, new_session, twice, word
from harness import ROOT, Server

from durable_autogen import DriftError, call_id, current_session
from durable_autogen.record import idle
from durable_autogen.record.events import Call, Event, EventInput, Kind, Returned
from durable_autogen.record.journal import Journal
from durable_autogen.record.place import OpenSession, current
from durable_autogen.record.replay import Replay
from nexum_engine.client import NexumClient

pytestmark = pytest.mark.every_python


T = TypeVar("T")
OnLoop = Callable[[Coroutine[Any, Any, T]], T]


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop. Each test runs on asyncio's loop, and then on uvloop's."""
    if request.param == "uvloop":
        uvloop = pytest.importorskip("uvloop", reason="uvloop isn't installed: there is none for Windows")
        found: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    else:
        found = asyncio.new_event_loop()
    yield found
    found.run_until_complete(found.shutdown_asyncgens())
    found.run_until_complete(found.shutdown_default_executor())
    found.close()


def test_session_does_not_wait_for_a_neighbours_busy_task(
    shared_server: Server, loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    happened: list[str] = []
    busy, over = asyncio.Event(), asyncio.Event()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while not over.is_set():
            ticks += 1
            busy.set()
            await asyncio.sleep(0)

    async def neighbour() -> None:
        await asyncio.create_task(tick())  # this task belongs to the session of `neighbour`

    async def program() -> list[str]:
        return [await asked(Scripted(happened)) for _ in range(10)]

    async def main() -> float:
        neighbours = [asyncio.create_task(inside(shared_server, neighbour, new_session())), asyncio.create_task(tick())]
        await busy.wait()
        before, begun = ticks, time.monotonic()
        await twice(shared_server, program, happened)
        seconds = time.monotonic() - begun
        assert ticks > before
        over.set()
        await asyncio.gather(*neighbours)
        return seconds

    with caplog.at_level(logging.WARNING, logger="durable_autogen"):
        assert loop.run_until_complete(main()) < idle.BUSY_PATIENCE
    assert "has been busy" not in caplog.text


@pytest.mark.parametrize("turns", [50, 1200])
def test_session_with_usual_work_in_a_slow_event_loop_is_not_taken_for_busy(
    shared_server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, turns: int
) -> None:
    async def slow() -> None:
        while True:
            time.sleep(0.002)  # noqa: ASYNC251 - other work of the loop, which makes each turn longer
            await asyncio.sleep(0)

    async def program() -> None:
        async def work() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        working = asyncio.create_task(work())
        await asked(Scripted([]))
        await working

    async def main() -> None:
        beside = asyncio.create_task(slow())
        await inside(shared_server, program, new_session())
        beside.cancel()

    monkeypatch.setattr(idle, "BUSY_PATIENCE", 0.05)
    with caplog.at_level(logging.WARNING, logger="durable_autogen"):
        asyncio.run(main())
    assert ("has been busy" in caplog.text) == (turns > idle.BUSY_TURNS)


def test_session_waits_for_its_work_in_threads(shared_server: Server, loop: asyncio.AbstractEventLoop) -> None:
    happened: list[str] = []

    async def program() -> list[str]:
        seen: list[str] = []
        both = asyncio.Event()

        async def answers() -> str:
            if happened.count("model") >= 2:
                both.set()
            await both.wait()
            return word()

        async def branch(name: str) -> None:
            await asked(Scripted(happened, answers))
            seen.append(f"{name} begins")
            await asyncio.to_thread(time.sleep, 0.05)  # work in a thread
            seen.append(f"{name} has worked")
            await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.02)
            await asked(Scripted(happened))
            seen.append(f"{name} ends")

        await asyncio.gather(branch("one"), branch("two"))
        return seen

    seen = loop.run_until_complete(twice(shared_server, program, happened))
    # The second branch's reply is delivered only when the first branch's work in its thread is over.
    first, second = seen[0].split()[0], seen[2].split()[0]
    assert first != second
    assert seen[:2] == [f"{first} begins", f"{first} has worked"]
    assert seen[2] == f"{second} begins"


def test_thread_that_makes_calls_in_the_sessions_loop_gets_their_results_at_once(
    shared_server: Server, loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    happened: list[str] = []

    async def program() -> list[str]:
        here = asyncio.get_running_loop()

        def ask_twice() -> list[str]:
            model = Scripted(happened)
            return [asyncio.run_coroutine_threadsafe(asked(model), here).result(30) for _ in range(2)]

        alone = await asyncio.to_thread(ask_twice)
        with ThreadPoolExecutor(1) as pool:  # the second function waits for the thread of the first one
            one, other = await asyncio.gather(*(here.run_in_executor(pool, ask_twice) for _ in range(2)))
        return [*alone, *one, *other]

    loop.run_until_complete(twice(shared_server, program, happened))
    assert "busy" not in caplog.text


def test_programs_own_executor_runs_its_functions_with_its_threads(
    shared_server: Server, loop: asyncio.AbstractEventLoop
) -> None:
    happened: list[str] = []
    held = threading.local()
    pool = ThreadPoolExecutor(6, "own", initializer=lambda: setattr(held, "connection", "open"))
    loop.set_default_executor(pool)
    together = threading.Barrier(6, timeout=10)

    def block() -> str:
        """Block until six calls of this function run at once."""
        together.wait()
        happened.append(threading.current_thread().name.partition("_")[0])
        return str(held.connection)

    async def program() -> Any:
        agent = AssistantAgent("a", Scripted(happened, [call("block") for _ in range(6)]), tools=[block])
        said = await agent.run(task="Q")
        return [said, await asyncio.to_thread(lambda: held.connection)]

    async def main() -> Any:
        found = await twice(shared_server, program, happened)
        after = await asyncio.to_thread(lambda: (threading.current_thread().name, held.connection))
        assert after[0].startswith("own")
        assert after[1] == "open"
        return found

    result, connection = loop.run_until_complete(main())
    assert happened == ["model", *["own"] * 6]
    assert [one["content"] for one in result["messages"][-2]["content"]] == ["open"] * 6
    assert connection == "open"


async def test_functions_may_share_a_context_of_the_program(shared_server: Server) -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="nobody")
    own, may_end = contextvars.copy_context(), threading.Event()
    own.run(name.set, "the program")

    def first() -> str:
        assert may_end.wait(10)
        return name.get()

    async def program() -> list[str]:
        with ThreadPoolExecutor(1) as pool:
            waiting = [pool.submit(partial(own.run, one)) for one in (first, name.get)]
            may_end.set()
            return [await asyncio.wrap_future(one) for one in waiting]

    assert await inside(shared_server, program, new_session()) == ["the program", "the program"]


def fan_out(happened: list[str]) -> GraphFlow:
    """Return a graph of three branches: one calls a streaming agent as a tool, one a function, one streams a reply."""

    def note() -> str:
        happened.append("noted")
        return word()

    def says(*script: Any) -> Scripted:
        """Return a slow model with this script."""

        async def late(content: Any) -> Any:
            await asyncio.sleep(random.random() * 0.01)
            return content

        return Scripted(happened, *(functools.partial(late, content) for content in (*script, word(), word())))

    deep = AssistantAgent("deep", says(), description="deep", model_client_stream=True)
    start, end = (AssistantAgent(name, says()) for name in ("start", "end"))
    slow = AssistantAgent("slow", says([call("deep", task="x")]), tools=[AgentTool(deep)])
    quick = AssistantAgent("quick", says([call("note")]), tools=[note], reflect_on_tool_use=True)
    third = AssistantAgent("third", says(), model_client_stream=True)
    graph = DiGraphBuilder()
    for node in (start, slow, quick, third, end):
        graph.add_node(node)
    for node in (slow, quick, third):
        graph.add_edge(start, node).add_edge(node, end)
    return GraphFlow(graph.get_participants(), graph.build())


def test_fan_out_with_a_streaming_agent_as_tool_replays_in_the_same_order(
    shared_server: Server, loop: asyncio.AbstractEventLoop
) -> None:
    happened: list[str] = []

    async def program() -> TaskResult:
        return await fan_out(happened).run(task="Q")

    async def main() -> None:
        for _ in range(6):
            await twice(shared_server, program, happened)
            assert sorted(happened) == ["model"] * 7 + ["noted"]

    loop.run_until_complete(main())


def test_agents_that_end_together_keep_order_of_plain_run(
    shared_server: Server, loop: asyncio.AbstractEventLoop
) -> None:
    """While an agent waits until the session is idle, no other agent gets ahead of it."""

    async def says(_: str) -> str:
        return "at once"

    def build() -> GraphFlow:
        members = [Own(name, says) for name in "abcde"]
        graph = DiGraphBuilder()
        for member in members:
            graph.add_node(member)
        for middle in members[1:-1]:
            graph.add_edge(members[0], middle).add_edge(middle, members[-1])
        return GraphFlow(list(members), graph.build())

    async def program() -> list[str]:
        return [message.source for message in (await build().run(task="Q")).messages]

    async def main() -> None:
        plain = await program()
        for _ in range(5):
            assert await inside(shared_server, program, new_session()) == plain

    loop.run_until_complete(main())


def test_agent_begins_before_the_next_event_is_delivered(
    shared_server: Server, loop: asyncio.AbstractEventLoop
) -> None:
    """An agent begins at once, as in a replay, even while another branch's reply is being recorded."""
    happened: list[str] = []

    async def program() -> list[str]:
        order: list[str] = []

        async def works(_: str) -> str:
            order.append("agent")
            return "done"

        async def branch(name: str) -> None:
            with current_session().agent(name):
                await asked(Scripted(happened))
                order.append(name)
                if name == "first":
                    await Own("worker", works).run(task="Q")

        await asyncio.gather(branch("first"), branch("second"))
        return order

    assert loop.run_until_complete(twice(shared_server, program, happened)) == ["first", "agent", "second"]


# ---- Threads of Python 3.14 ------------------------------------------------------------------------------------------

since_314 = pytest.mark.skipif(sys.version_info < (3, 14), reason="new in Python 3.14")


@since_314
async def test_thread_keeps_the_context_that_the_program_gave_it(shared_server: Server) -> None:
    asker: contextvars.ContextVar[str] = contextvars.ContextVar("asker", default="nobody")
    given, empty = contextvars.Context(), contextvars.Context()
    given.run(asker.set, "the program")
    seen: list[tuple[str, bool]] = []

    async def program() -> None:
        asker.set("the caller")
        for context in (given, empty):
            thread: Any = threading.Thread
            started = thread(target=lambda: seen.append((asker.get(), current.get() is not None)), context=context)
            started.start()
            await asyncio.to_thread(started.join)

    await inside(shared_server, program, new_session())
    assert seen == [("the program", True), ("nobody", True)]
    assert given.run(current.get) is None  # the session did not change the program's context


@since_314
async def test_pool_of_interpreters_runs_its_functions_in_a_session(shared_server: Server) -> None:
    futures: Any = importlib.import_module("concurrent.futures")

    async def program() -> float:
        with futures.InterpreterPoolExecutor(1) as pool:
            root: float = await asyncio.get_running_loop().run_in_executor(pool, math.sqrt, 4)
            return root

    assert await inside(shared_server, program, new_session()) == 2


@since_314
def test_pool_started_in_session_has_no_session_after_it(shared_server: Server) -> None:
    # The option thread_inherit_context lets a thread inherit its starter's context. In a free-threaded Python, this is
    # the default.
    code = """
        import asyncio, sys
        from concurrent.futures import ThreadPoolExecutor
        from durable_autogen import DurableSession
        from durable_autogen.record.place import current

        async def main(pool):
            async with DurableSession(sys.argv[2], nexum=sys.argv[1]):
                pool.submit(int).result()

        with ThreadPoolExecutor(1) as pool:
            asyncio.run(main(pool))
            print(pool.submit(current.get).result())
    """
    command = [sys.executable, "-X", "thread_inherit_context=1", "-c", textwrap.dedent(code)]
    done = subprocess.run(
        [*command, shared_server.address, new_session()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("None\n", 0), done.stderr


# ---- Simultaneous calls in another order -----------------------------------------------------------------------------


async def test_equal_calls_may_begin_in_another_order(shared_server: Server) -> None:
    happened: list[str] = []
    session, model = new_session(), Scripted(happened)

    async def ask(questions: str) -> dict[str, list[str]]:
        """Ask the questions, each a letter, at the same time; return the answers to each."""
        replies = await asyncio.gather(
            *(model.create([UserMessage(content=letter, source="user")]) for letter in questions)
        )
        answers: dict[str, list[str]] = {}
        for letter, reply in zip(questions, replies, strict=True):
            answers.setdefault(letter, []).append(str(reply.content))
        return answers

    first = await inside(shared_server, lambda: ask("XYY"), session)
    again = await inside(shared_server, lambda: ask("YYX"), session)
    assert (len(happened), again) == (3, first)
    with pytest.raises(DriftError, match="is not what this run asks for"):
        await inside(shared_server, lambda: ask("YYZ"), session)
    continued = await inside(shared_server, lambda: ask("YYZ"), session, on_drift="continue")
    assert await inside(shared_server, lambda: ask("ZYY"), session) == continued


class Bench(StaticWorkbench):
    """A workbench with one tool, which it lists after `listen`."""

    def __init__(self, tool: str, listen: Callable[[], Coroutine[Any, Any, None]]) -> None:
        super().__init__([])
        self.tool, self.listen = tool, listen

    async def list_tools(self) -> list[ToolSchema]:
        await self.listen()
        return [ToolSchema(name=self.tool)]

    async def ask(self) -> list[str]:
        return [tool["name"] for tool in await self.list_tools()]


class Remembers(ListMemory):
    """A memory with one text, which it remembers after `listen`."""

    def __init__(self, text: str, listen: Callable[[], Coroutine[Any, Any, None]]) -> None:
        super().__init__()
        self.text, self.listen = text, listen

    async def query(self, *_: Any, **__: Any) -> MemoryQueryResult:
        await self.listen()
        return MemoryQueryResult(results=[MemoryContent(content=self.text, mime_type=MemoryMimeType.TEXT)])

    async def ask(self) -> list[str]:
        return [str(one.content) for one in (await self.query("q")).results]


class Executor(CodeExecutor):
    """A code executor that prints its own name, after `listen`."""

    def __init__(self, name: str, listen: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.name, self.listen = name, listen

    async def execute_code_blocks(self, *_: Any, **__: Any) -> CodeResult:
        await self.listen()
        return CodeResult(exit_code=0, output=self.name)

    async def ask(self) -> list[str]:
        block = CodeBlock(code="print(name)", language="python")
        return [(await self.execute_code_blocks([block], CancellationToken())).output]

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def restart(self) -> None: ...


class ToolBench(Bench):
    """A workbench whose tool returns its name, after `listen`."""

    async def call_tool(self, *_: Any, **__: Any) -> ToolResult:
        await self.listen()
        return ToolResult(name="which", result=[TextResultContent(content=self.tool)])

    async def ask(self) -> list[str]:
        return [(await self.call_tool("which", {})).to_text()]


class AloneTool(ToolBench):
    """The same as a tool that the program calls without a workbench."""

    async def ask(self) -> list[str]:
        async def which() -> str:
            await self.listen()
            return self.tool

        return [await FunctionTool(which, "tells its name").run_json({}, CancellationToken())]


@pytest.mark.parametrize("kind", [Bench, Remembers, Executor, ToolBench, AloneTool])
async def test_call_cut_off_beside_an_equal_one_of_another_object_gets_its_own_result(
    shared_server: Server, kind: type[Bench] | type[Remembers] | type[Executor]
) -> None:
    session = new_session()

    async def program(*, is_up: bool) -> list[list[str]]:
        second_is_done = asyncio.Event()

        async def listen() -> None:
            if not is_up:
                await second_is_done.wait()
                raise ConnectionError("it is down")

        async def at_once() -> None: ...

        async def ask_second() -> list[str]:
            answer = await kind("b", at_once).ask()
            second_is_done.set()
            return answer

        return list(await asyncio.gather(kind("a", listen).ask(), ask_second()))

    with pytest.raises(ConnectionError):
        await inside(shared_server, lambda: program(is_up=False), session)
    assert await inside(shared_server, lambda: program(is_up=True), session) == [["a"], ["b"]]
    assert await inside(shared_server, lambda: program(is_up=False), session) == [["a"], ["b"]]


@pytest.mark.parametrize("kind", [Bench, Remembers, Executor, ToolBench])
async def test_equal_calls_of_two_objects_may_begin_in_another_order(
    shared_server: Server, kind: type[Bench] | type[Remembers] | type[Executor]
) -> None:
    session, asked = new_session(), []

    async def ask(order: str) -> list[str]:
        async def at_once() -> None:
            asked.append(order)

        objects = {name: kind(name, at_once) for name in order}
        return [
            answer for answers in await asyncio.gather(*(objects[name].ask() for name in order)) for answer in answers
        ]

    assert await inside(shared_server, lambda: ask("aba"), session) == ["a", "b", "a"]
    assert sorted(await inside(shared_server, lambda: ask("baa"), session)) == ["a", "a", "b"]
    assert len(asked) == 3


async def test_cut_off_equal_calls_of_two_objects_keep_their_ids_in_another_order(shared_server: Server) -> None:
    session, ids, is_up = new_session(), list[str](), False

    async def ask(order: str) -> None:
        async def listen() -> None:
            ids.append(call_id())
            if not is_up:
                await asyncio.sleep(0.01 if len(ids) == len(order) else 60)
                raise ConnectionError("it is down")

        objects = {name: ToolBench(name, listen) for name in order}
        await asyncio.gather(*(objects[name].ask() for name in order))

    with pytest.raises(ConnectionError):
        await inside(shared_server, lambda: ask("aba"), session)
    is_up, before, ids = True, ids, []
    await inside(shared_server, lambda: ask("baa"), session)
    assert sorted(ids) == sorted(before)


async def test_drift_of_agents_with_one_name_that_start_in_another_order_says_what_to_do(shared_server: Server) -> None:
    session, model = new_session(), Scripted([])

    async def ask(questions: str) -> None:
        await asyncio.gather(*(AssistantAgent("a", model).run(task=letter) for letter in questions))

    await inside(shared_server, lambda: ask("XY"), session)
    with pytest.raises(DriftError, match="give them different names"):
        await inside(shared_server, lambda: ask("YX"), session)


@pytest.mark.parametrize(("first", "then"), [("XY", "YX"), ("XYY", "YYX"), ("YXX", "XXY")])
async def test_given_up_calls_may_begin_in_another_order(shared_server: Server, first: str, then: str) -> None:
    happened: list[str] = []

    async def hangs() -> str:
        await asyncio.Event().wait()
        return "never"

    async def ask(questions: str) -> list[str]:
        """Ask the questions at the same time. The last `Y` gets no answer: the program gives it up."""

        async def one(number: int, letter: str) -> str:
            is_last_y = letter == "Y" and "Y" not in questions[number + 1 :]
            model = Scripted(happened, *([hangs] if is_last_y else [f"answer to {letter}"]))
            question = model.create([UserMessage(content=letter, source="user")])
            try:
                return str((await asyncio.wait_for(question, 0.6)).content)
            except asyncio.TimeoutError:
                return f"gave {letter} up"

        return sorted(await asyncio.gather(*(one(*each) for each in enumerate(questions))))

    session = new_session()
    answers = await inside(shared_server, lambda: ask(first), session)
    assert await inside(shared_server, lambda: ask(then), session) == answers
    assert "gave Y up" in answers
    assert len(happened) == len(first)


def positions_of(recorded: str, begun: str, asked_for: str) -> list[int]:
    """Return the positions that a replay gives to a tool's calls.

    Each call is a letter. `recorded` and `begun` have the calls at positions 1, 2, ..., with and without a result; a
    dot is no call. `asked_for` has the calls that the program makes.
    """

    def one(number: int, letter: str) -> Call:
        return Call(Kind.TOOL, "a", f"reply/1/tool/{number}", {"tool": "t", "hash": letter})

    journal = Journal(NexumClient("127.0.0.1:1"), "s")
    for number, letter in enumerate(recorded, 1):
        if letter != ".":
            made = one(number, letter)
            event = Event(
                seq=number,
                kind=made.kind,
                agent=made.agent,
                position=made.position,
                content=Returned(),
                request=dict(made.request),
            )
            journal.events.append(event)
    for number, letter in enumerate(begun, 1):
        if letter != ".":
            made = one(number, letter)
            input = EventInput(
                session="s", kind=made.kind, agent="a", position=made.position, tool="t", digest=made.digest
            )
            journal.recorded.unfinished.append(input)
    replay = Replay(journal, cast(OpenSession, None))
    found = [replay.matching(one(number, letter)) for number, letter in enumerate(asked_for, 1)]
    return [int(call.position.rpartition("/")[2]) for call in found]


@pytest.mark.parametrize(
    ("recorded", "begun", "asked_for", "positions"),
    [
        ("AB", "", "BA", [2, 1]),
        ("", "AB", "BA", [2, 1]),
        ("A", ".B", "BA", [2, 1]),
        ("A.C", ".B", "CBA", [3, 2, 1]),
        (".AB", "", "BAC", [3, 2, 1]),
        ("AB", "", "BCA", [2, 1, 3]),
        ("", "A", "BA", [1, 2]),
        ("AA", "..A", "AAA", [1, 2, 3]),
    ],
)
async def test_simultaneous_tool_calls_get_the_positions_that_they_had(
    recorded: str, begun: str, asked_for: str, positions: list[int]
) -> None:
    assert positions_of(recorded, begun, asked_for) == positions


async def test_two_calls_never_get_one_position() -> None:
    draw = random.Random(5)
    for _ in range(1000):
        recorded = "".join(draw.choices("ABC.", k=5))
        begun = "".join("." if letter != "." else draw.choice("ABC.") for letter in recorded)
        asked_for = "".join(draw.choices("ABCD", k=8))
        positions = positions_of(recorded, begun, asked_for)
        assert len(set(positions)) == len(positions), (recorded, begun, asked_for)

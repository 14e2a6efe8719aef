"""Connections and processes that are not recorded are reported with their agent and target, or prevented."""

from __future__ import annotations

import asyncio
import ctypes.util
import io
import multiprocessing
import os
import platform
import re
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import TaskResult
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import CancellationToken
from autogen_core.tools import FunctionTool
from durable_agents import Own, Scripted, agent, asked, call, inside, new_session, run, texts, twice, word
from harness import Server, nexum_server
from openai_server import OpenAIServer, Reply
from web_servers import LoopbackServer, page

from durable_autogen import DurableSession, NotDurable
from durable_autogen.autogen import entry_points
from nexum_engine import security

pytestmark = pytest.mark.every_python


class World:
    """The outside world of a program: a web server, and a file that a process writes."""

    def __init__(self, web: LoopbackServer, file: Path) -> None:
        self.web, self.file = web, file
        self.url = f"http://127.0.0.1:{web.port}/"
        self.command = [sys.executable, "-c", "import sys; open(sys.argv[1], 'a').write('x')", str(file)]

    @property
    def touched(self) -> int:
        return self.web.connections + (len(self.file.read_text()) if self.file.exists() else 0)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with LoopbackServer({"/": page("hello")}) as web:
        yield World(web, tmp_path / "written")


async def by_httpx(world: World) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        await client.get(world.url)


async def by_urllib_in_a_thread(world: World) -> None:
    def get() -> None:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(world.url).close()

    await asyncio.to_thread(get)


async def by_a_stream(world: World) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.web.port)
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    await reader.read()  # by now, the server has counted the connection
    writer.close()
    await writer.wait_closed()


async def by_a_process(world: World) -> None:
    subprocess.run(world.command, check=True)  # noqa: ASYNC221 - users' programs may block the loop, too


async def by_an_asynchronous_process(world: World) -> None:
    process = await asyncio.create_subprocess_exec(*world.command)
    assert await process.wait() == 0


Way = Callable[[World], Awaitable[None]]
WAYS = [by_httpx, by_urllib_in_a_thread, by_a_stream, by_a_process, by_an_asynchronous_process]


def target(way: Way, world: World) -> str:
    return f"started {sys.executable} -c" if "process" in way.__name__ else f"connected to 127.0.0.1:{world.web.port}"


def about_outside(lines: list[str]) -> list[str]:
    return [line for line in lines if "outside the record" in line]


@pytest.mark.parametrize("way", WAYS)
async def test_connection_is_reported_once_and_in_summary(shared_server: Server, world: World, way: Way) -> None:
    lines: list[str] = []
    named: list[list[str]] = []

    async def act(_: str) -> str:
        for _turn in range(2):
            await way(world)
            named.append(about_outside(lines))
        return word()

    async def program() -> TaskResult:
        return await RoundRobinGroupChat([Own("reporter", act)], max_turns=1).run(task="Q")

    await inside(shared_server, program, new_session(), logs=lines)
    assert world.touched == 2
    (line,) = named[0]
    assert named[1] == [line]
    assert line.startswith(f"reporter {target(way, world)}")
    assert line.endswith("outside the record: a re-run does it again, unless you make it a tool")
    summary = about_outside(lines)[1:]
    assert len(summary) == 1
    assert f"outside the record: reporter {target(way, world)}" in summary[0]
    assert summary[0].endswith("times)" if "process" in way.__name__ else "(2 times)")


@pytest.mark.parametrize("way", WAYS)
async def test_on_unrecorded_stop_prevents_connection_outside_record(
    shared_server: Server, world: World, way: Way
) -> None:
    async def act(_: str) -> str:
        await way(world)
        return word()

    async def survives(_: str) -> str:
        try:
            return await act("")
        except Exception:  # noqa: BLE001 - the run must end although its agent catches the error
            return word()

    for acting in (act, survives):
        with pytest.raises(NotDurable, match=f"reporter {re.escape(target(way, world))}.*on_unrecorded='stop'"):
            await run(shared_server, lambda: Own("reporter", acting), session=new_session(), on_unrecorded="stop")  # noqa: B023
    assert world.touched == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Python asks Windows without a process")
async def test_process_by_which_python_describes_the_machine_is_not_reported(shared_server: Server) -> None:
    started: list[object] = []
    lines: list[str] = []

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "subprocess.Popen" and is_watching:
            started.append(arguments[1])

    async def program() -> None:
        platform.architecture()
        ctypes.util.find_library("c")

    is_watching = True
    sys.addaudithook(hook)
    await inside(shared_server, program, new_session(), logs=lines, on_unrecorded="stop")
    is_watching = False
    assert started
    assert not about_outside(lines)


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
async def test_process_of_multiprocessing_is_reported(shared_server: Server, method: str) -> None:
    context = multiprocessing.get_context(method)
    started: list[int | None] = []
    lines: list[str] = []

    async def program() -> None:
        for _ in range(2):
            process: Any = context.Process(target=os.getpid)  # type: ignore[attr-defined]
            process.start()
            await asyncio.to_thread(process.join, 60)
            started.append(process.exitcode)

    await inside(shared_server, program, new_session(), logs=lines)
    assert started == [0, 0]
    told, summary = about_outside(lines)
    did = "the program started a process with multiprocessing"
    assert told == f"{did} outside the record: a re-run does it again, unless you make it a tool"
    assert summary.endswith(f"outside the record: {did} (2 times)")
    with pytest.raises(NotDurable, match=did):
        await inside(shared_server, program, new_session(), on_unrecorded="stop")
    assert len(started) == 2


async def test_program_and_each_agent_are_reported_separately(shared_server: Server, world: World) -> None:
    lines: list[str] = []

    async def act(_: str) -> str:
        await by_a_stream(world)
        return word()

    async def program() -> None:
        await by_a_stream(world)
        await RoundRobinGroupChat([Own("one", act), Own("two", act)], max_turns=2).run(task="Q")

    await inside(shared_server, program, new_session(), logs=lines)
    connected = f"connected to 127.0.0.1:{world.web.port} outside the record"
    named = [line for line in lines if connected in line]
    assert [line.partition(" connected")[0] for line in named] == ["the program", "one", "two"]


@pytest.mark.parametrize("on_unrecorded", ["tell", "stop"])
async def test_connection_in_recorded_call_or_outside_session_is_not_reported(
    shared_server: Server, world: World, on_unrecorded: str
) -> None:
    happened: list[str] = []
    lines: list[str] = []
    begun, ended = asyncio.Event(), asyncio.Event()

    async def work() -> str:
        happened.append("worked")
        for way in WAYS:
            await way(world)
        return word()

    def block() -> str:
        happened.append("blocked")
        subprocess.run(world.command, check=True)
        return word()

    async def neighbour() -> None:
        await begun.wait()
        await work()
        ended.set()

    class Calls(Scripted):
        async def create(self, *args: Any, **more: Any) -> Any:
            await by_a_stream(world)
            return await super().create(*args, **more)

    async def program() -> Any:
        begun.set()
        await ended.wait()
        model = Calls(happened, [call("work"), call("block")])
        await AssistantAgent("a", model, tools=[work, block]).run(task="Q")
        return await FunctionTool(work, "Work.").run_json({}, CancellationToken())

    outside = asyncio.create_task(neighbour())  # started before the session, and at work during it
    await twice(shared_server, program, happened, logs=lines, on_unrecorded=on_unrecorded)
    await outside
    assert sorted(happened[1:]) == ["blocked", "model", "worked", "worked"]
    assert about_outside(lines) == []


async def test_first_call_of_task_from_before_session_is_reported(
    shared_server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    happened: list[str] = []
    questions: asyncio.Queue[str] = asyncio.Queue()
    monkeypatch.setattr(entry_points, "_has_warned", False)

    async def answer() -> None:
        while True:
            await questions.get()
            await asked(Scripted(happened))
            questions.task_done()

    answering = asyncio.create_task(answer())
    await questions.put("before the session")
    await questions.join()
    assert (happened, caplog.messages) == (["model"], [])
    async with DurableSession(new_session(), nexum=shared_server.address) as session:
        for _ in range(2):
            await questions.put("inside the session")
            await questions.join()
        assert (happened, session.recorder.live_counts) == (["model"] * 3, {})
    answering.cancel()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith("a call of Scripted was made outside every session, so the call is not recorded")


async def test_console_input_is_recorded_and_not_reported(
    shared_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    lines: list[str] = []
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\nsecond\nthird\nfourth\n"))

    async def act(_: str) -> str:
        return f"{input('in a turn? ')} {await asyncio.to_thread(input, 'in a thread? ')}"  # noqa: ASYNC250

    async def program() -> Any:
        said = input("before? ")  # noqa: ASYNC250
        result = await RoundRobinGroupChat([Own("asker", act)], max_turns=1).run(task=said)
        return [said, result.messages[-1].to_text(), await asked(Scripted(happened))]

    before = input
    said = await twice(shared_server, program, happened, logs=lines, on_unrecorded="stop")
    assert said[:2] == ["first", "second third"]
    assert sys.stdin.readline() == "fourth\n"
    assert about_outside(lines) == []
    assert input is before


async def test_connection_to_restarted_server_is_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    restarted: list[Server] = []
    starting = threading.Lock()
    shake_hands = security._shake_hands

    def reply(_: dict[str, Any]) -> Reply:
        if len(model.requests) == 2:
            server.process.kill()
            server.process.wait()
        return Reply("yes")

    async def connect(target: str, context: ssl.SSLContext) -> OSError | EOFError | None:
        failure = await shake_hands(target, context)
        with starting:  # the client connects in two threads
            if not restarted:  # start the server only now: the client has tried to connect by Python's sockets
                restarted.append(stack.enter_context(nexum_server(tmp_path, port=server.port)))
        return failure

    monkeypatch.setattr(security, "_shake_hands", connect)
    with ExitStack() as stack, OpenAIServer(reply) as model:
        server = stack.enter_context(nexum_server(tmp_path))
        async with DurableSession("s", nexum=server.address, on_unrecorded="stop", tell=lines.append):
            one = agent(model, "one")
            found = [texts(await one.run(task="Q"))[-1] for _ in range(3)]

    assert (found, len(restarted)) == (["yes"] * 3, 1)
    assert about_outside(lines) == []

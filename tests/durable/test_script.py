"""`python -m durable_autogen run SCRIPT` in real processes: it runs as `python SCRIPT` does, and survives crashes."""

from __future__ import annotations

import os
import py_compile
import re
import signal
import subprocess
import sys
import zipapp
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from durable_agents import answer
from harness import ROOT, Server, needs_links, nexum_server, run_to_end, running
from openai_server import OpenAIServer, Reply
from server_thread import ServerThread

from durable_autogen import list_sessions
from nexum_engine.client import NexumClient

AGENT = '''
import asyncio, sys, time
from pathlib import Path
from autogen_agentchat.agents import AssistantAgent
from autogen_ext.models.openai import OpenAIChatCompletionClient

def note(text: str) -> str:
    """Note it."""
    with Path("log").open("a") as log:
        log.write(text + "\\n")
    if text == "second" and Path("hang").exists():
        print("hanging", flush=True)
        time.sleep(60)
    return "noted"

async def main(task):
    client = OpenAIChatCompletionClient(model="gpt-4o")
    agent = AssistantAgent("a", client, tools=[note], max_tool_iterations=3)
    result = await agent.run(task=task)
    print(result.messages[-1].to_text(), result.messages[-1].id)
    await client.close()
'''


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the whole file, with a short lease: a killed run's session is soon released."""
    with nexum_server(tmp_path_factory.mktemp("nexum"), lease=1.0) as running_server:
        yield running_server


@pytest.fixture
def model() -> Iterator[OpenAIServer]:
    """A model that calls the tool twice and then answers."""

    def reply(body: dict[str, Any]) -> Reply:
        done = sum(message["role"] == "tool" for message in body["messages"])
        return answer("end") if done == 2 else Reply(calls=[("note", {"text": ("first", "second")[done]})])

    with OpenAIServer(reply) as found:
        yield found


class Folder:
    """A script in its own folder, with the ways to run it. Set `forked` if the start of Python doesn't matter."""

    def __init__(self, path: Path, server: ServerThread | None, env: dict[str, str]) -> None:
        self.path, self.server, self.env, self.script = path, server, env, "script.py"
        self.forked = False

    def write(self, code: str, name: str = "script.py") -> None:
        (self.path / name).write_text(code, encoding="utf-8")

    def command(self, *arguments: str, session: str | None = "") -> list[str]:
        """Return the command that runs the script; the default session is named after the folder."""
        found = ["-m", "durable_autogen", "run", *(["--nexum", self.server.address] if self.server else [])]
        session = self.path.name[-40:] if session == "" else session
        return [*found, *(["--session", session] if session else []), self.script, *arguments]

    def durable(self, *arguments: str, session: str | None = "") -> subprocess.CompletedProcess[str]:
        command = self.command(*arguments, session=session)
        return run_to_end(command, cwd=self.path, env=self.env, forked=self.forked)

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run_to_end([self.script, *arguments], cwd=self.path, env=self.env)

    @property
    def log(self) -> list[str]:
        return (self.path / "log").read_text().split()


@pytest.fixture
def folder(tmp_path: Path, server: ServerThread, model: OpenAIServer) -> Folder:
    return Folder(tmp_path, server, {"OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": "k"})


def test_killed_script_continues_and_third_run_makes_no_call(folder: Folder, model: OpenAIServer) -> None:
    folder.write(f"{AGENT}\nasyncio.run(main(sys.argv[1]))\n")
    (folder.path / "hang").touch()
    folder.forked = True
    with running(folder.command("Q"), cwd=folder.path, env=folder.env, forked=True) as process:
        process.wait_for("hanging")
        process.kill()
    assert (len(model.requests), folder.log) == (2, ["first", "second"])
    (folder.path / "hang").unlink()
    second = folder.durable("Q")
    assert second.returncode == 0, second.stderr
    assert re.fullmatch(r"end [0-9.e-]+ [0-9a-f-]{36}\n", second.stdout)
    assert (len(model.requests), folder.log) == (3, ["first", "second", "second"])
    third = folder.durable("Q")
    assert (third.returncode, third.stdout) == (0, second.stdout)
    assert (len(model.requests), len(folder.log)) == (3, 3)
    assert "3 model call(s)" in third.stderr
    assert all(line.startswith("[Nexum] ") for line in third.stderr.splitlines())
    other = folder.durable("another task")  # in the same session
    assert other.returncode == 2
    (line,) = (line for line in other.stderr.splitlines() if not line.startswith("[Nexum] "))
    assert "it was 'Q'" in line
    assert "now it is 'another task'" in line
    assert (len(model.requests), len(folder.log)) == (3, 3)


LOOKS = """
import asyncio, sys, beside, __main__
from pathlib import Path

def reads(path: Path): ...

async def main():
    print(reads.__annotations__)
    print(__name__, Path(__file__).samefile(sys.argv[0]), sys.argv, Path(sys.path[0]).name, beside.NAME)
    print(Path.cwd(), __main__.main is main, asyncio.current_task().get_name())

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_script_has_pythons_environment_and_only_its_output(folder: Folder) -> None:
    (folder.path / "deeper").mkdir()
    folder.script = "./deeper/script.py"
    folder.write(LOOKS, folder.script)
    folder.write("NAME = 'beside it'", "deeper/beside.py")
    arguments = ["--", "--session", "its own", "-x", "--", ""]
    durable, plain = folder.durable(*arguments), folder.python(*arguments)
    assert (durable.returncode, plain.returncode, plain.stderr) == (0, 0, "")
    assert durable.stdout == plain.stdout
    assert "beside it" in durable.stdout
    assert "nothing was recorded" in durable.stderr


@needs_links
def test_linked_script_has_the_path_of_the_link(folder: Folder) -> None:
    (folder.path / "deeper").mkdir()
    folder.write("import sys; print(__file__, sys.path[0])", "deeper/real.py")
    (folder.path / "script.py").symlink_to("deeper/real.py")
    assert folder.durable().stdout == folder.python().stdout


MODULE = """
import asyncio, sys, __main__
from . import beside

async def main():
    print(__name__, __package__, __spec__.name, sys.argv, sys.path[0], beside.NAME, __main__.main is main)
    if len(sys.argv) > 1:
        raise LookupError(sys.argv[1])

asyncio.run(main())
"""


BUNDLE = "import sys, beside; print(__name__, __package__, __file__, sys.argv[1:], sys.path[:2], beside.NAME)"


@pytest.mark.parametrize("script", ["bundle", "bundle.pyz", "compiled.pyc"])
def test_folder_archive_and_compiled_file_run_as_under_python(folder: Folder, script: str) -> None:
    (folder.path / "bundle").mkdir()
    for place in ("bundle/beside.py", "beside.py"):
        folder.write("NAME = 'beside it'", place)
    folder.write(BUNDLE, "bundle/__main__.py")
    zipapp.create_archive(folder.path / "bundle", folder.path / "bundle.pyz")
    py_compile.compile(str(folder.path / "bundle" / "__main__.py"), str(folder.path / "compiled.pyc"))
    folder.script = script
    durable, plain = folder.durable("x"), folder.python("x")
    assert (durable.returncode, durable.stdout) == (plain.returncode, plain.stdout) == (0, plain.stdout)
    assert "beside it" in durable.stdout


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 brought PYTHONSAFEPATH")
def test_script_finds_what_pythonpath_names_also_with_a_safe_path(folder: Folder) -> None:
    (folder.path / "own").mkdir()
    folder.write("NAME = 'beside it'", "own/beside.py")
    folder.write("import sys, beside; print(sys.path[0], beside.NAME)")
    folder.env |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([str(folder.path / "own"), str(ROOT)])}
    durable, plain = folder.durable(), folder.python()
    assert (durable.returncode, durable.stdout) == (plain.returncode, plain.stdout) == (0, plain.stdout)
    assert "beside it" in durable.stdout


@pytest.mark.parametrize("arguments", [[], ["gone"]])
@pytest.mark.parametrize("name", ["package", "package.tool"])
def test_module_runs_as_under_python(folder: Folder, name: str, arguments: list[str]) -> None:
    (folder.path / "package").mkdir()
    for file, code in (("__init__", ""), ("__main__", MODULE), ("tool", MODULE), ("beside", "NAME = 'beside it'")):
        folder.write(code, f"package/{file}.py")
    plain = run_to_end(["-m", name, *arguments], cwd=folder.path, env=folder.env)
    (*command, _) = folder.command()
    durable = run_to_end([*command, "-m", name, *arguments], cwd=folder.path, env=folder.env)
    assert (durable.returncode, durable.stdout) == (plain.returncode, plain.stdout) == (len(arguments), plain.stdout)
    assert "beside it True" in durable.stdout
    frames = [line for line in durable.stderr.splitlines() if line.startswith('  File "')]
    assert [line for line in frames if "runpy" in line or "run_script" in line] == []


def test_missing_module_is_reported_in_one_line(folder: Folder) -> None:
    for name in ("nothing", "nothing.at.all"):
        done = run_to_end([*folder.command()[:-1], "-m", name], cwd=folder.path, env=folder.env, forked=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines() == [f"error: there is no module {name}: check its name and this folder"]


ENDS = """
import asyncio, sys

async def main():
    print("begun", flush=True)
    {end}

asyncio.run(main())
{after}
"""

INTERRUPTED_LINE = "[Nexum] interrupted; run the same command again to continue"


@pytest.mark.parametrize(
    ("end", "after"),
    [
        ("sys.exit(3)", ""),
        ("sys.exit('no more')", ""),
        ("return", "sys.exit(4)"),
        ("return", "raise LookupError('gone')"),
        ("raise LookupError('gone')", ""),
        ("return", ""),
    ],
)
def test_script_ends_with_the_exit_code_that_python_gives(folder: Folder, end: str, after: str) -> None:
    folder.write(ENDS.format(end=end, after=after))
    folder.forked = True
    durable, plain = folder.durable(), folder.python()
    assert (durable.returncode, durable.stdout) == (plain.returncode, plain.stdout)
    told = [line for line in durable.stderr.splitlines() if not line.startswith("[Nexum] ")]
    if "raise" not in end + after:
        assert told == plain.stderr.splitlines()
        return
    assert durable.returncode == 1
    assert (told[0], told[-1]) == ("Traceback (most recent call last):", "LookupError: gone")
    assert "script.py" in told[1]
    assert [line for line in told if "runpy" in line] == []


def test_error_of_script_is_passed_to_its_excepthook(folder: Folder) -> None:
    hook = "lambda kind, error, _: print('hook:', kind.__name__, error, flush=True)"
    folder.write(f"import sys\nsys.excepthook = {hook}\nraise LookupError('gone')\n")
    folder.forked = True
    done = folder.durable()
    assert (done.returncode, done.stdout) == (1, "hook: LookupError gone\n")
    assert "Traceback" not in done.stderr


def test_interrupted_script_ends_with_the_exit_code_of_python_and_one_line(folder: Folder) -> None:
    folder.write(ENDS.format(end="await asyncio.sleep(60)", after=""))
    codes = []
    for command, last in ((folder.command(), INTERRUPTED_LINE), (["script.py"], "KeyboardInterrupt")):
        with running(command, cwd=folder.path, env=folder.env) as process:
            process.wait_for("begun")
            process.interrupt()
            codes.append(process.wait())
            assert process.output.splitlines()[-1] == last
            assert ("Traceback" in process.output) == (last == "KeyboardInterrupt")
    assert codes[0] == codes[1]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.run doesn't cancel the main task on Ctrl+C")
def test_interrupted_script_that_had_caught_a_cancellation_ends_with_one_line(folder: Folder) -> None:
    catches = (
        "asyncio.current_task().cancel()\n    try: await asyncio.sleep(0)\n    except asyncio.CancelledError:\n"
        "        print('caught', flush=True)\n        await asyncio.sleep(60)"
    )
    folder.write(ENDS.format(end=catches, after=""))
    with running(folder.command(), cwd=folder.path, env=folder.env) as process:
        process.wait_for("caught")
        process.interrupt()
        assert process.wait() in (-signal.SIGINT, 130)
        assert process.output.splitlines()[-1] == INTERRUPTED_LINE
        assert "Traceback" not in process.output


def test_interrupted_script_ends_although_a_thread_waits(folder: Folder) -> None:
    folder.write(
        "import threading, time\nthreading.Thread(target=threading.Event().wait).start()\n"
        "print('begun', flush=True)\ntime.sleep(60)\n"
    )
    with running(folder.command(), cwd=folder.path, env=folder.env) as process:
        process.wait_for("begun")
        process.interrupt()
        assert process.wait() in (-signal.SIGINT, 130)
        assert process.output.splitlines()[-1] == "[Nexum] interrupted"


def test_missing_script_is_reported_in_one_line(folder: Folder) -> None:
    folder.forked = True
    done = folder.durable()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["error: there is no script script.py: check the path"]


async def test_each_asyncio_run_has_its_own_session(folder: Folder, server: ServerThread, model: OpenAIServer) -> None:
    folder.write(
        f"{AGENT}\nasyncio.run(main('one'))\nloop = asyncio.new_event_loop()\nasyncio.set_event_loop(loop)\n"
        "loop.run_until_complete(asyncio.sleep(0))\n"
        "loop.run_until_complete(main('two'))\nloop.run_until_complete(loop.shutdown_asyncgens())\nloop.close()\n"
    )
    folder.forked = True
    first = folder.durable(session="both")
    assert first.returncode == 0, first.stderr
    assert len(first.stdout.splitlines()) == 2
    assert "nothing was recorded" not in first.stderr
    again = folder.durable(session="both")
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert (len(model.requests), folder.log) == (6, ["first", "second"] * 2)
    async with NexumClient(server.address) as client:
        found = {one.session: one.status for one in await list_sessions(client) if one.session.startswith("both")}
    assert found == {"both": "finished", "both-2": "finished", "both-3": "finished"}


THREADS = """
import threading, time
from concurrent.futures import ThreadPoolExecutor

def ask(n):
    time.sleep(random.random() / 10)
    asyncio.run(main(n))

with ThreadPoolExecutor(4) as pool:
    list(pool.map(ask, "abcdefgh"))
thread = threading.Thread(target=lambda: asyncio.run(main("i")))
thread.start()
thread.join()

async def beside(task):
    loop = asyncio.get_running_loop()
    in_pool = [loop.run_in_executor(None, ask, n) for n in "kl"]
    await asyncio.gather(*in_pool, *(asyncio.to_thread(ask, n) for n in "mn"), main(task))

asyncio.run(beside("j"))
"""


async def test_threads_replay_their_own_sessions_in_whatever_order_they_run(
    folder: Folder, server: ServerThread, model: OpenAIServer
) -> None:
    folder.write(f"import random\n{AGENT}\n{THREADS}")
    folder.forked = True
    runs = [folder.durable(session="threads") for _ in range(4)]
    assert [run.returncode for run in runs] == [0] * 4, runs[-1].stderr
    assert (len(model.requests), len(folder.log)) == (42, 28)
    async with NexumClient(server.address) as client:
        found = {one.session: one.question for one in await list_sessions(client) if one.session.startswith("threads")}
    of_pool = {f"threads-ask-{n}": question for n, question in enumerate("abcdefghklmn", 1)}
    assert found == {**of_pool, "threads-lambda-1": "i", "threads": "j"}


RUNS_IN_TOOLS = """
from concurrent.futures import ThreadPoolExecutor

async def ask_model(text):
    client = OpenAIChatCompletionClient(model="gpt-4o")
    await client.create([UserMessage(content=text, source="user")])
    await client.close()

def note(text: str) -> str:
    '''Note it.'''
    with Path("log").open("a") as log:
        log.write(text + "\\n")
    if text == "first":
        asyncio.run(ask_model("in the tool's thread"))
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, ask_model("in a pool")).result()
    return "noted"

asyncio.run(main("one"))
asyncio.run(main("two"))
"""


async def test_asyncio_run_in_a_tool_has_no_session(folder: Folder, server: ServerThread, model: OpenAIServer) -> None:
    folder.write(f"from autogen_core.models import UserMessage\n{AGENT}\n{RUNS_IN_TOOLS}")
    folder.forked = True
    first = folder.durable(session="tools")
    assert first.returncode == 0, first.stderr
    again = folder.durable(session="tools")
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
    assert (len(model.requests), folder.log) == (10, ["first", "second"] * 2)
    async with NexumClient(server.address) as client:
        found = {one.session for one in await list_sessions(client) if one.session.startswith("tools")}
    assert found == {"tools", "tools-2"}


NEST_ASYNCIO = """
import asyncio, threading

def apply(loop=None):
    def run(main, *, debug=False):
        loop = asyncio.get_event_loop()
        return loop.run_until_complete(asyncio.ensure_future(main, loop=loop))

    def run_until_complete(self, future):
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        self._thread_id = threading.get_ident()
        try:
            future = asyncio.ensure_future(future, loop=self)
            while not future.done():
                self._run_once()
            return future.result()
        finally:
            asyncio._set_running_loop(outer)

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    asyncio.run = run
    type(loop).run_until_complete = run_until_complete
"""


async def test_script_with_nest_asyncio_is_recorded(folder: Folder, server: ServerThread, model: OpenAIServer) -> None:
    folder.write(NEST_ASYNCIO, "nest_asyncio.py")
    folder.write(
        f"import nest_asyncio; nest_asyncio.apply()\n{AGENT}\n"
        "asyncio.run(main('one'))\nasyncio.get_event_loop().run_until_complete(main('two'))\n"
    )
    folder.forked = True
    first = folder.durable(session="nested")
    assert first.returncode == 0, first.stderr
    again = folder.durable(session="nested")
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
    assert (len(model.requests), folder.log) == (6, ["first", "second"] * 2)


IN_ANOTHER_LOOP = """
import threading

loop = asyncio.new_event_loop()
thread = threading.Thread(target=loop.run_forever)
thread.start()
asyncio.run_coroutine_threadsafe(main("Q"), loop).result()
loop.call_soon_threadsafe(loop.stop)
thread.join()
"""


def test_first_call_in_a_loop_that_has_no_session_is_reported(folder: Folder, model: OpenAIServer) -> None:
    folder.write(f"{AGENT}\n{IN_ANOTHER_LOOP}")
    folder.forked = True
    done = folder.durable()
    assert (done.returncode, len(model.requests)) == (0, 3), done.stderr
    (warning,) = (line for line in done.stderr.splitlines() if "outside every session" in line)
    assert warning.startswith("[Nexum] a call of OpenAIChatCompletionClient was made outside every session")


def test_logging_of_script_does_not_turn_off_the_lines_of_the_command(folder: Folder, model: OpenAIServer) -> None:
    folder.write(
        "import logging, logging.config\nlogging.config.dictConfig({'version': 1})\nlogging.disable()\n"
        f"{AGENT}\nasyncio.run(main('Q'))\n"
    )
    folder.forked = True
    done = folder.durable()
    assert done.returncode == 0, done.stderr
    assert "live: 3 model call(s)" in done.stderr


def test_default_session_is_reported_and_depends_on_arguments(folder: Folder) -> None:
    folder.write("import sys; print(sys.argv[1:])")
    folder.forked = True

    def told(*arguments: str) -> str:
        done = folder.durable(*arguments, session=None)
        assert (done.returncode, done.stdout) == (0, f"{list(arguments)}\n")
        line = next(line for line in done.stderr.splitlines() if "[Nexum] session " in line)
        return line.split()[2]

    ids = [told("a", "b"), told("a b"), told("a", "b")]
    assert ids[0] == ids[2] != ids[1]
    assert all(one.startswith("script-") for one in ids)


def test_run_without_a_server_survives_a_kill(tmp_path: Path, model: OpenAIServer) -> None:
    folder = Folder(tmp_path, None, {"OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": "k"})
    folder.write(f"{AGENT}\nasyncio.run(main('Q'))\n")
    folder.forked = True
    (folder.path / "hang").touch()
    for _ in range(2):
        with running(folder.command(), cwd=folder.path, env=folder.env, forked=True) as process:
            process.wait_for("this program opened the database")
            process.wait_for("hanging")
            process.kill()
    assert "the previous run died; taking over" in process.output
    assert "is in use by another run" not in process.output, "the killed run was in the killed server's process"
    with running(["-m", "durable_autogen", "ls"], cwd=folder.path, env=folder.env, forked=True) as listing:
        listing.wait_for("interrupted")
    (folder.path / "hang").unlink()
    done = folder.durable()
    assert (done.returncode, done.stdout[:4], folder.log) == (0, "end ", ["first", "second", "second", "second"])
    assert len(model.requests) == 3
    assert not (tmp_path / ".nexum" / "local.db.address").exists()

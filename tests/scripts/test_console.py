"""The console behavior of every script: safe output, Ctrl+C at any moment, a closed output pipe."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, environment, running, tool_worker
from openai_server import OpenAIServer, Reply
from processes import answer, read_one_line, run_demo, run_script, submitter
from server_thread import ServerThread

from support.console import printable, say

CLEAR = "\x1b[2J\x1b]0;title\x07\x9b31m\x08\x7f"
SHOWN = r"\x1b[2J\x1b]0;title\x07\x9b31m\x08\x7f"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


# ---- Control characters ----------------------------------------------------------------------------------------------


def test_control_characters_are_escaped_except_newlines_and_tabs() -> None:
    everything = "".join(map(chr, range(0x100)))
    assert CONTROLS.sub("", printable(everything)) == printable(everything)
    assert printable("a\tb\nc\r\nd\re ✓ 東京") == "a\tb\nc\nd\\x0de ✓ 東京"
    assert printable(CLEAR) == SHOWN


def test_model_output_cannot_control_the_terminal(server: ServerThread, tmp_path: Path) -> None:
    replies = [Reply(calls=[(f"no_such_tool{CLEAR}", {})]), Reply(f"An answer.{CLEAR}\nWith a second line.")]
    with OpenAIServer(replies) as model:
        env = {"OPENAI_BASE_URL": model.base_url, "NEXUM_MODEL": "m"}
        code, output = run_demo(tmp_path, "--nexum", server.address, env=env)
    assert code == 0, output
    assert f"calls no_such_tool{SHOWN}" in output
    assert answer(output).strip() == f"An answer.{SHOWN}\nWith a second line."
    assert CONTROLS.findall(output.replace("\n", "")) == []


def test_team_output_cannot_control_the_terminal(server: ServerThread, tmp_path: Path) -> None:
    # The demo streams the replies of a single agent, and prints the replies of a team whole.
    with OpenAIServer([Reply(f"A report.{CLEAR}")]) as model:
        env = {"OPENAI_BASE_URL": model.base_url, "NEXUM_MODEL": "m"}
        code, output = run_demo(tmp_path, "--nexum", server.address, "--team", env=env)
    assert code == 0, output
    assert output.count(f"A report.{SHOWN}") == 3
    assert CONTROLS.findall(output.replace("\n", "")) == []


def test_tool_name_cannot_control_the_terminal_of_caller_or_worker(server: ServerThread, tmp_path: Path) -> None:
    with tool_worker(tmp_path, server.address) as worker:
        with submitter(tmp_path, server.address, f"no{CLEAR}", {"x": 1}) as caller:
            assert caller.wait() == 1
        worker.wait_for("failed")
    assert "Submitted exec-" in caller.output
    assert f"(no{SHOWN})" in caller.output
    assert f"no{SHOWN}, execution" in worker.output
    assert CONTROLS.findall((caller.output + worker.output).replace("\n", "")) == []


@pytest.mark.every_python
def test_log_records_and_warnings_cannot_control_the_terminal(tmp_path: Path) -> None:
    program = (
        "import logging, sys, warnings; from support.console import log_to; log_to(sys.stderr, logging.WARNING)\n"
        f"logging.getLogger('x').warning('logged %s', {CLEAR!r}); warnings.warn({CLEAR!r})"
    )
    code, output = run_script(["-c", program], tmp_path)
    assert code == 0
    assert f"logged {SHOWN}" in output
    assert f"UserWarning: {SHOWN}" in output
    assert CONTROLS.findall(output.replace("\n", "")) == []


# ---- Lines -----------------------------------------------------------------------------------------------------------


def test_log_line_and_error_begin_a_new_line_within_a_streamed_answer(tmp_path: Path) -> None:
    program = """
import asyncio, logging, sys
from autogen_agentchat.messages import ModelClientStreamingChunkEvent as Piece, TextMessage
from support.console import complain, log_to, say, say_what_is_logged
from support.conversation import Conversation

log_to(sys.stderr, logging.WARNING)
say_what_is_logged("x")

async def items():
    yield Piece(content="Tokyo ", source="agent")
    logging.warning("a warning")
    yield Piece(content="", source="agent")
    yield Piece(content="has ", source="agent")
    yield Piece(content="14", source="agent")
    yield Piece(content=" million.", source="agent")
    logging.getLogger("x").info("a note")
    yield TextMessage(content="Tokyo has 14 million.", source="agent")
    yield Piece(content="New ", source="agent")
    complain("error: broken")

asyncio.run(Conversation("agent").show(items()))
say("end")
"""
    code, output = run_script(["-c", program], tmp_path)
    assert code == 0
    assert output.split("\n") == [
        "",
        "Tokyo ",
        "a warning",
        "has 14 million.",
        "[Nexum] a note",
        "",
        "",
        "New ",
        "error: broken",
        "",
        "end",
    ]


# ---- Ctrl+C ----------------------------------------------------------------------------------------------------------

INTERRUPTER = """
import os, signal, sys

class Interrupter:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            sys.meta_path.remove(self)
            os.write(1, b"PRESSED\\n")
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupter())
"""
"""The code of a `sitecustomize` module, which Python imports first. When the import of the module INTERRUPT_AT begins,
the process sends a real SIGINT to itself."""

AT_ONCE = {
    "demo.py": (
        "argparse",
        "asyncio",
        "grpc",
        "grpc._cython",
        "pydantic",
        "nexum_engine.client",
        "support.session_file",
    ),
    "worker.py": ("argparse", "grpc", "pydantic_core", "support.tools", "workflow"),
    "submit_task.py": ("asyncio", "grpc", "support.session_file", "workflow"),
    "crash_demo.py": ("argparse", "grpc", "support.graphflow.comparison", "support.models", "support.pipeline.page"),
    "pipeline_worker.py": ("argparse", "socket", "grpc", "support.models", "pipeline_workflow"),
}


def interrupt(command: list[str], moment: str, folder: Path) -> tuple[int, str]:
    (folder / "sitecustomize.py").write_text(INTERRUPTER)
    env = {"INTERRUPT_AT": moment, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    code, output = run_script(command, folder, env)
    assert output.count("PRESSED") == 1, f"{moment} was never imported"
    return code, output


@pytest.mark.parametrize(("script", "moment"), [(script, one) for script, all_ in AT_ONCE.items() for one in all_])
def test_ctrl_c_during_imports_ends_a_script_silently(tmp_path: Path, script: str, moment: str) -> None:
    assert interrupt([str(ROOT / script)], moment, tmp_path) == (130, "PRESSED")


LIBRARIES_AT_ONCE = [
    ("nexum_engine", "argparse"),
    ("nexum_engine", "asyncio"),
    ("nexum_engine", "grpc"),
    ("nexum_engine", "nexum_engine.location"),
    ("durable_autogen", "autogen_core"),
    ("durable_autogen", "grpc"),
    ("durable_autogen", "durable_autogen.session"),
    ("durable_autogen", "durable_autogen.__main__"),
    ("durable_autogen", "durable_autogen.budget_command"),
]


@pytest.mark.parametrize(("library", "moment"), LIBRARIES_AT_ONCE)
def test_ctrl_c_during_imports_ends_the_command_of_a_library_silently(
    tmp_path: Path, library: str, moment: str
) -> None:
    assert interrupt(["-m", library, "--help"], moment, tmp_path) == (130, "PRESSED")


def test_ctrl_c_during_imports_ends_the_installed_nexum_silently(tmp_path: Path) -> None:
    script = "import sys; from nexum_engine.console_script import main; sys.exit(main())"
    assert interrupt(["-c", script], "grpc", tmp_path) == (130, "PRESSED")


def test_import_of_the_libraries_leaves_ctrl_c_alone(tmp_path: Path) -> None:
    program = "import signal, durable_autogen, nexum_engine.__main__; print(signal.getsignal(signal.SIGINT))"
    code, output = run_script(["-c", program], tmp_path)
    assert (code, output) == (0, str(signal.default_int_handler))


@pytest.mark.every_python
@pytest.mark.parametrize("moment", ["durable_autogen", "autogen_core", "autogen_agentchat.agents"])
def test_ctrl_c_while_autogen_loads_ends_the_demo_with_a_message(tmp_path: Path, moment: str) -> None:
    code, output = interrupt([str(ROOT / "demo.py")], moment, tmp_path)
    assert code == 130
    assert output.splitlines()[-1] == "interrupted; the same command continues from what is recorded"


@pytest.mark.every_python
def test_ctrl_c_while_tools_load_ends_the_worker(tmp_path: Path) -> None:
    assert interrupt([str(ROOT / "worker.py")], "support.offline.web", tmp_path) == (130, "PRESSED")


def test_ctrl_c_while_autogen_loads_stops_the_pipeline_worker_normally(tmp_path: Path) -> None:
    code, output = interrupt([str(ROOT / "pipeline_worker.py"), "--nexum", "127.0.0.1:1"], "autogen_core", tmp_path)
    assert (code, output.splitlines()[-1]) == (0, "PRESSED")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT that a shell can switch off")
def test_script_started_with_ignored_sigint_ignores_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTER)
    env = {"INTERRUPT_AT": "pydantic", "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    code, output = run_script(["-c", ignoring, sys.executable, str(ROOT / "submit_task.py"), "--help"], tmp_path, env)
    pressed, *help_text = output.splitlines()
    assert (code, pressed) == (0, "PRESSED")
    assert help_text[0].startswith("usage: submit_task.py")


# ---- A closed pipe, a full disk --------------------------------------------------------------------------------------


@pytest.mark.every_python
def test_closed_pipe_on_windows_raises_broken_pipe_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        encoding = "cp1252"

        def write(self, _: str) -> int:
            raise OSError(errno.EINVAL, "Invalid argument")

        def flush(self) -> None: ...

    monkeypatch.setattr("sys.stdout", Closed())
    with pytest.raises(BrokenPipeError):
        say("✓")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("script", ["demo.py", "crash_demo.py"])
def test_full_disk_under_the_output_is_a_one_line_error(tmp_path: Path, script: str) -> None:
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run(
            [sys.executable, str(ROOT / script)], cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE
        )
    assert (run.returncode, run.stderr) == (1, b"error: the output can't be written: No space left on device\n")


@pytest.mark.every_python
def test_worker_with_a_closed_log_pipe_ends_normally(server: ServerThread, tmp_path: Path) -> None:
    # The worker logs that it is connected, and the reader closes the pipe. Then the worker logs a line about a task.
    with running(["-c", READER.format(worker=str(ROOT / "worker.py"), address=server.address)], cwd=tmp_path) as reader:
        reader.wait_for("CLOSED")
        with submitter(tmp_path, server.address, "no_such_tool", {"x": 1}) as caller:
            assert caller.wait() == 1
        assert reader.wait() == 0
    assert reader.lines[-1] == "0 ''"


READER = """
import subprocess, sys


worker = subprocess.Popen(
    [sys.executable, {worker!r}, "--nexum", {address!r}], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
)
assert "connected to" in worker.stdout.readline()
worker.stdout.close()
print("CLOSED", flush=True)
print(worker.wait(30), repr(worker.stderr.read()))
"""


@pytest.mark.parametrize("script", [one for one in AT_ONCE if one != "submit_task.py"])
def test_help_with_a_closed_pipe_prints_no_error(tmp_path: Path, script: str) -> None:
    line, code, errors = read_one_line([str(ROOT / script), "--help"], tmp_path)
    assert line.startswith("usage: ")
    assert code in (0, 1)
    assert errors == ""

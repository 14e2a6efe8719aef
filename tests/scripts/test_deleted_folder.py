"""Every command whose working folder was deleted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, environment

PROGRAM = """\
import asyncio
from durable_autogen import DurableSession
from nexum_engine.errors import NexumError

async def main():
    try:
        async with DurableSession("s"):
            raise SystemExit("the session was opened")
    except NexumError as error:
        raise SystemExit(f"error: {error}") from error

asyncio.run(main())
"""
EMPTY = "import asyncio\nasyncio.run(asyncio.sleep(0))\n"
COMMANDS = {
    "demo": ["demo.py", "--offline", "what is new?"],
    "submit_task": ["submit_task.py", "web_search", '{"query": "x"}'],
    "worker": ["worker.py"],
    "pipeline_worker": ["pipeline_worker.py"],
    "crash_demo": ["crash_demo.py", "--offline"],
    "crash_demo --html": ["crash_demo.py", "--offline", "--html", "page.html"],
    "nexum": ["-m", "nexum_engine"],
    "nexum ps": ["-m", "nexum_engine", "ps"],
    "nexum ps --nexum": ["-m", "nexum_engine", "ps", "--nexum", "./x.db"],
    "nexum backup": ["-m", "nexum_engine", "backup", "x.db"],
    "nexum check": ["-m", "nexum_engine", "check", "x.db"],
    "nexum restore": ["-m", "nexum_engine", "restore", "x.db"],
    "durable_autogen ls": ["-m", "durable_autogen", "ls"],
    "durable_autogen run": ["-m", "durable_autogen", "run", "EMPTY"],
    "a program": ["PROGRAM"],
}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows deletes no working folder")
@pytest.mark.parametrize("name", COMMANDS)
def test_deleted_working_folder_is_a_one_line_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "PROGRAM").write_text(PROGRAM)
    (tmp_path / "EMPTY").write_text(EMPTY)
    gone = tmp_path / "gone"
    gone.mkdir()
    command = [str(tmp_path / word) if word in ("PROGRAM", "EMPTY") else word for word in COMMANDS[name]]
    command[0] = str(ROOT / command[0]) if command[0].endswith(".py") else command[0]
    run = subprocess.run(
        ["bash", "-c", 'rmdir "$PWD" && exec "$@"', "bash", sys.executable, *command],
        cwd=gone,
        env=environment({"PYTHONPATH": str(ROOT)}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = [line for line in run.stderr.splitlines() if not line.startswith("[Nexum] session ")]
    assert said == ["error: the working folder was deleted: change to another folder, and run the command again"]
    assert run.returncode in (1, 2)

"""Every command with a standard stream that is closed, full, or read by nobody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, environment

COMMANDS = {
    "demo": ["demo.py", "--offline", "--new-session", "--crash-after-step", "1"],
    "submit_task": ["submit_task.py", "web_search", '{"query": "x"}', "--timeout", "1", "--nexum", "127.0.0.1:1"],
    "worker": ["worker.py", "--nexum", "127.0.0.1:1", "--until-stdin-closes"],
    "nexum": ["-m", "nexum_engine", "--listen", "0.0.0.0:1"],
    "nexum ps": ["-m", "nexum_engine", "ps"],
    "durable_autogen send": ["-m", "durable_autogen", "send", "s", "payment"],
    "durable_autogen run": ["-m", "durable_autogen", "run", "script.py"],
}
STREAMS = [">&-", "<&- 2>&-", "<&- >&- 2>&-", ">/dev/full", "| true"]


@pytest.mark.skipif(sys.platform != "linux", reason="the shell's redirections, and /dev/full")
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", COMMANDS)
def test_closed_or_full_stream_gives_no_traceback_and_no_damage(tmp_path: Path, name: str) -> None:
    (tmp_path / "script.py").write_text("import asyncio\nasyncio.run(asyncio.sleep(0))\n")
    program, *arguments = COMMANDS[name]
    command = [sys.executable, str(ROOT / program) if program.endswith(".py") else program, *arguments]
    for streams in STREAMS:
        run = subprocess.run(
            ["bash", "-c", f'{{ "$@" {streams}; }} 2>&1', "bash", *command],
            cwd=tmp_path,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        for word in ("Traceback", "Exception ignored", "AttributeError", "Logging error", "[Errno"):
            assert word not in run.stdout, f"{streams}: {run.stdout}"
        if ">/dev/full" in streams and "2>" not in streams and name in ("demo", "durable_autogen send"):
            assert "the output can't be written: No space left on device" in run.stdout
            assert run.returncode == 1


def test_reason_of_a_failed_start_is_in_the_error_itself(tmp_path: Path) -> None:
    (tmp_path / ".nexum").write_text("a file in the place of the folder")
    run = subprocess.run(
        [sys.executable, "-m", "durable_autogen", "send", "s", "payment"],
        cwd=tmp_path,
        env=environment({"PYTHONPATH": str(ROOT)}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith("error: database ")
    assert str(tmp_path / ".nexum") in run.stderr

"""Scripts and servers that are the first process of a container, for which Linux ignores signals without a handler."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, Process, running
from processes import send

IN_A_CONTAINER = ("unshare", "--user", "--map-root-user", "--fork", "--pid", "--mount-proc", "--kill-child")
QUESTION = "What is the population of Tokyo vs New York?"
STOPPING = """
import asyncio
from nexum_engine.signals import stop_event

async def main():
    stop = stop_event()
    print("ready")
    await stop.wait()
    print("stopping")
    await asyncio.sleep(60)

asyncio.run(main())
"""


def may_make_containers() -> bool:
    """Return whether this machine lets a user make namespaces, as containers have them."""
    found = shutil.which(IN_A_CONTAINER[0])
    return (
        found is not None
        and subprocess.run([*IN_A_CONTAINER, "true"], capture_output=True, check=False).returncode == 0
    )


pytestmark = pytest.mark.skipif(not may_make_containers(), reason="needs Linux, and the right to make namespaces")


def run_demo(folder: Path, *arguments: str) -> tuple[int, Process]:
    """Run the demo as the first process of a container; return its exit code and the ended process."""
    command = [*IN_A_CONTAINER[1:], sys.executable, str(ROOT / "demo.py"), "--session-id", "demo1"]
    with running([*command, *arguments, QUESTION], cwd=folder, program=IN_A_CONTAINER[0]) as process:
        return process.wait(), process


def test_demo_that_is_the_first_process_kills_itself_and_continues(tmp_path: Path) -> None:
    code, killed = run_demo(tmp_path, "--crash-after-step", "1")
    assert (code, "crashing now" in killed.lines[-1]) == (137, True), killed.output
    code, continued = run_demo(tmp_path)
    assert (code, "already COMPLETED (cached)" in continued.output) == (0, True), continued.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_the_first_process_at_once(tmp_path: Path, number: int) -> None:
    command = [*IN_A_CONTAINER[1:], sys.executable, "-c", STOPPING]
    with running(command, cwd=tmp_path, program=IN_A_CONTAINER[0]) as process:
        process.wait_for("ready")
        own = process.popen.pid
        (first,) = map(int, Path(f"/proc/{own}/task/{own}/children").read_text().split())
        send(first, number)
        process.wait_for("stopping")
        send(first, number)
        assert process.wait() == 128 + number

"""Programs in containers.

Linux treats the first process of a container in its own way: it ignores signals for which the process has no handler.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, Process, running
from processes import send

IN_A_CONTAINER = ("unshare", "--user", "--map-root-user", "--mount", "--fork", "--pid", "--mount-proc", "--kill-child")
QUESTION = "What is the population of Tokyo vs New York?"
SESSION = """
import asyncio
from autogen_core.models import UserMessage
from autogen_ext.models.replay import ReplayChatCompletionClient
from durable_autogen import DurableSession

async def main():
    async with DurableSession("one"):
        await ReplayChatCompletionClient(["Tokyo"]).create([UserMessage(content="Where?", source="user")])
        print("recorded")
        await asyncio.sleep(60)

asyncio.run(main())
"""
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


@pytest.mark.parametrize("volume", ["one", "another"])
def test_containers_share_a_database_if_they_share_its_volume(tmp_path: Path, volume: str) -> None:
    """The path of the database tells nothing: it is the same in both containers, or differs."""
    for name in ("one", "another", "app", "data"):
        (tmp_path / name).mkdir()

    def container(path: str, mounted: str, *command: str) -> tuple[list[str], str]:
        inside = f'mount --bind {mounted} {path} && cd {path} && exec "$@"'
        return [*IN_A_CONTAINER[1:], "sh", "-c", inside, "sh", sys.executable, *command], IN_A_CONTAINER[0]

    first, program = container("app", "one", "-c", SESSION)
    with running(first, cwd=tmp_path, program=program) as one:
        one.wait_for("recorded")
        second, _ = container("data" if volume == "one" else "app", volume, "-m", "durable_autogen", "ls")
        with running(second, cwd=tmp_path, program=program) as other:
            assert (other.wait() == 0, "Where?" in other.output) == (volume == "one",) * 2, other.output
            assert ("nothing recorded" in other.output) == (volume == "another")

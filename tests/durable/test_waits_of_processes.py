"""Waits of processes that are killed or interrupted, and events that are sent to them, with and without a server."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import KILLED, Process, running
from server_thread import ServerThread

from durable_autogen import send_event
from durable_autogen.record.events import Waiting
from durable_autogen.recorded_sessions import show_session
from nexum_engine.client import NexumClient
from nexum_engine.embedded import EmbeddedNexum

SESSION = "order-4711"

PROGRAM = """
import asyncio, logging, sys, time
from durable_autogen import DurableSession

logging.basicConfig(level=logging.INFO, format="%(message)s")

async def main(kind, seconds):
    async with DurableSession("order-4711") as session:
        if kind == "sleep":
            await session.sleep(seconds)
            print("WOKE", time.time())
        else:
            print("GOT", await session.wait_for_event("payment", seconds))

try:
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
except KeyboardInterrupt:
    print("INTERRUPTED")
"""


@contextmanager
def program(folder: Path, kind: str, seconds: float, address: str = "") -> Iterator[Process]:
    with running(["program.py", kind, str(seconds)], cwd=folder, env=at(address), forked=True) as process:
        yield process
    assert "Traceback" not in process.output, process.output


def at(address: str) -> dict[str, str]:
    return {"NEXUM_ADDRESS": address} if address else {}


def waits(address: str = "") -> list[Waiting]:
    """Return what the session waits for. Without an address, this process opens the folder's database."""

    async def read() -> list[Waiting]:
        async with EmbeddedNexum(address or None, owners=True) as nexum, NexumClient(nexum.address) as client:
            shown = await show_session(client, SESSION)
        return [wait.content for wait in shown.info.waits if isinstance(wait.content, Waiting)]

    return asyncio.run(read())


def test_sleep_of_killed_process_ends_at_recorded_time(server: ServerThread, folder: Path) -> None:
    with program(folder, "sleep", 2, server.address) as killed:
        killed.wait_for("sleeping until")
        killed.kill()
        assert killed.wait() in KILLED
    (wait,) = waits(server.address)
    assert (wait.event, wait.seconds) == ("", 2)
    assert wait.until_ms is not None
    # This time, the program asks for an hour. The recorded sleep counts: a new sleep would not end in time.
    with program(folder, "sleep", 3600, server.address) as resumed:
        woke = float(resumed.wait_for("WOKE").split()[1])
        assert resumed.wait() == 0
    assert woke * 1000 >= wait.until_ms
    assert waits(server.address) == []


def test_interrupted_and_killed_program_gets_event_of_the_meantime(folder: Path) -> None:
    if sys.platform != "win32":  # on Windows, Ctrl+C can't be sent to only one process
        with program(folder, "event", 3600) as interrupted:
            interrupted.wait_for("waiting for event 'payment'")
            interrupted.interrupt()
            interrupted.wait_for("INTERRUPTED")
            assert interrupted.wait() == 0
    with program(folder, "event", 3600) as killed:
        killed.wait_for("waiting for event 'payment'")
        killed.kill()
        assert killed.wait() in KILLED
    # No other process has the database open, so this process opens it.
    assert [wait.event for wait in waits()] == ["payment"]
    asyncio.run(send_event(SESSION, "payment", {"amount": 990}))
    with program(folder, "event", 3600) as resumed:
        assert resumed.wait_for("GOT") == "GOT {'amount': 990}"
        assert resumed.wait() == 0


def test_told_command_sends_event_while_the_program_has_the_database_open(folder: Path) -> None:
    with program(folder, "event", 3600) as waiting:
        assert waiting.wait_for("this program opened the database")
        told = waiting.wait_for("waiting for event 'payment'").partition("(send it: python -m durable_autogen ")[2]
        command = ["-m", "durable_autogen", *shlex.split(told.rstrip(")")), '"paid"', "--key", "k"]
        with running(command, cwd=folder, forked=True) as sending:
            assert sending.wait() == 0
        assert sending.output == f"sent event 'payment' to session {SESSION}"
        assert waiting.wait_for("GOT") == "GOT paid"
        assert waiting.wait() == 0
    assert waiting.output.count("waiting for event") == 1

"""worker.py with tools for tests: they log each effect, wait at a gate, hang or fail on demand.

An effect is one line of a file: time in ms, attempt, process, idempotency key. A gate is a file; it is open once the
file exists.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
import uuid
from pathlib import Path

import worker
from nexum_engine.client import NexumClient
from nexum_engine.errors import FinalError
from nexum_engine.signals import stop_event
from nexum_engine.worker import Worker
from support.offline.web import OfflineWeb
from support.tool_calls import bindings
from support.tools import ToolContext, tool
from workflow import TOOL_CALL


def write_down(log: str, call: ToolContext) -> None:
    line = f"{time.time_ns() // 1_000_000} {call.attempt} {os.getpid()} {call.idempotency_key}\n"
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def wait_at(gate: str) -> None:
    while not Path(gate).exists():
        time.sleep(0.005)


@tool()
def count_effect(log: str, number: int, *, call: ToolContext) -> str:
    """Log the effect; return a new text at each execution."""
    time.sleep(0.02)
    write_down(log, call)
    time.sleep(0.02)
    return f"{number} {uuid.uuid4()}"


@tool()
def count_behind_gate(log: str, gate: str, number: int, *, call: ToolContext) -> str:
    """Wait for the gate, log the effect, and return a new text at each execution."""
    wait_at(gate)
    time.sleep(0.02)
    write_down(log, call)
    time.sleep(0.02)
    return f"{number} {uuid.uuid4()}"


@tool()
def gate_then_effect(arrivals: str, gate: str, log: str, *, call: ToolContext) -> str:
    """Log the arrival, wait for the gate, then log the effect."""
    write_down(arrivals, call)
    wait_at(gate)
    write_down(log, call)
    return f"attempt {call.attempt}"


@tool()
def effect_then_gate(log: str, gate: str, *, call: ToolContext) -> str:
    """Log the effect, then wait for the gate."""
    write_down(log, call)
    wait_at(gate)
    return f"attempt {call.attempt}"


@tool()
async def block_loop(log: str, seconds: float, number: int, *, call: ToolContext) -> str:
    """Log the effect, and block the worker's event loop."""
    write_down(log, call)
    time.sleep(seconds)  # noqa: ASYNC251 - the fault under test
    return f"{number}: attempt {call.attempt}"


@tool()
def write_much(size: int) -> str:
    """Return a text of `size` characters."""
    return "é" * size


@tool(time_limit=0.3)
def hang_once(log: str, *, call: ToolContext) -> str:
    """Hang past the time limit at the first attempt."""
    write_down(log, call)
    if call.attempt == 1:
        time.sleep(3600)
    return f"attempt {call.attempt}"


@tool()
def fail_until(log: str, gate: str, *, call: ToolContext) -> str:
    """Raise a final failure while the gate is closed."""
    write_down(log, call)
    if not Path(gate).exists():
        raise FinalError("the gate is closed ✗")
    return "the gate is open"


@tool()
def fail_then_gate(gate: str, *, call: ToolContext) -> str:
    """At the first attempt, fail with a reason of several lines. At a later attempt, wait for the gate."""
    if call.attempt == 1:
        raise RuntimeError("the page was\nnot there" + "!" * 300)
    wait_at(gate)
    return f"attempt {call.attempt}"


async def main(address: str) -> None:
    """Run a worker of the live workflow with the offline pages, so that no test needs the web."""
    stop = stop_event()
    async with NexumClient(address) as client:
        served = bindings(client, TOOL_CALL, OfflineWeb())
        await Worker(client, served, concurrency=4, describe=worker.describe).run(stop)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    try:
        asyncio.run(main(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)

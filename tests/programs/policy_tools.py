"""Tools with policies, and three programs that use them.

    policy_tools.py work ADDRESS                      a worker
    policy_tools.py call ADDRESS SESSION CALL...      calls, each a JSON list of tool and arguments
    policy_tools.py run ADDRESS SESSION CALL          one call in a durable run, which parks

A tool's log has a line for each effect: attempt, idempotency key, arguments. The log is the outside world.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from nexum_engine.client import NexumClient
from nexum_engine.errors import NexumError
from nexum_engine.policy import NOT_DONE
from nexum_engine.signals import stop_event
from nexum_engine.worker import Worker
from nexum_engine.workflow import RetryPolicy
from submit_task import Session
from support.console import say
from support.offline.web import OfflineWeb
from support.tool_calls import bindings
from support.tools import ToolContext, tool
from workflow import OFFLINE_TOOL_CALL, TOOL_CALL

SOON = RetryPolicy(max_attempts=2, first_delay_seconds=0.05)


def write_down(log: str, call: ToolContext, **arguments: Any) -> str:
    """Add a line to the log: the line is the effect of the call. Return a receipt."""
    line = json.dumps({"attempt": call.attempt, "key": call.idempotency_key, **arguments}) + "\n"
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, line.encode())
    os.close(descriptor)
    return f"receipt for {arguments.get('cents', arguments.get('number'))}"


def find(arguments: Mapping[str, Any], idempotency_key: str) -> Any:
    """Look an effect up in the log; return its result, or NOT_DONE. Fail if the effect's number is negative."""
    if arguments["number"] < 0:
        raise ConnectionError("the log is down")
    log = Path(arguments["log"])
    text = log.read_text() if log.exists() else ""
    # Leave out a line without its end: another worker is writing it.
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return f"found {arguments['number']}" if any(line["key"] == idempotency_key for line in lines) else NOT_DONE


def is_large(cents: int, **_: Any) -> bool:
    """Return whether a person has to approve the payment."""
    return cents > 100


def wait_at(gate: str) -> None:
    """Wait until the file exists."""
    while not Path(gate).exists():
        time.sleep(0.005)


@tool(approval=is_large)
def pay(log: str, cents: int, to: str = "c-17", *, call: ToolContext) -> str:
    """Pay. A person approves large payments."""
    return write_down(log, call, cents=cents, to=to)


@tool(approval="always", approval_timeout=0.3)
def pay_soon(log: str, *, call: ToolContext) -> str:
    """Pay. A person has to approve the payment within 0.3 s."""
    return write_down(log, call, cents=0)


@tool(approval="always", effect="once")
def pay_once_approved(log: str, cents: int, to: str = "c-17", *, call: ToolContext) -> str:
    """Pay once, after an approval."""
    return write_down(log, call, cents=cents, to=to)


@tool(approval=lambda **_: "PAY_FREELY" not in os.environ, effect="once")
def pay_once_or_ask(log: str, cents: int, *, call: ToolContext) -> str:
    """Pay once. A person approves each call, or no call if the variable PAY_FREELY is set."""
    return write_down(log, call, cents=cents)


@tool(effect="once", time_limit=3600)
def pay_once(log: str, gate: str, number: int, *, call: ToolContext) -> str:
    """Pay, and wait for the gate."""
    text = write_down(log, call, number=number)
    wait_at(gate)
    return text


@tool(effect="once", reconcile=find, time_limit=3600)
def pay_and_find(log: str, gate: str, number: int, *, call: ToolContext) -> str:
    """Pay, and wait for the gate. If the worker dies then, `find` looks the payment up."""
    text = write_down(log, call, number=number)
    wait_at(gate)
    return text


@tool(effect="once", reconcile=find, time_limit=3600)
def find_before_paying(begun: str, gate: str, log: str, number: int, *, call: ToolContext) -> str:
    """Log the beginning, wait for the gate, and pay."""
    write_down(begun, call)
    wait_at(gate)
    return write_down(log, call, number=number)


@tool(effect="once", time_limit=0.2)
def pay_slowly(log: str, *, call: ToolContext) -> str:
    """Pay, and return nothing within the time limit."""
    write_down(log, call)
    time.sleep(3600)
    return "never"


@tool(heartbeat=1, retry=RetryPolicy(max_attempts=2, first_delay_seconds=0.01))
def count_slowly(log: str, *, call: ToolContext) -> str:
    """Hang at the first attempt. At the second one, count for longer than the heartbeat limit, and send heartbeats."""
    write_down(log, call)
    if call.attempt == 1:
        time.sleep(3600)
    for number in range(1, 31):
        call.heartbeat({"counted": number})
        time.sleep(0.05)
    return "counted"


@tool(effect="once")
def pay_and_fail(log: str, *, call: ToolContext) -> str:
    """Pay, and fail."""
    write_down(log, call)
    raise ConnectionError("no answer")


@tool(retry=SOON)
def fail_twice(log: str, *, call: ToolContext) -> str:
    """Fail at each attempt."""
    write_down(log, call)
    raise ConnectionError("no answer")


@tool(final=(PermissionError,))
def refuse(log: str, *, call: ToolContext) -> str:
    """Fail in a way that a retry can't fix."""
    write_down(log, call)
    raise PermissionError("not yours")


@tool(rate="3/0.6s", concurrency=1)
def pay_in_turn(log: str, number: int, *, call: ToolContext) -> str:
    """Pay, one call after the other."""
    text = write_down(log, call, number=number)
    time.sleep(0.05)
    return text


async def work(address: str) -> None:
    """Run a worker of these tools."""
    stop = stop_event()
    async with NexumClient(address) as client:
        served = [one for shared in (TOOL_CALL, OFFLINE_TOOL_CALL) for one in bindings(client, shared, OfflineWeb())]
        await Worker(client, served, concurrency=20).run(stop)


async def call(address: str, session_id: str, *calls: str) -> None:
    """Make the calls at the same time. Each is a JSON list of tool and arguments. Print each result as JSON."""
    async with Session(session_id, nexum=address) as session:

        async def one(number: int, call: str) -> None:
            tool_name, arguments = json.loads(call)
            try:
                said = {"result": (await session.call(tool_name, arguments, timeout=120 + len(calls))).text}
            except NexumError as error:
                said = {"error": str(error)}
            say(json.dumps({"call": number, **said}))

        await asyncio.gather(*(one(number, call) for number, call in enumerate(calls)))


async def run(address: str, session_id: str, call: str) -> None:
    """Make the call in a tool of a durable run. If the call waits for a person's decision, the run parks."""
    from autogen_core import CancellationToken
    from autogen_core.tools import FunctionTool

    from durable_autogen import DurableSession, Parked, call_id

    async def submit(call: str) -> str:
        tool_name, arguments = json.loads(call)
        async with Session(session_id, nexum=address) as session:
            return (await session.call(tool_name, arguments, scope=call_id())).text

    try:
        async with DurableSession(session_id, nexum=address, park=True):
            result = await FunctionTool(submit, "Submit a call.").run_json({"call": call}, CancellationToken())
            say(f"RESULT {result}")
    except Parked as parked:
        say(str(parked))
        sys.exit(75)


ROLES: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {"work": work, "call": call, "run": run}

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    role, *arguments = sys.argv[1:]
    try:
        asyncio.run(ROLES[role](*arguments))
    except KeyboardInterrupt:
        sys.exit(130)

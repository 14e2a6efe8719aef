"""Helpers for tests of tools with policies. They start tests/programs/policy_tools.py, which declares the tools."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias

from harness import ROOT, Process, connected_worker, running

from nexum_engine.client import NexumClient

PROGRAM = str(ROOT / "tests" / "programs" / "policy_tools.py")

ToolCall: TypeAlias = tuple[str, dict[str, Any]]
"""A tool's name and the arguments of a call."""


def policy_worker(folder: Path, address: str) -> AbstractContextManager[Process]:
    """Run a worker of the tools with policies that is connected to the server."""
    return connected_worker([PROGRAM, "work", address], folder)


def policy_caller(folder: Path, address: str, *calls: ToolCall) -> AbstractContextManager[Process]:
    """Run a program that makes these calls at the same time."""
    return running([PROGRAM, "call", address, "s", *map(json.dumps, calls)], cwd=folder, forked=True)


def parking_run(folder: Path, address: str, call: ToolCall) -> AbstractContextManager[Process]:
    """Run a durable program that makes this call in a tool, and that parks while a person has to decide."""
    return running([PROGRAM, "run", address, "s", json.dumps(call)], cwd=folder, forked=True)


def results(caller: Process) -> list[str]:
    """Wait for the end of a caller; return the result or the error of each of its calls, in their order."""
    assert caller.wait() == 0, caller.output
    said = [json.loads(line) for line in caller.lines if line.startswith("{")]
    return [one.get("result") or f"ERROR {one['error']}" for one in sorted(said, key=lambda one: one["call"])]


def decide(address: str, method: str, execution_id: str, node: str, **arguments: Any) -> None:
    """Call a method of the client for a node that waits for a person: approve, reject or resolve."""

    async def call() -> None:
        async with NexumClient(address) as client:
            await getattr(client, method)(execution_id, node, **arguments)

    asyncio.run(call())


def asked_in(line: str) -> str:
    """Return the id of the execution that waits for a person, from a line about the wait."""
    match = re.search(r"(?:approve|resolve) (exec-[0-9]+-[0-9a-f]+)", line)
    assert match, line
    return match[1]


def paid(log: Path) -> list[dict[str, Any]]:
    """Return the effects in a tool's log."""
    text = log.read_text() if log.exists() else ""
    # Leave out a line without its end: at the end of a page, a reader can see a part of a write.
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

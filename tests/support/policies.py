"""Helpers for tests of tools with policies, which run as processes of tests/programs/policy_tools.py."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import ROOT, Process, running
from processes import run_script

from nexum_engine.client import NexumClient

PROGRAM = str(ROOT / "tests" / "programs" / "policy_tools.py")


@contextmanager
def policy_worker(folder: Path, address: str) -> Iterator[Process]:
    """Run a worker of the tools with policies that is connected to the server."""
    with running([PROGRAM, "work", address], cwd=folder) as process:
        process.wait_for("connected to")
        yield process


@contextmanager
def policy_caller(
    folder: Path, address: str, tool: str, *calls: Mapping[str, Any], session: str = "s"
) -> Iterator[Process]:
    """Run a program that makes these calls of a tool at the same time."""
    with running([PROGRAM, "call", address, session, tool, *map(json.dumps, calls)], cwd=folder) as process:
        yield process


def result(folder: Path, address: str, tool: str, call: Mapping[str, Any], *, session: str = "s") -> str:
    """Make a call in a new process; return its text after RESULT, or its error after ERROR."""
    with policy_caller(folder, address, tool, call, session=session) as process:
        assert process.wait() == 0, process.output
    match = re.search(r"^((?:RESULT|ERROR) .*)\nEND$", process.output, re.MULTILINE | re.DOTALL)
    assert match, process.output
    return match[1]


def nexum(folder: Path, *arguments: str) -> str:
    """Run a command of the engine; return its output."""
    code, output = run_script(["-m", "nexum_engine", *arguments], folder)
    assert code == 0, output
    return output


def decide(address: str, method: str, execution_id: str, node: str, **arguments: Any) -> None:
    """Call a method of the client for a node that waits for a person: approve, reject or resolve."""

    async def call() -> None:
        async with NexumClient(address) as client:
            await getattr(client, method)(execution_id, node, **arguments)

    asyncio.run(call())


def asked_in(line: str) -> str:
    """Return the execution that a waiting caller's line names."""
    match = re.search(r"(?:approve|resolve) (exec-\w+-\w+|exec-\w+)", line)
    assert match, line
    return match[1]


def paid(log: Path) -> list[dict[str, Any]]:
    """Return the effects in a tool's log."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

"""Plain AutoGen: a tool call without any durability, the reference for calls in the caller's process."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from peers.base import Call, Group, Peer, Settings, argument, executed_at, tool


async def no_op(argument: str) -> str:
    """Run the tool of the comparison."""
    return tool(argument)


def function_tool() -> Any:
    """Return the tool as an AutoGen FunctionTool."""
    from autogen_core.tools import FunctionTool

    return FunctionTool(no_op, description="Do nothing.", name="no_op")


class ToolCaller:
    """Calls an AutoGen tool."""

    def __init__(self) -> None:
        self._tool = function_tool()

    async def run(self, name: str, calls: int) -> list[Call]:
        """Make the calls of a run."""
        from autogen_core import CancellationToken

        made = []
        for number in range(calls):
            began = time.time()
            result = await self._tool.run_json({"argument": argument(name, number, calls)}, CancellationToken())
            made.append(Call(began, executed_at(result), time.time()))
        return made


class PlainAutoGen(Peer):
    """Plain AutoGen."""

    name = "autogen"
    title = "plain AutoGen (not durable)"
    group = Group.CALLER
    pages = ("https://microsoft.github.io/autogen/stable/user-guide/core-user-guide/components/tools.html",)
    setup = "FunctionTool.run_json. Nothing is stored."
    imports = ("autogen_core.tools",)
    replays = False

    @asynccontextmanager
    async def caller(self, settings: Settings) -> AsyncIterator[ToolCaller]:
        """Make the tool."""
        yield ToolCaller()

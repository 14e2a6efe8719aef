"""MCP tools through AutoGen's McpWorkbench, where the optional `mcp` package is installed."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import ToolCallExecutionEvent
from harness import ROOT, logged
from openai_server import OpenAIServer, Reply
from server_thread import ServerThread

from durable_autogen import DurableSession, Policy
from nexum_engine.approvals import NODE
from nexum_engine.client import NexumClient
from support.models.live import LiveModel

# Don't import mcp to find out whether it is installed: the import takes a second, and each process of pytest-xdist
# imports this file.
pytestmark = pytest.mark.skipif(find_spec("mcp") is None, reason="mcp isn't installed")


@contextmanager
def mcp_server(log: Path, transport: str) -> Iterator[Any]:
    """Start an MCP server with this transport; yield the parameters that a workbench needs."""
    from autogen_ext.tools.mcp import SseServerParams, StdioServerParams, StreamableHttpServerParams

    program = [str(ROOT / "tests" / "programs" / "mcp_server.py"), str(log)]
    if transport == "stdio":
        env = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}  # MCP passes on only some variables
        yield StdioServerParams(command=sys.executable, args=program, env=env, read_timeout_seconds=60)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, *program, transport, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 30
        while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if transport == "sse":
            yield SseServerParams(url=f"http://127.0.0.1:{port}/sse")
        else:
            yield StreamableHttpServerParams(url=f"http://127.0.0.1:{port}/mcp")
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("transport", ["stdio", "sse", "http"])
@pytest.mark.parametrize("is_opened_inside", [False, True])
async def test_mcp_tool_is_executed_once_and_its_failure_is_replayed(
    server: ServerThread, tmp_path: Path, transport: str, is_opened_inside: bool
) -> None:
    from autogen_ext.tools.mcp import McpWorkbench

    log = tmp_path / "log"
    lines: list[str] = []

    def reply(body: dict[str, Any]) -> Reply:
        if body["messages"][-1]["role"] == "tool":
            return Reply("end")
        return Reply(calls=[("note", {"text": "x"}), ("note", {"text": "x"}), ("note", {"text": "bad"})])

    async def run(parameters: Any) -> list[tuple[str, bool | None]]:
        client = LiveModel(vendor="OpenAI-compatible server", model="m", base_url=model.base_url, api_key="k")
        async with AsyncExitStack() as stack:
            sessions = DurableSession("s", nexum=server.address)
            stack.enter_context(logged(lines))
            if is_opened_inside:
                await stack.enter_async_context(sessions)
            workbench = await stack.enter_async_context(McpWorkbench(parameters))
            if not is_opened_inside:
                await stack.enter_async_context(sessions)
            agent = AssistantAgent("writer", client, workbench=workbench, max_tool_iterations=3)
            result = await agent.run(task="Q")
        (event,) = (message for message in result.messages if isinstance(message, ToolCallExecutionEvent))
        return [(one.content, one.is_error) for one in event.content]

    with OpenAIServer(reply) as model, mcp_server(log, transport) as parameters:
        first = await run(parameters)
        assert await run(parameters) == first
        assert len(model.requests) == 2
    assert not any("outside the record" in line for line in lines)
    assert sorted(log.read_text().split()) == ["bad", "x", "x"]
    assert [is_error for _, is_error in first] == [False, False, True]
    assert first[0] != first[1]


async def test_prompts_and_resources_of_an_mcp_server_are_read_once(server: ServerThread, tmp_path: Path) -> None:
    from autogen_ext.tools.mcp import McpWorkbench

    log = tmp_path / "log"

    async def run(parameters: Any) -> list[Any]:
        async with DurableSession("s", nexum=server.address), McpWorkbench(parameters) as bench:
            read = [await bench.list_prompts(), await bench.get_prompt("greeting", {"who": "ann"})]
            read += [await bench.list_resources(), await bench.read_resource("note://today")]
            read.append(await bench.list_resource_templates())
            with pytest.raises(Exception, match="unknown"):
                await bench.get_prompt("unknown")
            return read

    with mcp_server(log, "stdio") as parameters:
        first = await run(parameters)
        assert await run(parameters) == first
    assert log.read_text().split() == ["greeting-ann", "today"]


async def test_policy_of_an_mcp_tool_applies_by_name(server: ServerThread, tmp_path: Path) -> None:
    from autogen_ext.tools.mcp import McpWorkbench

    log = tmp_path / "log"
    asked: list[dict[str, Any]] = []

    def wants_approval(**arguments: Any) -> bool:
        asked.append(arguments)
        return bool(arguments["text"] == "x")

    policies = {"note": Policy(approval=wants_approval, effect="once")}
    with mcp_server(log, "stdio") as parameters:
        for _ in range(2):
            async with (
                McpWorkbench(parameters) as bench,
                NexumClient(server.address) as client,
                DurableSession("s", nexum=server.address, policies=policies),
            ):
                calling = asyncio.ensure_future(bench.call_tool("note", {"text": "x"}))
                if not log.exists():
                    while not (pending := await client.pending_approvals()):  # noqa: ASYNC110 - nothing sets an event
                        await asyncio.sleep(0.01)
                    await client.approve(pending[0].execution_id, NODE, approver="ann", answer={"text": "y"})
                assert (await calling).to_text().startswith('(ann changed the arguments to {"copies": 1, "text": "y"})')
                assert (await bench.call_tool("note", {"text": "bad"})).is_error
    assert log.read_text().split() == ["y", "bad"]
    assert asked == [{"text": "x", "copies": 1}, {"text": "bad", "copies": 1}]

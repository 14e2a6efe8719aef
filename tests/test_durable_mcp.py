"""MCP tools through AutoGen's McpWorkbench, where the optional `mcp` package is installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import ToolCallExecutionEvent
from harness import ROOT, Server
from openai_server import OpenAIServer, Reply

from durable_autogen import run_durable
from models.live import LiveModel

pytest.importorskip("mcp")


async def test_an_mcp_tool_is_executed_once_and_its_failure_replayed_as_it_was(server: Server, tmp_path: Path) -> None:
    from autogen_ext.tools.mcp import McpWorkbench, StdioServerParams

    log = tmp_path / "log"
    parameters = StdioServerParams(
        command=sys.executable,
        args=[str(ROOT / "tests" / "mcp_server.py"), str(log)],
        env={"PYTHONPATH": os.environ.get("PYTHONPATH", "")},  # MCP passes little of its environment on
    )

    def reply(body: dict[str, Any]) -> Reply:
        if body["messages"][-1]["role"] == "tool":
            return Reply("end")
        return Reply(calls=[("note", {"text": "x"}), ("note", {"text": "x"}), ("note", {"text": "bad"})])

    async def run() -> list[tuple[str, bool | None]]:
        client = LiveModel(vendor="OpenAI-compatible server", model="m", base_url=model.base_url, api_key="k")
        async with McpWorkbench(parameters) as workbench:
            result = await run_durable(
                AssistantAgent("writer", client, workbench=workbench, max_tool_iterations=3),
                task="Q",
                session_id="s",
                nexum=server.address,
            )
        (event,) = (message for message in result.messages if isinstance(message, ToolCallExecutionEvent))
        return [(one.content, one.is_error) for one in event.content]

    with OpenAIServer(reply) as model:
        first = await run()
        assert await run() == first
    assert sorted(log.read_text().split()) == ["bad", "x", "x"]
    assert [is_error for _, is_error in first] == [False, False, True]
    assert first[0] != first[1]

"""AutoGen's TextCanvasMemory, where the package `unidiff` is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from autogen_agentchat.agents import AssistantAgent
from autogen_core import CancellationToken, FunctionCall
from autogen_core.models import CreateResult, ModelFamily, ModelInfo, RequestUsage
from autogen_ext.models.replay import ReplayChatCompletionClient
from server_thread import ServerThread

from durable_autogen import DurableSession

pytestmark = pytest.mark.skipif(find_spec("unidiff") is None, reason="unidiff isn't installed")

INFO = ModelInfo(
    vision=False, function_calling=True, json_output=False, structured_output=False, family=ModelFamily.UNKNOWN
)


def writing() -> CreateResult:
    arguments = json.dumps({"filename": "a.md", "new_content": "a story"})
    return CreateResult(
        content=[FunctionCall(id="c1", name="update_file", arguments=arguments)],
        usage=RequestUsage(prompt_tokens=1, completion_tokens=1),
        finish_reason="function_calls",
        cached=False,
    )


async def test_replay_restores_the_text_of_a_canvas(server: ServerThread) -> None:
    from autogen_ext.memory.canvas import TextCanvasMemory

    async def program(*, questions: int) -> str | None:
        memory = TextCanvasMemory()
        model = ReplayChatCompletionClient([writing(), "written", "read"], model_info=INFO)
        async with DurableSession("s", nexum=server.address):
            tool = memory.get_update_file_tool()
            agent = AssistantAgent("writer", model, tools=[tool], memory=[memory], max_tool_iterations=2)
            for _ in range(questions):
                await agent.run(task="Q")  # the next prompt holds the canvas
        return memory.canvas.get_latest_content("a.md")

    assert await program(questions=1) == "a story"
    for _ in range(2):
        assert await program(questions=2) == "a story"


async def test_failed_writing_to_a_canvas_is_not_made_again(server: ServerThread) -> None:
    from autogen_ext.memory.canvas import TextCanvas
    from autogen_ext.memory.canvas._canvas_writer import UpdateFileArgs, UpdateFileResult, UpdateFileTool

    written: list[str] = []

    class Failing(UpdateFileTool):
        async def run(self, args: UpdateFileArgs, cancellation_token: CancellationToken) -> UpdateFileResult:
            written.append(args.new_content)
            raise ValueError("the canvas is full")

    for _ in range(2):
        model = ReplayChatCompletionClient([writing(), "not written"], model_info=INFO)
        async with DurableSession("s", nexum=server.address):
            agent = AssistantAgent("writer", model, tools=[Failing(TextCanvas())], max_tool_iterations=2)
            await agent.run(task="Q")
    assert written == ["a story"]

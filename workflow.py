"""Define the tool-call workflow, which has one EFFECT node.

`submit_task.py` starts executions of the workflow, and `worker.py` runs the node.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from nexum_engine.workflow import workflow


class ToolCallInput(BaseModel):
    """The input of a tool call: the tool's name, and the arguments that the model gave."""

    model_config = ConfigDict(frozen=True)

    tool_name: str
    tool_args: dict[str, Any]


class ToolCallOutput(BaseModel):
    """The output of a tool call: the text that the tool returned."""

    model_config = ConfigDict(frozen=True)

    result: str


TOOL_CALL = workflow("tool-call", input=ToolCallInput).effect("tool_call", ToolCallOutput).build()

# Keep offline tool calls in a separate workflow, so that a live run never gets an offline result.
OFFLINE_TOOL_CALL = workflow("tool-call-offline", input=ToolCallInput).effect("tool_call", ToolCallOutput).build()

"""The tool-call workflow: one EFFECT node, as data. `worker.py` binds the work to it, `submit_task.py` starts it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from nexum_engine.workflow import workflow


class ToolCallInput(BaseModel):
    """Which tool to run, with the arguments as the model gave them."""

    model_config = ConfigDict(frozen=True)

    tool_name: str
    tool_args: dict[str, Any]


class ToolCallOutput(BaseModel):
    """What the tool returned."""

    model_config = ConfigDict(frozen=True)

    result: str


TOOL_CALL = workflow("tool-call", input=ToolCallInput).effect("tool_call", ToolCallOutput).build()

# A workflow of its own, so that an offline result is never served to a live run.
OFFLINE_TOOL_CALL = workflow("tool-call-offline", input=ToolCallInput).effect("tool_call", ToolCallOutput).build()

"""Define the tool-call workflow, which has one EFFECT node, and a variant of it for each tool whose policy needs one.

`submit_task.py` starts executions of these workflows, and `worker.py` runs the node.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from nexum_engine.policy import Policy
from nexum_engine.workflow import Workflow, workflow


class ToolCallInput(BaseModel):
    """The input of a tool call: the tool's name, and the arguments that the model gave."""

    model_config = ConfigDict(frozen=True)

    tool_name: str
    tool_args: dict[str, Any]
    approval: str = ""
    """The execution in which a person approved the call; empty if the call needs no approval."""

    @model_serializer(mode="wrap")
    def _without_empty_approval(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = write(self)
        if not self.approval:
            del fields["approval"]
        return fields


class ToolCallOutput(BaseModel):
    """The output of a tool call: the text that the tool returned."""

    model_config = ConfigDict(frozen=True)

    result: str


TOOL_CALL = workflow("tool-call", input=ToolCallInput).effect("tool_call", ToolCallOutput).build()

# Keep offline tool calls in a separate workflow, so that a live run never gets an offline result.
OFFLINE_TOOL_CALL = workflow("tool-call-offline", input=ToolCallInput).effect("tool_call", ToolCallOutput).build()


def workflow_of(tool_name: str, policy: Policy, shared: Workflow) -> Workflow:
    """Return the workflow of a tool's calls: `shared`, or a variant of it.

    The tool gets a variant if its policy has effect="once", `retry`, `rate` or `concurrency`. `shared` is TOOL_CALL or
    OFFLINE_TOOL_CALL.
    """
    if not policy.is_once and policy.retry is None and not policy.is_limited:
        return shared
    return (
        workflow(f"{shared.workflow_id}:{tool_name}", input=ToolCallInput)
        .effect(
            "tool_call",
            ToolCallOutput,
            retry=policy.retry,
            once=policy.is_once,
            reconcile=policy.reconcile is not None,
            rate=policy.rate,
            concurrency=policy.concurrency,
        )
        .build()
    )

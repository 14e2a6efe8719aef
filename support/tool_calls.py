"""Run tool calls in a worker: the handler of `tool_call` nodes, and the workflows that a worker serves."""

from __future__ import annotations

from functools import partial

from nexum_engine.client import NexumClient
from nexum_engine.errors import FinalError
from nexum_engine.worker import Binding, TaskContext
from nexum_engine.workflow import Workflow
from support.approvals import check
from support.tools import TOOLS, ToolContext, Web, find_tool
from workflow import ToolCallInput, ToolCallOutput, workflow_of


def bindings(client: NexumClient, shared: Workflow, web: Web) -> list[Binding]:
    """Return a worker's bindings: one for `shared`, the workflow of most tools, and one for each tool's own workflow.

    A tool has its own workflow if its policy needs one. The tools use `web`. The worker asks the server by `client`
    whether a person has approved a call.
    """
    workflows = {workflow_of(name, tool.policy, shared) for name, tool in TOOLS.items()} | {shared}
    return [Binding(one, {"tool_call": partial(run_tool, client, shared, one, web)}) for one in workflows]


async def run_tool(client: NexumClient, shared: Workflow, own: Workflow, web: Web, task: TaskContext) -> ToolCallOutput:
    """Run the tool of a `tool_call` node of the workflow `own`, as the tool's policy says."""
    call = ToolCallInput.model_validate(task.input)
    tool = find_tool(call.tool_name)
    expected = workflow_of(tool.name, tool.policy, shared)
    if expected != own:
        raise FinalError(
            f"the policy of {tool.name} needs a call of workflow {expected.workflow_id}, and this is one of "
            f"{own.workflow_id}: let the caller declare the tool as this worker does"
        )
    note = await check(client, tool, call.tool_args, call.approval, own.workflow_id, task)
    context = ToolContext(task.idempotency_key, task.attempt, web, task.heartbeat)
    result = await tool.run(call.tool_args, context, must_reconcile=task.must_reconcile)
    return ToolCallOutput(result=note + result)

"""Ask a person before a tool call, and let the worker check that the person approved this very call.

The call's execution gets the idempotency key of the question that the person answered. The server starts one execution
per key, so one approval allows one execution.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from nexum_engine.approvals import (
    NODE,
    Approval,
    approval_workflow,
    decided,
    decision_of,
    how_to_decide,
    waiting_for_a_person,
)
from nexum_engine.client import NexumClient
from nexum_engine.connection import OUTAGE_PATIENCE
from nexum_engine.errors import ExecutionNotFound, FinalError
from nexum_engine.records import NodeType
from nexum_engine.worker import TaskContext
from support.tools.declare import Tool
from workflow import ToolCallInput

MAX_SHOWN = 300  # characters of a call's arguments in the line about a wait


class Question(Approval):
    """The question whether a worker may run a tool."""

    workflow: str
    """The workflow of the call's execution. A live call and an offline one have different workflows."""

    @classmethod
    def about(cls, tool: str, arguments: Mapping[str, Any], session_id: str, workflow: str) -> Question:
        """Return the question about a call, and compute its digest."""
        return cls(**Approval.of(session_id, "", tool, arguments).model_dump(), workflow=workflow)

    def key(self, scope: str) -> str:
        """Return the idempotency key of the question, and of the call's execution."""
        return super().key(f"{self.workflow}/{scope}")


@dataclass(frozen=True)
class ApprovedCall:
    """A call that may run: its arguments, which a person may have edited, and the idempotency key of its execution."""

    arguments: dict[str, Any]
    execution_id: str
    """The execution in which the person decided. Empty if the call was begun when it needed no approval."""
    key: str


async def ask(
    client: NexumClient,
    tool: Tool,
    arguments: Mapping[str, Any],
    *,
    session_id: str,
    scope: str,
    workflow: str,
    unasked_key: str,
    nexum: str | None,
    tell: Callable[[str], None],
) -> ApprovedCall | None:
    """Ask a person whether the tool may run, and wait for the decision. Return None if the call needs no approval.

    If nobody has decided yet, `tell` gets a line with the commands by which a person decides on the server `nexum`. In
    a durable run, the run logs the line instead, and may park. `unasked_key` is the key of the call's execution if the
    call needs no approval. Raises FinalError for wrong arguments, and if a person rejected the call or nobody decided
    in time.
    """
    complete = tool.complete(arguments)
    is_asked = tool.policy.needs_approval(tool.name, complete)
    question = Question.about(tool.name, complete, session_id, workflow)
    key = question.key(scope)
    if tool.policy.is_once:
        # A call with an approval has another key than a call without one. In an earlier run, the policy may have been
        # different. Look for an execution under the key that the call had then: its effect must not happen twice.
        begun = await _begun(client, workflow, unasked_key if is_asked else key)
        if begun is not None:
            return begun
    if not is_asked:
        return None

    asked = approval_workflow(tool.policy.approval_timeout)

    def waiting(execution_id: str) -> AbstractContextManager[None]:
        text = json.dumps(complete, ensure_ascii=False)
        shown = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
        line = f"waiting for a decision on {tool.name}({shown}): {how_to_decide(execution_id, nexum)}"
        return waiting_for_a_person(line, tell)

    decision = await decided(client, asked, question, key, waiting=waiting)
    if not decision.approved:
        raise FinalError(decision.refusal)
    approved = complete if decision.answer is None else tool.complete(decision.answer)
    return ApprovedCall(approved, decision.execution_id, key)


async def _begun(client: NexumClient, workflow: str, key: str) -> ApprovedCall | None:
    """Return the call whose execution has this key, or None."""
    found = client.all_executions(workflow_id=workflow, key_prefix=key, with_nodes=True, patience=OUTAGE_PATIENCE)
    newest_first = [one async for one in found if one.idempotency_key == key]  # longer keys begin with `key`, too
    if not newest_first:
        return None
    call = ToolCallInput.model_validate_json(newest_first[0].input_json)
    return ApprovedCall(call.tool_args, call.approval, key)


async def check(
    client: NexumClient, tool: Tool, arguments: Mapping[str, Any], approval: str, workflow: str, task: TaskContext
) -> str:
    """Raise FinalError if the call needs an approval and no person approved it with these arguments.

    `approval` is the id of the execution in which a person approved the call, or empty. Return a line for the model if
    the person edited the arguments, else "".
    """
    if not approval and tool.policy.approval is None:
        return ""
    complete = tool.complete(arguments)
    if not approval:
        if tool.policy.needs_approval(tool.name, complete):
            raise _refused(tool, "nobody was asked")
        return ""
    try:
        execution = (await client.get_execution(approval, patience=OUTAGE_PATIENCE)).execution
        question = Question.model_validate_json(execution.input_json)
    except (ExecutionNotFound, ValidationError):
        raise _refused(tool, f"execution {approval} asks no such question") from None
    if [(node.node_id, node.node_type) for node in execution.nodes] != [(NODE, NodeType.HUMAN_APPROVAL)]:
        raise _refused(tool, f"execution {approval} asks no person")
    key = execution.idempotency_key
    own = f"{question.workflow}:{key}:{task.node_id}"
    if own != task.idempotency_key or not key.startswith(f"{question.session}:"):
        raise _refused(tool, f"the decision of execution {approval} is for another call")
    decision = decision_of(execution)
    if not decision.approved:
        raise _refused(tool, f"execution {approval} is {execution.status.value}")
    asked = Question.about(tool.name, question.arguments, question.session, workflow)
    approved = question.arguments if decision.answer is None else tool.complete(decision.answer)
    if question != asked or complete != approved:
        raise _refused(tool, f"execution {approval} is about another tool or other arguments")
    if approved == question.arguments:
        return ""
    by = decision.by or "the person who approved this call"
    return f"({by} changed the arguments to {json.dumps(approved, ensure_ascii=False)})\n"


def _refused(tool: Tool, why: str) -> FinalError:
    return FinalError(f"{tool.name} did not run: a person has to approve it, and {why}; call it through submit_task.py")

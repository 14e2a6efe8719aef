"""Say in words what a tool call waits for, and why it failed."""

from __future__ import annotations

from nexum_engine.client import Observed
from nexum_engine.records import Attempt, Execution, ExecutionStatus, NodeStatus, Outcome
from nexum_engine.report import waits_for_person
from nexum_engine.workflow import Workflow

SHOWN_REASON = 200  # a notice shows at most this many characters of the reason why the latest attempt ended


def what_for(workflow: Workflow, observed: Observed) -> str:
    """Return what a RUNNING execution waits for, and how its latest attempt ended, if one has ended.

    `workflow` is the caller's version of the execution's workflow.
    """
    return f"{_next_step(workflow, observed)}{_last_failure(observed.execution)}"


def _next_step(workflow: Workflow, observed: Observed) -> str:
    nodes = observed.execution.nodes
    notes = [node.error for node in nodes if node.status is NodeStatus.READY and node.error]
    if notes:
        return notes[0]
    if observed.has_poller is False and not any(node.status is NodeStatus.RUNNING for node in nodes):
        version = observed.execution.version_hash
        if version != workflow.version_hash:
            return (
                f"no worker polls for {workflow.workflow_id} in this execution's version "
                f"({version[:19]}...); start a worker with the code of that version, or cancel the execution: "
                f"python -m nexum_engine cancel {observed.execution.execution_id}"
            )
        return (
            f"no worker polls for {workflow.workflow_id} (version {version[:19]}...); start one with: python worker.py"
        )
    for node in nodes:
        if node.status is NodeStatus.RUNNING:
            # A node may have no attempts: a published Nexum server, unlike this project's, reports none.
            which = f"attempt {node.attempts[-1].attempt}" if node.attempts else "the task"
            return f"{which} was handed to a worker"
    if observed.has_poller is None:
        return "the server doesn't show whether a worker polls; if none runs, start one with: python worker.py"
    return "the task is queued, or the pause before its next attempt is not over"


def _last_failure(execution: Execution) -> str:
    """Return a phrase with the outcome of the latest ended attempt and its reason, or "" if no attempt has ended."""
    ended = [attempt for node in execution.nodes for attempt in node.attempts if attempt.outcome is not Outcome.RUNNING]
    if not ended:
        return ""
    reason = " ".join(ended[-1].error.split()) or "no reason given"
    shown = reason if len(reason) <= SHOWN_REASON else f"{reason[: SHOWN_REASON - 3]}..."
    return f"; attempt {ended[-1].attempt} {ended[-1].outcome.value.lower()}: {shown}"


def unknown_attempt(execution: Execution) -> Attempt | None:
    """Return the attempt whose unknown effect a person has to resolve, or None if the execution has no such attempt."""
    return next((node.attempts[-1] for node in execution.nodes if waits_for_person(node)), None)


def why_it_failed(execution: Execution) -> str:
    """Return why a FAILED or CANCELLED execution ended."""
    if execution.status is ExecutionStatus.CANCELLED:
        return "the execution was cancelled"
    failed = [node.error for node in execution.nodes if node.status is NodeStatus.FAILED]
    return failed[0] if failed else execution.error

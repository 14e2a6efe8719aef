"""Transitions of tasks: hand out, report, release.

Each function runs inside one transaction, and is the same for every database. If the state doesn't allow a change, the
function raises an error of `nexum_engine.errors`, and its changes are rolled back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from nexum_engine import jsontext, scheduling
from nexum_engine.errors import Conflict, StaleTask, TaskNotFound, TooLarge
from nexum_engine.records import ExecutionStatus, Node, NodeStatus, Outcome, Task
from nexum_engine.store.db import Db, Row
from nexum_engine.store.executions import (
    MAX_INLINE_BYTES,
    MAX_OUTPUT_BYTES,
    TASK_FRAME_BYTES,
    OwnedResult,
    end_execution,
    output_bytes,
    start_execution,
)
from nexum_engine.store.ids import new_task_id, number_of
from nexum_engine.store.results import Changed, Changes, Claim, ReadyTask, Started
from nexum_engine.workflow import check_id

MAX_ERROR_CHARACTERS = 4000


def claim(
    db: Db,
    worker_id: str,
    version_hashes: tuple[str, ...],
    max_bytes: int,
    lease_ms: int,
    streamed: bool,
) -> Claim:
    """Hand a worker the task that has been due the longest, as a new attempt with a lease.

    A task with a large input is returned without the input: get the input with `task_input`.
    """
    candidates = [
        row
        for version_hash in version_hashes
        if (
            row := db.one(
                "oldest_task",
                version_hash=version_hash,
                now=db.now_ms,
                max_bytes=max_bytes,
                max_inline=MAX_INLINE_BYTES,
            )
        )
        is not None
    ]
    if not candidates:
        return Claim(oversized=_note_oversized(db, worker_id, version_hashes, max_bytes))
    return Claim(_hand_out(db, min(candidates, key=lambda row: int(row["due_ms"])), worker_id, lease_ms, streamed))


def start_owned(
    db: Db,
    workflow_id: str,
    version_hash: str,
    input_json: str,
    idempotency_key: str,
    owner: str,
    lease_ms: int,
    streamed: bool,
    held_task_id: str = "",
    output_json: str = "",
    attributes: Mapping[str, str] | None = None,
) -> Started:
    """Start or find the execution of the idempotency key, and hand its only node to `owner` as an attempt.

    No poll ever gets the node. If the execution's previous owner is dead, `owner` takes over. With `output_json`, the
    attempt is completed at once. With `held_task_id`, the start is refused if `owner` no longer holds that task.
    So an owner whose session was taken over can't record events. Raises the errors of `start_execution`, and:

    - InvalidRequest for a workflow of several nodes,
    - Conflict if another owner holds the execution, or if the execution was started for workers,
    - StaleTask if `held_task_id` is lost, or if the execution has a result other than `output_json`.
    """
    check_id(owner, "owner")
    if output_json:
        jsontext.parse(output_json, "output_json")
    if held_task_id:
        held = find_attempt(db, held_task_id)
        if held is None:
            raise StaleTask(f"the owner says that it holds task {held_task_id}, but this server has no such task")
        _check_may_report(held)
    result = OwnedResult(owner, streamed, output_json) if output_json else None
    started = start_execution(
        db, workflow_id, version_hash, input_json, idempotency_key, owned=True, result=result, attributes=attributes
    )
    if started.status.ended:
        if started.existing and output_json and not _has_result(db, started.execution_id, output_json):
            raise StaleTask(f"{workflow_id} {idempotency_key!r} has another result (execution {started.execution_id})")
        return started
    node = db.one("owned_node", execution=number_of(db, started.execution_id))
    if node is None or not node["owned"]:
        raise Conflict(f"execution {started.execution_id} was started for workers: it can't have an owner")
    if node["status"] == NodeStatus.READY:
        task = _hand_out(db, node, owner, lease_ms, streamed)
    elif node["worker_id"] == owner:
        task = _task(db, node, node["task_id"], node["attempts"])
    else:
        raise Conflict(
            f"{workflow_id} {idempotency_key!r} is in use by {node['worker_id']} "
            f"(execution {started.execution_id}): wait for its end, or end that process"
        )
    if not output_json:
        return replace(started, task=task)
    changed = complete_task(db, task.task_id, output_json)
    return replace(started, status=ExecutionStatus.COMPLETED, changed=changed)


def _has_result(db: Db, execution_id: str, output_json: str) -> bool:
    (recorded,) = db.all("dependency_outputs", execution=number_of(db, execution_id))
    return jsontext.same(recorded["output_json"], output_json)


def _hand_out(db: Db, row: Row, worker_id: str, lease_ms: int, streamed: bool) -> Task:
    node = row["node"]
    if row["attempts"]:
        db.run("keep_attempt", node=node)
    task_id = new_task_id(node)
    db.run(
        "take_task",
        node=node,
        task_id=task_id,
        worker_id=worker_id,
        streamed=int(streamed),
        now=db.now_ms,
        lease_expires_ms=db.now_ms + lease_ms,
    )
    return _task(db, row, task_id, row["attempts"] + 1)


def _task(db: Db, node: Row, task_id: str, attempt: int) -> Task:
    key = node["idempotency_key"]
    execution_id, node_id = node["execution_id"], node["node_id"]
    return Task(
        task_id=task_id,
        execution_id=execution_id,
        node_id=node_id,
        node_type=node["node_type"],
        version_hash=node["version_hash"],
        attempt=attempt,
        # If the caller gave no key, make one in the format of the published Nexum server.
        idempotency_key=f"{node['workflow_id']}:{key}:{node_id}"
        if key
        else f"{execution_id}:{node_id}:{node['version_hash']}",
        input_json="" if node["input_json"] is None else _task_input(db, node),
        input_bytes=node["task_bytes"],
    )


def _note_oversized(db: Db, worker_id: str, version_hashes: tuple[str, ...], max_bytes: int) -> ReadyTask | None:
    for version_hash in version_hashes:
        row = db.one("oversized_task", version_hash=version_hash, now=db.now_ms, max_bytes=max_bytes)
        if row is not None:
            db.run(
                "say_why_waiting",
                node=row["node"],
                error=f"the task is {row['task_bytes']:,} bytes, more than worker {worker_id} can receive "
                f"({max_bytes:,}): it waits for a worker that can receive more",
            )
            return ReadyTask(version_hash, row["task_bytes"])
    return None


def task_input(db: Db, task_id: str) -> str:
    """Return the input of a task that was handed out without its input."""
    row = db.one("task_payload", node=number_of(db, task_id))
    if row is None:
        raise TaskNotFound(task_id)
    return _task_input(db, row)


def _task_input(db: Db, node: Row) -> str:
    """Return `{"input": …, "deps": {…}}` as text. Its JSON parts were checked when they were stored."""
    dependencies: list[str] = json.loads(node["dependencies"])
    deps = ""
    if dependencies:
        outputs = {
            row["node_id"]: row["output_json"] for row in db.all("dependency_outputs", execution=node["execution"])
        }
        deps = ",".join(f"{json.dumps(name)}:{outputs[name]}" for name in dependencies)
    return f'{{"input":{node["input_json"]},"deps":{{{deps}}}}}'


def find_attempt(db: Db, task_id: str) -> Row | None:
    """Return an attempt with its node and execution, or None if the task is unknown."""
    return db.one("attempt", node=number_of(db, task_id), task_id=task_id)


def _reported_attempt(db: Db, task_id: str) -> Row:
    check_id(task_id, "task_id")
    row = find_attempt(db, task_id)
    if row is None:
        raise TaskNotFound(task_id)
    return row


def _check_may_report(row: Row) -> None:
    """Raise StaleTask (fencing) unless the attempt in `row` may report.

    Only the newest attempt at a node may report, once, while the execution is running.
    """
    what = f"attempt {row['attempt']} at node {row['node_id']!r} of execution {row['execution_id']}"
    if row["execution_status"] != ExecutionStatus.RUNNING:
        raise StaleTask(f"{what} reports too late: the execution is {row['execution_status']}")
    if row["outcome"] in (Outcome.COMPLETED, Outcome.FAILED):
        raise StaleTask(f"{what} was already reported as {row['outcome']}, with other contents")
    if row["attempt"] != row["newest_attempt"]:
        raise StaleTask(
            f"{what} is over ({row['outcome']}): attempt {row['newest_attempt']} was handed out later, "
            f"and only that attempt may report"
        )


def complete_task(db: Db, task_id: str, output_json: str) -> Changed:
    """Record a node's result. Make the next nodes ready, or end the execution after its last node.

    A second report with the same output changes nothing. Raises TaskNotFound for an unknown task, InvalidRequest for an
    output that isn't JSON, and StaleTask if the attempt may not report.
    """
    jsontext.parse(output_json, "output_json")
    row = _reported_attempt(db, task_id)
    execution_id = row["execution_id"]
    if row["outcome"] == Outcome.COMPLETED:
        recorded = db.one("node_output", node=row["node"])
        if recorded is not None and jsontext.same(recorded["output_json"], output_json):
            return Changed()
    _check_may_report(row)
    if len(output_json) > MAX_INLINE_BYTES and output_bytes(db, execution_id) + len(output_json) > MAX_OUTPUT_BYTES:
        raise TooLarge(f"the outputs of execution {execution_id} are over the limit of {MAX_OUTPUT_BYTES:,} bytes")
    db.run("record_output", node=row["node"], output_json=output_json, attempt=row["attempt"], now=db.now_ms)
    changes = Changes()
    if row["unrecorded"] > 1:  # `unrecorded` still counts this node
        advance(db, row["execution"], row["version_hash"], changes)
    else:
        is_short = row["is_only_node"] and len(output_json) <= MAX_INLINE_BYTES
        node = Node(row["node_id"], row["node_type"], NodeStatus.COMPLETED, output_json, "")
        only_node = node if is_short else None
        changes.ended.append(end_execution(db, row["execution"], ExecutionStatus.COMPLETED, "", only_node))
    return changes.freeze()


def advance(db: Db, execution: int, version_hash: str, changes: Changes) -> None:
    """Turn the nodes of a running execution that became ready into tasks."""
    nodes = {node["node_id"]: node for node in db.all("node_states", execution=execution)}
    dependencies: dict[str, list[str]] = {name: json.loads(node["dependencies"]) for name, node in nodes.items()}
    ready = scheduling.ready_nodes(dependencies, {name: NodeStatus(node["status"]) for name, node in nodes.items()})
    if not ready:
        return
    sizes = {part["node_id"]: int(part["bytes"]) for part in db.all("input_sizes", execution=execution)}
    for node_id in ready:
        parts = ("", *dependencies[node_id])
        task_bytes = TASK_FRAME_BYTES + sum(sizes[part] + len(json.dumps(part)) + 2 for part in parts)
        db.run("make_ready", node=nodes[node_id]["node"], task_bytes=task_bytes, now=db.now_ms)
        changes.ready.append(ReadyTask(version_hash, task_bytes))


def fail_task(db: Db, task_id: str, error: str, final: bool) -> Changed:
    """Record a failed attempt. The node is retried later, or fails together with its execution.

    A second report with the same error changes nothing. Raises TaskNotFound for an unknown task, and StaleTask if the
    attempt may not report.
    """
    row = _reported_attempt(db, task_id)
    error = _shortened(error) or "the worker gave no reason"
    if row["outcome"] == Outcome.FAILED and row["error"] == error:
        return Changed()
    _check_may_report(row)
    # Count a lost attempt as failed, and no longer as lost, if its worker still reports the failure.
    lost = -1 if row["outcome"] in (Outcome.LOST, Outcome.EXPIRED) else 0
    end = AttemptEnd(Outcome.FAILED, error, failed=1, lost=lost)
    failed_attempts = row["failed_attempts"] + 1
    delay_ms = None if final else scheduling.retry_delay_ms(failed_attempts)
    changes = Changes()
    if delay_ms is None:
        reason = error if final else f"{error} (attempt {failed_attempts} of {scheduling.MAX_FAILED_ATTEMPTS})"
        fail_node(db, row, reason, end, changes)
    else:
        changes.retry_ms = db.now_ms + delay_ms
        retry_node(db, row, changes.retry_ms, end)
    return changes.freeze()


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended without a result, and what its end adds to the node's counts of failures and losses."""

    outcome: Outcome
    error: str
    failed: int = 0
    lost: int = 0


def retry_node(db: Db, row: Row, due_ms: int, end: AttemptEnd) -> bool:
    """End the attempt in `row`, and make its node a task again. Return False if the node has already ended."""
    return bool(
        db.run(
            "retry_node",
            node=row["node"],
            attempt=row["attempt"],
            due_ms=due_ms,
            outcome=end.outcome.value,
            attempt_error=end.error,
            failed=end.failed,
            lost=end.lost,
            now=db.now_ms,
        )
    )


def fail_node(db: Db, row: Row, reason: str, end: AttemptEnd, changes: Changes) -> None:
    """End the attempt in `row`, and mark its node and execution as FAILED, unless the node has already ended."""
    failed = db.run(
        "fail_node",
        node=row["node"],
        attempt=row["attempt"],
        error=reason,
        outcome=end.outcome.value,
        attempt_error=end.error,
        failed=end.failed,
        lost=end.lost,
        now=db.now_ms,
    )
    if failed:
        error = f"{row['node_id']}: {reason}"
        changes.ended.append(end_execution(db, row["execution"], ExecutionStatus.FAILED, error))


def _shortened(error: str) -> str:
    if len(error) <= MAX_ERROR_CHARACTERS:
        return error
    return f"{error[:MAX_ERROR_CHARACTERS]} [cut: {MAX_ERROR_CHARACTERS:,} of {len(error):,} characters]"


def release(db: Db, task_id: str, reason: str) -> Changed:
    """Release a task that never reached its worker. The attempt counts as neither failed nor lost."""
    row = find_attempt(db, task_id)
    if row is None or row["outcome"] != Outcome.RUNNING:
        return Changed()
    retry_node(db, row, db.now_ms, AttemptEnd(Outcome.INTERRUPTED, reason))
    # Announce the task with size 0, so that any poll is woken. The poll's claim checks the true size.
    return Changed(ready=(ReadyTask(row["version_hash"], 0),))

"""Transitions of tasks: hand out, report, release."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from nexum_engine import jsontext
from nexum_engine.errors import Conflict, InvalidRequest, StaleTask, TaskNotFound
from nexum_engine.records import Effect, ExecutionStatus, Node, NodeStatus, NodeType, Outcome, Task
from nexum_engine.store import flow
from nexum_engine.store.db import Db, Row, brief, row_of
from nexum_engine.store.definitions import definition_of, retry_of
from nexum_engine.store.executions import start_execution
from nexum_engine.store.ids import new_task_id, number_of
from nexum_engine.store.limits import gate_of, pass_through, slot_freed
from nexum_engine.store.reading import MAX_INLINE_BYTES
from nexum_engine.store.results import Changes, Claim, Gate, ReadyTask, StoredStart
from nexum_engine.workflow import check_id

MAX_ERROR_CHARACTERS = 4000


@brief
def claim(
    db: Db, worker_id: str, version_hashes: tuple[str, ...], max_bytes: int, lease_ms: int, streamed: bool
) -> Claim:
    """Hand a worker the task that has been due the longest, as a new attempt with a lease.

    A task with a large input is returned without the input: add the input with `with_payload`.
    """
    opening: list[tuple[str, int]] = []
    candidates = [
        found for version in version_hashes if (found := _oldest_task(db, version, max_bytes, opening)) is not None
    ]
    if not candidates:
        return Claim(oversized=_note_oversized(db, worker_id, version_hashes, max_bytes), opening=tuple(opening))
    row, gate = min(candidates, key=lambda one: int(one[0]["due_ms"]))
    if gate.opens_ms is not None:
        opening.append((row["version_hash"], gate.opens_ms))
    return Claim(_hand_out(db, row, gate, worker_id, lease_ms, streamed), opening=tuple(opening))


def _oldest_task(db: Db, version_hash: str, max_bytes: int, opening: list[tuple[str, int]]) -> tuple[Row, Gate] | None:
    """Return the task that has been due the longest, with its gate. Skip the tasks that a limit holds back.

    If a rate holds a task back, add to `opening` when the rate lets the task pass.
    """
    held: list[str] = []
    while True:
        row = db.one(
            "oldest_task",
            version_hash=version_hash,
            now=db.now_ms,
            max_bytes=max_bytes,
            max_inline=MAX_INLINE_BYTES,
            held=json.dumps(held),
        )
        if row is None:
            return None
        gate = gate_of(db, row, lock=True)
        if gate.is_open:
            return row, gate
        if gate.opens_ms is not None:
            opening.append((version_hash, gate.opens_ms))
        held.append(row["node_id"])
        if len(held) == len(definition_of(db, row["workflow_id"], version_hash)):
            return None  # limits hold back all nodes of the version


@brief
def start_owned(
    db: Db,
    workflow_id: str,
    version_hash: str,
    input_json: str,
    idempotency_key: str,
    owner: str,
    lease_ms: int,
    held_task_id: str = "",
    output_json: str = "",
    attributes: Mapping[str, str] | None = None,
) -> StoredStart:
    """Start or find the execution of the idempotency key, and hand its only node to `owner` as an attempt.

    No poll ever gets the node. If the execution's previous owner is dead, `owner` takes over. If the effect of the node
    is unknown, the execution waits for a person, and `owner` gets no task. If a limit holds the node back, `owner` gets
    no task now. With `output_json`, the attempt is completed at once. With `held_task_id`, the start is refused if
    `owner` no longer holds that task. So if another process has taken over a session, the session's former owner can't
    record events any more. The new lease is not longer than the rest of that task's lease: the start may come from an
    owner whose connection has broken since. Raises the errors of `start_execution`, and:

    - InvalidRequest for a workflow of several nodes,
    - Conflict if another owner holds the execution, if the execution was started for workers, or if `output_json` is
      given although the effect of the execution's node is unknown,
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
        lease_ms = min(lease_ms, max(0, (held["due_ms"] or 0) - db.now_ms))
    started = start_execution(
        db,
        workflow_id,
        version_hash,
        input_json,
        idempotency_key,
        owner=owner,
        output_json=output_json,
        attributes=attributes,
    )
    if started.status.ended:
        if started.existing and output_json and not _has_result(db, started.execution_id, output_json):
            is_completed = started.status is ExecutionStatus.COMPLETED
            what = "has another result" if is_completed else f"is {started.status.value}, without a result"
            raise StaleTask(f"{workflow_id} {idempotency_key!r} {what} (execution {started.execution_id})")
        return started
    number = number_of(db, started.execution_id)
    db.lock(number)
    node = db.one("owned_node", execution=number)
    if node is None or not node["owned"]:
        raise Conflict(f"execution {started.execution_id} was started for workers: it can't have an owner")
    if node["status"] == NodeStatus.WAITING:
        if output_json:
            raise Conflict(f"{workflow_id} {idempotency_key!r} waits for a person (execution {started.execution_id})")
        return replace(started, unknown=True)
    if node["status"] == NodeStatus.READY:
        # With `output_json`, the work is already done: no limit applies.
        gate = Gate() if output_json else gate_of(db, node, lock=True)
        if not gate.is_open:
            return replace(started, held=gate, held_version=node["version_hash"])
        task = _hand_out(db, node, gate, owner, lease_ms, streamed=True)
        started = replace(started, lease_ends_ms=db.now_ms + min(lease_ms, task.timeout_ms or lease_ms))
    elif node["worker_id"] == owner:
        task = _task(db, node, node["task_id"], node["attempts"])
    else:
        raise Conflict(
            f"{workflow_id} {idempotency_key!r} is in use by {node['worker_id']} "
            f"(execution {started.execution_id}): wait until the execution has ended, or end that process"
        )
    if not output_json:
        return replace(started, task=task)
    changed = complete_task(db, task.task_id, output_json)
    return replace(started, status=ExecutionStatus.COMPLETED, changed=changed)


def _has_result(db: Db, execution_id: str, output_json: str) -> bool:
    recorded = [row["output_json"] for row in db.all("recorded_outputs", execution=number_of(db, execution_id))]
    return len(recorded) == 1 and jsontext.same(recorded[0], output_json)


def _hand_out(db: Db, row: Row, gate: Gate, worker_id: str, lease_ms: int, streamed: bool) -> Task:
    node = row["node"]
    pass_through(db, row, gate)
    if row["attempts"]:
        db.run("keep_attempt", node=node)
    task_id = new_task_id(node)
    db.run(
        "take_task",
        node=node,
        task_id=task_id,
        worker_id=worker_id,
        streamed=streamed,
        now=db.now_ms,
        lease_expires_ms=db.now_ms + min(lease_ms, row["timeout_ms"] or lease_ms),
    )
    return _task(db, row, task_id, row["attempts"] + 1)


def _task(db: Db, node: Row, task_id: str, attempt: int) -> Task:
    is_item = node["node_type"] == NodeType.MAP_SUBTASK
    # A worker sees the task of an item as a task of the MAP node.
    seen = row_of(db, "map_of_item", item=node["execution"]) if is_item else node
    is_short = node["input_json"] is not None
    return Task(
        task_id=task_id,
        execution_id=seen["execution_id"],
        node_id=seen["node_id"],
        node_type=node["node_type"],
        version_hash=node["version_hash"],
        attempt=attempt,
        idempotency_key=_key_of(seen, node["node_id"]),
        input_json=_task_input(db, seen) if is_short else "",
        input_bytes=node["task_bytes"],
        timeout_ms=node["timeout_ms"],
        progress_json=node["progress_json"] or "",
        map_index=seen["child_index"] if is_item else 0,
        map_total=seen["total"] if is_item else 0,
        map_item_json=node["input_json"] if is_item and is_short else "",
        must_reconcile=node["effect"] == Effect.MUST_RECONCILE,
    )


def _key_of(execution: Row, node_id: str) -> str:
    """Return the idempotency key of a node's tasks. All attempts at the node have the same key."""
    key = execution["idempotency_key"]
    if key:
        return f"{execution['workflow_id']}:{key}:{node_id}"
    # If the caller gave no key, make one in the format that published Nexum servers use (docs/wire.md).
    return f"{execution['execution_id']}:{node_id}:{execution['version_hash']}"


def _note_oversized(db: Db, worker_id: str, version_hashes: tuple[str, ...], max_bytes: int) -> ReadyTask | None:
    for version_hash in version_hashes:
        row = db.one("oversized_task", version_hash=version_hash, now=db.now_ms, max_bytes=max_bytes)
        if row is not None:
            db.run(
                "note_why_ready",
                node=row["node"],
                error=f"the task is {row['task_bytes']:,} bytes, more than worker {worker_id} can receive "
                f"({max_bytes:,}): it waits for a worker that can receive more",
            )
            return ReadyTask(version_hash, row["task_bytes"])
    return None


def note_largest_task(db: Db, version_hash: str, max_bytes: int) -> bool:
    """Note that a worker of a version can receive tasks of `max_bytes`. Return whether the version is registered."""
    db.run("note_largest_task", version_hash=version_hash, bytes=max_bytes)
    return row_of(db, "largest_task", version_hash=version_hash)["bytes"] is not None


def with_payload(db: Db, task: Task) -> Task:
    """Add the input to a task that was handed out without it. Raises TaskNotFound."""
    row = db.one("task_payload", node=number_of(db, task.task_id))
    if row is None:
        raise TaskNotFound(task.task_id)
    if row["node_type"] != NodeType.MAP_SUBTASK:
        return replace(task, input_json=_task_input(db, row))
    of_map = row_of(db, "map_of_item", item=row["execution"])
    return replace(task, input_json=_task_input(db, of_map), map_item_json=row["input_json"])


def _task_input(db: Db, node: Row) -> str:
    """Return `{"input": …, "deps": {…}}` as text. Its JSON parts were checked when they were stored."""
    dependencies: list[str] = json.loads(node["dependencies"])
    deps = ""
    if dependencies:
        outputs = {
            row["node_id"]: row["output_json"] for row in db.all("recorded_outputs", execution=node["execution"])
        }
        # A skipped node has no output.
        deps = ",".join(f"{json.dumps(name)}:{outputs[name]}" for name in dependencies if name in outputs)
    return f'{{"input":{node["input_json"]},"deps":{{{deps}}}}}'


def find_attempt(db: Db, task_id: str) -> Row | None:
    """Return an attempt with its node and execution, or None if the task is unknown.

    No other server changes the execution before the commit.
    """
    node = number_of(db, task_id)
    db.lock(node // 1000)
    return db.one("attempt", node=node, task_id=task_id)


def _reported_attempt(db: Db, task_id: str) -> Row:
    check_id(task_id, "task_id")
    row = find_attempt(db, task_id)
    if row is None:
        raise TaskNotFound(task_id)
    return row


def _for_newest(row: Row) -> Row:
    """Return the attempt for which a report of the attempt in `row` counts: the attempt in `row` or the newest one.

    A worker of the published Python SDK holds more tasks than it runs, so a task may wait in the worker for longer than
    its lease. If the same worker then gets the task again, its report of the old attempt counts for the newest attempt.
    Otherwise, a worker with a long queue would run each task again and again, and none of its reports would count.
    """
    overtaken = row["attempt"] != row["newest_attempt"] and row["outcome"] in (Outcome.EXPIRED, Outcome.INTERRUPTED)
    if not overtaken or row["newest_streamed"] or row["newest_worker"] != row["worker_id"] or row["owned"]:
        return row
    return {**row, "attempt": row["newest_attempt"], "outcome": row["newest_outcome"], "error": row["newest_error"]}


def _check_may_report(row: Row) -> None:
    """Raise StaleTask (fencing) unless the attempt in `row` may report.

    Only the newest attempt at a node may report, once, while the execution is running. `_for_newest`
    allows one more case.
    """
    what = f"attempt {row['attempt']} at node {row['node_id']!r} of execution {row['execution_id']}"
    if row["execution_status"] != ExecutionStatus.RUNNING:
        raise StaleTask(f"{what} reports too late: the execution is {row['execution_status']}")
    if row["outcome"] in (Outcome.COMPLETED, Outcome.FAILED):
        raise StaleTask(f"{what} was already reported as {row['outcome']}, with other contents")
    if row["outcome"] == Outcome.TIMED_OUT:
        raise StaleTask(f"{what} reports too late: {row['error']}")
    if row["attempt"] != row["newest_attempt"]:
        later = (
            "a person has decided about it"
            if row["outcome"] == Outcome.UNKNOWN
            else f"attempt {row['newest_attempt']} was handed out later, and only that attempt may report"
        )
        raise StaleTask(f"{what} is over ({row['outcome']}): {later}")


@brief
def complete_task(db: Db, task_id: str, output_json: str) -> Changes:
    """Record a node's result. Make the next nodes ready, or end the execution after its last node.

    The result of a MAP or SUBWORKFLOW node's task starts executions, and the node waits for them. A second report with
    the same output changes nothing. Raises TaskNotFound for an unknown task, InvalidRequest for an output that isn't
    JSON or that doesn't fit the type of the node, WorkflowNotFound for an unknown workflow of a SUBWORKFLOW node, and
    StaleTask if the attempt may not report. After an error, the worker still holds the task.
    """
    output = jsontext.parse(output_json, "output_json")
    row = _for_newest(_reported_attempt(db, task_id))
    if row["outcome"] == Outcome.COMPLETED and _was_reported(db, row, output, output_json):
        return Changes()
    _check_may_report(row)
    changes = Changes()
    node_type = NodeType(row["node_type"])
    if node_type is NodeType.ROUTER:
        _check_route(db, row, output)
    if node_type is NodeType.SUBWORKFLOW or (node_type is NodeType.MAP and output != []):
        _start_executions(db, row, output, changes)
    else:
        _record(db, row, output_json, changes)
    return changes


def _was_reported(db: Db, row: Row, output: object, output_json: str) -> bool:
    """Return whether the attempt in `row`, which is COMPLETED, reported this output.

    The report of a MAP or SUBWORKFLOW node is not stored: compare the output with the executions that the node started.
    """
    children = db.all("children", node=row["node"]) if NodeType(row["node_type"]).starts_executions else []
    if row["node_type"] == NodeType.SUBWORKFLOW:
        (child,) = children
        started = f'{{"subWorkflowId":{json.dumps(child["workflow_id"])},"childInput":{child["input_json"]}}}'
        if isinstance(output, dict):
            output_json = json.dumps({name: output.get(name) for name in ("subWorkflowId", "childInput")})
        return jsontext.same(started, output_json)
    if children:
        return jsontext.same(f"[{','.join(child['input_json'] for child in children)}]", output_json)
    recorded = db.one("node_output", node=row["node"])
    return (
        recorded is not None
        and recorded["output_json"] is not None
        and jsontext.same(recorded["output_json"], output_json)
    )


def _record(db: Db, row: Row, output_json: str, changes: Changes) -> None:
    execution_id = row["execution_id"]
    flow.check_outputs_fit(db, execution_id, output_json)
    db.run("record_output", node=row["node"], output_json=output_json, attempt=row["attempt"], now=db.now_ms)
    slot_freed(db, row, changes)
    if row["unrecorded"] > 1:  # counted before this node was recorded, so more than 1 means that other nodes are left
        flow.advance(db, row["execution"], row["workflow_id"], row["version_hash"], changes)
    else:
        is_short = row["is_only_node"] and len(output_json) <= MAX_INLINE_BYTES
        node = Node(row["node_id"], row["node_type"], NodeStatus.COMPLETED, output_json, "")
        only_node = node if is_short else None
        flow.end_execution(db, row["execution"], ExecutionStatus.COMPLETED, "", changes, only_node)


def _check_route(db: Db, row: Row, output: object) -> None:
    targets = definition_of(db, row["workflow_id"], row["version_hash"])[row["node_id"]].targets
    if not isinstance(output, dict) or output.get("routed_to") not in targets:
        raise InvalidRequest(
            f'the result of ROUTER node {row["node_id"]!r} must be {{"routed_to": TARGET}}, where TARGET is one of: '
            f"{', '.join(map(repr, targets))}"
        )


class _ChildStart(BaseModel):
    """The result of a SUBWORKFLOW node's task."""

    sub_workflow_id: str = Field(alias="subWorkflowId", min_length=1, strict=True)
    child_input: Any = Field(default=None, alias="childInput")


def _start_executions(db: Db, row: Row, output: object, changes: Changes) -> None:
    """Start the executions that the result of a node's task asks for. The node then waits until they have ended."""
    db.run("wait_for_children", node=row["node"], attempt=row["attempt"], now=db.now_ms)
    if row["node_type"] == NodeType.MAP:
        if not isinstance(output, list):
            raise InvalidRequest(f"the result of MAP node {row['node_id']!r} must be a list of items")
        flow.start_items(db, row, output, changes)
        return
    try:
        start = _ChildStart.model_validate(output)
    except ValidationError as error:
        raise InvalidRequest(
            f'the result of SUBWORKFLOW node {row["node_id"]!r} must be {{"subWorkflowId": NAME, "childInput": …}}'
        ) from error
    input_json = jsontext.dump(start.child_input, "childInput")
    flow.start_child(db, row, start.sub_workflow_id, input_json, changes)


@brief
def fail_task(db: Db, task_id: str, error: str, final: bool, unknown: bool = False) -> Changes:
    """Record a failed attempt. The node is retried later, or fails together with its execution.

    With `unknown`, the effect of an EFFECT node may have happened: the node waits for a person. But if a worker's next
    attempt can find out whether the effect has happened, the node is handed out again. An owned node waits for a person
    in any case: its owner has to find out before it reports. A second report with the same error changes nothing.
    Raises TaskNotFound for an unknown task, and StaleTask if the attempt may not report.
    """
    row = _reported_attempt(db, task_id)
    error = _shortened(error) or "the worker gave no reason"
    unknown = unknown and row["node_type"] == NodeType.EFFECT
    if row["outcome"] in (Outcome.FAILED, Outcome.UNKNOWN) and row["error"] == error:
        return Changes()
    _check_may_report(row)
    changes = Changes()
    lost = -counted_as_lost(row)  # the worker of the attempt still reports
    if unknown:
        if row["effect"] != Effect.RECONCILE or row["owned"]:
            wait_for_person(db, row, error, changes, lost=lost)
        else:
            retry_node(db, row, 0, AttemptEnd(Outcome.FAILED, error, lost=lost), changes)
            db.run("must_reconcile", node=row["node"])
        return changes
    end = AttemptEnd(Outcome.FAILED, error, failed=1, lost=lost)
    retry_or_fail(db, row, end, final, changes)
    return changes


def counted_as_lost(row: Row) -> int:
    """Return 1 if the attempt in `row`, the newest one, is among the node's lost attempts; else 0."""
    # After `retry_execution`, the node has fresh counts, but its newest attempt may still be one that was lost before.
    return int(row["outcome"] in (Outcome.LOST, Outcome.EXPIRED) and not row["owned"] and row["lost_attempts"] > 0)


def retry_or_fail(db: Db, row: Row, end: AttemptEnd, final: bool, changes: Changes) -> None:
    """End an attempt that counts as failed. If the node's retry policy allows it, retry the node, else fail it."""
    retry, failed_attempts = retry_of(row), row["failed_attempts"] + end.failed
    delay_ms = None if final else retry.delay_ms(failed_attempts)
    if delay_ms is None:
        reason = end.error if final else f"{end.error} (attempt {failed_attempts} of {retry.max_attempts})"
        fail_node(db, row, reason, end, changes)
    else:
        retry_node(db, row, delay_ms, end, changes)


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended without a result, and what its end adds to the node's counts of failures and losses."""

    outcome: Outcome
    error: str
    failed: int = 0
    lost: int = 0


def _ended(db: Db, row: Row, end: AttemptEnd) -> dict[str, object]:
    """Return what a query that ends the attempt in `row` must know."""
    return {
        "node": row["node"],
        "attempt": row["attempt"],
        "outcome": end.outcome.value,
        "attempt_error": end.error,
        "failed": end.failed,
        "lost": end.lost,
        "now": db.now_ms,
    }


def retry_node(db: Db, row: Row, delay_ms: int, end: AttemptEnd, changes: Changes) -> bool:
    """End the attempt in `row`, and make its node a task again. Return False if the node has already ended."""
    retried = db.changes("retry_node", due_ms=db.now_ms + delay_ms, **_ended(db, row, end)) > 0
    slot_freed(db, row, changes)
    if retried and not row["owned"]:  # an owned node waits for its owner
        if delay_ms:
            changes.due_at(db.now_ms + delay_ms)
        else:
            changes.ready.append(ReadyTask(row["version_hash"], row["task_bytes"]))
    return retried


def fail_node(db: Db, row: Row, reason: str, end: AttemptEnd, changes: Changes) -> None:
    """End the attempt in `row`, and mark its node and execution as FAILED, unless the node has already ended."""
    if db.changes("fail_node", error=reason, **_ended(db, row, end)):
        slot_freed(db, row, changes)
        flow.end_execution(db, row["execution"], ExecutionStatus.FAILED, f"{row['node_id']}: {reason}", changes)


def wait_for_person(
    db: Db, row: Row, error: str, changes: Changes, lease_loss: Outcome | None = None, *, lost: int = 0
) -> None:
    """End the attempt in `row`, whose effect is unknown. The node waits for a person, unless the node has ended.

    `lease_loss` says how the attempt's lease ran out: if the attempt's worker comes back, the attempt is resumed.
    `lease_loss` is None if the attempt ended for another reason, and then the attempt is never resumed. `lost` is added
    to the node's count of losses.
    """
    db.run(
        "wait_for_person",
        node=row["node"],
        attempt=row["attempt"],
        error=error,
        lease_loss=None if lease_loss is None else lease_loss.value,
        lost=lost,
        now=db.now_ms,
    )
    slot_freed(db, row, changes)


def _shortened(error: str) -> str:
    if len(error) <= MAX_ERROR_CHARACTERS:
        return error
    return f"{error[:MAX_ERROR_CHARACTERS]} [cut: {MAX_ERROR_CHARACTERS:,} of {len(error):,} characters]"


def release(db: Db, task_id: str, reason: str) -> Changes:
    """Release a task that never reached its worker. The attempt counts as neither failed nor lost."""
    row = find_attempt(db, task_id)
    if row is None or row["outcome"] != Outcome.RUNNING:
        return Changes()
    changes = Changes()
    retry_node(db, row, 0, AttemptEnd(Outcome.INTERRUPTED, reason), changes)
    return changes

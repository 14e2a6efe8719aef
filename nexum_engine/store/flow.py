"""The flow of an execution: what follows when a node begins to wait or ends, up to the end of the execution.

Each function is a part of a transition, runs inside the transition's transaction, and adds its effects to `changes`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone

from nexum_engine import jsontext, scheduling
from nexum_engine.errors import InvalidRequest, TooLarge, WorkflowNotFound
from nexum_engine.records import Execution, ExecutionStatus, Node, NodeStatus, NodeType, Outcome
from nexum_engine.store.db import Db, Row, row_of
from nexum_engine.store.definitions import columns_of, definition_of, milliseconds, parsed
from nexum_engine.store.ids import node_number, random_part
from nexum_engine.store.limits import slot_freed
from nexum_engine.store.reading import MAX_INLINE_BYTES, execution_of, get_execution, output_bytes
from nexum_engine.store.results import Changes, ReadyTask
from nexum_engine.workflow import NodeDefinition

TASK_FRAME_BYTES = 64
"""An upper bound of the size of the text that encloses the payloads in a task's input_json."""
MAX_OUTPUT_BYTES = 64 * 1024 * 1024
"""The largest total size of an execution's outputs. Each reader of the execution holds them all in memory."""
MAX_ITEMS = 10_000
"""The largest number of items of a MAP node.

There is a limit, because one transaction starts all the items' tasks, and all other transactions wait for it.
"""
MAX_DEPTH = 100
"""How deep SUBWORKFLOW nodes may be nested: a workflow that starts itself must not do so for ever."""

# ---- The nodes that follow -------------------------------------------------------------------------------------------


def begin(db: Db, added: Row, workflow_id: str, version_hash: str, task_bytes: int, changes: Changes) -> None:
    """Add the nodes of a new execution.

    A node that depends on no other node becomes a task, or begins to wait for a time, a person or an event. `added` is
    the row of the execution, with the IR of its version. `task_bytes` is the size of a task that gets only the input.
    """
    definitions = parsed(added["ir_json"])
    settled = scheduling.settle(definitions, dict.fromkeys(definitions, NodeStatus.PENDING), {})
    waiting: list[tuple[int, NodeDefinition]] = []
    for position, node in enumerate(definitions.values()):
        number = node_number(added["sequence"], position)
        is_task = settled.get(node.node_id) is NodeStatus.READY
        db.run(
            "add_node",
            node=number,
            node_id=node.node_id,
            node_type=node.node_type.value,
            dependencies=json.dumps(node.dependencies),
            version_hash=version_hash,
            status=(NodeStatus.READY if is_task else NodeStatus.PENDING).value,
            due_ms=db.now_ms if is_task else None,
            task_bytes=task_bytes if is_task else None,
            owned=False,
            **columns_of(node),
        )
        if is_task:
            changes.ready.append(ReadyTask(version_hash, task_bytes))
        elif node.node_id in settled:
            waiting.append((number, node))
    completed = [number for number, node in waiting if _begin_waiting(db, number, node, changes)]
    if completed:
        advance(db, added["sequence"], workflow_id, version_hash, changes)


def advance(db: Db, execution: int, workflow_id: str, version_hash: str, changes: Changes) -> None:
    """Find the PENDING nodes that no longer wait for other nodes. Make each one a task, let it wait, or skip it.

    End the execution if all its nodes are done.
    """
    definitions = definition_of(db, workflow_id, version_hash)
    again = True
    while again:  # after a node that completes at once, other nodes may begin
        rows = {row["node_id"]: row for row in db.all("node_states", execution=execution)}
        statuses = {node_id: NodeStatus(rows[node_id]["status"]) for node_id in definitions}
        settled = scheduling.settle(definitions, statuses, _choices(db, execution, definitions, rows))
        again = False
        for node_id, status in settled.items():
            number, node = rows[node_id]["node"], definitions[node_id]
            if status is NodeStatus.SKIPPED:
                db.run("skip_node", node=number)
            elif status is NodeStatus.WAITING:
                again |= _begin_waiting(db, number, node, changes)
        _make_ready(
            db,
            execution,
            version_hash,
            [(rows[name]["node"], definitions[name]) for name, to in settled.items() if to is NodeStatus.READY],
            changes,
        )
        statuses.update(settled)
    if scheduling.DONE.issuperset(statuses.values()):
        end_execution(db, execution, ExecutionStatus.COMPLETED, "", changes)


def _choices(
    db: Db, execution: int, definitions: Mapping[str, NodeDefinition], rows: Mapping[str, Row]
) -> dict[str, str]:
    """Return the target that each router has chosen.

    An EVENT node whose event did not come in time counts as a router that has chosen `on_timeout`.
    """
    chosen: dict[str, str] = {}
    if any(node.routes for node in definitions.values()):
        for row in db.all("choices", execution=execution):
            chosen[row["node_id"]] = json.loads(row["output_json"])["routed_to"]
    for node in definitions.values():
        if node.on_timeout and rows[node.node_id]["outcome"] == Outcome.EXPIRED:  # its event did not come in time
            chosen[node.node_id] = node.on_timeout
    return chosen


def _make_ready(
    db: Db, execution: int, version_hash: str, ready: list[tuple[int, NodeDefinition]], changes: Changes
) -> None:
    if not ready:
        return
    sizes = {part["node_id"]: int(part["bytes"]) for part in db.all("payload_sizes", execution=execution)}
    for number, node in ready:
        parts = ("", *(name for name in node.dependencies if name in sizes))  # a skipped node has no output
        task_bytes = TASK_FRAME_BYTES + sum(sizes[part] + len(json.dumps(part)) + 2 for part in parts)
        db.run("make_ready", node=number, task_bytes=task_bytes, now=db.now_ms)
        changes.ready.append(ReadyTask(version_hash, task_bytes))


# ---- Nodes that wait -------------------------------------------------------------------------------------------------


def _begin_waiting(db: Db, number: int, node: NodeDefinition, changes: Changes) -> bool:
    """Let a PENDING node wait for a time, a person or an event. Return True if it completes at once."""
    seconds = node.delay_seconds if node.node_type is NodeType.TIMER else node.timeout_seconds
    # Add 1 ms, so that no timer is early: `now_ms` is rounded down.
    due_ms = None if seconds is None else db.now_ms + 1 + milliseconds(seconds)
    db.run("begin_waiting", node=number, due_ms=due_ms, event=node.event or None, now=db.now_ms)
    if node.node_type is NodeType.TIMER and not node.delay_seconds:
        return db.changes("complete_waiting", node=number, output_json=timer_output(db, node), now=db.now_ms) > 0
    if node.node_type is NodeType.EVENT and use_event(db, number, node.event):
        return True
    if due_ms is not None:
        changes.due_at(due_ms)
    return False


def timer_output(db: Db, node: NodeDefinition) -> str:
    """Return the output of a TIMER node that completes now."""
    now = datetime.fromtimestamp(db.now_ms / 1000, tz=timezone.utc).isoformat(timespec="milliseconds")
    return jsontext.dump({"waited_until": now, "delay_seconds": node.delay_seconds}, "the timer's output")


def use_event(db: Db, number: int, name: str) -> bool:
    """Complete a WAITING node with the first unused event of this name. Return False if there is no such event."""
    execution = number // 1000
    event = db.one("unused_event", execution=execution, name=name)
    if event is None:
        return False
    db.run("use_event", execution=execution, number=event["number"], node=number)
    return db.changes("complete_waiting", node=number, output_json=event["payload_json"], now=db.now_ms) > 0


def complete_waiting(db: Db, node: Row, output_json: str, changes: Changes) -> None:
    """Record the output of a WAITING node, and advance its execution. Do nothing if the node no longer waits."""
    if db.changes("complete_waiting", node=node["node"], output_json=output_json, now=db.now_ms):
        advance(db, node["execution"], node["workflow_id"], node["version_hash"], changes)


def fail_waiting(db: Db, node: Row, reason: str, changes: Changes) -> None:
    """Fail a WAITING node and its execution. Do nothing if the node no longer waits."""
    if db.changes("fail_waiting", node=node["node"], error=reason, now=db.now_ms):
        end_execution(db, node["execution"], ExecutionStatus.FAILED, f"{node['node_id']}: {reason}", changes)


# ---- Executions that a node starts -----------------------------------------------------------------------------------


def start_items(db: Db, node: Row, items: list[object], changes: Changes) -> None:
    """Start an execution for each item of a MAP node. Each of these executions has one node, which is a task."""
    if len(items) > MAX_ITEMS:
        raise InvalidRequest(
            f"the result of MAP node {node['node_id']!r} has {len(items):,} items; the limit is {MAX_ITEMS:,}"
        )
    texts = [jsontext.dump(item, "an item") for item in items]
    db.run(
        "add_items",
        items=json.dumps([[random_part(), text] for text in texts], ensure_ascii=False),
        workflow_id=node["workflow_id"],
        version_hash=node["version_hash"],
        now=db.now_ms,
        parent_node=node["node"],
    )
    db.run(
        "add_item_nodes",
        node_id=node["node_id"],
        now=db.now_ms,
        parent_node=node["node"],
        task_bytes=node["task_bytes"],
        timeout_ms=node["timeout_ms"],
        retry=node["retry"],
    )
    changes.ready += [ReadyTask(node["version_hash"], node["task_bytes"] + jsontext.size_of(text)) for text in texts]


def start_child(db: Db, node: Row, workflow_id: str, input_json: str, changes: Changes) -> None:
    """Start an execution of the latest version of `workflow_id` for a SUBWORKFLOW node. Raises WorkflowNotFound."""
    latest = db.one("latest_version", workflow_id=workflow_id)
    if latest is None:
        raise WorkflowNotFound(workflow_id)
    if row_of(db, "depth", execution=node["execution"])["depth"] >= MAX_DEPTH:
        raise InvalidRequest(
            f"node {node['node_id']!r} can't start {workflow_id!r}: the execution is already nested {MAX_DEPTH} deep, "
            "which is the limit"
        )
    added = row_of(
        db,
        "add_child",
        random=random_part(),
        workflow_id=workflow_id,
        version_hash=latest["version_hash"],
        input_json=input_json,
        now=db.now_ms,
        parent_node=node["node"],
    )
    child = {**added, "ir_json": latest["ir_json"]}
    task_bytes = jsontext.size_of(input_json) + TASK_FRAME_BYTES
    begin(db, child, workflow_id, latest["version_hash"], task_bytes, changes)


def _child_ended(db: Db, child: Row, changes: Changes) -> None:
    """Complete the node that started `child` if all executions that the node started have completed.

    Fail the node if `child` has failed or was cancelled.
    """
    parent = db.one("node_at", node=child["parent_node"])
    if parent is None or parent["status"] != NodeStatus.WAITING:
        return  # the parent has ended before, and its end has cancelled this execution
    status = ExecutionStatus(child["status"])
    if status is not ExecutionStatus.COMPLETED:
        end = f"failed: {child['error']}" if status is ExecutionStatus.FAILED else "was cancelled"
        is_item = child["child_index"] is not None and status is ExecutionStatus.FAILED
        fail_waiting(db, parent, child["error"] if is_item else f"execution {child['execution_id']} {end}", changes)
        return
    if parent["node_type"] == NodeType.SUBWORKFLOW:
        last = db.one("last_output", execution=child["sequence"])
        output = "null" if last is None else last["output_json"]
        fits = outputs_fit(db, parent["execution_id"], jsontext.size_of(output))
    elif db.one("running_child", node=parent["node"]) is not None:
        return
    else:
        fits = outputs_fit(db, parent["execution_id"], row_of(db, "item_result_bytes", node=parent["node"])["bytes"])
        # Read the results only if they fit: together, they may be larger than the memory.
        results = db.all("item_results", node=parent["node"]) if fits else []
        output = f"[{','.join(row['output_json'] for row in results)}]"
    if fits:
        complete_waiting(db, parent, output, changes)
    else:
        reason = f"with its result, the outputs of the execution are over the limit of {MAX_OUTPUT_BYTES:,} bytes"
        fail_waiting(db, parent, reason, changes)


def outputs_fit(db: Db, execution_id: str, size: int) -> bool:
    """Return whether an execution's outputs, with `size` bytes more, are within MAX_OUTPUT_BYTES.

    To save a query, a `size` up to MAX_INLINE_BYTES always counts as fitting.
    """
    return size <= MAX_INLINE_BYTES or output_bytes(db, execution_id) + size <= MAX_OUTPUT_BYTES


def check_outputs_fit(db: Db, execution_id: str, output_json: str) -> None:
    """Raise TooLarge if an execution's outputs, with one more, are over MAX_OUTPUT_BYTES."""
    if not outputs_fit(db, execution_id, jsontext.size_of(output_json)):
        raise TooLarge(f"the outputs of execution {execution_id} are over the limit of {MAX_OUTPUT_BYTES:,} bytes")


# ---- The end ---------------------------------------------------------------------------------------------------------


def end_execution(
    db: Db, execution: int, status: ExecutionStatus, error: str, changes: Changes, only_node: Node | None = None
) -> None:
    """End the running execution with the number `execution`, its unfinished nodes, and the executions they started.

    An execution with large payloads is added to `changes` without its input and nodes. Callers that wait for the
    execution then read the payloads from the store. If the execution has only one node, and the node's output is not
    large, give the node as `only_node`: this saves three queries.
    """
    row = row_of(
        db,
        "end_execution",
        execution=execution,
        status=status.value,
        error=error,
        now=db.now_ms,
        max_inline=MAX_INLINE_BYTES,
    )
    if status is not ExecutionStatus.COMPLETED:
        for node in db.all("cancel_nodes", execution=execution, now=db.now_ms):
            if node["outcome"] == Outcome.CANCELLED:
                slot_freed(db, node, changes)
        db.run("cancel_item_nodes", execution=execution, now=db.now_ms)
        changes.ended_items += [
            item["execution_id"] for item in db.all("cancel_items", execution=execution, now=db.now_ms)
        ]
        for child in db.all("running_children", execution=execution):
            end_execution(db, child["sequence"], ExecutionStatus.CANCELLED, "", changes)
    if row["child_index"] is None:
        changes.ended.append(_ended(db, row, only_node))
    else:
        changes.ended_items.append(row["execution_id"])
    if row["parent_node"] is not None:
        _child_ended(db, {**row, "sequence": execution}, changes)


def _ended(db: Db, row: Row, only_node: Node | None) -> Execution:
    if only_node is not None and row["input_json"]:
        return execution_of(row, (only_node,))
    return get_execution(db, row["execution_id"], max_bytes=MAX_INLINE_BYTES)

"""Transitions of workflows and executions: register, start, read, cancel, end.

Each function runs inside one transaction, and is the same for every database. If the state doesn't allow a change, the
function raises an error of `nexum_engine.errors`, and its changes are rolled back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from nexum_engine import jsontext
from nexum_engine.errors import (
    Conflict,
    ExecutionNotFound,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    TooLarge,
    VersionConflict,
    WorkflowNotFound,
)
from nexum_engine.records import (
    Attempt,
    Compatibility,
    Execution,
    ExecutionStatus,
    Node,
    NodeStatus,
    Outcome,
    WorkflowVersion,
)
from nexum_engine.store.db import Db, Row
from nexum_engine.store.ids import new_task_id, node_number, number_of, random_part
from nexum_engine.store.results import Changed, Started
from nexum_engine.workflow import NodeDefinition, check_attributes, check_id, compatibility, parse_ir

TASK_FRAME_BYTES = 64
"""An upper bound of the size of the text that encloses the payloads in a task's input_json."""
MAX_OUTPUT_BYTES = 64 * 1024 * 1024
"""The largest total size of an execution's outputs. Whoever reads the execution holds them all in memory."""
MAX_INLINE_BYTES = 64 * 1024
"""The size up to which a transition returns payloads at once. Larger payloads are read separately when needed."""
MAX_VERSIONS = 1000
MAX_ATTEMPTS = 10_000
"""The largest number of versions, and of attempts, in one answer."""

# ---- Workflows -------------------------------------------------------------------------------------------------------


_parse_again = lru_cache(maxsize=256)(parse_ir)


def _definition(ir_json: str) -> Mapping[str, NodeDefinition]:
    # Remember only short definitions: the memory must stay small whatever clients register.
    return _parse_again(ir_json) if len(ir_json) <= MAX_INLINE_BYTES else parse_ir(ir_json)


def register_workflow(db: Db, workflow_id: str, version_hash: str, ir_json: str) -> Compatibility:
    """Store a workflow version, and return its compatibility with the version that was registered before it.

    Returns IDENTICAL if the version is already registered. Raises InvalidRequest for an IR that can't run, and
    VersionConflict if the hash is registered with another definition.
    """
    check_id(workflow_id, "workflow_id")
    check_id(version_hash, "version_hash")
    definition = _definition(ir_json)
    known = db.one("version", workflow_id=workflow_id, version_hash=version_hash)
    if known is not None:
        if _definition(known["ir_json"]) != definition:
            raise VersionConflict(
                f"version {version_hash!r} of workflow {workflow_id!r} is registered with another definition: "
                "a changed workflow needs a new version_hash"
            )
        return Compatibility.IDENTICAL
    latest = db.one("latest_version", workflow_id=workflow_id)
    result = Compatibility.NEW if latest is None else compatibility(_definition(latest["ir_json"]), definition)
    db.run(
        "add_version",
        workflow_id=workflow_id,
        version_hash=version_hash,
        ir_json=ir_json,
        compatibility=result.value,
        now=db.now_ms,
    )
    return result


def workflow_versions(db: Db, workflow_id: str) -> list[WorkflowVersion]:
    """Return the versions of a workflow, the latest first. An unknown workflow has no versions."""
    check_id(workflow_id, "workflow_id")
    return [
        WorkflowVersion(
            row["workflow_id"],
            row["version_hash"],
            Compatibility(row["compatibility"]),
            row["registered_ms"],
            row["active_executions"],
        )
        for row in db.all("versions", workflow_id=workflow_id, limit=MAX_VERSIONS)
    ]


# ---- Executions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnedResult:
    """A node's result that its owner sends with the start. `output_json` is valid JSON."""

    owner: str
    streamed: bool
    output_json: str


def start_execution(
    db: Db,
    workflow_id: str,
    version_hash: str,
    input_json: str,
    idempotency_key: str,
    *,
    owned: bool = False,
    result: OwnedResult | None = None,
    attributes: Mapping[str, str] | None = None,
    max_task_bytes: int | None = None,
) -> Started:
    """Store an execution and its first tasks, or find the RUNNING or COMPLETED execution of the idempotency key.

    An `owned` execution has one node, and no poll gets this node. With `result`, a new owned execution is stored as
    COMPLETED. `max_task_bytes` is the size of the largest task that any worker can receive. Raises WorkflowNotFound for
    an unknown version, InvalidRequest for an input that isn't JSON and for wrong attributes, TooLarge for an input that
    no worker can receive, and IdempotencyConflict if the key's execution has another input.
    """
    check_id(workflow_id, "workflow_id")
    check_id(version_hash, "version_hash")
    input_json = input_json or "null"
    jsontext.parse(input_json, "input_json")
    if attributes:
        check_attributes(attributes)
    if idempotency_key:
        check_id(idempotency_key, "idempotency_key")
        latest = db.one("execution_of_key", workflow_id=workflow_id, idempotency_key=idempotency_key)
        if latest is not None:
            if not jsontext.same(latest["input_json"], input_json):
                raise IdempotencyConflict(
                    f"idempotency key {idempotency_key!r} belongs to execution {latest['execution_id']}, which has "
                    "another input: use another key for another input"
                )
            status = ExecutionStatus(latest["status"])
            if status in (ExecutionStatus.RUNNING, ExecutionStatus.COMPLETED):
                return Started(latest["execution_id"], status, existing=True)
    task_bytes = jsontext.size_of(input_json) + TASK_FRAME_BYTES
    if max_task_bytes is not None and task_bytes > max_task_bytes:
        raise TooLarge(
            f"the input is {task_bytes - TASK_FRAME_BYTES:,} bytes, more than any known worker of version "
            f"{version_hash} can receive ({max_task_bytes - TASK_FRAME_BYTES:,}): put the data into a file, or start a "
            "worker with a larger limit (max_task_bytes), and then this execution"
        )
    status = ExecutionStatus.RUNNING if result is None else ExecutionStatus.COMPLETED
    added = db.one(
        "add_execution",
        random=random_part(),
        workflow_id=workflow_id,
        version_hash=version_hash,
        status=status.value,
        input_json=input_json,
        idempotency_key=idempotency_key or None,
        now=db.now_ms,
        ended_ms=db.now_ms if status.ended else None,
    )
    if added is None:
        raise WorkflowNotFound(workflow_id, version_hash)
    for name, value in (attributes or {}).items():
        db.run("add_attribute", execution=added["sequence"], name=name, value=value)
    definition = _definition(added["ir_json"])
    if owned and len(definition) != 1:
        raise InvalidRequest(f"workflow {workflow_id!r} has {len(definition)} nodes: an owned execution has one")
    for position, node in enumerate(definition.values()):
        ready = not node.dependencies
        number = node_number(added["sequence"], position)
        fields = {
            "node": number,
            "node_id": node.node_id,
            "node_type": node.node_type.value,
            "dependencies": json.dumps(node.dependencies),
            "version_hash": version_hash,
            "task_bytes": task_bytes if ready else None,
            "owned": int(owned),
        }
        if result is None:
            db.run(
                "add_node",
                **fields,
                status=(NodeStatus.READY if ready else NodeStatus.PENDING).value,
                due_ms=db.now_ms if ready and not owned else None,
            )
        else:
            db.run(
                "add_recorded_node",
                **fields,
                task_id=new_task_id(number),
                worker_id=result.owner,
                streamed=int(result.streamed),
                now=db.now_ms,
                output_json=result.output_json,
            )
    roots = sum(not node.dependencies for node in definition.values())
    return Started(added["execution_id"], status, existing=False, ready=roots)


def execution_of(row: Row, nodes: tuple[Node, ...] = ()) -> Execution:
    """Return the execution of a row, which has its attributes as JSON."""
    return Execution(
        row["execution_id"],
        row["workflow_id"],
        row["version_hash"],
        ExecutionStatus(row["status"]),
        row["input_json"],
        row["idempotency_key"] or "",
        row["created_ms"],
        row["ended_ms"],
        row["error"],
        nodes,
        json.loads(row["attributes"]),
    )


def get_execution(
    db: Db,
    execution_id: str,
    with_attempts: bool = False,
    *,
    max_bytes: int | None = None,
    max_answer_bytes: int | None = None,
) -> Execution:
    """Return an execution with its nodes. Raises ExecutionNotFound for an unknown id.

    If the input, outputs and attempts are larger than `max_bytes`, the execution has no input and no nodes. If they are
    larger than `max_answer_bytes`, the largest of input and outputs are left out: the execution has their sizes.
    """
    found = {"execution": number_of(db, execution_id), "execution_id": execution_id}
    is_large = max_bytes is not None and payload_bytes(db, execution_id, with_attempts) > max_bytes
    row = db.one("execution_without_input" if is_large else "execution", **found)
    if row is None:
        raise ExecutionNotFound(execution_id)
    if is_large:
        return execution_of(row)
    attempts: dict[str, list[Attempt]] = {}
    if with_attempts:
        for a in db.all("attempts", execution=row["sequence"], limit=MAX_ATTEMPTS):
            attempts.setdefault(a["node_id"], []).append(
                Attempt(a["attempt"], a["worker_id"], a["started_ms"], a["ended_ms"], Outcome(a["outcome"]), a["error"])
            )
    left_out: dict[str, int] = {}
    if max_answer_bytes is not None:
        left_out = _left_out(db, row["sequence"], with_attempts, max_answer_bytes)
    nodes = tuple(
        Node(
            node["node_id"],
            node["node_type"],
            NodeStatus(node["status"]),
            node["output_json"],
            node["error"],
            tuple(attempts.get(node["node_id"], ())),
            left_out.get(node["node_id"], 0),
        )
        for node in db.all("nodes", execution=row["sequence"], left_out=json.dumps(list(left_out)))
    )
    execution = execution_of(row, nodes)
    return replace(execution, input_json="", input_bytes=left_out[""]) if "" in left_out else execution


def _left_out(db: Db, execution: int, with_attempts: bool, max_bytes: int) -> dict[str, int]:
    """Return the sizes of the input (under an empty name) and outputs, the largest first, that don't fit an answer."""
    sizes = {part["node_id"]: int(part["bytes"]) for part in db.all("input_sizes", execution=execution)}
    rest = ("frame_bytes", "attempt_sizes") if with_attempts else ("frame_bytes",)
    total = sum(sizes.values()) + sum(int(row["bytes"]) for query in rest for row in db.all(query, execution=execution))
    left_out: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
        if total <= max_bytes:
            break
        total -= sizes[name]
        left_out[name] = sizes[name]
    return left_out


def payload_part(db: Db, execution_id: str, node_id: str, offset: int, length: int) -> tuple[bytes, int]:
    """Return a part of a node's output, or of the input if `node_id` is empty, and the size of the whole, in bytes.

    Raises ExecutionNotFound for an unknown id, and NotFound if there is no such node, or if it has no output.
    """
    execution = number_of(db, execution_id)
    if db.one("sequence", execution=execution, execution_id=execution_id) is None:
        raise ExecutionNotFound(execution_id)
    row = db.one("payload_part", execution=execution, node_id=node_id, offset=offset, length=length)
    if row is None or row["bytes"] is None:
        why = "it has no such node" if row is None else "the node has not completed"
        raise NotFound(f"execution {execution_id} has no output of node {node_id!r}: {why}")
    return bytes(row["data"]), int(row["bytes"])


def payload_bytes(db: Db, execution_id: str, with_attempts: bool = False) -> int:
    """Return the size of an execution's input, recorded outputs and attempts. An unknown execution has none."""
    execution = number_of(db, execution_id)
    parts = db.all("input_sizes", execution=execution)
    if with_attempts:
        parts = [*parts, *db.all("attempt_sizes", execution=execution)]
    return sum(int(part["bytes"]) for part in parts)


def output_bytes(db: Db, execution_id: str) -> int:
    """Return an upper bound of the size of an execution's recorded outputs, including the nodes' names."""
    row = db.one("output_bytes", execution=number_of(db, execution_id))
    return int(row["bytes"]) if row is not None else 0


def cancel_execution(db: Db, execution_id: str) -> Changed:
    """Cancel a running execution. If the execution is already cancelled, nothing changes.

    Raises ExecutionNotFound for an unknown id, and Conflict if the execution has completed or failed.
    """
    found = {"execution": number_of(db, execution_id), "execution_id": execution_id}
    row = db.one("execution_without_input", **found)
    if row is None:
        raise ExecutionNotFound(execution_id)
    if row["status"] == ExecutionStatus.CANCELLED:
        return Changed()
    if row["status"] != ExecutionStatus.RUNNING:
        raise Conflict(f"execution {execution_id} is {row['status']} and can't be cancelled any more")
    return Changed(ended=(end_execution(db, row["sequence"], ExecutionStatus.CANCELLED, ""),))


def end_execution(
    db: Db, execution: int, status: ExecutionStatus, error: str, only_node: Node | None = None
) -> Execution:
    """End the running execution with the number `execution`, and its unfinished nodes. Return the ended execution.

    An execution with large payloads is returned without its input and nodes. A waiting caller reads them. Give the
    only node of an execution, unless its output is large, as `only_node`: this saves three queries.
    """
    row = db.one(
        "end_execution",
        execution=execution,
        status=status.value,
        error=error,
        now=db.now_ms,
        max_inline=MAX_INLINE_BYTES,
    )
    assert row is not None, f"execution {execution} has ended before"
    if status is not ExecutionStatus.COMPLETED:
        db.run("cancel_nodes", execution=execution, now=db.now_ms)
    if only_node is not None and row["input_json"]:
        return execution_of(row, (only_node,))
    return get_execution(db, row["execution_id"], max_bytes=MAX_INLINE_BYTES)

"""Transitions of workflows and executions: register, start, read, cancel, end.

Each function runs inside one transaction, and is the same for every database. If the state doesn't allow a change, the
function raises an error of `nexum_engine.errors`, and its changes are rolled back.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from nexum_engine import jsontext
from nexum_engine.errors import (
    Conflict,
    ExecutionNotFound,
    IdempotencyConflict,
    InvalidRequest,
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
from nexum_engine.workflow import NodeDefinition, check_id, compatibility, parse_ir

TASK_FRAME_BYTES = 64
"""An upper bound of the size of the text that encloses the payloads in a task's input_json."""
MAX_OUTPUT_BYTES = 64 * 1024 * 1024
"""The largest total size of an execution's outputs. Whoever reads the execution holds them all in memory."""
MAX_INLINE_BYTES = 64 * 1024
"""The size up to which a transition returns payloads at once. Larger payloads are read separately when needed."""
MAX_VERSIONS = 1000
MAX_ATTEMPTS = 10_000
"""The largest number of versions, and of attempts, in one answer."""
MAX_LIST_BYTES = 16 * 1024 * 1024
"""The largest total size of the inputs and outputs in one list of executions.

Server and client hold the whole list in memory.
"""

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
) -> Started:
    """Store an execution and its first tasks, or find the RUNNING or COMPLETED execution of the idempotency key.

    An `owned` execution has one node, and no poll gets this node. With `result`, a new owned execution is stored as
    COMPLETED. Raises WorkflowNotFound for an unknown version, InvalidRequest for an input that isn't JSON, and
    IdempotencyConflict if the key's execution has another input.
    """
    check_id(workflow_id, "workflow_id")
    check_id(version_hash, "version_hash")
    input_json = input_json or "null"
    jsontext.parse(input_json, "input_json")
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
    task_bytes = jsontext.size_of(input_json) + TASK_FRAME_BYTES
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


def _execution(row: Row, nodes: tuple[Node, ...] = ()) -> Execution:
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
    )


def get_execution(db: Db, execution_id: str, with_attempts: bool = False, *, max_bytes: int | None = None) -> Execution:
    """Return an execution with its nodes. Raises ExecutionNotFound for an unknown id.

    If the input, outputs and attempts are larger than `max_bytes`, the execution has no input and no nodes.
    """
    found = {"execution": number_of(db, execution_id), "execution_id": execution_id}
    is_large = max_bytes is not None and payload_bytes(db, execution_id, with_attempts) > max_bytes
    row = db.one("execution_without_input" if is_large else "execution", **found)
    if row is None:
        raise ExecutionNotFound(execution_id)
    if is_large:
        return _execution(row)
    attempts: dict[str, list[Attempt]] = {}
    if with_attempts:
        for a in db.all("attempts", execution=row["sequence"], limit=MAX_ATTEMPTS):
            attempts.setdefault(a["node_id"], []).append(
                Attempt(a["attempt"], a["worker_id"], a["started_ms"], a["ended_ms"], Outcome(a["outcome"]), a["error"])
            )
    nodes = tuple(
        Node(
            node["node_id"],
            node["node_type"],
            NodeStatus(node["status"]),
            node["output_json"],
            node["error"],
            tuple(attempts.get(node["node_id"], ())),
        )
        for node in db.all("nodes", execution=row["sequence"])
    )
    return _execution(row, nodes)


def list_executions(
    db: Db,
    workflow_id: str,
    status: str,
    limit: int,
    *,
    key_prefix: str = "",
    before: str = "",
    with_nodes: bool = False,
) -> list[Execution]:
    """Return at most `limit` executions, the newest first. An empty filter matches every execution.

    `key_prefix` is the beginning of an idempotency key. `before` is the id of an execution: only older executions
    match. The returned executions have inputs and nodes only if `with_nodes` is set. A list with nodes stops at
    MAX_LIST_BYTES, but has at least one execution if any matches.

    Raises InvalidRequest for an unknown status and for a prefix without a workflow. Raises ExecutionNotFound for an
    unknown `before`: an empty list would mean that no execution is older.
    """
    if status and status not in ExecutionStatus.__members__:
        raise InvalidRequest(f"unknown status {status!r}: use one of {', '.join(ExecutionStatus.__members__)}")
    if key_prefix and not workflow_id:
        raise InvalidRequest("keys belong to a workflow: give workflow_id with idempotency_key_prefix")
    oldest = db.one("sequence", execution=number_of(db, before), execution_id=before) if before else None
    if before and oldest is None:
        raise ExecutionNotFound(before)
    sequence = None if oldest is None else oldest["sequence"]
    filters = {"workflow_id": workflow_id, "status": status, "before": sequence, "limit": limit}
    if key_prefix:
        end = key_prefix + chr(sys.maxunicode)
        rows = db.all("executions_of_prefix", **filters, first=key_prefix, end=end)
    else:
        rows = db.all("executions", **filters)
    if not with_nodes:
        return [_execution(row) for row in rows]
    whole: list[Execution] = []
    left = MAX_LIST_BYTES
    for row in rows:
        left -= payload_bytes(db, row["execution_id"])
        if whole and left < 0:
            break
        whole.append(get_execution(db, row["execution_id"]))
    return whole


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
        return _execution(row, (only_node,))
    return get_execution(db, row["execution_id"], max_bytes=MAX_INLINE_BYTES)

"""Reading executions: one with its nodes, lists, sizes. Nothing here changes the database."""

from __future__ import annotations

import sys

from nexum_engine.errors import ExecutionNotFound, InvalidRequest
from nexum_engine.records import Attempt, Execution, ExecutionStatus, Node, NodeStatus, Outcome
from nexum_engine.store.db import Db, Row
from nexum_engine.store.ids import number_of

MAX_INLINE_BYTES = 64 * 1024
"""The size up to which a transition returns payloads at once. Larger payloads are read separately when needed."""
MAX_ATTEMPTS = 10_000
"""The largest number of attempts in one answer."""
MAX_LIST_BYTES = 16 * 1024 * 1024
"""The largest total size of the inputs and outputs in one list of executions.

Server and client hold the whole list in memory.
"""


def execution_of_row(row: Row, nodes: tuple[Node, ...] = ()) -> Execution:
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
        row["parent_execution_id"] or "",
        row["parent_node_id"] or "",
        row["child_index"],
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
        return execution_of_row(row)
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
            node["progress_json"] or "",
            node["due_ms"] if node["status"] == NodeStatus.WAITING else None,
        )
        for node in db.all("nodes", execution=row["sequence"])
    )
    return execution_of_row(row, nodes)


def list_executions(
    db: Db,
    workflow_id: str,
    status: str,
    limit: int,
    *,
    key_prefix: str = "",
    before: str = "",
    with_nodes: bool = False,
    parent: str = "",
) -> list[Execution]:
    """Return at most `limit` executions, the newest first. An empty filter matches every execution.

    With `parent`, return only the executions that the nodes of this execution started. Without it, the tasks of MAP
    nodes are left out. `key_prefix` is the beginning of an idempotency key. `before` is the id of an execution: only
    older executions match. The returned executions have inputs and nodes only if `with_nodes` is set. A list with nodes
    stops at MAX_LIST_BYTES, but has at least one execution if any matches.

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
    if parent:
        rows = db.all("executions_of_parent", **filters, parent=number_of(db, parent), parent_execution_id=parent)
    elif key_prefix:
        end = key_prefix + chr(sys.maxunicode)
        rows = db.all("executions_of_prefix", **filters, first=key_prefix, end=end)
    else:
        rows = db.all("executions", **filters)
    if not with_nodes:
        return [execution_of_row(row) for row in rows]
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

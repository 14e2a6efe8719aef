"""Reading one execution: its nodes, attempts, sizes, and parts of its payloads. Nothing here changes the database."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from nexum_engine.errors import ExecutionNotFound, NotFound
from nexum_engine.records import Attempt, Execution, ExecutionStatus, Node, NodeStatus, Outcome
from nexum_engine.store.db import Db, Row, brief, of_one_snapshot, row_of
from nexum_engine.store.ids import number_of
from nexum_engine.store.limits import gate_of
from nexum_engine.store.results import Gate, News

MAX_INLINE_BYTES = 64 * 1024
"""The size up to which a transition returns payloads with its result. Larger ones are read separately when needed."""
MAX_ATTEMPTS = 10_000
"""The largest number of attempts in one answer."""
MAX_OFFSET = 2**31 - 2
"""The largest offset that PostgreSQL accepts. No payload is that long."""


def execution_of(row: Row, nodes: tuple[Node, ...] = ()) -> Execution:
    """Return the execution that is in `row`. The row has the attributes as JSON."""
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
        parent_execution_id=row["parent_execution_id"] or "",
        parent_node_id=row["parent_node_id"] or "",
        child_index=row["child_index"],
    )


def find_execution(db: Db, execution_id: str, *, lock: bool = False, with_input: bool = False) -> Row:
    """Return the row of an execution. Raises ExecutionNotFound for an unknown id.

    With `lock`, no other server changes the execution before the commit. Without `with_input`, the input is empty.
    """
    number = number_of(db, execution_id)
    if lock:
        db.lock(number)
    row = db.one("execution", execution=number, execution_id=execution_id, with_input=with_input)
    if row is None:
        raise ExecutionNotFound(execution_id)
    return row


@brief
@of_one_snapshot
def get_execution(
    db: Db,
    execution_id: str,
    with_attempts: bool = False,
    *,
    max_bytes: int | None = None,
    max_answer_bytes: int | None = None,
) -> Execution:
    """Return an execution with its nodes. Raises ExecutionNotFound for an unknown id.

    If the input, outputs and attempts together are larger than `max_bytes`, the execution is returned without its input
    and nodes. If they are larger than `max_answer_bytes`, the largest payloads are left out, and only their sizes are
    returned.
    """
    if max_bytes is not None and payload_bytes(db, execution_id, with_attempts) > max_bytes:
        return execution_of(find_execution(db, execution_id))
    row = find_execution(db, execution_id, with_input=True)
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
            _note(db, node),
            tuple(attempts.get(node["node_id"], ())),
            node["progress_json"] or "",
            node["due_ms"] if node["status"] == NodeStatus.WAITING else None,
            left_out.get(node["node_id"], 0),
            node["effect"] is not None,
        )
        for node in db.all("nodes", execution=row["sequence"], left_out=json.dumps(list(left_out)))
    )
    execution = execution_of(row, nodes)
    return replace(execution, input_json="", input_bytes=left_out[""]) if "" in left_out else execution


def _note(db: Db, node: Row) -> str:
    """Return the error of a node. If a limit holds the node back, return a text that names the limit."""
    gate = gate_of(db, node) if node["status"] == NodeStatus.READY else Gate()
    return str(node["error"]) if gate.is_open else gate.why


def _left_out(db: Db, execution: int, with_attempts: bool, max_bytes: int) -> dict[str, int]:
    """Return the sizes of the payloads to leave out of an answer, by node id. The input has an empty id.

    The largest payloads are left out first.
    """
    sizes = {part["node_id"]: int(part["bytes"]) for part in db.all("payload_sizes", execution=execution)}
    rest = ("frame_bytes", "attempt_sizes") if with_attempts else ("frame_bytes",)
    total = sum(sizes.values()) + sum(int(row["bytes"]) for query in rest for row in db.all(query, execution=execution))
    left_out: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
        if total <= max_bytes:
            break
        total -= sizes[name]
        left_out[name] = sizes[name]
    return left_out


def missed(db: Db, version_hashes: Sequence[str], execution_ids: Sequence[str]) -> News:
    """Return which of the versions have a due task, and which of the executions have ended."""
    due = db.all("versions_with_task", version_hashes=json.dumps(version_hashes), now=db.now_ms)
    numbers = {number_of(db, execution_id): execution_id for execution_id in execution_ids}
    ended = db.all("ended_of", sequences=json.dumps(list(numbers)))
    return News(tuple(row["version_hash"] for row in due), tuple(numbers[row["sequence"]] for row in ended))


def queued_tasks(db: Db, limit: int) -> int:
    """Return the number of tasks that wait for a worker, or `limit` if there are more."""
    return int(row_of(db, "queued_tasks", limit=limit)["tasks"])


def payload_part(db: Db, execution_id: str, node_id: str, offset: int, length: int) -> tuple[bytes, int]:
    """Return a part of a node's output, or of the input if `node_id` is empty, and the size of the whole, in bytes.

    Raises ExecutionNotFound for an unknown id, and NotFound if there is no such node, or if it has no output.
    """
    execution = number_of(db, execution_id)
    if db.one("sequence", execution=execution, execution_id=execution_id) is None:
        raise ExecutionNotFound(execution_id)
    part = {"offset": min(offset, MAX_OFFSET), "length": length}
    row = db.one("payload_part", execution=execution, node_id=node_id, **part)
    if row is None or row["bytes"] is None:
        why = "it has no such node" if row is None else "the node has not completed"
        raise NotFound(f"execution {execution_id} has no output of node {node_id!r}: {why}")
    return bytes(row["data"]), int(row["bytes"])


def payload_bytes(db: Db, execution_id: str, with_attempts: bool = False) -> int:
    """Return the size of an execution's input, recorded outputs and attempts: 0 for an unknown execution."""
    execution = number_of(db, execution_id)
    parts = db.all("payload_sizes", execution=execution)
    if with_attempts:
        parts = [*parts, *db.all("attempt_sizes", execution=execution)]
    return sum(int(part["bytes"]) for part in parts)


def output_bytes(db: Db, execution_id: str) -> int:
    """Return an upper bound of the size of an execution's recorded outputs, including the nodes' names."""
    return int(row_of(db, "output_bytes", execution=number_of(db, execution_id))["bytes"])

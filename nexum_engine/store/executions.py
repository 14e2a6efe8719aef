"""Transitions of workflows and executions: register, start, cancel."""

from __future__ import annotations

from collections.abc import Mapping

from nexum_engine import jsontext
from nexum_engine.errors import (
    Conflict,
    IdempotencyConflict,
    InvalidRequest,
    Overloaded,
    TooLarge,
    VersionConflict,
    WorkflowNotFound,
)
from nexum_engine.records import Compatibility, ExecutionStatus, NodeStatus, NodeType, WorkflowVersion
from nexum_engine.store.db import Db, Row, brief, row_of
from nexum_engine.store.definitions import columns_of, parsed
from nexum_engine.store.flow import TASK_FRAME_BYTES, begin, end_execution
from nexum_engine.store.ids import new_task_id, node_number, random_part
from nexum_engine.store.reading import MAX_INLINE_BYTES, find_execution, get_execution
from nexum_engine.store.results import Changes, StoredStart
from nexum_engine.workflow import check_attributes, check_id, compatibility

QUEUE_RETRY_AFTER = 1.0  # seconds
MAX_VERSIONS = 1000
"""The largest number of versions in one answer."""

# ---- Workflows -------------------------------------------------------------------------------------------------------


def register_workflow(db: Db, workflow_id: str, version_hash: str, ir_json: str) -> Compatibility:
    """Store a workflow version, and return its compatibility with the version that was registered before it.

    Returns IDENTICAL if the version is already registered. Raises InvalidRequest for an IR that can't run, and
    VersionConflict if the hash is registered with another definition.
    """
    check_id(workflow_id, "workflow_id")
    check_id(version_hash, "version_hash")
    definition = parsed(ir_json)
    known = db.one("version", workflow_id=workflow_id, version_hash=version_hash)
    if known is not None:
        if parsed(known["ir_json"]) != definition:
            raise VersionConflict(
                f"version {version_hash!r} of workflow {workflow_id!r} is registered with another definition: "
                "a changed workflow needs a new version_hash"
            )
        return Compatibility.IDENTICAL
    latest = db.one("latest_version", workflow_id=workflow_id)
    result = Compatibility.NEW if latest is None else compatibility(parsed(latest["ir_json"]), definition)
    db.run(
        "add_version",
        workflow_id=workflow_id,
        version_hash=version_hash,
        ir_json=ir_json,
        compatibility=result.value,
        now=db.now_ms,
    )
    for node in definition.values():
        if node.is_limited:
            db.run("add_limit", workflow_id=workflow_id, node_id=node.node_id)
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


@brief
def start_execution(
    db: Db,
    workflow_id: str,
    version_hash: str,
    input_json: str,
    idempotency_key: str,
    *,
    owner: str = "",
    output_json: str = "",
    attributes: Mapping[str, str] | None = None,
    any_worker_bytes: int | None = None,
    full_at: int | None = None,
) -> StoredStart:
    """Store an execution and its first tasks, or find the RUNNING or COMPLETED execution of the idempotency key.

    A FAILED or CANCELLED execution of the key is found, too, if it has a node whose effect must happen only once. An
    execution with an `owner` has one node, and no poll gets this node. With `output_json`, which is valid JSON, a new
    owned execution is stored as COMPLETED. `any_worker_bytes` is the size up to which every worker can receive a task.
    `full_at` is the limit of the queue if the queue is full, else None.

    Raises WorkflowNotFound for an unknown version, Overloaded for a new execution if the queue is full, InvalidRequest
    for an input that isn't JSON and for wrong attributes, TooLarge for an input that no worker can receive, and
    IdempotencyConflict if the key's execution has another input.
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
            if status in (ExecutionStatus.RUNNING, ExecutionStatus.COMPLETED) or latest["has_once"]:
                ended = get_execution(db, latest["execution_id"], max_bytes=MAX_INLINE_BYTES) if status.ended else None
                return StoredStart(latest["execution_id"], status, existing=True, ended=ended)
    if full_at is not None:
        raise Overloaded(
            f"at least {full_at:,} tasks wait for workers, which is the limit of this server (--max-queue): retry, or "
            "start more workers",
            QUEUE_RETRY_AFTER,
        )
    task_bytes = jsontext.size_of(input_json) + TASK_FRAME_BYTES
    if any_worker_bytes is not None and task_bytes > any_worker_bytes:
        largest = max(any_worker_bytes, row_of(db, "largest_task", version_hash=version_hash)["bytes"] or 0)
        if task_bytes > largest:
            raise TooLarge(
                f"the input is {task_bytes - TASK_FRAME_BYTES:,} bytes, but no worker that has polled for version "
                f"{version_hash} can receive more than {largest - TASK_FRAME_BYTES:,}: put the data into a file, or "
                "start a worker with a larger limit (max_task_bytes) before this execution"
            )
    status = ExecutionStatus.COMPLETED if output_json else ExecutionStatus.RUNNING
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
    if owner:
        _add_owned_node(db, added, workflow_id, version_hash, task_bytes, owner, output_json)
        return StoredStart(added["execution_id"], status, existing=False)
    changes = Changes()
    begin(db, added, workflow_id, version_hash, task_bytes, changes)
    # If all nodes complete at once (for instance timers without a delay), the execution has already ended.
    status = next((one.status for one in changes.ended if one.execution_id == added["execution_id"]), status)
    return StoredStart(added["execution_id"], status, existing=False, changed=changes)


def _add_owned_node(
    db: Db, added: Row, workflow_id: str, version_hash: str, task_bytes: int, owner: str, output_json: str
) -> None:
    definition = parsed(added["ir_json"])
    if len(definition) != 1:
        raise InvalidRequest(
            f"workflow {workflow_id!r} has {len(definition)} nodes, but an owned execution can have only one"
        )
    (node,) = definition.values()
    if node.node_type not in (NodeType.EFFECT, NodeType.COMPUTE):
        raise InvalidRequest(f"node {node.node_id!r} is a {node.node_type.value} node: it can't have an owner")
    number = node_number(added["sequence"], 0)
    fields = {
        "node": number,
        "node_id": node.node_id,
        "node_type": node.node_type.value,
        "dependencies": "[]",
        "version_hash": version_hash,
        "task_bytes": task_bytes,
        "owned": True,
    }
    if output_json:
        db.run(
            "add_recorded_node",
            **fields,
            task_id=new_task_id(number),
            worker_id=owner,
            streamed=True,
            now=db.now_ms,
            output_json=output_json,
        )
    else:
        db.run("add_node", **fields, status=NodeStatus.READY.value, due_ms=None, **columns_of(node))


def cancel_execution(db: Db, execution_id: str, by: str = "") -> Changes:
    """Cancel a running execution, and record who did. If the execution is already cancelled, nothing changes.

    Raises ExecutionNotFound for an unknown id, and Conflict if the execution has completed or failed.
    """
    if by:
        check_id(by, "cancelled_by")
    row = find_execution(db, execution_id, lock=True)
    if row["status"] == ExecutionStatus.CANCELLED:
        return Changes()
    if row["status"] != ExecutionStatus.RUNNING:
        raise Conflict(f"execution {execution_id} is {row['status']} and can't be cancelled any more")
    changes = Changes()
    reason = f"cancelled by {by}" if by else ""
    end_execution(db, row["sequence"], ExecutionStatus.CANCELLED, reason, changes)
    return changes

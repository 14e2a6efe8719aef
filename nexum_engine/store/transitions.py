"""The engine's transitions: each function is one change of state inside one transaction, the same for every database.

A function checks the state that it expects and raises an error of `nexum_engine.errors` where it finds another; the
transaction is then rolled back. What a function returns may be acted on only after the commit, which the store sees to.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from functools import lru_cache

from nexum_engine import jsontext, scheduling
from nexum_engine.errors import (
    Conflict,
    ExecutionNotFound,
    IdempotencyConflict,
    InvalidRequest,
    StaleTask,
    TaskNotFound,
    VersionConflict,
    WorkflowNotFound,
)
from nexum_engine.model import (
    Attempt,
    Compatibility,
    Execution,
    ExecutionStatus,
    Node,
    NodeStatus,
    Outcome,
    Task,
    WorkflowVersion,
)
from nexum_engine.store.db import Db, Row
from nexum_engine.workflow import check_id, compatibility, parse_ir

MAX_ERROR_CHARACTERS = 4000
_TASK_FRAME_BYTES = 64
"""What a task's input_json has beside the payloads; an upper bound."""


@dataclass(frozen=True)
class ReadyTask:
    """A task that became due: what wakes a waiting poll."""

    version_hash: str
    task_bytes: int


@dataclass(frozen=True)
class Started:
    """The outcome of `start_execution`."""

    execution_id: str
    status: ExecutionStatus
    existing: bool
    ready: int = 0
    """How many tasks it began with."""


@dataclass(frozen=True)
class Changed:
    """What a report or a sweep changed beyond its own row."""

    ready: tuple[ReadyTask, ...] = ()
    ended: tuple[Execution, ...] = ()
    retry_ms: int | None = None
    """When a failed node becomes a task again."""


@dataclass(frozen=True)
class Claim:
    """The outcome of `claim`: a task, or the size of one that was too large for the worker."""

    task: Task | None = None
    oversized: ReadyTask | None = None


@dataclass(frozen=True)
class Swept:
    """The outcome of `sweep`."""

    changed: Changed
    next_ms: int | None
    """When the next lease runs out or the next retry is due."""


@dataclass
class _Changes:
    ready: list[ReadyTask] = field(default_factory=list)
    ended: list[Execution] = field(default_factory=list)
    retry_ms: int | None = None

    def freeze(self) -> Changed:
        return Changed(tuple(self.ready), tuple(self.ended), self.retry_ms)


# ---- Workflows -------------------------------------------------------------------------------------------------------


_definition = lru_cache(maxsize=256)(parse_ir)


def register_workflow(db: Db, workflow_id: str, version_hash: str, ir_json: str) -> Compatibility:
    """Store a version, unless it is there.

    Raises InvalidRequest for an IR that can't run, VersionConflict if the hash has another definition.
    """
    check_id(workflow_id, "workflow_id")
    check_id(version_hash, "version_hash")
    definition = _definition(ir_json)
    latest = db.one("latest_version", workflow_id=workflow_id)
    known = db.one("version", workflow_id=workflow_id, version_hash=version_hash)
    if known is not None and _definition(known["ir_json"]) != definition:
        raise VersionConflict(
            f"version {version_hash!r} of workflow {workflow_id!r} is registered with another definition: "
            "a changed workflow needs a new version_hash"
        )
    result = Compatibility.NEW if latest is None else compatibility(_definition(latest["ir_json"]), definition)
    if known is None:
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
    """The versions of a workflow, the latest first; none for an unknown one."""
    check_id(workflow_id, "workflow_id")
    return [
        WorkflowVersion(
            row["workflow_id"],
            row["version_hash"],
            Compatibility(row["compatibility"]),
            row["registered_ms"],
            row["active_executions"],
        )
        for row in db.all("versions", workflow_id=workflow_id)
    ]


# ---- Executions ------------------------------------------------------------------------------------------------------


def start_execution(db: Db, workflow_id: str, version_hash: str, input_json: str, idempotency_key: str) -> Started:
    """Store an execution and its first tasks, or find the key's RUNNING or COMPLETED one.

    Raises WorkflowNotFound, InvalidRequest for an input that isn't JSON, IdempotencyConflict for a key with another
    input.
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
    version = db.one("version", workflow_id=workflow_id, version_hash=version_hash)
    if version is None:
        raise WorkflowNotFound(workflow_id, version_hash)
    execution_id = f"exec-{uuid.uuid4()}"
    db.run(
        "add_execution",
        execution_id=execution_id,
        workflow_id=workflow_id,
        version_hash=version_hash,
        input_json=input_json,
        idempotency_key=idempotency_key or None,
        now=db.now_ms,
    )
    task_bytes = len(input_json.encode("utf-8")) + _TASK_FRAME_BYTES
    definition = _definition(version["ir_json"])
    for position, node in enumerate(definition.values()):
        ready = not node.dependencies
        db.run(
            "add_node",
            execution_id=execution_id,
            node_id=node.node_id,
            position=position,
            node_type=node.node_type.value,
            dependencies=json.dumps(node.dependencies),
            version_hash=version_hash,
            status=(NodeStatus.READY if ready else NodeStatus.PENDING).value,
            ready_ms=db.now_ms if ready else None,
            task_bytes=task_bytes if ready else None,
        )
    roots = sum(not node.dependencies for node in definition.values())
    return Started(execution_id, ExecutionStatus.RUNNING, existing=False, ready=roots)


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


def get_execution(db: Db, execution_id: str, with_attempts: bool = False) -> Execution:
    """One execution with its nodes. Raises ExecutionNotFound."""
    row = db.one("execution", execution_id=execution_id)
    if row is None:
        raise ExecutionNotFound(execution_id)
    attempts: dict[str, list[Attempt]] = {}
    if with_attempts:
        for a in db.all("attempts", execution_id=execution_id):
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
        for node in db.all("nodes", execution_id=execution_id)
    )
    return _execution(row, nodes)


def list_executions(db: Db, workflow_id: str, status: str, limit: int) -> list[Execution]:
    """The newest executions, without inputs and nodes. Raises InvalidRequest for a status that there isn't."""
    if status and status not in ExecutionStatus.__members__:
        raise InvalidRequest(f"status {status!r} is none of {', '.join(ExecutionStatus.__members__)}")
    return [_execution(row) for row in db.all("executions", workflow_id=workflow_id, status=status, limit=limit)]


def output_bytes(db: Db, execution_id: str) -> int:
    """How large the recorded outputs of an execution are."""
    row = db.one("output_bytes", execution_id=execution_id)
    return int(row["bytes"]) if row is not None else 0


def cancel_execution(db: Db, execution_id: str) -> Changed:
    """End a running execution; cancelling it again changes nothing.

    Raises ExecutionNotFound, Conflict if it ended otherwise.
    """
    row = db.one("execution", execution_id=execution_id)
    if row is None:
        raise ExecutionNotFound(execution_id)
    if row["status"] == ExecutionStatus.CANCELLED:
        return Changed()
    if row["status"] != ExecutionStatus.RUNNING:
        raise Conflict(f"execution {execution_id} is {row['status']} and can't be cancelled any more")
    return Changed(ended=(_end_execution(db, execution_id, ExecutionStatus.CANCELLED, ""),))


def _end_execution(db: Db, execution_id: str, status: ExecutionStatus, error: str) -> Execution:
    db.run("end_execution", execution_id=execution_id, status=status.value, error=error, now=db.now_ms)
    if status is not ExecutionStatus.COMPLETED:
        db.run("cancel_nodes", execution_id=execution_id)
        db.run("cancel_attempts", execution_id=execution_id, now=db.now_ms)
    return get_execution(db, execution_id)


# ---- Tasks -----------------------------------------------------------------------------------------------------------


def claim(
    db: Db, worker_id: str, version_hashes: tuple[str, ...], max_bytes: int, lease_ms: int, streamed: bool
) -> Claim:
    """Hand the task that has been due the longest to a worker, as a new attempt with a lease."""
    candidates = [
        row
        for version_hash in version_hashes
        if (row := db.one("oldest_task", version_hash=version_hash, now=db.now_ms, max_bytes=max_bytes)) is not None
    ]
    if not candidates:
        return Claim(oversized=_note_oversized(db, worker_id, version_hashes, max_bytes))
    node = min(candidates, key=lambda row: int(row["ready_ms"]))
    execution_id, node_id, attempt = node["execution_id"], node["node_id"], node["attempts"] + 1
    task_id = f"task-{uuid.uuid4()}"
    db.run("take_task", execution_id=execution_id, node_id=node_id)
    db.run(
        "add_attempt",
        task_id=task_id,
        execution_id=execution_id,
        node_id=node_id,
        attempt=attempt,
        worker_id=worker_id,
        streamed=int(streamed),
        now=db.now_ms,
        lease_expires_ms=db.now_ms + lease_ms,
    )
    key = node["idempotency_key"]
    return Claim(
        Task(
            task_id=task_id,
            execution_id=execution_id,
            node_id=node_id,
            node_type=node["node_type"],
            version_hash=node["version_hash"],
            attempt=attempt,
            # Without a key of the caller's: the published server's format.
            idempotency_key=f"{node['workflow_id']}:{key}:{node_id}"
            if key
            else f"{execution_id}:{node_id}:{node['version_hash']}",
            input_json=_task_input(db, node),
        )
    )


def _note_oversized(db: Db, worker_id: str, version_hashes: tuple[str, ...], max_bytes: int) -> ReadyTask | None:
    for version_hash in version_hashes:
        row = db.one("oversized_task", version_hash=version_hash, now=db.now_ms, max_bytes=max_bytes)
        if row is not None:
            db.run(
                "say_why_waiting",
                execution_id=row["execution_id"],
                node_id=row["node_id"],
                error=f"the task is {row['task_bytes']:,} bytes, more than worker {worker_id} can receive "
                f"({max_bytes:,}): it waits for a worker that takes more",
            )
            return ReadyTask(version_hash, row["task_bytes"])
    return None


def _task_input(db: Db, node: Row) -> str:
    """`{"input": …, "deps": {…}}`, put together from texts that were checked when they were stored."""
    dependencies: list[str] = json.loads(node["dependencies"])
    deps = ""
    if dependencies:
        outputs = {
            row["node_id"]: row["output_json"]
            for row in db.all("dependency_outputs", execution_id=node["execution_id"])
        }
        deps = ",".join(f"{json.dumps(name)}:{outputs[name]}" for name in dependencies)
    return f'{{"input":{node["input_json"]},"deps":{{{deps}}}}}'


def _reported_attempt(db: Db, task_id: str) -> Row:
    check_id(task_id, "task_id")
    row = db.one("attempt", task_id=task_id)
    if row is None:
        raise TaskNotFound(task_id)
    return row


def _check_may_report(row: Row, task_id: str) -> None:
    """Fencing: only the newest attempt at an unfinished node may report, and only once."""
    what = f"attempt {row['attempt']} at node {row['node_id']!r} of execution {row['execution_id']}"
    if row["execution_status"] != ExecutionStatus.RUNNING:
        raise StaleTask(f"{what}: the execution is {row['execution_status']}, the report comes too late")
    if row["outcome"] in (Outcome.COMPLETED, Outcome.FAILED):
        raise StaleTask(f"{what} was already reported as {row['outcome']}, with other contents")
    if row["attempt"] != row["newest_attempt"]:
        raise StaleTask(
            f"{what} is over ({row['outcome']}): attempt {row['newest_attempt']} was handed out since, "
            f"and only that one may report"
        )


def complete_task(db: Db, task_id: str, output_json: str) -> Changed:
    """Record a node's result, schedule what follows from it, and end the execution if that was all.

    The same report sent again changes nothing. Raises TaskNotFound, InvalidRequest for an output that isn't JSON,
    StaleTask if the attempt may not report this.
    """
    jsontext.parse(output_json, "output_json")
    row = _reported_attempt(db, task_id)
    execution_id, node_id = row["execution_id"], row["node_id"]
    if row["outcome"] == Outcome.COMPLETED:
        recorded = db.one("node_output", execution_id=execution_id, node_id=node_id)
        if recorded is not None and jsontext.same(recorded["output_json"], output_json):
            return Changed()
    _check_may_report(row, task_id)
    db.run("record_output", execution_id=execution_id, node_id=node_id, output_json=output_json, attempt=row["attempt"])
    db.run("end_attempt", task_id=task_id, outcome=Outcome.COMPLETED.value, error="", now=db.now_ms)
    changes = _Changes()
    _advance(db, row, changes)
    return changes.freeze()


def _advance(db: Db, row: Row, changes: _Changes) -> None:
    """Schedule the nodes that became ready, or end the execution."""
    execution_id = row["execution_id"]
    if row["unrecorded"] == 1:  # counted before this result was recorded
        changes.ended.append(_end_execution(db, execution_id, ExecutionStatus.COMPLETED, ""))
        return
    nodes = db.all("node_states", execution_id=execution_id)
    dependencies: dict[str, list[str]] = {node["node_id"]: json.loads(node["dependencies"]) for node in nodes}
    status = {node["node_id"]: NodeStatus(node["status"]) for node in nodes}
    ready = scheduling.ready_nodes(dependencies, status)
    if not ready:
        return
    sizes = {part["node_id"]: int(part["bytes"]) for part in db.all("input_sizes", execution_id=execution_id)}
    for node_id in ready:
        parts = ("", *dependencies[node_id])
        task_bytes = _TASK_FRAME_BYTES + sum(sizes[part] + len(json.dumps(part)) + 2 for part in parts)
        db.run("make_ready", execution_id=execution_id, node_id=node_id, task_bytes=task_bytes, now=db.now_ms)
        changes.ready.append(ReadyTask(row["version_hash"], task_bytes))


def fail_task(db: Db, task_id: str, error: str, final: bool) -> Changed:
    """Record a failed attempt; the node is tried again later, or fails for good with its execution.

    The same report sent again changes nothing. Raises TaskNotFound, StaleTask if the attempt may not report this.
    """
    row = _reported_attempt(db, task_id)
    error = _shortened(error) or "the worker gave no reason"
    if row["outcome"] == Outcome.FAILED and row["error"] == error:
        return Changed()
    _check_may_report(row, task_id)
    db.run("end_attempt", task_id=task_id, outcome=Outcome.FAILED.value, error=error, now=db.now_ms)
    # A lost attempt that reports after all is a failed one, not both.
    lost = -1 if row["outcome"] in (Outcome.LOST, Outcome.EXPIRED) else 0
    counts = {"failed": 1, "lost": lost}
    failed_attempts = row["failed_attempts"] + 1
    delay_ms = None if final else scheduling.retry_delay_ms(failed_attempts)
    changes = _Changes()
    if delay_ms is None:
        reason = error if final else f"{error} (attempt {failed_attempts} of {scheduling.MAX_FAILED_ATTEMPTS})"
        _fail_node(db, row, reason, counts, changes)
    else:
        changes.retry_ms = db.now_ms + delay_ms
        db.run(
            "retry_node",
            execution_id=row["execution_id"],
            node_id=row["node_id"],
            ready_ms=changes.retry_ms,
            attempt=row["attempt"],
            **counts,
        )
    return changes.freeze()


def _fail_node(db: Db, row: Row, reason: str, counts: dict[str, int], changes: _Changes) -> None:
    execution_id, node_id = row["execution_id"], row["node_id"]
    db.run("fail_node", execution_id=execution_id, node_id=node_id, error=reason, **counts)
    changes.ended.append(_end_execution(db, execution_id, ExecutionStatus.FAILED, f"{node_id}: {reason}"))


def _shortened(error: str) -> str:
    if len(error) <= MAX_ERROR_CHARACTERS:
        return error
    return f"{error[:MAX_ERROR_CHARACTERS]} [cut: {MAX_ERROR_CHARACTERS:,} of {len(error):,} characters]"


def release(db: Db, task_id: str, reason: str) -> Changed:
    """Take back a task that never reached its worker; this counts for nothing."""
    row = db.one("attempt", task_id=task_id)
    if row is None or row["outcome"] != Outcome.RUNNING:
        return Changed()
    db.run("end_attempt", task_id=task_id, outcome=Outcome.INTERRUPTED.value, error=reason, now=db.now_ms)
    node = {"execution_id": row["execution_id"], "node_id": row["node_id"]}
    db.run("retry_node", **node, ready_ms=db.now_ms, attempt=row["attempt"], failed=0, lost=0)
    # Its size was checked when it was handed out; whoever is woken is offered it by size again.
    return Changed(ready=(ReadyTask(row["version_hash"], 0),))


# ---- Leases ----------------------------------------------------------------------------------------------------------


def renew(db: Db, worker_id: str, task_ids: tuple[str, ...], lease_ms: int) -> None:
    """Extend the leases of what a worker says that it holds."""
    for task_id in task_ids:
        db.run("renew_lease", task_id=task_id, worker_id=worker_id, lease_expires_ms=db.now_ms + lease_ms)


def disconnect(db: Db, worker_id: str, grace_ms: int) -> None:
    """A worker's stream broke: what it holds is lost unless it comes back within the grace."""
    db.run("shorten_leases", worker_id=worker_id, lease_expires_ms=db.now_ms + grace_ms)


def restart(db: Db, grace_ms: int, unstreamed_ms: int) -> None:
    """The server starts: workers get time to come back to what they hold."""
    db.run("restart_leases", streamed=1, lease_expires_ms=db.now_ms + grace_ms)
    db.run("restart_leases", streamed=0, lease_expires_ms=db.now_ms + unstreamed_ms)


def sweep(db: Db, since_ms: int) -> Swept:
    """End the attempts whose lease has run out, and find the retries that became due after `since_ms`."""
    # Before the expired ones, which become due at this very moment and announce themselves.
    retries = db.all("due_tasks", since=since_ms, now=db.now_ms)
    changes = _Changes([ReadyTask(row["version_hash"], row["task_bytes"]) for row in retries])
    for row in db.all("expired_attempts", now=db.now_ms):
        _expire(db, row, changes)
    due = [
        row["due"]
        for row in (db.one("next_lease"), db.one("next_retry", now=db.now_ms))
        if row is not None and row["due"] is not None
    ]
    return Swept(changes.freeze(), min(due, default=None))


def _expire(db: Db, row: Row, changes: _Changes) -> None:
    outcome = Outcome(row["lease_loss"])
    worker_id = row["worker_id"]
    reason = {
        Outcome.LOST: f"worker {worker_id} disconnected and did not come back",
        Outcome.EXPIRED: f"worker {worker_id} gave no sign of life for longer than its lease",
        Outcome.INTERRUPTED: f"the server was restarted and worker {worker_id} did not come back",
    }[outcome]
    db.run("end_attempt", task_id=row["task_id"], outcome=outcome.value, error=reason, now=db.now_ms)
    lost = 0 if outcome is Outcome.INTERRUPTED else 1
    counts = {"failed": 0, "lost": lost}
    if row["lost_attempts"] + lost >= scheduling.MAX_LOST_ATTEMPTS:
        last = f"{row['lost_attempts'] + lost} attempts were lost, the last because {reason}"
        _fail_node(db, row, f"{last}; the task may be what kills its workers", counts, changes)
        return
    node = {"execution_id": row["execution_id"], "node_id": row["node_id"]}
    db.run("retry_node", **node, ready_ms=db.now_ms, attempt=row["attempt"], **counts)
    changes.ready.append(ReadyTask(row["version_hash"], row["task_bytes"]))

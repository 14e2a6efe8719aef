"""Transitions of nodes that wait for a time, a person or an event: approve, reject, send an event, end due waits.

Each function runs inside one transaction, and is the same for every database. If the state doesn't allow a change, the
function raises an error of `nexum_engine.errors`, and its changes are rolled back.
"""

from __future__ import annotations

import math
from itertools import groupby

from nexum_engine import jsontext
from nexum_engine.errors import (
    Conflict,
    IdempotencyConflict,
    InvalidRequest,
    NotFound,
    TooLarge,
)
from nexum_engine.records import ExecutionStatus, NodeStatus, NodeType, PendingApproval
from nexum_engine.store import flow
from nexum_engine.store.db import Db, Row
from nexum_engine.store.definitions import definition_of
from nexum_engine.store.reading import MAX_INLINE_BYTES, find_execution
from nexum_engine.store.results import Changed, Changes
from nexum_engine.workflow import check_id

MAX_ENDED_WAITS = 200
"""How many waits one transaction ends. If more are due, the next transaction follows at once."""
MAX_APPROVALS = 1000
"""The largest number of pending approvals in one answer."""
MAX_COMMENT_CHARACTERS = 4000
MAX_EVENTS = 1000
"""The largest number of events that one execution keeps."""


def pending_approvals(db: Db) -> list[PendingApproval]:
    """Return the nodes that wait for a person, the longest waiting first."""
    return [
        PendingApproval(row["execution_id"], row["node_id"], row["workflow_id"], row["started_ms"])
        for row in db.all("pending_approvals", limit=MAX_APPROVALS)
    ]


def approve(db: Db, execution_id: str, node_id: str, approver: str, comment: str) -> Changed:
    """Complete a HUMAN_APPROVAL node.

    Raises NotFound if there is no such node, and Conflict if it does not wait for a decision now.
    """
    node, changes = _undecided(db, execution_id, node_id, approver, comment), Changes()
    decision = {"approved": True, "approver": approver, "comment": comment, "decided_ms": db.now_ms}
    output = jsontext.dump(decision, "the decision")
    flow.complete_waiting(db, node, output, changes)
    return changes.freeze()


def reject(db: Db, execution_id: str, node_id: str, approver: str, reason: str) -> Changed:
    """Fail a HUMAN_APPROVAL node and its execution. Raises NotFound and Conflict, as `approve` does."""
    node, changes = _undecided(db, execution_id, node_id, approver, reason), Changes()
    by = f" by {approver}" if approver else ""
    flow.fail_waiting(db, node, f"rejected{by}: {reason}" if reason else f"rejected{by}", changes)
    return changes.freeze()


def _undecided(db: Db, execution_id: str, node_id: str, approver: str, comment: str) -> Row:
    """Return the node, if it waits for a person's decision."""
    check_id(node_id, "node_id")
    if approver:
        check_id(approver, "approver")
    if len(comment) > MAX_COMMENT_CHARACTERS:
        raise TooLarge(f"the comment has {len(comment):,} characters; the limit is {MAX_COMMENT_CHARACTERS:,}")
    check_id(execution_id, "execution_id")
    execution = find_execution(db, execution_id, lock=True)
    node = db.one("node_by_name", execution=execution["sequence"], node_id=node_id)
    if node is None:
        raise NotFound(f"execution {execution_id} has no node {node_id!r}")
    what = f"node {node_id!r} of execution {execution_id}"
    if node["node_type"] != NodeType.HUMAN_APPROVAL:
        raise NotFound(f"{what} is of type {node['node_type']}: it does not wait for an approval")
    if node["status"] == NodeStatus.WAITING:
        return node
    if node["status"] == NodeStatus.PENDING:
        raise Conflict(f"{what} can't be decided yet: it waits for other nodes")
    ended = "" if execution["status"] == ExecutionStatus.RUNNING else f", and its execution is {execution['status']}"
    raise Conflict(f"{what} can't be decided any more: it is {node['status']}{ended}")


def send_event(db: Db, execution_id: str, name: str, payload_json: str, idempotency_key: str) -> Changed:
    """Complete the first node that waits for the event, or keep the event until a node waits for it.

    A second event with the same key changes nothing. Raises ExecutionNotFound, NotFound if the workflow has no EVENT
    node for the name, IdempotencyConflict if the key belongs to another event, and Conflict if the execution has ended.
    """
    check_id(name, "name")
    payload_json = payload_json or "null"
    jsontext.parse(payload_json, "payload_json")
    check_id(execution_id, "execution_id")
    row = find_execution(db, execution_id, lock=True)
    execution = row["sequence"]
    if idempotency_key:
        check_id(idempotency_key, "idempotency_key")
        sent = db.one("event_of_key", execution=execution, idempotency_key=idempotency_key)
        if sent is not None:
            if sent["name"] != name or not jsontext.same(sent["payload_json"], payload_json):
                raise IdempotencyConflict(
                    f"idempotency key {idempotency_key!r} belongs to another event of execution {execution_id}: use "
                    "another key for another event"
                )
            return Changed()
    if row["status"] != ExecutionStatus.RUNNING:
        raise Conflict(f"execution {execution_id} is {row['status']}: it waits for no event any more")
    definitions = definition_of(db, row["workflow_id"], row["version_hash"])
    if row["child_index"] is not None:
        raise NotFound(f"execution {execution_id} is an item of a MAP node: it waits for no event")
    if name not in {node.event for node in definitions.values()}:
        raise NotFound(f"workflow {row['workflow_id']!r} has no EVENT node that waits for {name!r}")
    kept = db.one("kept_event_bytes", execution=execution)
    assert kept is not None
    size = jsontext.size_of(payload_json)
    if size > MAX_INLINE_BYTES and not flow.outputs_fit(db, execution_id, kept["bytes"] + size):
        raise TooLarge(
            f"with this event, the events and outputs of execution {execution_id} would be over the limit of "
            f"{flow.MAX_OUTPUT_BYTES:,} bytes"
        )
    added = db.one(
        "add_event",
        execution=execution,
        name=name,
        idempotency_key=idempotency_key,
        payload_json=payload_json,
        now=db.now_ms,
    )
    assert added is not None
    if added["number"] > MAX_EVENTS:
        raise InvalidRequest(f"execution {execution_id} has already had {MAX_EVENTS:,} events, which is the limit")
    changes = Changes()
    waiting = db.one("node_of_event", execution=execution, name=name)
    if waiting is not None and flow.use_event(db, waiting["node"], name):
        flow.advance(db, execution, row["workflow_id"], row["version_hash"], changes)
    return changes.freeze()


def end_waits(db: Db, changes: Changes) -> None:
    """Complete the TIMER nodes that are due, and end the EVENT nodes whose event did not come in time."""
    due = db.all("due_waits", now=db.now_ms, limit=MAX_ENDED_WAITS)
    # If several waits of an execution end at the same time, advance the execution once: `advance` reads all its nodes.
    for _, together in groupby(due, key=lambda node: (node["due_ms"], node["execution"])):
        nodes = list(together)
        db.lock(nodes[0]["execution"])
        ended = [node for node in nodes if _end_wait(db, node, changes)]
        if ended:
            one = ended[0]
            flow.advance(db, one["execution"], one["workflow_id"], one["version_hash"], changes)


def _end_wait(db: Db, node: Row, changes: Changes) -> bool:
    """End the wait of a node. Return True if its execution must be advanced.

    Nothing happens if the node no longer waits: an earlier wait that ended in this transaction may have made the
    node's execution fail, or another server may have ended the wait.
    """
    if db.one("due_wait", node=node["node"], now=db.now_ms) is None:
        return False
    definition = definition_of(db, node["workflow_id"], node["version_hash"])[node["node_id"]]
    if definition.node_type is NodeType.TIMER:
        output = flow.timer_output(db, definition)
        return db.changes("complete_waiting", node=node["node"], output_json=output, now=db.now_ms) > 0
    reason = f"no event {definition.event!r} came within {definition.timeout_seconds or math.inf:g} s"
    if definition.on_timeout:
        return db.changes("time_out", node=node["node"], error=reason, now=db.now_ms) > 0
    flow.fail_waiting(db, node, reason, changes)
    return False

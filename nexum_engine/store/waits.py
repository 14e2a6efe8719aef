"""Transitions of nodes that wait for a time, a person or an event.

These transitions approve or reject a node, resolve an unknown effect, send an event, and end the waits that are due.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby

from nexum_engine import jsontext
from nexum_engine.errors import Conflict, IdempotencyConflict, InvalidRequest, NotFound, TooLarge
from nexum_engine.records import ExecutionStatus, NodeStatus, NodeType, Outcome, PendingApproval, UnknownNode
from nexum_engine.store import flow
from nexum_engine.store.db import Db, Row, row_of
from nexum_engine.store.definitions import definition_of
from nexum_engine.store.ids import new_task_id
from nexum_engine.store.reading import MAX_INLINE_BYTES, find_execution
from nexum_engine.store.results import Changes, ReadyTask
from nexum_engine.workflow import check_id

MAX_ENDED_WAITS = 200
"""How many waits one transaction ends. If more are due, the next transaction follows at once."""
MAX_WAITING = 1000
"""The largest number of nodes in one list of the nodes that wait for a person."""
MAX_SHOWN_INPUT = 16 * 1024
"""The largest input, in bytes, that a list of waiting nodes shows. Larger inputs are left out."""
MAX_SHOWN_INPUTS = 2 * 1024 * 1024
"""The largest total size, in bytes, of the inputs in one list of waiting nodes."""
MAX_COMMENT_CHARACTERS = 4000
NOT_DONE = "the effect has not happened"
"""The error that is stored with a person's decision to hand a node out again."""
MAX_EVENTS = 1000
"""The largest number of events that one execution keeps."""


def pending_approvals(db: Db) -> list[PendingApproval]:
    """Return the nodes that wait for a person's approval, the longest waiting first."""
    rows = db.all("pending_approvals", limit=MAX_WAITING, max_input=MAX_SHOWN_INPUT)
    return [
        PendingApproval(row["execution_id"], row["node_id"], row["workflow_id"], row["started_ms"], input_json)
        for row, input_json in _with_inputs(rows)
    ]


def unknown_nodes(db: Db) -> list[UnknownNode]:
    """Return the nodes whose effect is unknown, the longest waiting first."""
    rows = db.all("unknown_nodes", limit=MAX_WAITING, max_input=MAX_SHOWN_INPUT)
    return [UnknownNode(**{**row, "input_json": input_json}) for row, input_json in _with_inputs(rows)]


def _with_inputs(rows: list[Row]) -> Iterator[tuple[Row, str]]:
    """Yield each row with its input, or with "" if the input would make the list too large."""
    left = MAX_SHOWN_INPUTS
    for row in rows:
        size = jsontext.size_of(row["input_json"])
        is_shown = size <= left
        left -= size if is_shown else 0
        yield row, row["input_json"] if is_shown else ""


def approve(db: Db, execution_id: str, node_id: str, approver: str, comment: str, answer_json: str = "") -> Changes:
    """Complete a HUMAN_APPROVAL node. If `answer_json` is given, it becomes the field `answer` of the node's output.

    Raises NotFound if there is no such node, Conflict if it does not wait for a decision now, InvalidRequest for an
    answer that isn't JSON, and TooLarge for a long comment or output.
    """
    node, changes = _undecided(db, execution_id, node_id, approver, comment), Changes()
    decision = {"approved": True, "approver": approver, "comment": comment, "decided_ms": db.now_ms}
    if answer_json:
        decision["answer"] = jsontext.parse(answer_json, "answer_json")
    output = jsontext.dump(decision, "the decision")
    jsontext.parse(output, "the decision with its answer")  # it is nested one level more deeply than the answer
    flow.check_outputs_fit(db, execution_id, output)
    _note_decision(db, node, approver, Outcome.COMPLETED, "")
    flow.complete_waiting(db, node, output, changes)
    return changes


def reject(db: Db, execution_id: str, node_id: str, approver: str, reason: str) -> Changes:
    """Fail a HUMAN_APPROVAL node and its execution. Raises NotFound and Conflict, as `approve` does."""
    node, changes = _undecided(db, execution_id, node_id, approver, reason), Changes()
    by = f" by {approver}" if approver else ""
    _note_decision(db, node, approver, Outcome.FAILED, reason)
    flow.fail_waiting(db, node, f"rejected{by}: {reason}" if reason else f"rejected{by}", changes)
    return changes


def _undecided(db: Db, execution_id: str, node_id: str, approver: str, comment: str) -> Row:
    """Return the node, if it waits for a person's decision."""
    node, execution = _node_of(db, execution_id, node_id, approver, comment)
    what = f"node {node_id!r} of execution {execution_id}"
    if node["node_type"] != NodeType.HUMAN_APPROVAL:
        raise NotFound(f"{what} is of type {node['node_type']}: it does not wait for an approval")
    if db.one("due_wait", node=node["node"], now=db.now_ms) is not None:
        raise Conflict(f"{what} can't be decided any more: its time is over")  # no server has ended it yet
    if node["status"] == NodeStatus.WAITING:
        return node
    if node["status"] == NodeStatus.PENDING:
        raise Conflict(f"{what} can't be decided yet: it waits for other nodes")
    ended = "" if execution["status"] == ExecutionStatus.RUNNING else f", and its execution is {execution['status']}"
    raise Conflict(f"{what} can't be decided any more: it is {node['status']}{ended}")


def _node_of(db: Db, execution_id: str, node_id: str, by: str, comment: str) -> tuple[Row, Row]:
    """Check the names and the comment of a person's decision; return the node to decide about, and its execution."""
    check_id(node_id, "node_id")
    if by:
        check_id(by, "the name of the person who decides")
    if len(comment) > MAX_COMMENT_CHARACTERS:
        raise TooLarge(f"the comment has {len(comment):,} characters; the limit is {MAX_COMMENT_CHARACTERS:,}")
    check_id(execution_id, "execution_id")
    execution = find_execution(db, execution_id, lock=True)
    node = db.one("node_by_name", execution=execution["sequence"], node_id=node_id)
    if node is None:
        raise NotFound(f"execution {execution_id} has no node {node_id!r}")
    return node, execution


def _note_decision(db: Db, node: Row, by: str, outcome: Outcome, reason: str) -> None:
    task_id = new_task_id(node["node"])
    db.run(
        "add_decision", node=node["node"], task_id=task_id, by=by, outcome=outcome.value, error=reason, now=db.now_ms
    )


def resolve(
    db: Db,
    execution_id: str,
    node_id: str,
    by: str,
    *,
    output_json: str | None = None,
    not_done: bool = False,
    failed: str = "",
    attempt: int = 0,
) -> Changes:
    """Record a person's decision about a node whose effect is unknown.

    With `output_json`, the effect has happened, and the node completes with this result. With `not_done`, the effect
    has not happened, and the node is handed out again. Otherwise the node and its execution fail, for the reason
    `failed`. `attempt` is the attempt that the person has looked at; it may be 0 if it is the first one in doubt.

    Raises NotFound if there is no such node, Conflict if its effect is not unknown now or if another attempt is in
    doubt, InvalidRequest for a result that isn't JSON or an empty reason, and TooLarge for a long reason or result.
    """
    if output_json is not None:
        jsontext.parse(output_json, "output_json")
    elif not not_done and not failed:
        raise InvalidRequest("failed needs a reason: say why the node fails")
    node = _in_doubt(db, execution_id, node_id, by, failed, attempt)
    changes, number = Changes(), node["node"]
    if output_json is not None:
        flow.check_outputs_fit(db, execution_id, output_json)
        outcome, reason = Outcome.COMPLETED, ""
    else:
        outcome, reason = Outcome.FAILED, NOT_DONE if not_done else failed
    db.run("keep_attempt", node=number)
    db.run(
        "add_resolution",
        node=number,
        task_id=new_task_id(number),
        by=by,
        outcome=outcome.value,
        error=reason,
        now=db.now_ms,
    )
    if output_json is not None:
        flow.complete_waiting(db, node, output_json, changes)
    elif not_done:
        db.run("hand_out_again", node=number, due_ms=db.now_ms)
        if not node["owned"]:
            changes.ready.append(ReadyTask(node["version_hash"], node["task_bytes"]))
    else:
        flow.fail_waiting(db, node, reason, changes)
    return changes


def _in_doubt(db: Db, execution_id: str, node_id: str, by: str, comment: str, attempt: int) -> Row:
    """Return the node, if its effect is unknown and `attempt` is the one in doubt (or 0, as `resolve` allows)."""
    node, _ = _node_of(db, execution_id, node_id, by, comment)
    if node["status"] != NodeStatus.WAITING or node["outcome"] != Outcome.UNKNOWN:
        raise Conflict(
            f"node {node_id!r} of execution {execution_id} can't be resolved: it is {node['status']}, and waits for no "
            "decision about an unknown effect"
        )
    if attempt != node["attempt"] and (attempt or node["is_again"]):
        # Nobody may have looked at the attempt that is in doubt now.
        about = f"attempt {attempt} is over" if attempt else "a person has decided about an earlier attempt"
        raise Conflict(
            f"node {node_id!r} of execution {execution_id} is not resolved: {about}, and now attempt "
            f"{node['attempt']} is in doubt. Find out whether that attempt had its effect, then name it: "
            f"--attempt {node['attempt']}"
        )
    return node


def send_event(db: Db, execution_id: str, name: str, payload_json: str, idempotency_key: str) -> Changes:
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
            return Changes()
    if row["status"] != ExecutionStatus.RUNNING:
        raise Conflict(f"execution {execution_id} is {row['status']}: it waits for no event any more")
    definitions = definition_of(db, row["workflow_id"], row["version_hash"])
    if row["child_index"] is not None:
        raise NotFound(f"execution {execution_id} is an item of a MAP node: it waits for no event")
    if name not in {node.event for node in definitions.values()}:
        raise NotFound(f"workflow {row['workflow_id']!r} has no EVENT node that waits for {name!r}")
    kept = row_of(db, "kept_event_bytes", execution=execution)["bytes"]
    size = jsontext.size_of(payload_json)
    if size > MAX_INLINE_BYTES and not flow.outputs_fit(db, execution_id, kept + size):
        raise TooLarge(
            f"with this event, the events and outputs of execution {execution_id} would be over the limit of "
            f"{flow.MAX_OUTPUT_BYTES:,} bytes"
        )
    added = row_of(
        db,
        "add_event",
        execution=execution,
        name=name,
        idempotency_key=idempotency_key,
        payload_json=payload_json,
        now=db.now_ms,
    )
    if added["number"] > MAX_EVENTS:
        raise InvalidRequest(f"execution {execution_id} has already had {MAX_EVENTS:,} events, which is the limit")
    changes = Changes()
    waiting = db.one("node_of_event", execution=execution, name=name)
    if waiting is not None and flow.use_event(db, waiting["node"], name):
        flow.advance(db, execution, row["workflow_id"], row["version_hash"], changes)
    return changes


def end_waits(db: Db, changes: Changes) -> None:
    """Complete the TIMER nodes that are due, and end the nodes whose event or decision did not come in time."""
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
    within = f"within {definition.timeout_seconds or math.inf:g} s"
    if definition.node_type is NodeType.HUMAN_APPROVAL:
        flow.fail_waiting(db, node, f"not decided {within}", changes)
        return False
    reason = f"no event {definition.event!r} came {within}"
    if definition.on_timeout:
        return db.changes("time_out", node=node["node"], error=reason, now=db.now_ms) > 0
    flow.fail_waiting(db, node, reason, changes)
    return False

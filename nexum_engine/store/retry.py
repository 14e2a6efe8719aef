"""The transition that continues a FAILED execution."""

from __future__ import annotations

from nexum_engine.errors import Conflict
from nexum_engine.records import ExecutionStatus
from nexum_engine.store.db import Db, Row, row_of
from nexum_engine.store.flow import advance
from nexum_engine.store.ids import node_number
from nexum_engine.store.reading import find_execution
from nexum_engine.store.results import Changes, ReadyTask


def retry_execution(db: Db, execution_id: str) -> Changes:
    """Continue a FAILED execution at its failed node, with fresh counts of failures. Recorded results are kept.

    The nodes that the failure had cancelled wait again for their dependencies, and timers begin again. A node that had
    started executions does not start them again: its executions without a result are retried in the same way. Raises
    ExecutionNotFound for an unknown id, and Conflict if the execution has not failed, if its key has a newer execution,
    if it is owned, or if a node of another execution started it.
    """
    row = find_execution(db, execution_id, lock=True)
    if row["status"] != ExecutionStatus.FAILED:
        raise Conflict(f"execution {execution_id} is {row['status']}: only a FAILED one can be retried")
    if (key := row["idempotency_key"]) is not None:
        newest = row_of(db, "execution_of_key", workflow_id=row["workflow_id"], idempotency_key=key)
        if newest["execution_id"] != execution_id:
            # Refuse, even if the newest execution has ended: a start with the key finds only the newest execution, so
            # an older one must not run again.
            next_step = ": retry that one" if newest["status"] == ExecutionStatus.FAILED else ""
            raise Conflict(
                f"execution {execution_id} can't be retried: its key has a newer execution, {newest['execution_id']}, "
                f"which is {newest['status']}{next_step}"
            )
    owned = db.one("owned_node", execution=row["sequence"])
    if owned is not None and owned["owned"]:
        raise Conflict(
            f"execution {execution_id} belongs to the program that started it, and no worker gets it: run that program "
            "again"
        )
    if row["parent_execution_id"]:
        raise Conflict(
            f"execution {execution_id} was started by node {row['parent_node_id']!r} of another execution: retry "
            f"execution {row['parent_execution_id']}"
        )
    changes = Changes()
    _reopen(db, row, changes)
    return changes


def _reopen(db: Db, execution: Row, changes: Changes) -> None:
    """Make an execution run again, and with it the executions without a result that its nodes started."""
    number, version_hash = execution["sequence"], execution["version_hash"]
    db.run("reopen_execution", execution=number)
    if execution["child_index"] is not None:
        item = row_of(db, "reopen_item", node=node_number(number, 0), now=db.now_ms)
        changes.ready.append(ReadyTask(version_hash, item["task_bytes"]))
        return
    db.run("reopen_waiting", execution=number)
    db.run("reopen_nodes", execution=number)
    repeating = db.one("repeating_parent", execution=number)
    if repeating is not None:
        raise Conflict(
            f"execution {execution['execution_id']} can't be retried: node {repeating['node_id']!r} failed after its "
            "executions had completed, because their results are too large"
        )
    for child in db.all("children_without_result", execution=number):
        _reopen(db, child, changes)
    advance(db, number, execution["workflow_id"], version_hash, changes)
